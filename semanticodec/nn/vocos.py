"""A vocoder whose network predicts magnitudes and whose phases follow from them.  B batch, L mel rows, K bins."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import MelConfig, VocosConfig

MEL_16K = MelConfig()
FLOOR = 1e-3
"""Magnitudes below this are silence."""
MOMENTUM = 0.9
"""Of the phase iterations; Perraudin et al. (2013) use 0.99, this does better in 8 iterations."""


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

    Source: trunk and inverse-STFT synthesis of the Vocos paper (section 3), convolutions padded so as to look only
    ``sum(right)`` rows ahead.  Phases are not predicted: accelerated Griffin-Lim iterations find them, continuing from
    the samples before (real-time spectrogram inversion, Beauregard et al. 2005), because phases learnt in a few CPU
    hours cancel each other.
    """

    window: Tensor
    start: Tensor
    basis: Tensor

    def __init__(self, config: VocosConfig, mel: MelConfig = MEL_16K) -> None:
        super().__init__()
        self.config = config
        self.hop = mel.hop
        first, *others = config.right
        self.padding = (config.kernel - 1 - first, first)
        self.embed = nn.Conv1d(mel.bins, config.dim, config.kernel)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.hidden, config.kernel, right, 1 / config.layers) for right in others
        )
        self.final_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.n_fft // 2 + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # Pseudo-inverse of the mel filters: what the network corrects.
        self.register_buffer("basis", torch.zeros(mel.bins, config.n_fft // 2 + 1))
        self.register_buffer("window", torch.hann_window(config.n_fft, device="cpu"), persistent=False)
        # Where nothing came before, phases start scattered: aligned ones would be a click.
        golden = (torch.arange(config.n_fft // 2 + 1, device="cpu") ** 2 * 0.6180339887498949) % 1.0
        self.register_buffer("start", 2 * math.pi * golden, persistent=False)

    @property
    def history(self) -> int:
        """Mel rows before a sample's own row that its magnitudes depend on."""
        return (self.config.kernel - 1) * len(self.config.right) - sum(self.config.right)

    @property
    def lookahead(self) -> int:
        """Mel rows after a sample's own row that must be given before it is final."""
        return sum(self.config.right) + math.ceil(self.margin / self.hop)

    @property
    def margin(self) -> int:
        """Samples by which a row's frame reaches beyond its own ``hop`` samples, on either side."""
        return (self.config.n_fft - self.hop) // 2

    @property
    def memory(self) -> int:
        """Samples that :meth:`extend` needs of what came before."""
        return self.margin + self.history * self.hop

    def magnitude(self, mel: Tensor) -> Tensor:
        """Predict log-magnitudes ``[B, L, K]`` (K = n_fft / 2 + 1) of log-mel ``[B, bins, L]``."""
        x = self.embed(functional.pad(mel.to(self.embed.weight.dtype), self.padding))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        correction: Tensor = self.head(self.final_norm(x.transpose(1, 2))).float()
        smooth = (mel.float().mT.exp() @ self.basis.float()).clamp_min(FLOOR).log()
        return (smooth + correction).clamp_max(8.0)

    def forward(self, mel: Tensor) -> Tensor:
        """Synthesise a whole signal, as if silence came before.

        Args:
            mel: log-mel ``[B, bins, L]``.

        Returns:
            float32 samples ``[B, hop * L]``; row t is centred on sample ``hop * (t + 1/2)``.
        """
        silence = torch.zeros(len(mel), self.margin, device=mel.device)
        return self._invert(self.magnitude(mel).exp(), silence)[:, self.margin :][:, : mel.shape[2] * self.hop]

    def extend(self, mel: Tensor, past: Tensor) -> Tensor:
        """Synthesise the rows whose context is complete, continuing from known samples.

        Args:
            mel: log-mel ``[B, bins, history + n + lookahead]``.
            past: the last ``memory`` samples before row ``history``, ``[B, memory]``.

        Returns:
            float32 samples ``[B, hop * n]``.
        """
        # Rows that lie wholly in the known samples need no phases; a few of them anchor the first unknown ones.
        anchor = max(0, self.history - math.ceil(self.config.n_fft / self.hop))
        magnitude = self.magnitude(mel)[:, anchor:].exp()
        known = past[:, anchor * self.hop :]
        end = known.shape[1] + (mel.shape[2] - self.history - self.lookahead) * self.hop
        return self._invert(magnitude, known)[:, known.shape[1] : end]

    def _invert(self, magnitude: Tensor, known: Tensor) -> Tensor:
        """Find a signal ``[B, (L - 1) * hop + n_fft]`` that begins with ``known`` and has magnitudes ``[B, L, K]``."""
        size, rows = self.config.n_fft, magnitude.shape[1]
        window = self.window.float()
        length = (rows - 1) * self.hop + size
        weight = _overlap_add((window**2).expand(1, rows, -1), length, self.hop).clamp_min(1e-3)
        fixed = functional.pad(known.float(), (0, length - known.shape[1]))
        free = torch.arange(length, device=known.device) >= known.shape[1]

        def signal(spectrum: Tensor) -> Tensor:
            joined = _overlap_add(torch.fft.irfft(spectrum, size) * window, length, self.hop) / weight
            result: Tensor = torch.where(free, joined, fixed)
            return result

        def spectrum(samples: Tensor) -> Tensor:
            result: Tensor = torch.fft.rfft(samples.unfold(1, size, self.hop) * window)
            return result

        last = max((known.shape[1] - size) // self.hop, 0)
        start = self.start.float()
        seen = spectrum(fixed)[:, last] + torch.polar(torch.full_like(start, 1e-6), start)
        advance = torch.arange(rows, device=known.device)[:, None] - last
        advance = advance * (2 * math.pi * self.hop / size) * torch.arange(len(self.start), device=known.device)
        estimate = torch.polar(magnitude, seen.angle()[:, None] + advance)
        before = None
        for _ in range(self.config.iterations):
            now = spectrum(signal(estimate))
            pushed = now if before is None else now + MOMENTUM * (now - before)
            estimate = magnitude * pushed / pushed.abs().clamp_min(1e-8)
            before = now
        return signal(estimate)


def _overlap_add(frames: Tensor, length: int, hop: int) -> Tensor:
    """Add frames ``[B, L, n_fft]`` at steps of ``hop`` samples into ``[B, length]``."""
    size = frames.shape[2]
    result: Tensor = functional.fold(frames.transpose(1, 2), (1, length), (1, size), stride=(1, hop))[:, 0, 0]
    return result
