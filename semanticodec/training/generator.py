"""What mini's generator learns from: latents of labelled windows, and for its ControlNet how loud each moment is.

B windows, C latent channels, T latent steps, F latent columns, M mel rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..audio import log_mel
from ..conditioners.labels import LabelConditioner
from ..controls import follow, loudness
from ..diffusion import SamplerOptions
from ..latent import LatentDiffusion
from ..nn.controlnet import ControlNet
from .diffusion import Batch, DiffusionStage
from .labels import LabelledCrops
from .loop import RunOptions

MARGIN = 4
"""Mel rows on either side of a window, whose spectra would look beyond the crop."""
EXAMPLE = SamplerOptions(steps=8, guidance=1.0)
"""Of the pictures on the way."""


def window_samples(rows: int, hop: int) -> int:
    """Return how long a crop has to be for a window of ``rows`` mel rows."""
    return (rows + 2 * MARGIN) * hop


class Told(nn.Module):
    """What learns, the U-Net and the vectors of the labels, and the scale of the latents."""

    scale: Tensor

    def __init__(self, unet: nn.Module, labels: LabelConditioner, scale: Tensor) -> None:
        super().__init__()
        self.unet, self.labels = unet, labels
        self.register_buffer("scale", scale)


@dataclass(frozen=True)
class Windows:
    """Batches of labelled windows, as latents on the scale of the denoiser.

    Args:
        crops: of :func:`window_samples`.
        latent: its autoencoder, both ways, standing still.
        labels: what the network is told.
        control: a ControlNet that is told how loud the windows are, or None.
    """

    crops: LabelledCrops
    latent: LatentDiffusion
    labels: LabelConditioner
    control: ControlNet | None = None

    def __call__(self, step: int, rank: int = 0) -> Batch:
        """Return a batch, without the dropout of its conditions."""
        wave, label = self.crops(step, rank)
        device = self.latent.scale.device
        with torch.no_grad():
            mel = log_mel(wave.to(device), self.latent.config.mel)[:, MARGIN:-MARGIN]
            latents = self.latent.encode(mel).mean
        told, untold = (self.labels.told(rows) for rows in (label, torch.full_like(label, len(self.labels.labels))))
        if self.control is not None:
            told = replace(told, controls=(follow(self.control, loudness(mel), mel.shape[2]),))
        return Batch(latents, told, untold)


class GeneratorStage(DiffusionStage):
    """Train the U-Net with its labels, or a ControlNet beside it."""

    def __init__(
        self, network: nn.Module, windows: Windows, held_out: Windows, options: RunOptions, *, name: str
    ) -> None:
        self.name = name
        super().__init__(windows.latent, network, windows, held_out, options)

    @torch.no_grad()
    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write the mels of held-out windows above what a few steps generate under the same conditions."""
        batch, latent = self.held_out(0), self.raw.latent
        start = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0)).to(batch.latents)
        made = latent.generate(batch.conditioning, batch.unconditional, lambda _: start, EXAMPLE)
        image = torch.cat([latent.mel(batch.latents), latent.mel(made)], 2)[:8].flatten(0, 1).mT[None]
        writer.add_image("mel and generated", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)
