"""Frozen configuration values of the conditioners; the defaults are the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

ROBERTA = "FacebookAI/roberta-base"
FLAN_T5 = "google/flan-t5-large"
"""Hub names of the published tokenizers; a local folder serves as well."""


@dataclass(frozen=True)
class CLAPConfig:
    """LAION-CLAP without fusion: HTSAT over 10 s of sound, RoBERTa over text, both projected to ``dim``.

    HTSAT starts ``audio_base`` channels wide and doubles between its stages; without stages there is only RoBERTa.
    """

    audio_base: int = 96
    audio_depths: tuple[int, ...] = (2, 2, 6, 2)
    audio_heads: tuple[int, ...] = (4, 8, 16, 32)
    text_dim: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    vocabulary: int = 50265
    positions: int = 514
    dim: int = 512
    tokenizer: str = ROBERTA
    max_tokens: int = 512


CLAP_TINY = CLAPConfig()
"""With HTSAT-tiny: audioldm-s and audioldm-l."""
CLAP_BASE = CLAPConfig(audio_base=128, audio_depths=(2, 2, 12, 2))
"""With HTSAT-base: audioldm-m, AudioLDM 2, audioldm_48k and MusicLDM."""


@dataclass(frozen=True)
class T5Config:
    """The encoder half of T5 v1.1 (gated GELU)."""

    dim: int = 1024
    head_dim: int = 64
    heads: int = 16
    hidden: int = 2816
    depth: int = 24
    vocabulary: int = 32128
    tokenizer: str = FLAN_T5
    max_tokens: int = 128


@dataclass(frozen=True)
class SequenceConfig:
    """GPT-2 that continues a sequence of vectors.

    ``inputs`` are the widths of the conditions in front, each wrapped in a start and an end vector out of tables of
    ``rows``; ``count`` vectors are generated.
    """

    inputs: tuple[int, ...] = (512, 1024)
    count: int = 8
    dim: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 1024
    rows: int = 32


@dataclass(frozen=True)
class PhonemeConfig:
    """The text encoder of VITS over at most ``length`` symbols."""

    symbols: int = 183
    dim: int = 192
    hidden: int = 768
    heads: int = 2
    depth: int = 6
    kernel: int = 3
    window: int = 4
    length: int = 310


@dataclass(frozen=True)
class PromptConfig:
    """Which encoders a system has and how their results reach its U-Net.

    ``clap`` is always there: it ranks candidates, and is shared with whatever else needs it.  With ``film`` its vector
    is the condition itself.  ``contexts`` are the U-Net's, in its order: "sequence" is what the sequence generator
    writes after CLAP's vector and, of text models, T5's states or, of speech models, the phonemes.
    """

    clap: CLAPConfig = CLAP_BASE
    film: bool = False
    t5: T5Config | None = None
    phonemes: PhonemeConfig | None = None
    sequence: SequenceConfig | None = None
    contexts: tuple[Literal["sequence", "t5"], ...] = ()

    def __post_init__(self) -> None:
        if "t5" in self.contexts and self.t5 is None:
            raise ConfigError("the context 't5' needs T5; give its configuration")
        if ("sequence" in self.contexts) != (self.sequence is not None):
            raise ConfigError("the context 'sequence' and the sequence generator's configuration go together")
        if self.sequence is not None and (self.t5 is None) == (self.phonemes is None):
            raise ConfigError("the sequence generator needs either T5 or phonemes beside CLAP")


PROMPTS: dict[str, PromptConfig] = {
    "audioldm-s": PromptConfig(clap=CLAP_TINY, film=True),
    "audioldm-m": PromptConfig(film=True),
    "audioldm-l": PromptConfig(clap=CLAP_TINY, film=True),
    "audioldm2": PromptConfig(t5=T5Config(), sequence=SequenceConfig(), contexts=("sequence", "t5")),
    "audioldm2-speech": PromptConfig(
        phonemes=PhonemeConfig(), sequence=SequenceConfig(inputs=(512, 192), count=512), contexts=("sequence",)
    ),
    "audioldm_48k": PromptConfig(film=True),
    "audioldm_16k_crossattn_t5": PromptConfig(t5=T5Config(), contexts=("t5",)),
    "musicldm": PromptConfig(film=True),
}
"""The published systems; audioldm2 is -full, -music-665k and -full-large-1150k."""
