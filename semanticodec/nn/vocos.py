"""A vocoder that predicts spectra and leaves the synthesis to an inverse STFT.  B batch, L mel rows, D channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import HOP, VocosConfig


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron per row, with a learned residual scale."""

    def __init__(self, dim: int, hidden: int, kernel: int, right: int, scale: float) -> None:
        super().__init__()
        self.padding = (kernel - 1 - right, right)
        self.dwconv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, L]`` to ``[B, D, L]``."""
        y = self.dwconv(functional.pad(x, self.padding)).transpose(1, 2)
        y = self.pwconv2(functional.gelu(self.pwconv1(self.norm(y))))
        result: Tensor = x + (self.gamma * y).transpose(1, 2)
        return result


class Vocos(nn.Module):
    """Log-mel to waveform with bounded context on both sides.

    Sample s depends on mel rows up to ``(s + (n_fft - 160) / 2) // 160 + sum(right)`` and on none later.

    Source: the architecture of the Vocos paper (section 3), with convolutions padded so as to look only
    ``sum(right)`` rows ahead.
    """

    window: Tensor

    def __init__(self, config: VocosConfig, mel_bins: int = 64) -> None:
        super().__init__()
        self.config = config
        first, *others = config.right
        self.padding = (config.kernel - 1 - first, first)
        self.embed = nn.Conv1d(mel_bins, config.dim, config.kernel)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.hidden, config.kernel, right, 1 / config.layers) for right in others
        )
        self.final_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.n_fft + 2)
        self.register_buffer("window", torch.hann_window(config.n_fft, device="cpu"), persistent=False)

    @property
    def history(self) -> int:
        """Mel rows before a sample's own row that can influence it."""
        steps = (self.config.kernel - 1) * len(self.config.right) - sum(self.config.right)
        return steps + math.ceil((self.config.n_fft - HOP) / 2 / HOP)

    @property
    def lookahead(self) -> int:
        """Mel rows after a sample's own row that can influence it."""
        return sum(self.config.right) + math.ceil((self.config.n_fft - HOP) / 2 / HOP)

    def spectrum(self, mel: Tensor) -> Tensor:
        """Predict the complex spectrum ``[B, n_fft // 2 + 1, L]`` of ``mel`` ``[B, 64, L]``."""
        x = self.embed(functional.pad(mel.to(self.embed.weight.dtype), self.padding))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        log_magnitude, phase = self.head(self.final_norm(x.transpose(1, 2))).float().transpose(1, 2).chunk(2, 1)
        return torch.polar(log_magnitude.clamp_max(5.0).exp(), phase)

    def forward(self, mel: Tensor) -> Tensor:
        """Synthesise samples.

        Args:
            mel: log-mel ``[B, 64, L]``.

        Returns:
            Samples ``[B, 160 * L]``; row t is centred on sample ``160 t + 80``.
        """
        frames = torch.fft.irfft(self.spectrum(mel), dim=1) * self.window.float()[:, None]
        length = (mel.shape[-1] - 1) * HOP + self.config.n_fft
        joined = _overlap_add(frames, length)
        weight = _overlap_add((self.window.float() ** 2)[:, None].expand(-1, mel.shape[-1])[None], length)
        margin = (self.config.n_fft - HOP) // 2
        return (joined / weight.clamp_min(1e-8))[:, margin : length - margin]


def _overlap_add(frames: Tensor, length: int) -> Tensor:
    """Add frames ``[B, n_fft, L]`` at steps of ``HOP`` samples into ``[B, length]``."""
    return functional.fold(frames, (1, length), (1, frames.shape[1]), stride=(1, HOP))[:, 0, 0]
