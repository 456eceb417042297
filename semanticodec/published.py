"""Compatibility mode: the published implementation's geometry, on top of the codec's own modules.

:class:`~semanticodec.codec.SemantiCodec` departs from the published code where that wastes or loses something.  The
functions here reproduce it instead, defects included, for whoever must match its tokens or its waveforms:

* the number of tokens follows a rounded floating-point formula (spec 6.1), and exact multiples of 10.24 s get a whole
  window of silence (6.2);
* the mean of the padded file is removed (6.3), of several channels only the first is coded (6.15);
* a decoded window has 32 samples more than 10.24 s, so that every window comes 2 ms later than it should (6.12), and
  some lengths lose a sample to rounding (6.18).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torchaudio
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from .audio import PADDING_ROW, fbank
from .codec import SemantiCodec
from .config import HOP, PATCH, SAMPLE_RATE
from .diffusion import PUBLISHED, Draw, SamplerOptions
from .latent import Conditioning
from .nn.conditioners import ContextConditioner

WINDOW = 163_840
"""Samples per encoder window (10.24 s)."""
OVERLAP = 10_240
"""Samples that two decoded windows share (0.64 s)."""
ROWS = WINDOW // HOP
FRAMES = ROWS // PATCH * 8
"""Frames per window at 100 tokens per second."""


def mono(wave: Tensor, sample_rate: int) -> Tensor:
    """Return the first channel at 16 kHz, resampled as torchaudio does by default.

    Args:
        wave: ``[channels, samples]``.
        sample_rate: in Hz.

    Returns:
        ``[samples]``.
    """
    resampled: Tensor = torchaudio.functional.resample(wave, sample_rate, SAMPLE_RATE)
    return resampled[0]


def token_count(samples: int, token_rate: int) -> tuple[float, int]:
    """Return the published target length of ``samples`` samples at 16 kHz, and the frames that are kept.

    Args:
        samples: of the recording, at 16 kHz.
        token_rate: 25, 50 or 100 tokens per second.

    Returns:
        The target, a float as published, and the number of frames.

    Source: spec 2 step 4 and 3.6; float64 arithmetic in this order.
    """
    seconds = samples / SAMPLE_RATE
    seconds += 0.16 - seconds % 0.16
    target = 8 * seconds / 0.16 / (100 / token_rate)
    return target, min(math.ceil(target), window_count(samples) * FRAMES * token_rate // 100)


def window_count(samples: int) -> int:
    """Return the encoder windows of ``samples`` samples: one more than needed at exact multiples."""
    return samples // WINDOW + 1


def fbank_windows(wave: Tensor) -> Tensor:
    """Return the filter bank ``[windows, 1024, 128]`` of ``[samples]`` at 16 kHz, the padded file's mean removed."""
    count = window_count(len(wave))
    padded = functional.pad(wave, (0, count * WINDOW - len(wave)))
    rows = fbank(padded - padded.mean())
    rows = functional.pad(rows, (0, 0, 0, count * ROWS - len(rows)), value=PADDING_ROW)
    return rearrange(rows, "(w r) b -> w r b", w=count)


def encode(codec: SemantiCodec, wave: Tensor, sample_rate: int) -> Tensor:
    """Encode a file as the published code does.

    Args:
        codec: an official preset.
        wave: ``[channels, samples]`` in [-1, 1] at ``sample_rate`` Hz, on the codec's device.
        sample_rate: in Hz.

    Returns:
        int64 ``[1, frames, 2]``: (semantic, acoustic) codes.

    Source: spec 2 and 3.  One quirk is left out: a window with a single filter-bank row of sound counts as empty there.
    """
    samples = mono(wave, sample_rate)
    codes = torch.cat([codec.encode_windows(window[None]) for window in fbank_windows(samples)])
    return rearrange(codes, "w q f -> 1 (w f) q")[:, : token_count(len(samples), codec.config.token_rate)[1]]


def window_spans(frames: int, token_rate: int) -> list[tuple[int, int]]:
    """Return the frames of each decoder window, which share a sixteenth with the one before.

    Args:
        frames: to be decoded.
        token_rate: 25, 50 or 100 tokens per second.

    Returns:
        ``[start, end)`` pairs.
    """
    window = FRAMES * token_rate // 100
    hop = window - window // 16
    starts = [0]
    while starts[-1] + window < frames:
        starts.append(starts[-1] + hop)
    return [(start, min(start + window, frames)) for start in starts]


def conditioning(codec: SemantiCodec, tokens: Tensor) -> tuple[Conditioning, Conditioning]:
    """Return what one window of tokens asks for, and its absence, for guidance.

    Args:
        codec: an official preset.
        tokens: int64 ``[B, frames, 2]``, at most a window.
    """
    conditioner = codec.model.conditioner
    assert isinstance(conditioner, ContextConditioner)
    features = codec.embed(tokens.mT)
    nothing = features.new_zeros(len(features), codec.config.window_frames, features.shape[2])
    asked, absent = (Conditioning(((conditioner(x), None),)) for x in (features, nothing))
    return asked, absent


def cross_fade(windows: Sequence[Tensor], overlap: int = OVERLAP) -> Tensor:
    """Join windows linearly; ramps in float64, sums in float32.

    Args:
        windows: at least one, ``[..., samples]`` each.
        overlap: samples that each shares with the one before.

    Returns:
        float32 ``[..., samples]``.
    """
    rise = torch.linspace(0, 1, overlap, dtype=torch.float64, device=windows[0].device)
    joined = windows[0]
    for window in windows[1:]:
        body, tail = joined[..., :-overlap], joined[..., -overlap:]
        mixed = (tail * rise.flip(0)).float() + (window[..., :overlap] * rise).float()
        joined = torch.cat([body, mixed, window[..., overlap:]], -1)
    return joined


def sample_count(frames: int, token_rate: int) -> int:
    """Return how many samples a decoded file is cut to: 320 per frame at 100 tokens per second, or one less.

    Args:
        frames: that were decoded.
        token_rate: 25, 50 or 100 tokens per second.
    """
    return int(((frames / 8) * 16 * 0.01 * (100 / token_rate)) * SAMPLE_RATE)


def decode(
    codec: SemantiCodec, tokens: Tensor, draw: Callable[[int], Draw], options: SamplerOptions = PUBLISHED
) -> Tensor:
    """Decode tokens as the published code does, window after window.

    Args:
        codec: an official preset.
        tokens: int64 ``[1, frames, 2]``: (semantic, acoustic) codes.
        draw: window index -> noise of its solver steps, ``[1, 8, 256, 16]`` each.  The published code takes all of it
            from torch's global generator in this order.
        options: the solver.

    Returns:
        float32 ``[1, 1, samples]`` at 16 kHz.
    """
    latent, waves = codec.model.latent, []
    assert latent is not None
    for index, (start, end) in enumerate(window_spans(tokens.shape[1], codec.config.token_rate)):
        asked, absent = conditioning(codec, tokens[:, start:end])
        mel = latent.mel(latent.generate(asked, absent, draw(index), options))
        waves.append(latent.vocoder(mel.mT.contiguous()).float())
    return cross_fade(waves)[:, None, : sample_count(tokens.shape[1], codec.config.token_rate)]
