"""AudioMAE's encoder: a vision transformer over 16 x 16 patches of the filter bank.  B batch, N tokens, D channels."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..config import BANDS, PATCH, AudioMAEConfig

WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
LARGE = 1 << 19
"""Weights from which a layer is worth the detour: their order is changed in every call."""


def position_table(columns: int, dim: int) -> Tensor:
    """Build fixed 2-D sine-cosine positions, time in the first half of the channels and frequency in the second.

    Args:
        columns: patch columns (time steps).
        dim: channels, a multiple of 4.

    Returns:
        ``[1, 1 + columns * 8, dim]``; row 0 is the class token's (zeros), then time-major order.

    Source: the MAE paper's table.  The published AudioMAE table is laid out for the transposed grid; it is part of the
    checkpoint and replaces this one.
    """

    # On the CPU even while a model is built on "meta", where the first torch.arange imports the compiler: a second.
    def code(position: Tensor) -> Tensor:
        half = dim // 4
        angle = position[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64, device="cpu") / half)
        return torch.cat([angle.sin(), angle.cos()], 1)

    time = torch.arange(columns, dtype=torch.float64, device="cpu").repeat_interleave(BANDS)
    band = torch.arange(BANDS, dtype=torch.float64, device="cpu").repeat(columns)
    body = torch.cat([code(time), code(band)], 1)
    return torch.cat([torch.zeros(1, dim, device="cpu"), body.float()])[None]


class Linear(nn.Linear):
    """A linear layer that a CPU with AVX-512 computes as a convolution of 1 x 1 where it is large.

    PyTorch's matrix products are MKL's, which leave AVX-512 unused on processors that are not Intel's; its convolutions
    are oneDNN's, which use it and take half the time.  Both round differently, by some 1e-6.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D']``."""
        if not WIDE or self.weight.numel() < LARGE or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        image = rearrange(x[:, None], "b h n d -> b d h n")  # one with its channels innermost, as it lies in memory
        return rearrange(functional.conv2d(image, self.weight[..., None, None], self.bias), "b d 1 n -> b n d")


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D]``."""
        q, k, v = rearrange(self.qkv(x), "b n (p h d) -> p b h n d", p=3, h=self.heads)
        result: Tensor = self.proj(rearrange(functional.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return result


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D]``."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return result


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D]``."""
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchEmbed(nn.Module):
    """One linear map per 16 x 16 patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, PATCH, PATCH)

    def forward(self, fbank: Tensor) -> Tensor:
        """Map ``[B, rows, 128]`` to ``[B, columns * 8, D]``, time-major."""
        result: Tensor = rearrange(self.proj(fbank[:, None]), "b d t f -> b (t f) d")
        return result


class AudioMAE(nn.Module):
    """The encoder half of a masked autoencoder over one window of filter bank.

    Source: behaves as the published AudioMAE ViT-B/16 inside SemantiCodec (spec 3.2).
    """

    pos_embed: Tensor

    def __init__(self, config: AudioMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("pos_embed", position_table(config.columns, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def embed(self, fbank: Tensor) -> Tensor:
        """Return patch tokens with their positions, ``[B, columns * 8, D]``, before the class token joins."""
        result: Tensor = self.patch_embed(fbank) + self.pos_embed[:, 1:]
        return result

    def transform(self, tokens: Tensor) -> Tensor:
        """Run the blocks over any subset of patch tokens and pool the last ``pooled_blocks`` normed outputs.

        Args:
            tokens: ``[B, N, D]`` from :meth:`embed`.

        Returns:
            ``[B, N, D]``, without the class token.
        """
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], 1)
        skipped = len(self.blocks) - self.config.pooled_blocks
        pooled = torch.zeros_like(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= skipped:
                pooled = pooled + self.norm(x)
        return pooled[:, 1:] / self.config.pooled_blocks

    def forward(self, fbank: Tensor) -> Tensor:
        """Compute the features of one window.

        Args:
            fbank: normalised filter bank ``[B, columns * 16, 128]``.

        Returns:
            ``[B, columns * 8, D]``; token ``8 t + f`` is the patch at time step t and band f (0 = lowest).
        """
        return self.transform(self.embed(fbank))
