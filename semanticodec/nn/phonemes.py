"""The text encoder of VITS: a transformer with relative positions.  B batch, L symbols, D channels, H heads."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn


class RelativeAttention(nn.Module):
    """Self-attention that knows how far apart two symbols are, up to ``window`` of them.

    Source: behaves as VITS's attention (one table of distances for all heads, nothing beyond the window).
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.q, self.k, self.v, self.o = (nn.Conv1d(dim, dim, 1) for _ in range(4))
        self.relative_k, self.relative_v = (
            nn.Parameter(torch.randn(2 * window + 1, dim // heads) * (dim // heads) ** -0.5) for _ in range(2)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``[B, D, L]`` to ``[B, D, L]``; symbols see each other where ``mask`` ``[B, 1, L, L]`` is not 0."""
        q, k, v = (rearrange(part(x), "b (h c) l -> b h l c", h=self.heads) for part in (self.q, self.k, self.v))
        q = q * q.shape[-1] ** -0.5
        length = x.shape[-1]
        place = torch.arange(length, device=x.device)
        distance = place[None] - place[:, None] + self.window  # of column from row, 0 .. 2 * window
        near = (distance >= 0) & (distance <= 2 * self.window)
        index = distance.clamp(0, 2 * self.window).expand(*q.shape[:2], -1, -1)
        scores = q @ k.mT + (q @ self.relative_k.T).gather(-1, index) * near
        weights = scores.masked_fill(mask == 0, -1e4).softmax(-1)
        offsets = torch.zeros(*weights.shape[:3], 2 * self.window + 1, dtype=weights.dtype, device=x.device)
        offsets = offsets.scatter_add(-1, index, weights * near)
        result: Tensor = self.o(rearrange(weights @ v + offsets @ self.relative_v, "b h l c -> b (h c) l"))
        return result


class EncoderLayer(nn.Module):
    """Attention and two convolutions, each normalised after its residual."""

    def __init__(self, dim: int, hidden: int, heads: int, kernel: int, window: int) -> None:
        super().__init__()
        self.attention = RelativeAttention(dim, heads, window)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1 = nn.Conv1d(dim, hidden, kernel, padding="same")
        self.conv2 = nn.Conv1d(hidden, dim, kernel, padding="same")

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Map ``[B, D, L]`` to ``[B, D, L]``; ``present`` ``[B, 1, L]`` is 1 where there is a symbol."""
        x = self._norm(self.norm1, x + self.attention(x, present[:, :, None] * present[..., None]))
        y = self.conv2(self.conv1(x * present).relu() * present) * present
        return self._norm(self.norm2, x + y)

    @staticmethod
    def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        result: Tensor = norm(x.mT).mT
        return result


class PhonemeEncoder(nn.Module):
    """Encodes phonemes and tells where in a fixed frame of ``length`` symbols each stands.

    Source: behaves as the phoneme condition of AudioLDM 2's speech models (spec 4.5).
    """

    def __init__(
        self, symbols: int, dim: int, hidden: int, heads: int, depth: int, kernel: int, window: int, length: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, hidden, heads, kernel, window) for _ in range(depth))
        self.positions = nn.Parameter(torch.zeros(1, dim, length))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode symbols.

        Args:
            ids: int64 ``[B, length]``.
            mask: ``[B, length]``, 1 where there is a symbol.

        Returns:
            ``[B, length, D]``; where there is no symbol, only the position.
        """
        present = mask.to(self.positions.dtype)[:, None]
        x = self.embed(ids).mT * math.sqrt(self.embed.embedding_dim) * present
        for layer in self.layers:
            x = layer(x, present)
        result: Tensor = (x * present + self.positions).mT
        return result
