"""Locating, checking, naming and filling weights: both layouts, whole and by halves, and all that can be wrong."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from golden import Goldens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from semanticodec import checkpoints, keymap
from semanticodec.checkpoints import convert, load, locate, save, weights_hash
from semanticodec.config import PRESETS, AudioMAEConfig, CodecConfig
from semanticodec.errors import CheckpointError, ConfigError
from semanticodec.model import CodecModel
from semanticodec.nn.audiomae import AudioMAE
from semanticodec.nn.quantize import Codebooks, ResidualEncoder

NAME = "semanticodec-100-4096"
TABLE = "codebook_idx/combine_512_audioset_dominate/codebook_2048_0.npy"


class Latent(nn.Module):
    """Stands for the decoder half: one child per group of published names, and a table that is in no checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.vae = nn.ModuleDict({"decoder": nn.Linear(2, 3), "post_quant_conv": nn.Linear(2, 2)})
        self.vocoder = nn.ModuleDict({"conv_pre": nn.Linear(2, 5)})
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("positions", torch.arange(5.0, device="cpu"), persistent=False)


class Codec(nn.Module):
    def __init__(self, config: CodecConfig, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        self.codebooks = Codebooks(config)
        if encoder:
            self.mae = AudioMAE(config.encoder.mae)
            self.residual = ResidualEncoder(config)
        if decoder:
            self.latent = Latent()


def build(config: CodecConfig, **parts: bool) -> Codec:
    with torch.device("meta"):
        return Codec(config, **parts)


def randomised(config: CodecConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator) for name, x in build(config).state_dict().items()}


def tiny(config: CodecConfig) -> CodecConfig:
    encoder = dataclasses.replace(
        config.encoder,
        mae=AudioMAEConfig(columns=2, dim=8, depth=2, heads=2),
        context=0,
        semantic_size=16,
        acoustic_size=4,
        acoustic_dim=8,
        lstm_layers=2,
        lstm_dim=4,
    )
    return dataclasses.replace(config, encoder=encoder)


PREFIXES = {
    "mae.": "audiomae.model.",
    "residual.lstm.": "encoder.",
    "residual.project.": "encoder_output_linear.",
    "codebooks.acoustic": "quantizer._codebook.embed",
    "latent.unet.": "model.diffusion_model.",
    "latent.vae.": "first_stage_model.",
    "latent.vocoder.": "first_stage_model.vocoder.",
    "latent.scale": "scale_factor",
}


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix:
            renamed[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor[None] if "codebooks" in name else tensor
    return renamed


def unused_tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the published files hold beside the weights that decoding and encoding use."""
    encoder = {
        "audiomae.model.mask_token": torch.zeros(1, 1, 2),
        "audiomae.model.decoder_blocks.0.norm1.weight": torch.zeros(2),
        "audiomae.model.decoder_pos_embed": torch.zeros(1, 2),
        "quantizer._codebook.embed_avg": torch.zeros(1, 4, 8),
        "quantizer._codebook.cluster_size": torch.zeros(1, 4),
        "quantizer._codebook.initted": torch.ones(1),
    }
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    decoder = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        "model_ema.diffusion_model0weight": torch.zeros(4, 3),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2),
        "first_stage_model.quant_conv.bias": torch.zeros(2),
        "alphas_cumprod": torch.from_numpy(np.cumprod(1 - betas)).float(),
        "betas": torch.from_numpy(betas).float(),
        "logvar": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
    }
    return encoder, decoder


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> CodecConfig:
    """The published preset, shrunken."""
    config = tiny(PRESETS[NAME])
    monkeypatch.setitem(PRESETS, NAME, config)
    return config


@pytest.fixture
def state(config: CodecConfig) -> dict[str, Tensor]:
    return randomised(config, 0)


@pytest.fixture
def official(state: dict[str, Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "official"
    (folder / TABLE).parent.mkdir(parents=True)
    np.save(folder / TABLE, state["codebooks.semantic"].numpy())
    halves = (
        published_names({k: v for k, v in state.items() if not k.startswith("latent.")}),
        published_names({k: v for k, v in state.items() if k.startswith("latent.")}),
    )
    for file, half, unused in zip(("encoder.ckpt", "decoder.ckpt"), halves, unused_tensors(), strict=True):
        torch.save(half | unused, folder / file)
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def check_filled(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name].to(dtype)), name


# --- official layout


def test_official_folder_fills_every_tensor(official: Path, state: dict[str, Tensor]) -> None:
    source = locate(official)
    assert source.config.name == NAME
    codec = build(source.config)
    load(codec, source, device="cpu", dtype=torch.float32)
    check_filled(codec, state)
    assert torch.equal(codec.latent.positions, torch.arange(5.0))
    x = torch.randn(1, 3, 16)
    assert codec.residual.lstm(x)[0].isfinite().all()  # assigned weights reach the LSTM's flat list too


@pytest.mark.parametrize("initted", [torch.ones(1), torch.tensor(True)], ids=["float [1]", "bool scalar"])
def test_both_spellings_of_initted_are_accepted(official: Path, initted: Tensor) -> None:
    rewrite(official / "encoder.ckpt", lambda s: s.update({"quantizer._codebook.initted": initted}))
    source = locate(official)
    load(build(source.config), source, device="cpu", dtype=torch.float32)


def test_halves_never_open_the_other_half(official: Path, state: dict[str, Tensor]) -> None:
    source = locate(official)
    (official / "decoder.ckpt").rename(official / "away.ckpt")
    encoder = build(source.config, decoder=False)
    load(encoder, source, device="cpu", dtype=torch.float32)
    check_filled(encoder, state)
    (official / "away.ckpt").rename(official / "decoder.ckpt")
    # Of the encoder's file the decoder takes the acoustic codebook alone, so nothing else needs to be there.
    rewrite(official / "encoder.ckpt", lambda s: [s.pop(k) for k in list(s) if k.startswith("audiomae")] and None)
    decoder = build(source.config, encoder=False)
    load(decoder, source, device="cpu", dtype=torch.float32)
    check_filled(decoder, state)


def test_dtype_is_the_one_asked_for(official: Path, state: dict[str, Tensor]) -> None:
    source = locate(official)
    codec = build(source.config)
    load(codec, source, device="cpu", dtype=torch.bfloat16)
    check_filled(codec, state, torch.bfloat16)


def test_loaded_weights_do_not_depend_on_the_file(official: Path, state: dict[str, Tensor]) -> None:
    source = locate(official)
    codec = build(source.config)
    load(codec, source, device="cpu", dtype=torch.float32)
    for file in ("encoder.ckpt", "decoder.ckpt"):
        size = (official / file).stat().st_size
        with (official / file).open("r+b") as f:
            f.write(bytes(size))
    check_filled(codec, state)


def test_mismatch_lists_both_sides(official: Path) -> None:
    def change(s: dict[str, Tensor]) -> None:
        s["encoder.weight_ih_l7"] = torch.zeros(2)  # a known family, but no such layer in the model
        s["audiomae.foreign"] = torch.zeros(2)  # no rule
        del s["encoder_output_linear.weight"]
        s["audiomae.model.cls_token"] = torch.zeros(1, 1, 9)
        s["audiomae.model.norm.bias"] = torch.zeros(8, dtype=torch.int64)

    rewrite(official / "encoder.ckpt", change)
    source = locate(official)
    with pytest.raises(CheckpointError) as error:
        load(build(source.config), source, device="cpu", dtype=torch.float32)
    text = str(error.value)
    for name in ("residual.lstm.weight_ih_l7", "audiomae.foreign", "residual.project.weight"):
        assert name in text
    assert "mae.cls_token (file (1, 1, 9), model (1, 1, 8))" in text
    assert "mae.norm.bias (file integer (8,), model (8,))" in text


def test_long_lists_are_cut(official: Path) -> None:
    rewrite(official / "encoder.ckpt", lambda s: s.update({f"foreign.{i}": torch.zeros(1) for i in range(40)}))
    source = locate(official)
    with pytest.raises(CheckpointError, match=r"foreign\.11 and 28 more"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


def test_two_tensors_for_one_name_are_refused() -> None:
    rules = keymap.native_rules("encoder", 100)
    tensors = {"mae.norm": torch.zeros(1), "rate100.mae.norm": torch.zeros(1), "rate50.mae.norm": torch.zeros(1)}
    found, unmapped = keymap.apply_rules(rules, tensors, {"mae"})
    assert list(found) == ["mae.norm"]
    assert unmapped == ["rate100.mae.norm"]


@pytest.mark.parametrize(
    "change",
    [lambda s: s["alphas_cumprod"].mul_(0.99), lambda s: s.pop("alphas_cumprod")],
    ids=["another", "missing"],
)
def test_another_schedule_is_refused(official: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    rewrite(official / "decoder.ckpt", change)
    source = locate(official)
    with pytest.raises(CheckpointError, match="alphas_cumprod"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


def test_tables_left_on_meta_are_an_error(official: Path) -> None:
    source = locate(official)
    codec = build(source.config)
    codec.latent.register_buffer("forgotten", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"latent\.forgotten"):
        load(codec, source, device="cpu", dtype=torch.float32)


def write_table(official: Path, table: np.ndarray) -> None:
    np.save(official / TABLE, table, allow_pickle=True)


def test_fewer_centroids_than_the_name_says_warn_and_count(official: Path) -> None:
    write_table(official, np.zeros((8, 8), np.float32))
    with pytest.warns(UserWarning, match="8 rows, 16 were expected"):
        source = locate(official)
    assert source.config.encoder.semantic_size == 8
    codec = build(source.config)
    load(codec, source, device="cpu", dtype=torch.float32)
    assert codec.codebooks.semantic.shape == (8, 8)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (np.zeros((17, 8), np.float32), "17 rows"),
        (np.zeros((16, 9), np.float32), "9 columns where 8"),
        (np.zeros((16, 8), np.float64), "float64"),
        (np.zeros((16,), np.float32), r"\(16,\)"),
        (np.array([{"a": 1}], dtype=object), "not a readable .npy"),
    ],
    ids=["rows", "columns", "dtype", "axes", "pickle"],
)
def test_unusable_tables(official: Path, table: np.ndarray, said: str) -> None:
    write_table(official, table)
    with pytest.raises(CheckpointError, match=said):
        locate(official)


def test_table_may_lie_beside_the_folder_as_in_the_hub(
    official: Path, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(official, hub / "semanticodec_tokenrate_100")
    shutil.move(hub / "semanticodec_tokenrate_100" / "codebook_idx", hub / "codebook_idx")
    source = locate(hub / "semanticodec_tokenrate_100")
    codec = build(source.config)
    load(codec, source, device="cpu", dtype=torch.float32)
    check_filled(codec, state)
    shutil.copytree(hub / "semanticodec_tokenrate_100", hub / "semanticodec_tokenrate_50")
    with pytest.raises(CheckpointError, match="of these presets: none"):
        locate(hub / "semanticodec_tokenrate_50")


def test_no_table_or_the_wrong_preset(official: Path) -> None:
    with pytest.raises(CheckpointError, match="mini-100"):
        locate(official, "mini-100")
    (official / TABLE).unlink()
    with pytest.raises(CheckpointError, match="of these presets: none"):
        locate(official)
    with pytest.raises(CheckpointError, match=r"codebook_2048_0\.npy is missing"):
        locate(official, NAME)


def test_missing_half_says_which_file(official: Path) -> None:
    source = locate(official)
    (official / "decoder.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"decoder\.ckpt is missing"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


class Surprise:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "pickle", "list", "nested", "meta", "sparse"])
def test_unreadable_checkpoints(official: Path, kind: str) -> None:
    path = official / "decoder.ckpt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Surprise()}))
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind in ("nested", "meta", "sparse"):
        odd = {
            "nested": {"a": torch.zeros(1)},
            "meta": torch.zeros(1, device="meta"),
            "sparse": torch.eye(2).to_sparse(),
        }
        torch.save({"scale_factor": odd[kind]}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>"}[kind])
    source = locate(official)
    with pytest.raises(CheckpointError, match=r"decoder\.ckpt"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


# --- the hub


def test_hub_names_fetch_only_what_is_needed(
    official: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        assert repository == "haoheliu/SemantiCodec"
        asked.append(name)
        return str(official / name.removeprefix("semanticodec_tokenrate_100/"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = locate(NAME)
    encoder = build(source.config, decoder=False)
    load(encoder, source, device="cpu", dtype=torch.float32)
    check_filled(encoder, state)
    assert set(asked) == {TABLE, "semanticodec_tokenrate_100/encoder.ckpt"}


def test_without_a_network_the_error_says_what_to_put_where(
    config: CodecConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match=r"no network.*encoder\.ckpt and decoder\.ckpt.*codebook_2048_0\.npy"):
        locate(config.name)


def test_published_paths_of_the_tables() -> None:
    paths = {config.name: checkpoints._table_path(config) for config in checkpoints._official_presets()}
    assert len(set(paths.values())) == 12
    assert paths["semanticodec-100-4096"] == TABLE
    assert paths["semanticodec-50-32768"] == "codebook_idx/combine_256_audioset_dominate/codebook_16384_0.npy"
    assert paths["semanticodec-25-8192"] == "codebook_idx/combine_128_audioset_dominate/codebook_4096_0.npy"


def test_neither_preset_nor_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known presets: mini-100"):
        locate(tmp_path / "nothing")


# --- native layout


def test_convert_keeps_every_value_and_the_identity(official: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    source = locate(official)
    convert(source, tmp_path / "native", build(source.config))
    native = locate(tmp_path / "native")
    assert native.config == source.config
    codec = build(native.config)
    load(codec, native, device="cpu", dtype=torch.float32)
    check_filled(codec, state)
    assert weights_hash(native) == weights_hash(source)
    assert len(bytes.fromhex(weights_hash(native))) == 32


def test_convert_to_half_precision(official: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    source = locate(official)
    convert(source, tmp_path / "half", build(source.config), torch.float16)
    half = locate(tmp_path / "half")
    codec = build(half.config)
    load(codec, half, device="cpu", dtype=torch.float32)
    check_filled(codec, {name: tensor.half().float() for name, tensor in state.items()})
    assert weights_hash(half) != weights_hash(source)


def test_native_converts_too(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    """One rate of a folder that serves several becomes a folder of its own."""
    save(tmp_path / "all", rates)
    source = locate(tmp_path / "all", "mini-50")
    convert(source, tmp_path / "one", build(source.config))
    one = locate(tmp_path / "one")
    codec = build(one.config)
    load(codec, one, device="cpu", dtype=torch.float32)
    check_filled(codec, rates[source.config])


def test_convert_is_strict(official: Path, tmp_path: Path) -> None:
    rewrite(official / "decoder.ckpt", lambda s: s.pop("scale_factor") and None)
    source = locate(official)
    with pytest.raises(CheckpointError, match=r"latent\.scale"):
        convert(source, tmp_path / "native", build(source.config))
    assert not (tmp_path / "native").exists()


def test_either_half_knows_the_identity(official: Path) -> None:
    source = locate(official)
    want = weights_hash(source)
    (official / "decoder.ckpt").unlink()
    assert weights_hash(source) == want


def test_every_token_rate_has_its_own_identity(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    save(tmp_path, rates)
    found = {config.name: weights_hash(locate(tmp_path, config.name)) for config in rates}
    assert found == {config.name: weights_hash(state) for config, state in rates.items()}
    assert len(set(found.values())) == 3


def test_two_names_must_agree(
    rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    save(tmp_path / "mini", rates)
    assert locate("mini-50", "mini-50").config.token_rate == 50
    assert locate("mini", "mini-100").config.token_rate == 100
    for name, other in (("mini-50", "mini-100"), ("mini", "mini-25"), (NAME, "mini-100")):
        with pytest.raises(ConfigError, match=f"{name} was asked for, and the preset {other}"):
            locate(name, other)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("encoder", "foo.bar"),
        ("encoder", "rate50"),
        ("encoder", "rate7.x"),
        ("encoder", "rate7.mae.norm.weight"),
        ("encoder", "rate50.foo"),
        ("encoder", "latent.scale"),
        ("encoder", "mae"),
        ("codebooks", "mae.norm.weight"),
        ("decoder", "codebooks.semantic"),
    ],
)
def test_names_that_belong_elsewhere_are_refused(
    rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, file: str, name: str
) -> None:
    save(tmp_path, rates)
    path, books = tmp_path / f"{file}.safetensors", tmp_path / "codebooks.safetensors"
    state = {key: x.clone() for key, x in load_file(path).items()} | {name: torch.zeros(2)}
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata() | {"sha256": checkpoints._digest(state)}
    save_file(state, path, metadata)
    if file != "codebooks":
        resave(books, **{f"{file}_sha256": metadata["sha256"]})
    source = locate(tmp_path, "mini-100")
    with pytest.raises(CheckpointError, match=rf"without a place in the model: {re.escape(name)}\."):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


@pytest.fixture
def rates() -> dict[CodecConfig, dict[str, Tensor]]:
    """Three token rates that share everything but the k-means tables and one layer."""
    models = {}
    for rate in (100, 50, 25):
        config = tiny(PRESETS[f"mini-{rate}"])
        state = randomised(config, 1)
        shared = {name: x for name, x in randomised(tiny(PRESETS["mini-100"]), 1).items() if name.startswith("mae.")}
        models[config] = state | shared
    return models


def test_one_folder_serves_several_token_rates(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    save(tmp_path, rates)
    stored = load_file(tmp_path / "encoder.safetensors")
    assert "mae.norm.weight" in stored  # equal in all three, so it is there once
    assert {"rate100.residual.lstm.weight_ih_l0", "rate25.residual.lstm.weight_ih_l0"} < set(stored)
    for config, state in rates.items():
        source = locate(tmp_path, config.name)
        assert source.config == config
        codec = build(source.config)
        load(codec, source, device="cpu", dtype=torch.float32)
        check_filled(codec, state)
    with pytest.raises(CheckpointError, match="mini-100, mini-50, mini-25; say which"):
        locate(tmp_path)
    with pytest.raises(CheckpointError, match=f"not {NAME}"):
        locate(tmp_path, NAME)


def test_shipped_presets_are_found_by_name(
    rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match=r"codebooks\.safetensors is missing"):
        locate("mini-50")
    save(tmp_path / "mini", rates)
    assert locate("mini-50").config.token_rate == 50
    assert locate("mini").config.token_rate == 100


def test_native_halves_open_their_own_file(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    save(tmp_path, rates)
    source = locate(tmp_path, "mini-50")
    for file, parts in (("encoder", {"encoder": False}), ("decoder", {"decoder": False})):
        path = tmp_path / f"{file}.safetensors"
        path.rename(tmp_path / "away")
        codec = build(source.config, **parts)
        load(codec, source, device="cpu", dtype=torch.float32)
        check_filled(codec, rates[source.config])
        with pytest.raises(CheckpointError, match=f"{file}.safetensors is missing"):
            load(build(source.config), source, device="cpu", dtype=torch.float32)
        (tmp_path / "away").rename(path)


def test_identity_follows_the_codebooks_only(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    def identity(change: str) -> str:
        config = next(iter(rates))
        save(tmp_path, {config: rates[config] | {change: rates[config][change] + 1}})
        return weights_hash(locate(tmp_path))

    same = {identity(name) for name in ("mae.norm.weight", "residual.project.weight", "latent.unet.0.bias")}
    others = {identity(name) for name in ("codebooks.semantic", "codebooks.acoustic")}
    assert len(same) == 1
    assert len(others - same) == 2
    assert same == {weights_hash(rates[next(iter(rates))])}


def test_save_refuses_what_it_cannot_tell_apart(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    config, state = next(iter(rates.items()))
    with pytest.raises(CheckpointError, match=r"optimizer\.step belongs to no file"):
        save(tmp_path, {config: state | {"optimizer.step": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"one preset per token rate.*\[100, 100\]"):
        save(tmp_path, {config: state, dataclasses.replace(config, name="other"): state})


def resave(path: Path, **metadata: str | None) -> None:
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    state = {name: x.clone() for name, x in load_file(path).items()}
    save_file(state, path, {key: value for key, value in (old | metadata).items() if value is not None})


@pytest.mark.parametrize("file", ["encoder", "codebooks", "decoder"])
def test_one_flipped_bit_is_found(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, file: str) -> None:
    save(tmp_path, rates)
    source = locate(tmp_path, "mini-100")
    path = tmp_path / f"{file}.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors is damaged"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


def test_files_of_two_models_do_not_mix(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    config, state = next(iter(rates.items()))
    save(tmp_path / "a", {config: state})
    save(tmp_path / "b", {config: randomised(config, 2)})
    shutil.copy(tmp_path / "b" / "decoder.safetensors", tmp_path / "a")
    source = locate(tmp_path / "a")
    with pytest.raises(CheckpointError, match="another set of files"):
        load(build(config), source, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": None}, "has the format None"),
        ({"version": "2"}, "version '2'; this package reads"),
        ({"configs": None}, r"lacks the metadata \['configs'\]"),
        ({"decoder_sha256": None}, r"lacks the metadata \['decoder_sha256'\]"),
        ({"configs": "{"}, "another version"),
        ({"configs": "[]"}, "another version"),
        ({"configs": json.dumps({"mini-100": {"name": "mini-100"}})}, "another version"),
    ],
    ids=["no format", "version", "no configs", "no link", "no JSON", "no mapping", "no fields"],
)
def test_foreign_metadata(
    rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, metadata: dict[str, str | None], said: str
) -> None:
    save(tmp_path, rates)
    resave(tmp_path / "codebooks.safetensors", **metadata)
    with pytest.raises(CheckpointError, match=said):
        locate(tmp_path, "mini-100")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_native_files(rates: dict[CodecConfig, dict[str, Tensor]], tmp_path: Path, keep: int) -> None:
    save(tmp_path, rates)
    source = locate(tmp_path, "mini-100")
    path = tmp_path / "decoder.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load(build(source.config), source, device="cpu", dtype=torch.float32)


# --- the published files, by their lists of keys


@pytest.mark.parity
@pytest.mark.parametrize("rate", [100, 50, 25])
def test_published_keys_are_all_mapped_or_dropped(goldens: Path, rate: int) -> None:
    config = PRESETS[f"semanticodec-{rate}-4096"]
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in CodecModel(config).state_dict().items()}
    files = {
        keymap.OFFICIAL_ENCODER: ["audiomae", f"acoustic_{rate}"],
        keymap.OFFICIAL_DECODER: [f"unet_{rate}", f"unet_ema_{rate}", "diffusion_buffers", "vae", "vocoder"],
    }
    found = {"codebooks.semantic": wanted["codebooks.semantic"]}
    used = set()
    for rules, parts in files.items():
        entries = [entry for part in parts for entry in Goldens(goldens).entries(part)]
        published = {entry["key"]: torch.empty(entry["shape"], device="meta") for entry in entries}
        mapped, unmapped = keymap.apply_rules(rules, published, {name.split(".")[0] for name in wanted})
        assert unmapped == []
        found |= {name: tuple(x.shape) for name, x in mapped.items()}
        used |= {rule for name in published for rule in [next(r for r in rules if re.fullmatch(r.pattern, name))]}
    assert found == wanted
    # Every rule has a purpose: none is shadowed by an earlier one or matches nothing.
    assert used == {*keymap.OFFICIAL_ENCODER, *keymap.OFFICIAL_DECODER}
