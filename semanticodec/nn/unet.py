"""The denoiser: a U-Net over the latent image with attention to itself and to any number of contexts.

Module names are those of the published checkpoints, so that a key map is a table of prefixes.
Images are ``[B, channels, time, frequency]``; in ``channels_last`` memory the step to tokens and back copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UNetConfig
from ..errors import ConfigError
from .norm import GroupNorm


@dataclass(frozen=True)
class ContextCache:
    """What every attention site needs of one context; constant over the steps of a solver.

    Attributes:
        sites: the (keys, values) of each reader in the order of execution, both ``[B, heads, L, head_dim]``.
        bias: added to the scores, ``[B, 1, 1, L]``, 0 where the context may be looked at; None without a mask.
    """

    sites: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None = None

    def joined(self, other: ContextCache) -> ContextCache:
        """Stack two batches; the shorter context is padded, and the padding is hidden."""
        lengths = [cache.sites[0][0].shape[2] for cache in (self, other)]
        length = max(lengths)
        padded = [cache.padded(length) for cache in (self, other)]
        sites = tuple(
            (torch.cat([ka, kb]), torch.cat([va, vb]))
            for (ka, va), (kb, vb) in zip(padded[0].sites, padded[1].sites, strict=True)
        )
        if padded[0].bias is None and padded[1].bias is None:
            return ContextCache(sites)
        rows = [
            keys.new_zeros(len(keys), 1, 1, length) if bias is None else bias
            for cache in padded
            for (keys, _), bias in [(cache.sites[0], cache.bias)]
        ]
        return ContextCache(sites, torch.cat(rows))

    def padded(self, length: int) -> ContextCache:
        """Return the same context at ``length`` positions, the new ones hidden even from rows that may see nothing."""
        keys = self.sites[0][0]
        missing = length - keys.shape[2]
        if not missing:
            return self
        sites = tuple((F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))) for k, v in self.sites)
        bias = keys.new_zeros(len(keys), 1, 1, keys.shape[2]) if self.bias is None else self.bias
        return ContextCache(sites, F.pad(bias, (0, missing), value=torch.finfo(bias.dtype).min))


@dataclass(frozen=True)
class Residuals:
    """What ControlNets add to a U-Net: one tensor per input block (to its skip), and one to the middle's output."""

    skips: tuple[Tensor, ...]
    middle: Tensor

    def __add__(self, other: Residuals) -> Residuals:
        skips = tuple(a + b for a, b in zip(self.skips, other.skips, strict=True))
        return Residuals(skips, self.middle + other.middle)


def zeroed(layer: nn.Module) -> nn.Module:
    """Let a residual branch start as nothing, so that depth does not hurt the first training steps."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return the sinusoids of timesteps.

    Args:
        t: timesteps ``[B]``.
        dim: even number of channels.

    Returns:
        ``[B, dim]`` float32, cosines in the first half, sines in the second.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10_000) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around the addition of the time embedding."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, in_channels),
            nn.SiLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the published dropout of 0, which counts in the key names
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h: Tensor = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None]
        h = self.skip_connection(x) + self.out_layers(h)
        return h


class Downsample(nn.Module):
    """Halve both axes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.op(x)
        return h


class Upsample(nn.Module):
    """Double both axes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return h


class Attention(nn.Module):
    """Multi-head attention whose keys and values may come from elsewhere, already projected."""

    def __init__(self, dim: int, head_dim: int, context_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        keys, values = self.keys_values(x) if keys_values is None else keys_values
        h = F.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values, attn_mask=bias)
        mixed: Tensor = self.to_out(h.transpose(1, 2).flatten(2))
        return mixed


class GEGLU(nn.Module):
    """A linear layer of twice the width, one half gating the other."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        h: Tensor = value * F.gelu(gate)
        return h


class FeedForward(nn.Module):
    """The transformer's pointwise part."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.net(x)
        return h


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (to itself where there is none), feed-forward."""

    def __init__(self, dim: int, head_dim: int, context_dim: int | None) -> None:
        super().__init__()
        self.attn1 = Attention(dim, head_dim, dim)
        self.attn2 = Attention(dim, head_dim, dim if context_dim is None else context_dim)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), keys_values, bias)
        x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A transformer over the cells of an image, time-major.

    ``source`` says which (context, site of the first block) its second attentions read from a sequence of
    :class:`ContextCache`; None attends to itself.
    """

    def __init__(
        self, channels: int, head_dim: int, config: UNetConfig, context_dim: int | None, source: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.source = source
        self.norm = GroupNorm(config.groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, head_dim, context_dim) for _ in range(config.depth)
        )
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    @property
    def readers(self) -> list[Attention]:
        """The attentions that read the context, one per block."""
        return [block.attn2 for block in self.transformer_blocks]  # type: ignore[misc]

    def forward(self, x: Tensor, contexts: Sequence[ContextCache]) -> Tensor:
        h: Tensor = self.proj_in(self.norm(x))
        shape = h.shape
        h = h.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.transformer_blocks):
            if self.source is None:
                h = block(h, None, None)
            else:
                context, site = self.source
                h = block(h, contexts[context].sites[site + i], contexts[context].bias)
        h = self.proj_out(h.transpose(1, 2).view(shape))
        return x + h


class Stage(nn.ModuleList):
    """Layers in a row, each handed what it needs."""

    def forward(self, x: Tensor, emb: Tensor, contexts: Sequence[ContextCache]) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, contexts)
            else:
                x = layer(x)
        return x


class Builder:
    """Makes the parts of one network and numbers the readers of its contexts in the order of execution."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config
        self.sites = 0
        both = config.film_dim is not None and config.film_mode == "concat"
        self.embed_dim = (8 if both else 4) * config.base

    def res(self, in_channels: int, out_channels: int) -> ResBlock:
        return ResBlock(in_channels, out_channels, self.embed_dim, self.config.groups)

    def attention(self, level: int) -> list[SpatialTransformer]:
        """One transformer per entry of ``contexts``; entries with a width take the given contexts in turn."""
        config = self.config
        if level not in config.attention_levels:
            return []
        channels = config.base * config.mults[level]
        head_dim = config.head_dim if config.heads is None else channels // config.heads
        units: list[SpatialTransformer] = []
        index = 0
        for width in config.contexts:
            source = None if width is None else (index, self.sites)
            index += width is not None
            units.append(SpatialTransformer(channels, head_dim, config, width, source))
        self.sites += config.depth
        return units


class Contraction(nn.Module):
    """What a U-Net and its ControlNets have in common: the embeddings, the way down, and the middle; abstract."""

    def __init__(self, config: UNetConfig, build: Builder) -> None:
        super().__init__()
        self.config = config
        base, wide = config.base, 4 * config.base
        self.time_embed = nn.Sequential(nn.Linear(base, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.film_emb = None if config.film_dim is None else nn.Linear(config.film_dim, wide)
        channels = base
        self.widths = [base]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(config.in_channels, base, 3, padding=1)])])
        for level, mult in enumerate(config.mults):
            for _ in range(config.res_blocks):
                self.input_blocks.append(Stage([build.res(channels, base * mult), *build.attention(level)]))
                channels = base * mult
                self.widths.append(channels)
            if level < len(config.mults) - 1:
                self.input_blocks.append(Stage([Downsample(channels)]))
                self.widths.append(channels)
        last = len(config.mults) - 1
        self.middle_block = Stage(
            [build.res(channels, channels), *build.attention(last), build.res(channels, channels)]
        )

    def project_contexts(self, contexts: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[ContextCache, ...]:
        """Compute the keys and values of contexts once, for any number of calls of :meth:`forward`.

        Args:
            contexts: one (sequence ``[B, L, width]``, mask ``[B, L]`` or None) per width in ``config.contexts``, in
                that order; where the mask is 1 the sequence may be looked at, None means everywhere.

        Returns:
            One value per context, to be handed to :meth:`forward`.

        Raises:
            ConfigError: the number or a width of the contexts is not the configured one.
        """
        widths = [width for width in self.config.contexts if width is not None]
        seen = [context.shape[-1] for context, _ in contexts]
        if seen != widths:
            raise ConfigError(f"contexts of the widths {seen} were given; this U-Net needs {widths}, in this order")
        if not contexts:
            return ()
        readers: list[list[Attention]] = [[] for _ in contexts]
        for module in self.modules():
            if isinstance(module, SpatialTransformer) and module.source is not None:
                readers[module.source[0]] += module.readers
        caches = []
        for row, (context, mask) in zip(readers, contexts, strict=True):
            sites = tuple(reader.keys_values(context) for reader in row)
            caches.append(ContextCache(sites, _bias(mask, sites[0][0].dtype)))
        return tuple(caches)

    def project_film(self, film: Tensor | None) -> Tensor | None:
        """Compute what stands beside the time embedding once, for any number of calls of :meth:`forward`.

        Args:
            film: ``[B, film_dim]``; None for a network that takes none.

        Raises:
            ConfigError: there is a vector and none is wanted, or the reverse, or its width is another.
        """
        seen = None if film is None else film.shape[-1]
        if seen != self.config.film_dim:
            raise ConfigError(f"a film vector of width {seen} was given; this U-Net needs {self.config.film_dim}")
        if film is None or self.film_emb is None:
            return None
        projected: Tensor = self.film_emb(film)
        return projected

    def embed(self, t: Tensor, film: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return what every block is told: timesteps ``[B]`` and what :meth:`project_film` made."""
        if (film is None) != (self.film_emb is None):
            raise ConfigError(f"a film vector was {'not ' * (film is None)}given; make it with project_film")
        emb: Tensor = self.time_embed(time_embedding(t, self.config.base).to(dtype))
        if film is None:
            return emb
        return torch.cat([emb, film], -1) if self.config.film_mode == "concat" else emb + film

    def contract(
        self, x: Tensor, emb: Tensor, contexts: Sequence[ContextCache], hint: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return the output of every input block, and of the middle; a hint joins after the first block."""
        factor = self.config.factor
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ConfigError(f"a latent of {tuple(x.shape[-2:])} cells was given; pad both to multiples of {factor}")
        needed = sum(width is not None for width in self.config.contexts)
        if len(contexts) != needed:
            raise ConfigError(f"{len(contexts)} contexts were given, {needed} needed; make them with project_contexts")
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            x = stage(x, emb, contexts)
            if hint is not None and not skips:
                x = x + hint
            skips.append(x)
        x = self.middle_block(x, emb, contexts)
        return skips, x


class UNet(Contraction):
    """Predict what the denoiser is trained on (noise, or velocity) from a noisy latent and its timestep.

    Source: the AudioLDM 2 family's U-Net (spec of the family, section 2.1), of which SemantiCodec's is an instance.
    """

    def __init__(self, config: UNetConfig) -> None:
        build = Builder(config)
        super().__init__(config, build)
        skips, channels = list(self.widths), self.widths[-1]
        self.output_blocks = nn.ModuleList()
        for level in range(len(config.mults) - 1, -1, -1):
            for i in range(config.res_blocks + 1):
                layers = [build.res(channels + skips.pop(), config.base * config.mults[level]), *build.attention(level)]
                channels = config.base * config.mults[level]
                if level and i == config.res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(layers))

        self.out = nn.Sequential(
            GroupNorm(config.groups, channels),
            nn.SiLU(inplace=True),
            zeroed(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        contexts: Sequence[ContextCache] = (),
        film: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Run the network once.

        Args:
            x: noisy latents (with any extra channels already joined) ``[B, in_channels, T, F]``; T and F are multiples
                of ``config.factor``.
            t: timesteps ``[B]``.
            contexts: what :meth:`project_contexts` made, for the same batch.
            film: what :meth:`project_film` made, for the same batch.
            residuals: what ControlNets add.

        Returns:
            ``[B, out_channels, T, F]``.

        Raises:
            ConfigError: T or F is not such a multiple, or contexts or the film vector are missing.
        """
        emb = self.embed(t, film, x.dtype)
        skips, x = self.contract(x, emb, contexts)
        if residuals is not None:
            skips = [skip + extra for skip, extra in zip(skips, residuals.skips, strict=True)]
            x = x + residuals.middle
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, contexts)
        x = self.out(x)
        return x


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask into scores; finite ones, so that a row with nothing to look at is uniform instead of NaN."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(mask != 1, torch.finfo(dtype).min / 2)[:, None, None, :]
