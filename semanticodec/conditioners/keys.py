"""What every tensor of the published conditioners becomes, and how their modules are filled.

Each function returns the rules of one module: ``source`` begins its names in the file, ``target`` begins ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .. import loading
from ..keymap import DROP, Rule, apply_rules, inside

_MODULE = "filled"


def clap_rules(source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Return the rules of LAION-CLAP without fusion, for :class:`~semanticodec.conditioners.clap.CLAP`."""
    s, t = re.escape(source), f"{target}model."
    text, audio = f"{t}text_model.", f"{t}audio_model.audio_encoder."
    block = r"audio_branch\.(layers\.\d+\.blocks\.\d+)\."
    return (
        Rule(rf"{s}text_branch\.embeddings\.position_ids", DROP, "counts from 0; some versions of the library keep it"),
        Rule(rf"{s}text_branch\.(.+)", rf"{text}\1", "RoBERTa"),
        Rule(rf"{s}(text|audio)_projection\.0\.(.+)", rf"{t}\1_projection.linear1.\2", "projection"),
        Rule(rf"{s}(text|audio)_projection\.2\.(.+)", rf"{t}\1_projection.linear2.\2", "projection"),
        Rule(rf"{s}(text|audio)_transform\..+", DROP, "second head: only read by CLAP's training"),
        Rule(rf"{s}(logit_scale_[at])", rf"{t}\1", "temperature"),
        Rule(rf"{s}audio_branch\.(spectrogram|logmel)_extractor\..+", DROP, "recomputed: Fourier and mel matrices"),
        Rule(rf"{s}audio_branch\.(tscam_conv|head)\..+", DROP, "classifier of AudioSet: only pre-trains"),
        Rule(rf"{s}audio_branch\.bn0\.(.+)", rf"{audio}batch_norm.\1", "HTSAT"),
        Rule(rf"{s}{block}attn_mask", DROP, "recomputed: which shifted windows touch"),
        Rule(
            rf"{s}{block}attn\.qkv\.(weight|bias)",
            tuple(rf"{audio}\1.attention.self.{part}.\2" for part in ("query", "key", "value")),
            "HTSAT",
        ),
        Rule(rf"{s}{block}attn\.(relative_position_\w+)", rf"{audio}\1.attention.self.\2", "HTSAT"),
        Rule(rf"{s}{block}attn\.proj\.(.+)", rf"{audio}\1.attention.output.dense.\2", "HTSAT"),
        Rule(rf"{s}{block}norm1\.(.+)", rf"{audio}\1.layernorm_before.\2", "HTSAT"),
        Rule(rf"{s}{block}norm2\.(.+)", rf"{audio}\1.layernorm_after.\2", "HTSAT"),
        Rule(rf"{s}{block}mlp\.fc1\.(.+)", rf"{audio}\1.intermediate.dense.\2", "HTSAT"),
        Rule(rf"{s}{block}mlp\.fc2\.(.+)", rf"{audio}\1.output.dense.\2", "HTSAT"),
        Rule(rf"{s}audio_branch\.((patch_embed|norm|layers\.\d+\.downsample)\..+)", rf"{audio}\1", "HTSAT"),
    )


def t5_rules(source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Return the rules of T5's encoder, for :class:`~semanticodec.conditioners.text.T5`."""
    s = re.escape(source)
    return (
        Rule(rf"{s}encoder\.(.+)", rf"{target}model.\1", "encoder"),
        Rule(rf"{s}shared\.weight", DROP, "the same table as encoder.embed_tokens"),
    )


def sequence_rules(source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Return the rules of AudioLDM 2's GPT-2, for :class:`~semanticodec.conditioners.sequence.SequenceGenerator`."""
    s = re.escape(source)
    return (
        Rule(rf"{s}model\.wte\.weight", DROP, "table of words: the sequence is of vectors"),
        Rule(rf"{s}model\.h\.\d+\.attn\.(masked_)?bias", DROP, "recomputed: causal mask of older versions"),
        Rule(rf"{s}model\.(.+)", rf"{target}model.\1", "GPT-2"),
        Rule(rf"{s}start_of_sequence_tokens\.weight", f"{target}start", "start vectors"),
        Rule(rf"{s}end_of_sequence_tokens\.weight", f"{target}end", "end vectors"),
        Rule(rf"{s}input_sequence_embed_linear\.(.+)", rf"{target}project.\1", "projections of the conditions"),
    )


def phoneme_rules(source: str = "", target: str = "") -> tuple[Rule, ...]:
    """Return the rules of the phoneme encoder, for :class:`~semanticodec.nn.phonemes.PhonemeEncoder`."""
    s, encoder = re.escape(source), rf"{re.escape(source)}text_encoder\.encoder\."
    return (
        Rule(rf"{s}learnable_positional_embedding", f"{target}positions", "positions"),
        Rule(rf"{s}text_encoder\.emb\.weight", f"{target}embed.weight", "table of symbols"),
        Rule(rf"{s}text_encoder\.proj\..+", DROP, "means and variances of VITS's prior"),
        Rule(
            rf"{encoder}attn_layers\.(\d+)\.conv_([qkvo])\.(.+)",
            rf"{target}layers.\1.attention.\2.\3",
            "transformer",
        ),
        Rule(
            rf"{encoder}attn_layers\.(\d+)\.emb_rel_([kv])",
            rf"{target}layers.\1.attention.relative_\2",
            "transformer",
            squeeze=True,
        ),
        Rule(rf"{encoder}ffn_layers\.(\d+)\.conv_([12])\.(.+)", rf"{target}layers.\1.conv\2.\3", "transformer"),
        Rule(rf"{encoder}norm_layers_([12])\.(\d+)\.gamma", rf"{target}layers.\2.norm\1.weight", "transformer"),
        Rule(rf"{encoder}norm_layers_([12])\.(\d+)\.beta", rf"{target}layers.\2.norm\1.bias", "transformer"),
    )


def audiomae_rules(source: str = "audiomae.model.", target: str = "") -> tuple[Rule, ...]:
    """Return the rules of AudioMAE's encoder, for :class:`~semanticodec.nn.audiomae.AudioMAE`."""
    s = re.escape(source)
    return (
        Rule(rf"{s}((cls_token|pos_embed|(patch_embed|blocks|norm)\..+))", rf"{target}\1", "AudioMAE encoder"),
        Rule(rf"{s}(mask_token|decoder_\w+(\..+)?)", DROP, "MAE decoder: only trains the encoder"),
    )


def prompt_rules(system: str) -> tuple[Rule, ...]:
    """Return the rules of everything that conditions, in the whole checkpoint of a system of :data:`PROMPTS`.

    Targets are those of :class:`~semanticodec.conditioners.prompts.PromptConditioner`.  Encoders that a file holds
    twice are loaded once: the published code froze both copies where the same weights were loaded
    (:func:`differing_copies` tells where a file breaks that).
    """
    first, nested = "cond_stage_models.0.", "cond_stage_models.0.cond_stage_models."
    again = Rule(r"clap\..+", DROP, "CLAP for ranking: the copy for conditioning ranks too")
    if system in ("audioldm-s", "audioldm-m", "audioldm-l", "musicldm"):
        return clap_rules("cond_stage_model.model.", "clap.")
    if system == "audioldm_48k":
        return (*_wrapped_clap(first), again)
    if system == "audioldm_16k_crossattn_t5":
        return (*t5_rules(f"{first}model.", "t5."), *_wrapped_clap("clap."))
    speech = system == "audioldm2-speech"
    second = phoneme_rules(f"{nested}1.", "phonemes.encoder.") if speech else t5_rules(f"{nested}1.model.", "t5.")
    return (
        *_wrapped_clap(f"{nested}0."),
        *second,
        Rule(rf"{re.escape(nested)}2\..+", DROP, "AudioMAE: only makes training targets"),
        *sequence_rules(first, "sequence."),
        Rule(r"cond_stage_models\.1\..+", DROP, "FLAN-T5 again: the copy inside the sequence generator serves"),
        again,
    )


def _wrapped_clap(source: str) -> tuple[Rule, ...]:
    mel = Rule(rf"{re.escape(source)}mel_transform\..+", DROP, "another spectrogram: computed, never used")
    return (mel, *clap_rules(f"{source}model.", "clap."))


COPIES = (
    ("cond_stage_models.0.cond_stage_models.0.model.", "clap.model."),
    ("cond_stage_models.0.model.", "clap.model."),
    ("cond_stage_models.0.cond_stage_models.1.model.", "cond_stage_models.1.model."),
)
"""Where whole checkpoints hold an encoder twice: the copy that is used, and the other."""


def differing_copies(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of second copies in a checkpoint whose weights are not those of the first.

    Only biases, norms and the like are read: training that moved anything would have moved them.
    """
    pairs = [
        (tensor, f"{second}{name.removeprefix(first)}")
        for first, second in COPIES
        for name, tensor in tensors.items()
        if name.startswith(first) and tensor.dim() == 1
    ]
    return [name for tensor, name in pairs if name in tensors and not torch.equal(tensor, tensors[name])]


def select(module: nn.Module, tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Find everything that a module wants in a file.

    Args:
        module: whose ``state_dict()`` says what there must be; on any device.
        tensors: by the name in the file; all of them must be the module's own.
        rules: with targets that are the module's own names.

    Returns:
        Tensors by the module's names.

    Raises:
        CheckpointError: a tensor has no place, or a parameter no tensor, or the shapes differ.
    """
    found, unmapped = apply_rules([inside(_MODULE, rule) for rule in rules], tensors, {_MODULE})
    named = {name.removeprefix(f"{_MODULE}."): tensor for name, tensor in found.items()}
    return loading.matched(named, unmapped, module.state_dict(), type(module).__name__)


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    rules: Iterable[Rule],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fill a module that was built on the meta device, and make it ready for inference.

    Args:
        module: as for :func:`select`.
        tensors: likewise.
        rules: likewise.
        device: where the module goes.
        dtype: of every floating-point tensor.

    Raises:
        CheckpointError: as :func:`select`.
    """
    loading.fill(module, select(module, tensors, rules), device=device, dtype=dtype)
    module.requires_grad_(False).eval()
