"""Stage 3: the KL autoencoder of the log-mel spectrogram.  B batch, T mel rows."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..audio import log_mel
from ..config import MelConfig, VAEConfig
from ..nn.vae import AutoencoderKL
from .data import Corpus, Crops
from .loop import Logs, RunOptions, adamw, channels_last, descend, mean_logs
from .losses import mel_error

KL_WEIGHT = 1e-2
"""Large enough that detail nobody hears costs more than it gains: the denoiser need not learn it."""


class VAELoss(nn.Module):
    """Reconstruction and KL terms of one batch."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, mel: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mel error, KL per latent value, and the reconstruction of ``mel`` ``[B, 1, T, bins]``."""
        mean, logvar = self.vae.encode(mel)
        picture = self.vae.decode(mean + (0.5 * logvar).exp() * noise)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return mel_error(picture, mel).mean(), kl, picture


class VAEStage:
    """Train the autoencoder on crops of ``rows`` mel rows: as long as the windows it will see."""

    name = "vae"

    def __init__(self, corpus: Corpus, vae: VAEConfig, mel: MelConfig, rows: int, options: RunOptions) -> None:
        self.options, self.mel = options, mel
        self.raw = VAELoss(AutoencoderKL(vae))
        self.shape = (vae.latent_channels, rows // vae.factor, mel.bins // vae.factor)
        self.crops = Crops(corpus, rows * mel.hop, options.batch, seed=options.seed + 10)
        self.held_out = Crops(corpus, rows * mel.hop, 64, seed=1, held_out=True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser."""
        self.fabric = fabric
        channels_last(self.raw)
        if self.options.compile:
            self.raw.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the model and the optimiser."""
        return {"model": self.raw, "optimizer": self.optimizer}

    def _run(self, wave: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mel = log_mel(wave.to(self.fabric.device), self.mel)[:, None]
        noise = torch.randn((len(mel), *self.shape), generator=torch.Generator().manual_seed(seed)).to(mel.device)
        error, kl, picture = self.model(mel, noise)
        return error, kl, picture, mel

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        error, kl, _, _ = self._run(self.crops(index, fabric.global_rank), index)
        descend(fabric, error + KL_WEIGHT * kl, self.model, self.optimizer)
        return {"error": error.detach(), "kl": kl.detach()}

    def evaluate(self) -> Logs:
        """Return the held-out mel error, mel L1 (nats) and KL."""

        def one(index: int) -> Logs:
            error, kl, picture, mel = self._run(self.held_out(index), index)
            return {"error": error, "mel_l1": (picture - mel).abs().mean(), "kl": kl}

        return mean_logs(one, 4)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write eight mel spectrograms above their reconstructions."""
        with torch.no_grad():
            _, _, picture, mel = self._run(self.held_out(0)[:8], 0)
        image = torch.cat([mel, picture], 3)[:, 0].reshape(1, -1, 2 * mel.shape[3]).mT
        writer.add_image("mel and reconstruction", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)


class InverseStage(VAEStage):
    """Train an encoder for a decoder that is there already, and stands still."""

    name = "inverse"

    def __init__(self, corpus: Corpus, vae: AutoencoderKL, mel: MelConfig, rows: int, options: RunOptions) -> None:
        super().__init__(corpus, vae.config, mel, rows, options)
        self.vae = self.raw.vae
        for part, given in ((self.vae.decoder, vae.decoder), (self.vae.post_quant_conv, vae.post_quant_conv)):
            part.load_state_dict(given.state_dict())
            part.requires_grad_(False)
