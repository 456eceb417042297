"""CLAP: one unit vector for a text or for a sound, in the same space.  B batch, S samples, L tokens, D channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional

from ..audio import checked
from ..errors import AudioError, ConfigError
from .config import CLAPConfig
from .hub import Tokenizer, transformers

RATE = 48_000
"""Sample rate in Hz that CLAP hears."""
WINDOW = 10 * RATE
"""Samples that CLAP hears at once."""
MOST_PHASES = 6000
"""Filters of the resampler: one per sample at 48 kHz until both clocks tick together again."""
HOP = 480
FFT = 1024
BINS = 64
LOWEST, HIGHEST = 50.0, 14_000.0
"""Hz; transformers' feature extractor starts at 0 Hz unless told otherwise, which costs a cosine of 0.015."""


def prepare(wave: Tensor, *, start: int = 0, repeat: bool = True) -> Tensor:
    """Cut or fill sound to what CLAP hears.

    Args:
        wave: ``[B, S]`` at 48 kHz.
        start: where to cut a longer sound.
        repeat: say a shorter sound as often as it fits, then pad with zeros to 10 s; otherwise leave it short.

    Returns:
        ``[B, 480000]``, or shorter without ``repeat``.

    Raises:
        AudioError: there are no samples.

    Source: AudioLDM 1 and MusicLDM cut at random (give ``start`` for parity) and repeat; AudioLDM 2 takes the first
    10 s and does not repeat.  Ours takes the first 10 s and repeats, so that the same sound has the same embedding.
    """
    length = wave.shape[-1]
    if not length:
        raise AudioError("CLAP was given a sound without samples")
    if length >= WINDOW:
        return wave[:, start : start + WINDOW]
    if not repeat:
        return wave
    wave = wave.repeat(1, WINDOW // length)
    return functional.pad(wave, (0, WINDOW - wave.shape[-1]))


def log_mel(wave: Tensor) -> Tensor:
    """Compute CLAP's spectrogram.

    Args:
        wave: ``[B, S]`` at 48 kHz, at least 513 samples.

    Returns:
        ``[B, 1 + S // 480, 64]`` in decibels, at least -100.
    """
    window = torch.hann_window(FFT, device=wave.device)
    power = torchaudio.functional.spectrogram(wave, 0, window, FFT, HOP, FFT, power=2.0, normalized=False)
    filters = torchaudio.functional.melscale_fbanks(
        FFT // 2 + 1, LOWEST, HIGHEST, BINS, RATE, norm="slaney", mel_scale="slaney"
    )
    result: Tensor = 10 * (power.mT @ filters.to(wave)).clamp_min(1e-10).log10()
    return result


class CLAP(nn.Module):
    """Embeds texts and sounds; the model is transformers' ``ClapModel``.

    Built by the caller under ``torch.device("meta")``, then filled (:func:`semanticodec.conditioners.keys.fill`).

    Source: behaves as LAION-CLAP inside AudioLDM, AudioLDM 2 and MusicLDM (spec 2.8), except that no embedding is
    replaced by the unconditional one at random: the published code does so to one in ten, in inference too.
    """

    def __init__(self, config: CLAPConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer or Tokenizer(config.tokenizer, config.max_tokens)
        library = transformers()
        whole = _configuration(config)
        self.model = library.ClapModel(whole) if self.hears else library.ClapTextModelWithProjection(whole.text_config)
        embeddings = self.model.text_model.embeddings
        positions = torch.arange(config.positions, device="cpu")[None]
        embeddings.register_buffer("position_ids", positions, persistent=False)
        embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)

    @property
    def hears(self) -> bool:
        """Whether it embeds sounds too: some folders hold only the half that reads."""
        return bool(self.config.audio_depths)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.model.text_projection.linear1.weight
        return weight

    def text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors ``[B, D]`` in float32.

        Raises:
            CheckpointError: the tokenizer's files cannot be found.
        """
        return self.tokens(*self.tokenizer(texts))

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed tokenized texts.

        Args:
            ids: int64 ``[B, L]`` of RoBERTa.
            mask: ``[B, L]``, 1 where there is a token.

        Returns:
            Unit vectors ``[B, D]`` in float32.
        """
        device = self._weight.device
        pooled = self.model.text_model(ids.to(device), mask.to(device)).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def audio(self, wave: Tensor, sample_rate: int) -> Tensor:
        """Embed the first 10 s of sounds.

        Args:
            wave: ``[B, S]`` in [-1, 1]; any S >= 1.
            sample_rate: of ``wave`` in Hz.

        Returns:
            Unit vectors ``[B, D]`` in float32.

        Raises:
            AudioError: no samples, samples that are not finite, or a sample rate far from any simple ratio to 48 kHz.
            ConfigError: only the half that reads is there.

        Source: torchaudio's resampler, as published: CLAP hears how much a resampler leaves above the old band.
        """
        if sample_rate < 1 or RATE // math.gcd(sample_rate, RATE) > MOST_PHASES:
            raise AudioError(
                f"CLAP hears 48000 Hz, seen {sample_rate}; change the rate with semanticodec.audio.resample"
            )
        # A second more than needed, so that the end of the window has its neighbours.
        rows = checked(wave[:, : (WINDOW // RATE + 1) * sample_rate].detach().float())
        return self.prepared(prepare(torchaudio.functional.resample(rows, sample_rate, RATE)))

    def prepared(self, wave: Tensor) -> Tensor:
        """Embed sounds from :func:`prepare` as unit vectors ``[B, D]`` in float32.

        Raises:
            ConfigError: only the half that reads is there.
        """
        if not self.hears:
            raise ConfigError("this CLAP only reads; load one with an audio encoder to rank or to embed sounds")
        mel = log_mel(wave.to(self._weight.device, torch.float32))[:, None].to(self._weight.dtype)
        pooled = self.model.audio_model(mel).pooler_output
        return functional.normalize(self.model.audio_projection(pooled).float(), dim=-1)

    def unconditional(self, batch: int) -> Tensor:
        """Return the embedding of the empty text ``[B, D]``, which stands for no condition, texts and sounds alike."""
        return self.text([""]).expand(batch, -1)


def _configuration(config: CLAPConfig) -> Any:
    library = transformers()
    text = library.ClapTextConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.text_dim,
        num_hidden_layers=config.text_depth,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_hidden,
        max_position_embeddings=config.positions,
        layer_norm_eps=1e-5,  # RoBERTa's; transformers' default for CLAP is 1e-12
    )
    audio = library.ClapAudioConfig(
        patch_embeds_hidden_size=config.audio_base,
        hidden_size=config.audio_base * 2 ** max(len(config.audio_depths) - 1, 0),
        depths=list(config.audio_depths),
        num_attention_heads=list(config.audio_heads),
    )
    return library.ClapConfig(
        text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=config.dim, attn_implementation="eager"
    )
