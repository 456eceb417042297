"""Conditioners in the layout of transformers and diffusers: a folder per part, built as its ``config.json`` says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusers_layout import wanted
from ..errors import CheckpointError, ConfigError
from ..keymap import DROP, Rule
from .clap import CLAP
from .config import CLAPConfig, PromptConfig, SequenceConfig, T5Config
from .hub import transformers
from .keys import fill
from .prompts import PromptConditioner

_COUNTED = r"(?:\w+\.)*(position_ids|token_type_ids)"
_COMPUTED = ("relative_position_index", "num_batches_tracked")
_CLAP: tuple[Rule, ...] = (
    Rule(_COUNTED, DROP, "counts from 0, or zeros"),
    Rule(r"((text|audio)_(model|projection)\..+|logit_scale_[at])", r"clap.model.\1", "CLAP"),
)
_T5: tuple[Rule, ...] = (
    Rule(r"encoder\.(.+)", r"t5.model.\1", "FLAN-T5"),
    Rule(r"shared\.weight", DROP, "the same table as encoder.embed_tokens"),
)
_GPT2: tuple[Rule, ...] = (
    Rule(r"(?:transformer\.)?wte\.weight|lm_head\.weight", DROP, "table of words: the sequence is of vectors"),
    Rule(r"(?:transformer\.)?((?:wpe|h|ln_f)\..+)", r"sequence.model.\1", "GPT-2"),
    Rule(r"projection\.(.+)", r"sequence.project.0.\1", "projection of CLAP's vector"),
    Rule(r"projection_1\.(.+)", r"sequence.project.1.\1", "projection of T5's states"),
    Rule(r"(start|end)", r"sequence.\1", "start and end vectors"),
)
# What the networks built here compute, by transformers' names, beyond what shapes tell.
_CLAP_COMPUTES = {"hidden_act": "gelu", "projection_hidden_act": "relu"}
_HTSAT_COMPUTES: dict[str, Any] = {
    "layer_norm_eps": 1e-5,
    "window_size": 8,
    "mlp_ratio": 4,
    "spec_size": 256,
    "num_mel_bins": 64,
    "patch_size": 4,
    "patch_stride": (4, 4),
    "patch_embed_input_channels": 1,
    "flatten_patch_embeds": True,
    "enable_patch_layer_norm": True,
    "qkv_bias": True,
}
_T5_COMPUTES: dict[str, Any] = {
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_decoder": False,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_GPT2_COMPUTES: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def load_clap(
    place: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLAP:
    """Load CLAP and its tokenizer.

    Args:
        place: a folder that transformers wrote, or a name on the hub such as "laion/larger_clap_music_and_speech".
        device: where it goes.
        dtype: of its weights.

    Raises:
        CheckpointError: there is no such model, it is another one, or computes what ours does not.
        ConfigError: transformers is not installed, or this CLAP fuses several crops.
    """
    whole = _config("ClapModel", place)
    config = _clap_config(whole.text_config, whole.audio_config, place, str(place))
    with torch.device("meta"):
        clap = CLAP(config)
    rules = [
        rule._replace(target=rule.target.removeprefix("clap.")) if isinstance(rule.target, str) else rule
        for rule in _CLAP
    ]
    fill(clap, _tensors("ClapModel", place), rules, device=device, dtype=dtype)
    return clap


def load_prompts(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PromptConditioner:
    """Load everything that conditions out of the folder of a diffusers pipeline.

    Args:
        folder: of AudioLDM, AudioLDM 2 (not the speech models) or MusicLDM, with ``text_encoder``, ``tokenizer`` and,
            for AudioLDM 2, ``text_encoder_2``, ``tokenizer_2``, ``language_model`` and ``projection_model``.
        device: where it goes.
        dtype: of its weights.

    Returns:
        The conditioner.  AudioLDM's folders hold only the half of CLAP that reads: such a one cannot rank.

    Raises:
        CheckpointError: a part is missing, is another one than its configuration says, or computes what ours does not:
            an activation, an epsilon, a window of attention.
        ConfigError: transformers is not installed, or a part is of a kind that is not known here.
    """
    first = folder / "text_encoder"
    kind = _kind(_settings(first), first, ("ClapModel", "ClapTextModelWithProjection"))
    whole = _config(kind, first)
    texts, sounds = (whole.text_config, whole.audio_config) if kind == "ClapModel" else (whole, None)
    config = PromptConfig(_clap_config(texts, sounds, first, str(folder / "tokenizer")), film=True)
    tensors, rules = _tensors(kind, first), _CLAP
    if (folder / "language_model").is_dir():
        t5, sequence, more = _sequence_parts(folder, texts.projection_dim)
        config = PromptConfig(config.clap, t5=t5, sequence=sequence, contexts=("sequence", "t5"))
        tensors, rules = tensors | more, (*_CLAP, *_T5, *_GPT2)
    with torch.device("meta"):
        module = PromptConditioner(config)
    fill(module, tensors, rules, device=device, dtype=dtype)
    return module


def _sequence_parts(folder: Path, width: int) -> tuple[T5Config, SequenceConfig, dict[str, Tensor]]:
    second = folder / "text_encoder_2"
    _kind(_settings(second), second, ("T5EncoderModel",))
    writer = folder / "language_model"
    kind = _kind(_settings(writer), writer, ("GPT2Model", "GPT2LMHeadModel"))
    c, g = _config("T5EncoderModel", second), _config(kind, writer)
    wanted(c.to_dict(), second, **_T5_COMPUTES)
    wanted(g.to_dict(), writer, **_GPT2_COMPUTES)
    tensors = _tensors("T5EncoderModel", second) | _tensors(kind, writer) | _projection(folder / "projection_model")
    states = T5Config(
        dim=c.d_model,
        head_dim=c.d_kv,
        heads=c.num_heads,
        hidden=c.d_ff,
        depth=c.num_layers,
        vocabulary=c.vocab_size,
        tokenizer=str(folder / "tokenizer_2"),
    )
    count = getattr(g, "max_new_tokens", None) or SequenceConfig().count
    sequence = SequenceConfig((width, c.d_model), count, g.n_embd, g.n_layer, g.n_head, g.n_positions, rows=2)
    return states, sequence, tensors


def _projection(folder: Path) -> dict[str, Tensor]:
    """Read diffusers' projections; its start and end vectors become the rows of two tables."""
    from safetensors.torch import load_file

    path = folder / "diffusion_pytorch_model.safetensors"
    try:
        tensors = load_file(path)
        tables = {
            ours: torch.stack([tensors.pop(f"{theirs}_embed"), tensors.pop(f"{theirs}_embed_1")])
            for ours, theirs in (("start", "sos"), ("end", "eos"))
        }
    except (OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not AudioLDM 2's projection model: {error}") from error
    return tensors | tables


def _clap_config(texts: Any, sounds: Any, place: str | os.PathLike[str], tokenizer: str) -> CLAPConfig:
    if sounds is not None and sounds.enable_fusion:
        raise ConfigError("this CLAP fuses several crops of a sound; load one without fusion")
    # Converted folders say 1e-12, transformers' default; the weights were trained with RoBERTa's, which is built.
    known = {} if texts.layer_norm_eps == 1e-12 else {"layer_norm_eps": 1e-5}
    wanted(texts.to_dict(), place, **_CLAP_COMPUTES, **known, pad_token_id=1, position_embedding_type="absolute")
    if sounds is not None:
        wanted(sounds.to_dict(), place, **_CLAP_COMPUTES, **_HTSAT_COMPUTES)
    return CLAPConfig(
        audio_base=0 if sounds is None else sounds.patch_embeds_hidden_size,
        audio_depths=() if sounds is None else tuple(sounds.depths),
        audio_heads=() if sounds is None else tuple(sounds.num_attention_heads),
        text_dim=texts.hidden_size,
        text_depth=texts.num_hidden_layers,
        text_heads=texts.num_attention_heads,
        text_hidden=texts.intermediate_size,
        vocabulary=texts.vocab_size,
        positions=texts.max_position_embeddings,
        dim=texts.projection_dim,
        tokenizer=tokenizer,
        max_tokens=texts.max_position_embeddings - 2,
    )


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder}/config.json is no table of settings")
    return settings


def _kind(settings: Mapping[str, Any], folder: Path, known: tuple[str, ...]) -> str:
    seen = (settings.get("architectures") or ["nothing"])[0]
    if seen not in known:
        raise ConfigError(f"{folder} holds {seen}; known here are {', '.join(known)}")
    return str(seen)


def _config(kind: str, place: str | os.PathLike[str]) -> Any:
    """Read a configuration; what the file does not say is transformers' default."""
    return _pretrained(kind, place, getattr(transformers(), kind).config_class)


def _tensors(kind: str, place: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights, without those that transformers makes up where a file lacks them."""
    model, told = _pretrained(kind, place, getattr(transformers(), kind), output_loading_info=True)
    made_up = {name for name in told["missing_keys"] if not name.endswith(_COMPUTED)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in made_up}


def _pretrained(kind: str, place: str | os.PathLike[str], source: Any, **options: Any) -> Any:
    try:
        return source.from_pretrained(place, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {kind} from {place}: {' '.join(str(error).split())[:300]}") from error
