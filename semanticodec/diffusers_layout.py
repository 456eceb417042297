"""Folders of the library diffusers that hold AudioLDM, AudioLDM 2 or MusicLDM: the networks, read by their configs.

Each part has its own subfolder with a ``config.json`` and a safetensors file.  Nothing is assumed about sizes: what a
config says is built, and what no part of this package can be is refused.  Attention heads above all: the config's
number is for every level where the published checkpoints have heads of equal width; weights fit either, and only one
is right, so the folder's own word is taken.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import HiFiGANConfig, LatentConfig, MelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .errors import CheckpointError, LicenceWarning
from .keymap import DROP, Rule, apply_rules
from .latent import LatentDiffusion
from .loading import fill, matched

GUIDANCE = {"AudioLDMPipeline": 2.5, "AudioLDM2Pipeline": 3.5, "MusicLDMPipeline": 2.0}
"""Pipelines that are read, and their own guidance."""
FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def is_folder(place: str | os.PathLike[str]) -> bool:
    """Tell whether a path is a folder in this layout."""
    return (Path(place) / "model_index.json").is_file()


def latent_config(folder: str | os.PathLike[str]) -> LatentConfig:
    """Read what the networks of a folder are.

    Raises:
        CheckpointError: a file is missing or no JSON, or the folder holds what this package cannot build.
    """
    try:
        return _latent_config(Path(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configs in {folder} are not diffusers': {type(error).__name__} {error}") from error


def _latent_config(place: Path) -> LatentConfig:
    pipeline = _read_json(place / "model_index.json").get("_class_name")
    if pipeline not in GUIDANCE:
        raise CheckpointError(f"{place} holds a {pipeline}; the ones that can be read are {', '.join(GUIDANCE)}")
    unet, vae, vocoder, scheduler = (
        _read_json(place / part / name)
        for part, name in (
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("vocoder", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    )
    prediction = {"epsilon": "eps", "v_prediction": "v"}[scheduler.get("prediction_type", "epsilon")]
    if scheduler.get("beta_schedule") != "scaled_linear":
        raise CheckpointError(f"{place} has betas {scheduler.get('beta_schedule')!r}; 'scaled_linear' is wanted")
    wanted(scheduler, place / "scheduler", trained_betas=None, rescale_betas_zero_snr=False)
    return LatentConfig(
        unet=_unet(unet, place / "unet"),
        vae=_vae(vae, place / "vae"),
        vocoder=_vocoder(vocoder, place / "vocoder"),
        mel=MelConfig(sample_rate=vocoder["sampling_rate"], bins=vocoder["model_in_dim"]),
        schedule=ScheduleConfig(
            steps=scheduler["num_train_timesteps"],
            beta_start=scheduler["beta_start"],
            beta_end=scheduler["beta_end"],
        ),
        prediction=prediction,  # type: ignore[arg-type]
        steps=25,
        guidance=GUIDANCE[pipeline],
    )


@functools.cache
def remind(pipeline: str) -> None:
    """Say once per process and kind of pipeline that its published weights may not be used commercially."""
    told = f"the published weights of {pipeline} are not for commercial use; the folder's own card has the last word"
    warnings.warn(told, LicenceWarning, stacklevel=4)


def load_latent(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LatentDiffusion:
    """Load the U-Net, the autoencoder and the vocoder of a folder.

    Args:
        folder: with ``model_index.json`` and the subfolders unet, vae, vocoder and scheduler.
        device: where the modules go.
        dtype: of every floating-point tensor.

    Returns:
        The modules, ready for inference.

    Raises:
        CheckpointError: a file is missing or damaged, is of another kind, or does not fit its config.
    """
    place, config = Path(folder), latent_config(folder)
    remind(str(_read_json(place / "model_index.json")["_class_name"]))
    with torch.device("meta"):
        latent = LatentDiffusion(config, vae_encoder=True)
    factor = _read_json(place / "vae" / "config.json").get("scaling_factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        raise CheckpointError(f"{place / 'vae'} has the scaling factor {factor!r}; a number is wanted")
    found: dict[str, Tensor] = {"scale": torch.tensor(float(factor))}
    unmapped: list[str] = []
    for part, rules in (("unet", unet_rules(config.unet)), ("vae", vae_rules(config.vae)), ("vocoder", VOCODER)):
        tensors = _read_tensors(place / part)
        names, unknown = apply_rules(rules, tensors, {part})
        found |= names
        unmapped += [f"{part}: {name}" for name in unknown]
    # Weights of another layout: 1 x 1 convolutions here are linear layers there.
    targets = latent.state_dict()
    found = {
        name: tensor.reshape(targets[name].shape)
        if name in targets and tensor.ndim == 2 and targets[name].shape[2:] == (1, 1)
        else tensor
        for name, tensor in found.items()
    }
    fill(latent, matched(found, unmapped, targets, f"the diffusers folder {place}"), device=device, dtype=dtype)
    return latent.eval().requires_grad_(False)


# --- configurations -------------------------------------------------------------------------------------------------


def wanted(config: Mapping[str, Any], place: str | os.PathLike[str], **values: Any) -> None:
    """Refuse a part whose config says something that no module of this package does.

    Args:
        config: of the part; what it does not say counts as what is wanted.
        place: where it is.
        values: what the module does, by the names of the config.

    Raises:
        CheckpointError: the config says something else.
    """
    for key, value in values.items():
        seen = config.get(key, value)
        if (tuple(seen) if isinstance(seen, list) else seen) != value:
            raise CheckpointError(f"{place} has {key} = {seen!r}; only {value!r} can be built")


def _unet(config: Mapping[str, Any], place: Path) -> UNetConfig:
    widths = config["block_out_channels"]
    base, levels = widths[0], len(widths)
    attention = tuple(i for i, kind in enumerate(config["down_block_types"]) if kind == "CrossAttnDownBlock2D")
    wanted(config, place, flip_sin_to_cos=True, freq_shift=0, resnet_time_scale_shift="default", act_fn="silu")
    wanted(config, place, center_input_sample=False, norm_eps=1e-5, downsample_padding=1, use_linear_projection=False)
    wanted(config, place, only_cross_attention=False, time_embedding_type="positional", addition_embed_type=None)
    wanted(config, place, dual_cross_attention=False, attention_type="default", upcast_attention=False)
    wanted(config, place, mid_block_scale_factor=1, resnet_out_scale_factor=1, resnet_skip_time_act=False)
    wanted(config, place, time_embedding_act_fn=None, timestep_post_act=None)
    if any(width % base for width in widths) or levels - 1 not in attention:
        raise CheckpointError(f"{place} has levels of the widths {widths}, attention at {attention}: cannot be built")
    heads = _heads(config, place)
    depth = config.get("transformer_layers_per_block", 1)
    if not isinstance(depth, int) or list(config["up_block_types"]) != _mirrored(config["down_block_types"]):
        raise CheckpointError(f"{place} has transformers of the depths {depth}, or another way up than down")
    film = config.get("projection_class_embeddings_input_dim")
    if config.get("class_embed_type") not in (None, "simple_projection"):
        raise CheckpointError(f"{place} embeds classes by {config['class_embed_type']!r}, not by a simple projection")
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        base=base,
        mults=tuple(width // base for width in widths),
        res_blocks=config["layers_per_block"],
        attention_levels=attention,
        heads=heads,
        contexts=_contexts(config["cross_attention_dim"], widths, attention),
        depth=depth,
        film_dim=film,
        film_mode="concat" if config.get("class_embeddings_concat") else "add",
        groups=config["norm_num_groups"],
        **({} if heads is not None else {"head_dim": _head_width(config)}),
    )


def _mirrored(down: list[str]) -> list[str]:
    return [kind.replace("Down", "Up") for kind in reversed(down)]


def _heads(config: Mapping[str, Any], place: Path) -> int | None:
    """Return the number of heads at every level, or None where their width is the same instead.

    diffusers reads ``num_attention_heads`` or, if there is none, ``attention_head_dim``, as the *number* of heads.
    """
    value = config.get("num_attention_heads") or config["attention_head_dim"]
    if isinstance(value, int):
        return value
    attending = zip(config["block_out_channels"], value, config["down_block_types"], strict=True)
    widths = {width / heads for width, heads, kind in attending if kind == "CrossAttnDownBlock2D"}
    if len(widths) == 1:
        return None
    if len(set(value)) == 1:
        return int(value[0])
    raise CheckpointError(f"{place} has {value} heads per level; one number, or one width of a head, can be built")


def _head_width(config: Mapping[str, Any]) -> int:
    value = config.get("num_attention_heads") or config["attention_head_dim"]
    return int(config["block_out_channels"][-1] // value[-1])


def _contexts(dims: Any, widths: list[int], attention: tuple[int, ...]) -> tuple[int | None, ...]:
    """Return what each transformer of an attention site looks at.

    AudioLDM and MusicLDM write the level's own width where a transformer without a context has none; AudioLDM 2 a list
    per level.
    """
    level = attention[-1]
    entry = dims if isinstance(dims, int) else dims[level]
    if isinstance(entry, int):
        return (None if entry == widths[level] else entry,)
    return tuple(entry)


def _vae(config: Mapping[str, Any], place: Path) -> VAEConfig:
    widths = config["block_out_channels"]
    wanted(config, place, in_channels=1, out_channels=1, act_fn="silu", mid_block_add_attention=True)
    wanted(config, place, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    return VAEConfig(
        base=widths[0],
        mults=tuple(width // widths[0] for width in widths),
        res_blocks=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        groups=config["norm_num_groups"],
    )


def _vocoder(config: Mapping[str, Any], place: Path) -> HiFiGANConfig:
    # Where a config does not say it, transformers normalises.
    wanted({"normalize_before": True, **config}, place, normalize_before=False, leaky_relu_slope=0.1)
    dilations = {tuple(row) for row in config["resblock_dilation_sizes"]}
    if len(dilations) != 1:
        raise CheckpointError(f"{place} has stacks of the dilations {sorted(dilations)}; they must be the same")
    return HiFiGANConfig(
        base=config["upsample_initial_channel"],
        rates=tuple(config["upsample_rates"]),
        kernels=tuple(config["upsample_kernel_sizes"]),
        stack_kernels=tuple(config["resblock_kernel_sizes"]),
        dilations=dilations.pop(),
    )


# --- names ----------------------------------------------------------------------------------------------------------

_RES = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
VOCODER = (
    Rule(r"mean|scale", DROP, "normalisation of the mel: not applied"),
    Rule(r"upsampler\.(.+)", r"vocoder.ups.\1", "vocoder"),
    Rule(r"((conv_pre|conv_post|resblocks)\..+)", r"vocoder.\1", "vocoder"),
)


def unet_rules(config: UNetConfig) -> tuple[Rule, ...]:
    """Return what becomes of the names of ``UNet2DConditionModel`` and ``AudioLDM2UNet2DConditionModel``."""
    rules = [
        Rule(r"time_embedding\.linear_1\.(.+)", r"unet.time_embed.0.\1", "time embedding"),
        Rule(r"time_embedding\.linear_2\.(.+)", r"unet.time_embed.2.\1", "time embedding"),
        Rule(r"class_embedding\.(.+)", r"unet.film_emb.\1", "film"),
        Rule(r"conv_in\.(.+)", r"unet.input_blocks.0.0.\1", "first convolution"),
        Rule(r"conv_norm_out\.(.+)", r"unet.out.0.\1", "last norm"),
        Rule(r"conv_out\.(.+)", r"unet.out.2.\1", "last convolution"),
    ]
    for source, target, kind in _places(config):
        if kind == "res":
            rules += [Rule(rf"{source}\.{a}\.(.+)", rf"unet.{target}.{b}.\1", "residual block") for a, b in _RES]
        else:
            rules.append(Rule(rf"{source}\.(.+)", rf"unet.{target}.\1", kind))
    return tuple(rules)


def _places(config: UNetConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (pattern of diffusers' name, ours, what it is) of every layer between the first and the last."""
    units, last, blocks = len(config.contexts), len(config.mults) - 1, config.res_blocks

    def attention(level: int, block: str, index: int, target: str) -> Iterator[tuple[str, str, str]]:
        for unit in range(units if level in config.attention_levels else 0):
            yield rf"{block}\.attentions\.{index * units + unit}", f"{target}.{1 + unit}", "transformer"

    stage = 0
    for level in range(last + 1):
        block = rf"down_blocks\.{level}"
        for i in range(blocks):
            stage += 1
            yield rf"{block}\.resnets\.{i}", f"input_blocks.{stage}.0", "res"
            yield from attention(level, block, i, f"input_blocks.{stage}")
        if level < last:
            stage += 1
            yield rf"{block}\.downsamplers\.0\.conv", f"input_blocks.{stage}.0.op", "downsampling"
    yield r"mid_block\.resnets\.0", "middle_block.0", "res"
    yield from attention(last, "mid_block", 0, "middle_block")
    yield r"mid_block\.resnets\.1", f"middle_block.{1 + units}", "res"
    for step in range(last + 1):
        level, block = last - step, rf"up_blocks\.{step}"
        for i in range(blocks + 1):
            stage = step * (blocks + 1) + i
            yield rf"{block}\.resnets\.{i}", f"output_blocks.{stage}.0", "res"
            yield from attention(level, block, i, f"output_blocks.{stage}")
        child = 1 + (units if level in config.attention_levels else 0)
        if level:
            yield rf"{block}\.upsamplers\.0\.conv", f"output_blocks.{stage}.{child}.conv", "upsampling"


def vae_rules(config: VAEConfig) -> tuple[Rule, ...]:
    """Return what becomes of the names of ``AutoencoderKL``; older folders call the attention's layers otherwise."""
    last = len(config.mults) - 1
    up = r"decoder\.up_blocks\.{}"
    rules = [
        Rule(r"((?:post_)?quant_conv\..+)", r"vae.\1", "1 x 1 convolution"),
        Rule(r"((?:en|de)coder\.conv_(?:in|out)\..+)", r"vae.\1", "convolution"),
        Rule(r"((?:en|de)coder)\.conv_norm_out\.(.+)", r"vae.\1.norm_out.\2", "norm"),
        Rule(
            r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", r"vae.\1.down.\2.downsample.conv.\3", "down"
        ),
        *_res(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"vae.encoder.down.\1.block.\2", 3),
    ]
    for side in ("encoder", "decoder"):
        rules += _res(rf"{side}\.mid_block\.resnets\.0", f"vae.{side}.mid.block_1", 1)
        rules += _res(rf"{side}\.mid_block\.resnets\.1", f"vae.{side}.mid.block_2", 1)
        for names, ours in (
            ("group_norm", "norm"),
            ("to_q|query", "q"),
            ("to_k|key", "k"),
            ("to_v|value", "v"),
            (r"to_out\.0|proj_attn", "proj_out"),
        ):
            source = rf"{side}\.mid_block\.attentions\.0\.(?:{names})\.(.+)"
            rules.append(Rule(source, rf"vae.{side}.mid.attn_1.{ours}.\1", "attention"))
    for step in range(last + 1):
        ours = f"vae.decoder.up.{last - step}"
        rules.append(Rule(rf"{up.format(step)}\.upsamplers\.0\.conv\.(.+)", rf"{ours}.upsample.conv.\1", "up"))
        rules += _res(rf"{up.format(step)}\.resnets\.(\d+)", rf"{ours}.block.\1", 2)
    return tuple(rules)


def _res(source: str, target: str, group: int) -> list[Rule]:
    """Return the rules of one residual block; ``group`` is the first free group of the pattern."""
    return [
        Rule(rf"{source}\.(norm1|conv1|norm2|conv2)\.(.+)", rf"{target}.\{group}.\{group + 1}", "residual block"),
        Rule(rf"{source}\.conv_shortcut\.(.+)", rf"{target}.nin_shortcut.\{group}", "residual block"),
    ]


# --- files ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not an object")
    return data


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} has none of {', '.join(FILES)}; save the pipeline with safe_serialization=True"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
