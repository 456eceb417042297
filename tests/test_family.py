"""The published systems on disk: where files are looked for, which weights are taken, what is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor

from semanticodec import family
from semanticodec.config import HiFiGANConfig, LatentConfig, UNetConfig, VAEConfig
from semanticodec.errors import CheckpointError, LicenceWarning
from semanticodec.family import expected, load_latent, locate, models_folder, present
from semanticodec.latent import LatentDiffusion
from semanticodec.schedule import make_schedule
from semanticodec.systems import SYSTEMS, SystemConfig

UNET = UNetConfig(base=8, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4)
TINY = LatentConfig(
    unet=UNET,
    vae=VAEConfig(base=4, mults=(1, 2), res_blocks=1, groups=2),
    vocoder=HiFiGANConfig(base=8, rates=(5, 32), kernels=(16, 32), stack_kernels=(3,), dilations=(1,)),
    prediction="eps",
)


def shrunk(name: str) -> SystemConfig:
    row = SYSTEMS[name]
    latent = dataclasses.replace(TINY, schedule=row.latent.schedule, prediction=row.latent.prediction)
    return dataclasses.replace(row, latent=latent)


def checkpoint(row: SystemConfig) -> dict[str, Tensor]:
    """Return a whole file in the published layout: raw weights of seed 0, averaged ones of seed 1, VAE copy of 2."""
    state: dict[str, Tensor] = {"logvar": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9)}
    alpha_bar = torch.tensor(make_schedule(row.latent.schedule).alpha_bar)
    state |= {"alphas_cumprod": alpha_bar, "betas": torch.zeros(1000), "scale_factor": torch.tensor(0.7)}
    for seed in range(3):
        for name, tensor in weights(seed, row).items():
            part, rest = name.split(".", 1) if "." in name else (name, "")
            if part == "unet" and seed == 0:
                state[f"model.diffusion_model.{rest}"] = tensor
            if part == "unet" and seed == 1:
                state[f"model_ema.diffusion_model{rest.replace('.', '')}"] = tensor
            if part in ("vae", "vocoder") and seed == 0:
                state[f"first_stage_model.{name.removeprefix('vae.')}"] = tensor
            if part in ("vae", "vocoder") and seed == 2 and row.prompts is None:
                state[f"cond_stage_models.0.vae.{name.removeprefix('vae.')}"] = tensor
    if row.prompts is not None:
        state["cond_stage_model.model.text_branch.pooler.dense.bias"] = torch.zeros(2)
    return state


def weights(seed: int, row: SystemConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        wanted = LatentDiffusion(row.latent, vae_encoder=True).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in wanted.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SEMANTICODEC_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    family.remind.cache_clear()
    yield tmp_path / "models"
    family.remind.cache_clear()


def write(row: SystemConfig, path: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    state = checkpoint(row)
    if change is not None:
        change(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


class TestLocate:
    def test_by_folder_file_or_name(self, tmp_path: Path, home: Path) -> None:
        row = SYSTEMS["audioldm-s-full-v2"]
        assert models_folder() == home
        assert expected(row) == home / "audioldm-s-full-v2" / "audioldm-full-s-v2.ckpt"
        assert present(row) is None
        for path in (tmp_path / "else" / row.weights.file, expected(row)):
            path.parent.mkdir(parents=True)
            path.touch()
        assert locate(row, tmp_path / "else") == locate(row, tmp_path / "else" / row.weights.file)
        assert locate(row) == present(row) == expected(row)

    def test_in_the_hubs_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, ...]] = []
        monkeypatch.setattr(
            huggingface_hub, "try_to_load_from_cache", lambda *where: asked.append(where) or "/cache/file"
        )
        assert locate(SYSTEMS["audiosr-speech"]) == Path("/cache/file")
        assert asked == [("haoheliu/audiosr_speech", "pytorch_model.bin")]
        assert present(SYSTEMS["musicldm"]) is None

    def test_downloads_what_only_the_hub_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: f"/down/{repo}/{file}")
        assert locate(SYSTEMS["audioldm2-full"]) == Path("/down/haoheliu/audioldm2-full/audioldm2-full.pth")

        def broken(_repo: str, _file: str) -> str:
            raise OSError("no network")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
        where = re.escape(str(expected(SYSTEMS["audioldm2-full"])))
        with pytest.raises(CheckpointError, match=rf"OSError: no network.*fetch audioldm2-full\.pth.*{where}"):
            locate(SYSTEMS["audioldm2-full"])

    def test_says_what_is_missing_and_where_it_is(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"audioldm-m-full\.ckpt from https://zenodo\.org/records/7813012"):
            locate(SYSTEMS["audioldm-m-full"])
        with pytest.raises(CheckpointError, match=r"musicldm\.ckpt is missing; it is musicldm\.ckpt of https://github"):
            locate(SYSTEMS["musicldm"], tmp_path)


@pytest.mark.filterwarnings("ignore::semanticodec.errors.LicenceWarning")
class TestLoad:
    @pytest.mark.parametrize(
        ("name", "which", "seed"),
        [
            ("audioldm-s-full", "reference", 1),
            ("audioldm-s-full", "raw", 0),
            ("audiosr-basic", "reference", 0),
            ("audiosr-basic", "average", 1),
        ],
    )
    def test_takes_the_weights_that_were_asked_for(
        self, tmp_path: Path, name: str, which: family.Which, seed: int
    ) -> None:
        row = shrunk(name)
        latent = load_latent(row, write(row, tmp_path / "file"), which=which, dtype=torch.float64)
        assert not latent.training
        unet, first = weights(seed, row), weights(0, row)
        encoder = weights(2, row) if name.startswith("audiosr") else first
        for key, tensor in latent.state_dict().items():
            wanted = {"unet": unet, "vae": encoder if ".encoder." in key or "quant_conv" in key else first}
            source = wanted.get(key.split(".")[0], first)
            if "post_quant" in key:
                source = first
            if key != "scale":
                assert torch.equal(tensor, source[key].double()), key
        assert latent.scale == pytest.approx(0.7)
        assert not any(p.requires_grad for p in latent.parameters())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.update({"first_stage_model.extra": torch.zeros(1)}),
                r"without a place.*first_stage_model\.ex",
            ),
            (lambda s: s.pop("scale_factor"), r"does not fill: latent\.scale"),
            (lambda s: s.update(scale_factor=torch.ones(2)), r"latent\.scale \(file \(2,\), model \(\)\)"),
            (lambda s: s.pop("model.diffusion_model.out.2.bias"), r"does not fill: latent\.unet\.out\.2\.bias"),
            (lambda s: s.update(alphas_cumprod=torch.ones(1000)), "alphas_cumprod of audiosr-basic.* is another one"),
            (lambda s: s.pop("alphas_cumprod"), "alphas_cumprod of audiosr-basic.* is missing"),
        ],
    )
    def test_refuses_what_does_not_fit(
        self, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        row = shrunk("audiosr-basic")
        with pytest.raises(CheckpointError, match=message):
            load_latent(row, write(row, tmp_path / "file", change))

    def test_refuses_files_of_other_kinds(self, tmp_path: Path) -> None:
        row, path = shrunk("audiosr-basic"), tmp_path / "file"
        torch.save(checkpoint(row), path)
        with pytest.raises(CheckpointError, match="no entry 'state_dict'"):
            load_latent(row, path)
        torch.save({"state_dict": {"x": "text"}}, path)
        with pytest.raises(CheckpointError, match="plain dictionary of tensors"):
            load_latent(row, path)
        path.write_bytes(b"PK nothing")
        with pytest.raises(CheckpointError, match="not a readable checkpoint: it is damaged, or holds more"):
            load_latent(row, path)

    def test_reads_files_of_old_versions(self, tmp_path: Path) -> None:
        row, path = shrunk("audiosr-basic"), tmp_path / "file"
        torch.save({"state_dict": checkpoint(row)}, path, _use_new_zipfile_serialization=False)
        assert load_latent(row, path).scale == pytest.approx(0.7)


def test_says_once_that_weights_are_not_for_commerce(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    row = shrunk("musicldm")
    path = write(row, tmp_path / "file")
    with pytest.warns(LicenceWarning, match=r"musicldm are licensed CC-BY-NC-SA-4\.0: not for commercial use"):
        load_latent(row, path)
    load_latent(row, path)
    free = shrunk("audiosr-speech")
    load_latent(free, write(free, tmp_path / "free"))
    assert not [w for w in recwarn if issubclass(w.category, LicenceWarning)]


def test_an_encoder_that_is_there_twice_and_differs(tmp_path: Path) -> None:
    row = shrunk("audioldm_16k_crossattn_t5")
    first, second = "cond_stage_models.0.model.", "clap.model."

    def change(state: dict[str, Tensor]) -> None:
        state |= {f"{first}norm.bias": torch.zeros(2), f"{second}norm.bias": torch.ones(2)}

    path = write(row, tmp_path / row.weights.file, change)
    with (
        pytest.warns(LicenceWarning),
        pytest.warns(UserWarning, match=r"holds an encoder twice .* such as clap\.model\.norm\.bias"),
        pytest.raises(CheckpointError, match="do not fit"),
    ):
        family.load_system(row, path)
