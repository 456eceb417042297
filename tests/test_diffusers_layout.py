"""Folders of diffusers: the same random weights give the same numbers there and here, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check
from safetensors.torch import load_file, save_file
from torch import Tensor

from semanticodec import diffusers_layout
from semanticodec.diffusers_layout import is_folder, latent_config, load_latent
from semanticodec.errors import CheckpointError, LicenceWarning
from semanticodec.latent import Conditioning

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::semanticodec.errors.LicenceWarning")

WIDTHS = (16, 32, 48)
COMMON = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": WIDTHS,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
CONTEXTS = {
    "AudioLDM2Pipeline": {"cross_attention_dim": [[None, 12, 20]] * 3},
    "AudioLDM2Pipeline large": {"cross_attention_dim": [[None, 12, 20, None]] * 3, "transformer_layers_per_block": 2},
}
FILM = {
    "cross_attention_dim": list(WIDTHS),
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 12,
    "class_embeddings_concat": True,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.add_(spread * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def parts(kind: str, heads: Any = 8) -> dict[str, Any]:
    """Return the components of one tiny random pipeline."""
    pipeline = kind.split()[0]
    if pipeline == "AudioLDM2Pipeline":
        unet = diffusers.AudioLDM2UNet2DConditionModel(**COMMON, **CONTEXTS[kind], attention_head_dim=heads)
    else:
        unet = diffusers.UNet2DConditionModel(**COMMON, **FILM, attention_head_dim=heads)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.41,
    )
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=16,
            upsample_initial_channel=16,
            upsample_rates=[5, 32],
            upsample_kernel_sizes=[16, 64],
            resblock_kernel_sizes=[3, 5],
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            normalize_before=False,
        )
    )
    vocoder.remove_weight_norm() if hasattr(vocoder.conv_pre, "weight_g") else None
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, steps_offset=1, set_alpha_to_one=False
    )
    return {
        "unet": randomised(unet),
        "vae": randomised(vae),
        "vocoder": randomised(vocoder),
        "scheduler": scheduler,
        "pipeline": pipeline,
    }


def saved(folder: Path, components: dict[str, Any]) -> Path:
    for name in ("unet", "vae", "vocoder", "scheduler"):
        components[name].save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": components["pipeline"]}))
    return folder


def test_its_licence_is_said_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    diffusers_layout.remind.cache_clear()
    folder = saved(tmp_path, parts("MusicLDMPipeline"))
    with pytest.warns(LicenceWarning, match=r"weights of MusicLDMPipeline are not for commercial use"):
        load_latent(folder)
    recwarn.clear()
    load_latent(folder)
    assert not recwarn.list


def theirs(components: dict[str, Any], x: Tensor, t: Tensor, asked: Conditioning) -> Tensor:
    unet = components["unet"]
    if components["pipeline"] == "AudioLDM2Pipeline":
        (first, mask), (second, other) = asked.contexts
        out = unet(
            x,
            t,
            encoder_hidden_states=first,
            encoder_attention_mask=mask,
            encoder_hidden_states_1=second,
            encoder_attention_mask_1=other,
        )
    else:
        out = unet(x, t, encoder_hidden_states=None, class_labels=asked.film)
    result: Tensor = out.sample
    return result


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("AudioLDM2Pipeline", 8),
        ("AudioLDM2Pipeline large", 4),
        ("AudioLDM2Pipeline", (2, 4, 6)),
        ("AudioLDMPipeline", 8),
        ("MusicLDMPipeline", 4),
    ],
)
@torch.inference_mode()
def test_one_pass_of_each_network_is_diffusers_own(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, heads: Any
) -> None:
    components = parts(kind, heads)
    folder = saved(tmp_path, components)
    assert is_folder(folder)
    assert not is_folder(folder / "unet")
    latent = load_latent(folder)
    assert latent.scale == pytest.approx(0.41)
    asked = Conditioning(film=noise(2, 12, seed=1))
    if kind.startswith("AudioLDM2"):
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        asked = Conditioning(((noise(2, 3, 12, seed=1), torch.ones(2, 3).long()), (noise(2, 5, 20, seed=2), mask)))
    x, t = noise(2, 4, 12, 4), torch.tensor([30, 700])
    z, mel = noise(1, 4, 6, 4, seed=4), noise(1, 24, 16, seed=5)
    vae, posterior = components["vae"], latent.encode(mel)
    pairs = {
        "U-Net": (latent.predict(x, t, latent.prepare(asked)), theirs(components, x, t, asked)),
        "autoencoder, decoder": (latent.mel(z * 0.41), vae.decode(z).sample[:, 0]),
        "autoencoder, mean": (posterior.mean, vae.encode(mel[:, None]).latent_dist.mean * 0.41),
        "autoencoder, spread": (posterior.std, vae.encode(mel[:, None]).latent_dist.std * 0.41),
        "vocoder": (latent.wave(mel), components["vocoder"](mel)[:, : 160 * 24]),
    }
    errors = {name: float((ours - other).abs().max() / other.std()) for name, (ours, other) in pairs.items()}
    check(request, errors, 5e-5, part=(f"{kind}, heads {heads}", "one pass beside diffusers"))


@pytest.mark.parametrize("kind", ["AudioLDM2Pipeline", "AudioLDMPipeline", "MusicLDMPipeline"])
@torch.inference_mode()
def test_the_number_of_heads_is_the_folders(tmp_path: Path, kind: str) -> None:
    """Weights fit any number of heads, so that a wrong one would show nowhere but in the sound."""
    components = parts(kind, 8)
    eight = load_latent(saved(tmp_path, components))
    assert eight.config.unet.heads == 8
    path = tmp_path / "unet" / "config.json"
    for value, heads, width in ((4, 4, 32), ([2, 4, 6], None, 8), ([2, 2, 2], 2, 32)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_head_dim": value}))
        config = latent_config(tmp_path).unet
        assert (config.heads, config.head_dim) == (heads, width)
    other = load_latent(tmp_path)
    x, t = noise(1, 4, 8, 4), torch.tensor([30])
    asked = Conditioning(film=noise(1, 12))
    if kind == "AudioLDM2Pipeline":
        asked = Conditioning(((noise(1, 3, 12), None), (noise(1, 5, 20), None)))
    a, b = (latent.predict(x, t, latent.prepare(asked)) for latent in (eight, other))
    assert (a - b).abs().max() > 1e-3


def changed(folder: Path, part: str, **values: Any) -> None:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def unsaid(path: Path, name: str) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


def without(folder: Path, part: str, name: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "holds a FluxPipeline"),
        (lambda f: (f / "vae" / "config.json").unlink(), r"vae/config\.json is missing"),
        (lambda f: (f / "vae" / "config.json").write_text("[1]"), "holds list, not an object"),
        (lambda f: changed(f, "unet", attention_head_dim=[2, 4, 4]), r"has \[2, 4, 4\] heads per level"),
        (lambda f: changed(f, "unet", norm_eps=1e-3), r"norm_eps = 0\.001; only 1e-05"),
        (lambda f: changed(f, "unet", block_out_channels=[16, 32, 40]), "cannot be built"),
        (lambda f: changed(f, "unet", class_embed_type="timestep"), "embeds classes by 'timestep'"),
        (lambda f: changed(f, "unet", block_out_channels=None), "configs .* are not diffusers'"),
        (lambda f: changed(f, "vocoder", normalize_before=True), "normalize_before = True"),
        (lambda f: unsaid(f / "vocoder" / "config.json", "normalize_before"), "normalize_before = True; only False"),
        (lambda f: changed(f, "vocoder", resblock_dilation_sizes=[[1, 3], [1, 5]]), "must be the same"),
        (lambda f: changed(f, "unet", up_block_types=["UpBlock2D"] * 3), "another way up than down"),
        (lambda f: changed(f, "unet", transformer_layers_per_block=[1, 2, 1]), r"the depths \[1, 2, 1\]"),
        (lambda f: changed(f, "scheduler", beta_schedule="linear"), "has betas 'linear'"),
        (lambda f: changed(f, "scheduler", trained_betas=[0.1, 0.2]), r"trained_betas = \[0\.1, 0\.2\]; only None"),
        (lambda f: changed(f, "scheduler", rescale_betas_zero_snr=True), "rescale_betas_zero_snr = True; only False"),
        (lambda f: changed(f, "unet", dual_cross_attention=True), "unet has dual_cross_attention = True; only False"),
        (lambda f: changed(f, "unet", attention_type="gated"), "attention_type = 'gated'; only 'default'"),
        (lambda f: changed(f, "unet", upcast_attention=True), "upcast_attention = True; only False"),
        (lambda f: changed(f, "unet", mid_block_scale_factor=2), "mid_block_scale_factor = 2; only 1"),
        (lambda f: changed(f, "unet", resnet_skip_time_act=True), "resnet_skip_time_act = True; only False"),
        (lambda f: changed(f, "unet", resnet_out_scale_factor=1.4), r"resnet_out_scale_factor = 1\.4; only 1"),
        (lambda f: changed(f, "unet", time_embedding_act_fn="mish"), "time_embedding_act_fn = 'mish'; only None"),
        (lambda f: changed(f, "unet", timestep_post_act="silu"), "timestep_post_act = 'silu'; only None"),
        (lambda f: changed(f, "vae", scaling_factor=None), "scaling factor None"),
        (lambda f: changed(f, "vae", scaling_factor=True), "scaling factor True"),
        (lambda f: without(f, "unet", "conv_out.bias"), r"does not fill: unet\.out\.2\.bias"),
        (lambda f: without(f, "vocoder", "conv_pre.weight"), r"does not fill: vocoder\.conv_pre\.weight"),
        (lambda f: next((f / "vae").glob("*.safetensors")).unlink(), "has none of"),
        (lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"x"), "not a readable safetensors"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    change(saved(tmp_path, parts("AudioLDM2Pipeline")))
    with pytest.raises(CheckpointError, match=message):
        load_latent(tmp_path)


def test_a_whole_number_scales_too(tmp_path: Path) -> None:
    changed(saved(tmp_path, parts("AudioLDM2Pipeline")), "vae", scaling_factor=2)
    scale = load_latent(tmp_path).scale
    assert (scale.dtype, float(scale)) == (torch.float32, 2.0)
