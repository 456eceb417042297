"""AudioMAE features as a sequence of vectors: what AudioLDM 2's GPT-2 learns to write.  B batch, S samples."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..audio import PADDING_ROW, fbank
from ..config import BANDS, HOP, PATCH
from ..nn.audiomae import AudioMAE
from .sequence import Context


def window(wave: Tensor, columns: int = 64) -> Tensor:
    """Compute the filter bank of one window.

    Args:
        wave: ``[B, S]`` at 16 kHz, at least 400 samples; what is beyond the window is left out.
        columns: patch columns of the window (64 are 10.24 s).

    Returns:
        ``[B, columns * 16, 128]``; rows beyond the sound are the constant that stands for no audio.

    Source: the published AudioMAE conditioner; it removes the mean of the sound first, which only rounding shows.
    """
    rows = columns * PATCH
    bank = fbank(wave[:, : (rows + 2) * HOP + HOP // 2])[:, :rows]
    return functional.pad(bank, (0, 0, 0, rows - bank.shape[1]), value=PADDING_ROW)


def pool(features: Tensor, time: int, bands: int) -> Tensor:
    """Halfway between the average and the maximum of every ``time`` x ``bands`` patches.

    Args:
        features: ``[B, columns * 8, D]``, time-major, of :class:`~semanticodec.nn.audiomae.AudioMAE`.
        time: columns that become one; divides their number.
        bands: bands that become one; divides 8.

    Returns:
        ``[B, columns / time * 8 / bands, D]``, time-major.
    """
    image = rearrange(features, "b (t f) d -> b d t f", f=BANDS)
    size = (time, bands)
    pooled = (functional.avg_pool2d(image, size) + functional.max_pool2d(image, size)) / 2
    return rearrange(pooled, "b d t f -> b (t f) d")


def context(mae: AudioMAE, wave: Tensor, time: int = 8, bands: int = 8) -> Context:
    """Return the pooled features of one window of sound: the truth that the sequence generator guesses.

    Args:
        mae: AudioLDM 2's.
        wave: ``[B, S]`` at 16 kHz, at least 400 samples.
        time: patch columns that become one vector; 1 for speech.
        bands: bands that become one vector; 1 for speech.

    Returns:
        ``[B, 8, 768]`` at the published sizes, and a mask of ones.  Its unconditional value is zeros under ones.
    """
    features = mae(window(wave, mae.config.columns).to(mae.pos_embed))
    pooled = pool(features, time, bands)
    return pooled, torch.ones(pooled.shape[:2], dtype=pooled.dtype, device=pooled.device)
