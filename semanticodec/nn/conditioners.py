"""From the embeddings of codes to what the denoiser is conditioned on.  B batch, F frames, P patches, D channels."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..config import BANDS, LATENT_ROWS, MEL_BINS, PATCH, RATES, CodecConfig, GridConditioning
from .quantize import unstack


def interleaved_positions(length: int, dim: int) -> Tensor:
    """Return ``[length, dim]`` positions with sines in the even channels and cosines in the odd ones.

    Source: behaves as the published token positions (spec 4.2), in float32.
    """
    rate = torch.exp(torch.arange(0, dim, 2, device="cpu") * (-math.log(10000.0) / dim))
    angle = torch.arange(length, device="cpu")[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class ContextConditioner(nn.Module):
    """Append positions to the code embeddings: the context that the U-Net attends to."""

    positions: Tensor

    def __init__(self, frames: int, position_dim: int) -> None:
        super().__init__()
        self.register_buffer("positions", interleaved_positions(frames, position_dim), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[B, F, D]``, F at most one window, to ``[B, window, D + position_dim]``; missing frames are -1."""
        missing = len(self.positions) - features.shape[1]
        padded = functional.pad(features, (0, 0, 0, missing), value=-1.0)
        return torch.cat([padded, self.positions.to(features).expand(len(features), -1, -1)], -1)


class GridConditioner(nn.Module):
    """Lay the embedding of each patch on the cells of the latent grid that the patch covers."""

    CELLS = (PATCH // LATENT_ROWS, MEL_BINS // LATENT_ROWS // BANDS)

    def __init__(self, config: CodecConfig, conditioning: GridConditioning) -> None:
        super().__init__()
        self.stack = config.stack
        self.rate = RATES.index(config.token_rate)
        merged = config.stack[0] * config.stack[1]
        self.widths = (config.encoder.acoustic_dim, config.feature_dim)
        width = sum(self.widths) // merged
        cells = self.CELLS[0] * self.CELLS[1]
        self.enter = nn.Linear(width, conditioning.hidden)
        # On the CPU even while a model is built on "meta", where the first normal draw imports the compiler: a second.
        self.bands = nn.Parameter(torch.randn(BANDS, conditioning.hidden, device="cpu") * 0.02)
        self.rates = nn.Parameter(torch.randn(len(RATES), conditioning.hidden, device="cpu") * 0.02)
        self.leave = nn.Sequential(
            nn.Linear(conditioning.hidden, conditioning.hidden),
            nn.SiLU(),
            nn.Linear(conditioning.hidden, cells * conditioning.channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map frames ``[B, F, acoustic + semantic]`` to the grid ``[B, channels, 4 * columns, 16]``."""
        acoustic, semantic = features.split(self.widths, -1)
        patches = torch.cat([unstack(acoustic, self.stack), unstack(semantic, self.stack)], -1)
        x = self.enter(patches) + self.bands.repeat(patches.shape[1] // BANDS, 1) + self.rates[self.rate]
        time, frequency = self.CELLS
        result: Tensor = rearrange(
            self.leave(functional.silu(x)), "b (t f) (c i j) -> b c (t i) (f j)", f=BANDS, i=time, j=frequency
        )
        return result
