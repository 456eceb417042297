"""From features to codes and back: patch stacking, nearest-neighbour lookup, and the residual encoder.

Positions: frame ``g * group + j`` is band group j (0 = lowest) of time step g.  At 100 tokens per second a step is one
patch column with 8 bands; at 50, one column whose bands are joined in pairs; at 25, two columns, likewise in pairs.
B batch, P patches, F frames, D channels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..config import BANDS, CodecConfig


def stack(patches: Tensor, by: tuple[int, int]) -> Tensor:
    """Join ``by`` = (time, frequency) neighbouring patches along channels: ``[B, P, D]`` to ``[B, F, merged * D]``."""
    time, frequency = by
    return rearrange(patches, "b (t i f j) d -> b (t f) (i j d)", i=time, j=frequency, f=BANDS // frequency)


def unstack(frames: Tensor, by: tuple[int, int]) -> Tensor:
    """Undo :func:`stack`: ``[B, F, merged * D]`` to ``[B, P, D]``, time-major."""
    time, frequency = by
    return rearrange(frames, "b (t f) (i j d) -> b (t i f j) d", i=time, j=frequency, f=BANDS // frequency)


def nearest(x: Tensor, table: Tensor, *, root: bool = False) -> Tensor:
    """Find the nearest row of ``table`` by Euclidean distance.

    Args:
        x: ``[..., D]``.
        table: ``[entries, D]``.
        root: compare square roots, as the published acoustic quantiser does; it decides ties differently.

    Returns:
        int64 ``[...]``; the first entry on ties.

    Source: the expanded form ``|x|^2 + |c|^2 - 2 x c`` of the published code (spec 3.4, 3.5), in float32.
    """
    table = table.float()
    squares = (table * table).sum(-1)

    def among(rows: Tensor) -> Tensor:
        distance = (rows * rows).sum(-1, keepdim=True) + squares - 2 * (rows @ table.T)
        return (distance.clamp_min(0).sqrt() if root else distance).argmin(-1)

    # Distances to 16384 entries are 64 MB each for so many rows; of a batch of windows they would be gigabytes.
    rows = x.float().reshape(-1, x.shape[-1])
    return torch.cat([among(part) for part in rows.split(1024)]).view(x.shape[:-1])


class Codebooks(nn.Module):
    """The two tables both halves of the codec need: semantic centroids and acoustic code vectors."""

    semantic: Tensor
    acoustic: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.register_buffer("semantic", torch.zeros(config.encoder.semantic_size, config.feature_dim))
        self.register_buffer("acoustic", torch.zeros(config.encoder.acoustic_size, config.encoder.acoustic_dim))

    def embed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Look up codes ``[B, 2, F]``: (semantic ``[B, F, feature_dim]``, acoustic ``[B, F, acoustic_dim]``)."""
        return self.semantic[codes[:, 0]], self.acoustic[codes[:, 1]]


class ResidualEncoder(nn.Module):
    """LSTM from (features, their quantised version) to the vectors that the acoustic codebook quantises."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        encoder = config.encoder
        self.lstm = nn.LSTM(
            2 * config.feature_dim,
            encoder.lstm_dim,
            encoder.lstm_layers,
            batch_first=True,
            bidirectional=encoder.bidirectional,
        )
        self.project = nn.Linear(encoder.lstm_dim * (1 + encoder.bidirectional), encoder.acoustic_dim, bias=False)

    def forward(self, features: Tensor, semantic: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encode what the semantic codes leave out.

        Args:
            features: ``[B, F, feature_dim]``.
            semantic: their nearest centroids, same shape.
            padding: bool ``[B, F]``, true where a frame stands for no audio; its input is replaced by -1.

        Returns:
            ``[B, F, acoustic_dim]``.
        """
        x = torch.cat([features, semantic], -1)
        if padding is not None:
            x = torch.where(padding[..., None], -torch.ones_like(x), x)
        result: Tensor = self.project(self.lstm(x)[0])
        return result
