"""A vocoder whose network predicts magnitudes and whose phases follow from them.  B batch, L mel rows, K bins."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import MelConfig, VocosConfig
from ..errors import ConfigError

MEL_16K = MelConfig()
FLOOR = 1e-3
"""Magnitudes below this are silence."""
MOMENTUM = 0.9
"""Of the phase iterations; Perraudin et al. (2013) use 0.99, this does better in 8 iterations."""


class Memory(NamedTuple):
    """What :meth:`Vocos.extend` needs of what came before.

    Args:
        context: the last ``kernel - 1`` columns of what each convolution read, one under the other,
            ``[B, bins + layers * dim, kernel - 1]``.
        magnitude: of ``anchor`` rows before the first that is not final and ``overhang`` from it, ``[B, rows, K]``.
        wave: the samples ``[B, S]`` from the first of these rows' frames to the last final one.
    """

    context: Tensor
    magnitude: Tensor
    wave: Tensor


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron per row, with a learned residual scale."""

    def __init__(self, dim: int, hidden: int, kernel: int, right: int, scale: float) -> None:
        super().__init__()
        self.context = (kernel - 1 - right, right)
        self.dwconv = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, D, kernel - 1 + L]`` to ``[B, D, L]``: ``context`` columns lie on either side."""
        y = self.dwconv(x).transpose(1, 2)
        y = self.pwconv2(functional.gelu(self.pwconv1(self.norm(y))))
        left, right = self.context
        result: Tensor = x[:, :, left : x.shape[2] - right] + (self.gamma * y).transpose(1, 2)
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
        if config.kernel < 2 or sum(config.right) >= config.kernel:
            raise ConfigError(
                f"kernels have at least 2 rows, and together look ahead by fewer rows than one has; seen are kernels "
                f"of {config.kernel} rows that look {sum(config.right)} ahead"
            )
        self.embed = nn.Conv1d(mel.bins, config.dim, config.kernel)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.dim, config.hidden, config.kernel, right, 1 / config.layers)
            for right in config.right[1:]
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
    def lookahead(self) -> int:
        """Mel rows after a sample's own row that must be given before it is final."""
        return sum(self.config.right) + self.overhang

    @property
    def margin(self) -> int:
        """Samples by which a row's frame reaches beyond its own ``hop`` samples, on either side."""
        return (self.config.n_fft - self.hop) // 2

    @property
    def overhang(self) -> int:
        """Rows after a row whose frames reach into its own samples."""
        return math.ceil(self.margin / self.hop)

    @property
    def anchor(self) -> int:
        """Rows before the first that is not final: the last wholly known one, which leads the phases, and what follows.

        The frames of these reach into samples that are not final.
        """
        return math.ceil((self.config.n_fft - self.margin) / self.hop)

    def _embed(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return embedded

    def _head(self, x: Tensor, mel: Tensor) -> Tensor:
        correction: Tensor = self.head(self.final_norm(x.transpose(1, 2))).float()
        with torch.autocast(mel.device.type, enabled=False):
            smooth = (mel.float().mT.exp() @ self.basis.float()).clamp_min(FLOOR).log()
        return (smooth + correction).clamp_max(8.0)

    def magnitude(self, mel: Tensor) -> Tensor:
        """Predict log-magnitudes ``[B, L, K]`` (K = n_fft / 2 + 1) of log-mel ``[B, bins, L]``."""
        x = mel.to(self.embed.weight.dtype)
        for layer, right in zip((self._embed, *self.blocks), self.config.right, strict=True):
            x = layer(functional.pad(x, (self.config.kernel - 1 - right, right)))
        return self._head(x, mel)

    def next_magnitude(self, mel: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the rows that ``n`` more rows of mel complete.

        Args:
            mel: log-mel ``[B, bins, n]``, n at least 1.
            context: as in :class:`Memory`.

        Returns:
            Log-magnitudes ``[B, n, K]``, which lag ``sum(right)`` rows behind, and the new context.
        """
        lag, columns = sum(self.config.right), context.shape[2]
        first, *others = context.split([mel.shape[1], *[self.config.dim] * self.config.layers], 1)
        rows = torch.cat([first, mel], 2)
        kept, x = [rows[:, :, -columns:]], self._embed(rows.to(self.embed.weight.dtype))
        for block, before in zip(self.blocks, others, strict=True):
            x = torch.cat([before.to(x.dtype), x], 2)
            kept.append(x[:, :, -columns:].float())
            x = block(x)
        return self._head(x, rows[:, :, columns - lag : rows.shape[2] - lag]), torch.cat(kept, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """Synthesise a whole signal, as if silence came before.

        Args:
            mel: log-mel ``[B, bins, L]``.

        Returns:
            float32 samples ``[B, hop * L]``; row t is centred on sample ``hop * (t + 1/2)``.
        """
        silence = torch.zeros(len(mel), self.margin, device=mel.device)
        return self._invert(self.magnitude(mel).exp(), silence)[:, self.margin :][:, : mel.shape[2] * self.hop]

    @torch.no_grad()
    def begin(self, batch: int, level: float) -> Memory:
        """Return the memory after endless silence.

        Args:
            batch: rows.
            level: log-mel of silence.
        """
        columns = self.config.kernel - 1
        silence = torch.full((1, self.embed.in_channels, 1), level, device=self.basis.device)
        context, x = [silence], silence.to(self.embed.weight.dtype)
        for layer in (self._embed, *self.blocks):
            x = layer(x.expand(-1, -1, columns + 1))
            context.append(x.float())
        context.pop()
        row = self._head(x, silence).exp()
        samples = self.margin + self.anchor * self.hop
        return Memory(
            torch.cat(context, 1).repeat(batch, 1, columns),
            row.repeat(batch, self.anchor + self.overhang, 1),
            torch.zeros(batch, samples, device=row.device),
        )

    def extend(self, mel: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Synthesise the samples that more rows complete, continuing from those before.

        Args:
            mel: log-mel ``[B, bins, n]``, n at least 1.
            memory: from :meth:`begin` or the call before.

        Returns:
            float32 samples ``[B, hop * n]``, which lag ``lookahead`` rows behind, and the new memory.
        """
        new, context = self.next_magnitude(mel, memory.context)
        magnitude, known = torch.cat([memory.magnitude, new.exp()], 1), memory.wave.shape[1]
        wave = self._invert(magnitude, memory.wave)[:, : known + mel.shape[2] * self.hop]
        # copies, so that a memory holds no more than it is
        parts = magnitude[:, -memory.magnitude.shape[1] :], wave[:, -known:]
        kept = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        return wave[:, known:], Memory(context, *kept)

    def _invert(self, magnitude: Tensor, known: Tensor) -> Tensor:
        """Find a signal ``[B, (L - 1) * hop + n_fft]`` that begins with ``known`` and has magnitudes ``[B, L, K]``."""
        size, rows = self.config.n_fft, magnitude.shape[1]
        window = self.window.float()
        length = (rows - 1) * self.hop + size
        weight = _overlap_add((window**2).expand(1, rows, -1), self.hop).clamp_min(1e-3)
        last = max((known.shape[1] - size) // self.hop, 0)

        def signal(spectrum: Tensor) -> Tensor:
            result = _overlap_add(torch.fft.irfft(spectrum, size) * window, self.hop) / weight
            result[:, : known.shape[1]] = known
            return result

        def spectrum(samples: Tensor) -> Tensor:
            result: Tensor = torch.fft.rfft(samples.unfold(1, size, self.hop) * window)
            return result

        start = self.start.float()
        fixed = functional.pad(known.float(), (0, length - known.shape[1]))
        seen = spectrum(fixed)[:, last] + torch.polar(torch.full_like(start, 1e-6), start)
        advance = torch.arange(rows, device=known.device)[:, None] - last
        advance = advance * (2 * math.pi * self.hop / size) * torch.arange(len(self.start), device=known.device)
        estimate = torch.polar(magnitude, seen.angle()[:, None] + advance)
        before = None
        for _ in range(self.config.iterations):
            # in real numbers: complex division and absolute values take several times as long
            now = torch.view_as_real(spectrum(signal(estimate)))
            pushed = now if before is None else torch.lerp(before, now, 1 + MOMENTUM)
            power = pushed * pushed
            scale = magnitude * (power[..., 0] + power[..., 1]).clamp_min(1e-16).rsqrt()
            estimate = torch.view_as_complex(pushed) * scale
            before = now
        return signal(estimate)


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """Add frames ``[B, L, size]`` at steps of ``hop`` samples into ``[B, (L - 1) * hop + size]``."""
    batch, rows, size = frames.shape
    parts = math.ceil(size / hop)
    cut = functional.pad(frames, (0, parts * hop - size)).view(batch, rows, parts, hop)
    result = frames.new_zeros(batch, rows + parts - 1, hop)
    for part in range(parts):
        result[:, part : part + rows] += cut[:, :, part]
    return result.view(batch, -1)[:, : (rows - 1) * hop + size]
