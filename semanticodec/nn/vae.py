"""The first stage: a KL autoencoder over the log-mel image ``[B, 1, rows, bins]``.

Module names are those of the published checkpoints, so that a key map is a table of prefixes.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import VAEConfig
from ..errors import ConfigError
from .norm import GroupNorm

LOGVAR_RANGE = (-30.0, 20.0)


def _norm(groups: int, channels: int) -> GroupNorm:
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        h = self.nin_shortcut(x) + h
        return h


class Attention(nn.Module):
    """Single-head self-attention over all cells of the image."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        shift: Tensor = self.proj_out(h[:, 0].transpose(1, 2).view(x.shape))
        return x + shift


class Mid(nn.Module):
    """The part at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_2(self.attn_1(self.block_1(x)))
        return x


class Downsample(nn.Module):
    """Halve both axes; only the far ends are padded, as in the published autoencoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """Double both axes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h


class Level(nn.Module):
    """The blocks of one resolution and the way to the next."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        widths = [in_channels] + blocks * [out_channels]
        self.block = nn.ModuleList(ResBlock(before, after, groups) for before, after in pairwise(widths))
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        x = self.upsample(self.downsample(x))
        return x


class Encoder(nn.Module):
    """From mel to the moments of the latent."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base * mult for mult in config.mults]
        self.conv_in = nn.Conv2d(1, config.base, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before, after, config.res_blocks, config.groups, downsample=level < len(widths) - 1)
            for level, (before, after) in enumerate(zip([config.base, *widths[:-1]], widths, strict=True))
        )
        self.mid = Mid(widths[-1], config.groups)
        self.norm_out = _norm(config.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, mel: Tensor) -> Tensor:
        x: Tensor = self.conv_in(mel)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True))
        return x


class Decoder(nn.Module):
    """From latent to mel."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base * mult for mult in config.mults]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], config.groups)
        # Indexed by resolution, 0 the highest; the highest index runs first.
        self.up = nn.ModuleList(
            Level(before, after, config.res_blocks + 1, config.groups, upsample=level > 0)
            for level, (before, after) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(config.groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True))
        return x


class AutoencoderKL(nn.Module):
    """Compress a log-mel image into a small latent one and back.

    Source: the KL autoencoder of AudioLDM (SemantiCodec spec section 4.5).
    """

    def __init__(self, config: VAEConfig, *, encoder: bool = True) -> None:
        """Build both halves, or without ``encoder`` only the one that decodes."""
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config) if encoder else None
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if encoder else None
        self.decoder = Decoder(config)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latent.

        Args:
            mel: natural-log mel ``[B, 1, T, bins]``; T and bins are multiples of ``2 ** (len(mults) - 1)``.

        Returns:
            Two tensors ``[B, latent_channels, T / factor, bins / factor]``, the second in [-30, 20].

        Raises:
            ConfigError: this autoencoder was built without its encoder, or the mel is not of such a size.
        """
        if self.encoder is None or self.quant_conv is None:
            raise ConfigError("this autoencoder holds only its decoder; build it with encoder=True to encode")
        factor = 2 ** (len(self.config.mults) - 1)
        if mel.shape[-2] % factor or mel.shape[-1] % factor:
            raise ConfigError(f"a mel of {tuple(mel.shape[-2:])} cells was given; pad both to multiples of {factor}")
        mean, logvar = self.quant_conv(self.encoder(mel)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """Return the log-mel of a latent.

        Args:
            z: ``[B, latent_channels, T, F]`` on the autoencoder's own scale (divided by the checkpoint's scale factor).

        Returns:
            Natural-log mel ``[B, 1, factor * T, factor * F]``.
        """
        mel: Tensor = self.decoder(self.post_quant_conv(z))
        return mel
