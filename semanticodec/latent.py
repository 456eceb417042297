"""The latent-diffusion core: conditioning in, latents out, and from there to mel and samples.

B batch, C latent channels, T latent steps (40 ms), M mel rows, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import DecoderConfig, HiFiGANConfig
from .diffusion import Draw, SamplerOptions, from_v, guided, linear_schedule, sample
from .nn.hifigan import HiFiGAN
from .nn.unet import ContextCache, UNet
from .nn.vae import AutoencoderKL
from .nn.vocos import Vocos


@dataclass(frozen=True)
class Conditioning:
    """Everything the denoiser is told besides the noisy latent; all parts have the same batch.

    Args:
        contexts: (sequence ``[B, L, D]``, mask ``[B, L]`` or None) per cross-attention context, in the U-Net's order.
        concat: channels joined to the noisy latent, ``[B, channels, T, F]``, or None.
    """

    contexts: tuple[tuple[Tensor, Tensor | None], ...] = ()
    concat: Tensor | None = None


@dataclass(frozen=True)
class Known:
    """A beginning of the window that is given, not generated.

    Args:
        latents: ``[B, C, P, F]``, the first P steps.
        present: bool ``[B]``; false where a row has no past: its beginning is zeros, and the network is told so.
    """

    latents: Tensor
    present: Tensor

    def place(self, x: Tensor) -> Tensor:
        """Replace the first P steps of ``x`` ``[B, C, T, F]``."""
        steps = self.latents.shape[2]
        given = torch.where(self.present[:, None, None, None], self.latents, 0.0)
        return torch.cat([given.to(x), x[:, :, steps:]], 2)

    def mask(self, x: Tensor) -> Tensor:
        """Return where ``x`` is known, ``[B, 1, T, F]``, 1 or 0."""
        mask = torch.zeros_like(x[:, :1])
        mask[:, :, : self.latents.shape[2]] = self.present.to(x)[:, None, None, None]
        return mask


@dataclass(frozen=True)
class _Prepared:
    """Conditioning whose constant parts have been computed."""

    contexts: tuple[ContextCache, ...]
    concat: Tensor | None


class LatentDiffusion(nn.Module):
    """U-Net, autoencoder and vocoder of one system."""

    scale: Tensor

    def __init__(self, config: DecoderConfig, *, vae_encoder: bool = False) -> None:
        super().__init__()
        self.config = config
        self.schedule = linear_schedule(config.schedule)
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae, encoder=vae_encoder)
        hifigan = isinstance(config.vocoder, HiFiGANConfig)
        self.vocoder = HiFiGAN(config.vocoder) if hifigan else Vocos(config.vocoder)  # type: ignore[arg-type]
        self.register_buffer("scale", torch.ones(()))

    def predict(self, x: Tensor, t: Tensor, conditioning: _Prepared, known: Known | None = None) -> Tensor:
        """Run the U-Net once on ``x`` ``[B, C, T, F]`` at timesteps ``t`` ``[B]``."""
        parts = [x]
        if known is not None:
            parts = [known.place(x), known.mask(x)]
        if conditioning.concat is not None:
            parts.append(conditioning.concat)
        joined = torch.cat(parts, 1) if len(parts) > 1 else x
        result: Tensor = self.unet(joined.to(self.dtype, memory_format=torch.channels_last), t, conditioning.contexts)
        return result

    def prepare(self, conditioning: Conditioning) -> _Prepared:
        """Compute what stays constant over the steps of a solver."""
        return _Prepared(self.unet.project_contexts(conditioning.contexts), conditioning.concat)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.scale.dtype

    def generate(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        draw: Draw,
        options: SamplerOptions,
        known: Known | None = None,
    ) -> Tensor:
        """Sample the latents of one window per row.

        Args:
            conditioning: what to generate.
            unconditional: what guidance steers away from; only read if the guidance is not 1.
            draw: noise by solver step, see :func:`semanticodec.diffusion.sample`.
            options: the caller's dials; the preset's values stand in for those left open.
            known: the beginning of the windows, if it is given.

        Returns:
            ``[B, C, T, F]`` float32, on the scale of the denoiser; the known beginning is returned unchanged.
        """
        guidance = self.config.guidance if options.guidance is None else options.guidance

        def network(x: Tensor, t: int, prepared: _Prepared) -> Tensor:
            start = known
            if start is not None and len(x) != len(start.present):
                start = Known(torch.cat([start.latents] * 2), torch.cat([start.present] * 2))
            return self.predict(x, torch.full((len(x),), t, device=x.device), prepared, start)

        prepared = self.prepare(conditioning)
        other = prepared if guidance == 1.0 else self.prepare(unconditional)
        denoise = from_v(guided(network, prepared, other, guidance, _join), self.schedule)
        latents = sample(denoise, draw, self.schedule, options, steps=self.config.steps)
        return latents if known is None else known.place(latents)

    def mel(self, latents: Tensor) -> Tensor:
        """Decode latents ``[B, C, T, F]`` to log-mel ``[B, M, 64]``."""
        z = (latents.to(self.dtype) / self.scale).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(z)[:, 0]

    def wave(self, mel: Tensor) -> Tensor:
        """Synthesise log-mel ``[B, M, 64]`` to float32 samples ``[B, 160 * M]``."""
        samples: Tensor = self.vocoder(mel.mT.contiguous())
        return samples[:, : mel.shape[1] * 160].float()


def _join(a: _Prepared, b: _Prepared) -> _Prepared:
    """Stack two batches of conditioning."""
    contexts = tuple(_join_context(x, y) for x, y in zip(a.contexts, b.contexts, strict=True))
    if a.concat is None or b.concat is None:
        return _Prepared(contexts, None)
    return _Prepared(contexts, torch.cat([a.concat, b.concat]))


def _join_context(a: ContextCache, b: ContextCache) -> ContextCache:
    sites = tuple(
        (torch.cat([ka, kb]), torch.cat([va, vb])) for (ka, va), (kb, vb) in zip(a.sites, b.sites, strict=True)
    )
    bias = None if a.bias is None or b.bias is None else torch.cat([a.bias, b.bias])
    return ContextCache(sites, bias)
