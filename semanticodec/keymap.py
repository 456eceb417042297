"""What every tensor of a weight file becomes: the names in the files, and ours.

Each file has one ordered table of :class:`Rule`; the first rule whose pattern matches a whole name decides.  A name
that no rule matches has no place in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from .config import RATES

DROP = None

FILES: dict[str, tuple[str, ...]] = {
    "encoder": ("mae", "residual"),
    "codebooks": ("codebooks",),
    "decoder": ("latent", "conditioner"),
}
"""Native file -> first components of the names it holds."""


class Rule(NamedTuple):
    """What becomes of the tensors whose whole name matches ``pattern``."""

    pattern: str
    target: str | tuple[str, ...] | None
    """Our name; several names share the first axis in equal parts, in this order."""
    reason: str
    squeeze: bool = False
    """The file has a leading axis of 1 that our module has not."""


def inside(component: str, rule: Rule) -> Rule:
    """Return the rule with what it names put inside ``component``."""
    if rule.target is None:
        return rule
    names = (rule.target,) if isinstance(rule.target, str) else rule.target
    return rule._replace(target=tuple(f"{component}.{name}" for name in names))


_SCHEDULE = (
    Rule(r"scale_factor", "latent.scale", "standard deviation of the latent"),
    Rule(r"alphas_cumprod", DROP, "recomputed from the configuration, after checking that both agree"),
    Rule(r"betas|alphas_cumprod_prev|(sqrt|log)_\w*alphas_cumprod", DROP, "schedule: follows from alphas_cumprod"),
    Rule(r"sqrt_recip(m1)?_alphas_cumprod|posterior_\w+", DROP, "schedule: follows from alphas_cumprod"),
    Rule(r"logvar", DROP, "learned weighting of the training loss"),
)
OFFICIAL_ENCODER = (
    Rule(r"audiomae\.model\.((cls_token|pos_embed|(patch_embed|blocks|norm)\..+))", r"mae.\1", "AudioMAE encoder"),
    Rule(r"audiomae\.model\.(mask_token|decoder_\w+(\..+)?)", DROP, "MAE decoder: only trains the encoder"),
    Rule(r"encoder\.((weight|bias)_[ih]h_l\d+(_reverse)?)", r"residual.lstm.\1", "residual encoder"),
    Rule(r"encoder_output_linear\.(weight)", r"residual.project.\1", "residual encoder"),
    Rule(r"quantizer\._codebook\.embed", "codebooks.acoustic", "acoustic codebook", squeeze=True),
    Rule(r"quantizer\._codebook\.(embed_avg|cluster_size|initted)", DROP, "state of the codebook's training"),
)
OFFICIAL_DECODER = (
    Rule(r"model\.diffusion_model\.(.+)", r"latent.unet.\1", "U-Net"),
    Rule(r"model_ema\.(decay|num_updates|diffusion_model\w+)", DROP, "averaged U-Net: never used to decode"),
    Rule(r"first_stage_model\.((decoder|post_quant_conv)\..+)", r"latent.vae.\1", "VAE decoder"),
    Rule(r"first_stage_model\.(encoder|quant_conv)\..+", DROP, "VAE encoder: only makes training targets"),
    Rule(r"first_stage_model\.(vocoder\..+)", r"latent.\1", "vocoder"),
    *_SCHEDULE,
)


_AVERAGED = "model_ema.diffusion_model"
_FIRST = r"first_stage_model\."
_CONDITION = r"cond_stage_models\.0\.vae\."


def latent_rules(*, average: bool, lowpass: bool = False) -> tuple[Rule, ...]:
    """Return the rules of the networks that AudioLDM, AudioLDM 2, MusicLDM and AudioSR have in common.

    Args:
        average: take the moving average of the U-Net's weights (its names made ours by :func:`dotted_averages`) instead
            of the raw ones.
        lowpass: the file is AudioSR's, which holds a second autoencoder: the one that encodes the low band.
    """
    raw = r"model\.diffusion_model\.(.+)"
    averaged = rf"{re.escape(_AVERAGED)}\.(.+)"
    used, unused = (averaged, raw) if average else (raw, averaged)
    encoder = r"((?:encoder|quant_conv)\..+)"
    return (
        Rule(used, r"latent.unet.\1", "U-Net"),
        Rule(unused, DROP, "U-Net: raw and averaged weights; the other ones were asked for"),
        Rule(r"model_ema\.(decay|num_updates)", DROP, "state of the averaging"),
        Rule(rf"{_CONDITION if lowpass else _FIRST}{encoder}", r"latent.vae.\1", "VAE encoder"),
        Rule(rf"{_FIRST if lowpass else _CONDITION}{encoder}", DROP, "VAE encoder: only makes training targets"),
        Rule(rf"{_FIRST}((decoder|post_quant_conv)\..+)", r"latent.vae.\1", "VAE decoder"),
        Rule(rf"{_FIRST}(vocoder\..+)", r"latent.\1", "vocoder"),
        Rule(rf"{_FIRST}loss\..+", DROP, "discriminator and perceptual net: only train the VAE"),
        Rule(rf"{_CONDITION}(decoder|post_quant_conv|vocoder)\..+", DROP, "second copy of the VAE: only encodes"),
        *_SCHEDULE,
    )


def dotted_averages(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Give averaged weights, whose names were written without dots, the names of the weights they average.

    Args:
        tensors: by the name in the file; all others keep theirs.
        names: of the U-Net's own parameters.
    """
    dotted = {f"{_AVERAGED}{name.replace('.', '')}": f"{_AVERAGED}.{name}" for name in names}
    return {dotted.get(name, name): tensor for name, tensor in tensors.items()}


def native_rules(file: str, token_rate: int) -> tuple[Rule, ...]:
    """Return the rules of one native file, for one token rate."""
    names = rf"(?:{'|'.join(FILES[file])})\..+"
    return (
        Rule(rf"rate{token_rate}\.({names})", r"\1", "this token rate's own"),
        Rule(rf"rate(?:{'|'.join(map(str, RATES))})\.{names}", DROP, "another token rate's own"),
        Rule(rf"({names})", r"\1", "shared by all token rates"),
    )


def apply_rules(
    rules: Iterable[Rule], tensors: Mapping[str, Tensor], wanted: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the tensors of one file.

    Args:
        rules: tried in order.
        tensors: by the name in the file.
        wanted: first components of the names to keep; whole components that nobody asked for are left unread.

    Returns:
        Tensors by our name, and the names no rule matches or that meet on the same name.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    found: dict[str, Tensor] = {}
    unmapped = []
    for name, tensor in tensors.items():
        match, rule = next(((m, r) for p, r in compiled if (m := p.fullmatch(name))), (None, None))
        if rule is None or match is None:
            unmapped.append(name)
            continue
        names = (rule.target,) if isinstance(rule.target, str) else rule.target or ()
        targets = [match.expand(target) for target in names]
        if not found.keys().isdisjoint(targets):
            unmapped.append(name)
        elif targets and targets[0].split(".")[0] in wanted:
            whole = tensor[0] if rule.squeeze and tensor.dim() and len(tensor) == 1 else tensor
            found |= zip(targets, whole.chunk(len(targets)) if len(targets) > 1 else (whole,), strict=True)
    return found, unmapped
