"""Small random models of both flavours, built from the presets' own configurations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from semanticodec.codec import SemantiCodec
from semanticodec.config import (
    CodecConfig,
    HiFiGANConfig,
    TokenRate,
    UNetConfig,
    VAEConfig,
    VocosConfig,
    preset,
)
from semanticodec.model import CodecModel

FLAVOURS = ("official", "mini")
UNET = UNetConfig(
    in_channels=4, out_channels=4, base=8, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4
)
VAE = VAEConfig(base=4, mults=(1, 2, 2), res_blocks=1, latent_channels=4, groups=2)
"""Networks of a system with four latent channels."""


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return standard normal numbers times ``scale``."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(flavour: str, rate: TokenRate = 100) -> CodecConfig:
    """Return a preset's configuration with everything small that does not change what happens."""
    base = preset(f"semanticodec-{rate}-4096" if flavour == "official" else f"mini-{rate}")
    official = flavour == "official"
    mae = replace(base.encoder.mae, columns=8 if official else 6, dim=16, depth=3, heads=2, pooled_blocks=2)
    dim = 16 * base.stack[0] * base.stack[1]
    encoder = replace(
        base.encoder, mae=mae, semantic_size=50, acoustic_size=70, acoustic_dim=dim, lstm_layers=1, lstm_dim=12
    )
    context = 2 * dim + 192
    own = base.decoder.latent
    unet = replace(own.unet, base=8, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4)
    latent = replace(
        own,
        unet=replace(unet, contexts=(None, context)) if official else unet,
        vae=replace(own.vae, base=4, mults=(1, 2, 2), res_blocks=1, groups=2),
        vocoder=HiFiGANConfig(base=8, rates=(5, 32), kernels=(16, 32), stack_kernels=(3,), dilations=(1,))
        if official
        else VocosConfig(dim=16, hidden=24, layers=2, right=(1, 1, 0)),
        steps=2,
    )
    decoder = replace(base.decoder, columns=8 if official else 3, overlap=2 if official else 1, latent=latent)
    return replace(base, encoder=encoder, decoder=decoder)


def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every weight, bias and codebook a random value, the layers that start as zeros included; norms stay."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        for matrix in [parameter for parameter in own if parameter.ndim > 1][:1]:
            for bias in [parameter for parameter in own if parameter.ndim == 1]:
                spread = matrix[0].numel() ** -0.5
                bias.data.uniform_(-spread, spread, generator=generator)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            # A loud patch embedding, so that codes tell more about the sound than about the position.
            spread = (8 if "patch_embed" in name else 1) * parameter[0].numel() ** -0.5
            parameter.data.normal_(0, spread, generator=generator)
        if name.endswith("vocoder.head.bias"):
            parameter.data.fill_(5.0)  # loud enough that what is wrong is not lost in rounding
    for name, buffer in module.named_buffers():
        if "codebooks" in name:
            buffer.normal_(0, 1.0 if "semantic" in name else 0.1, generator=generator)


@cache
def codec(flavour: str, rate: TokenRate = 100, dtype: torch.dtype = torch.float32) -> SemantiCodec:
    """Return a small random codec; shared, so leave it as it is."""
    small = config(flavour, rate)
    model = CodecModel(small)
    fill(model)
    return SemantiCodec.from_model(small, model.to(dtype))


def random_codes(small: CodecConfig, frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Return uniform codes ``[batch, 2, frames]``."""
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.randint(0, size, (batch, frames), generator=generator) for size in small.codebook_sizes]
    return torch.stack(streams, 1)
