"""Stage 4: the vocoder's network, which turns mels back into magnitudes.  B batch, L mel rows, K bins.

It learns from mels that went through the autoencoder, as in use; phases are found, not learnt.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..audio import log_mel, slaney_filters, stft_magnitude
from ..config import MelConfig, VocosConfig
from ..nn.vae import AutoencoderKL
from ..nn.vocos import FLOOR, Vocos
from .data import Corpus, Crops
from .loop import Logs, RunOptions, adamw, descend, mean_logs

ROWS = 64
IMPERFECTION = 0.12
"""Noise on the latents that the mels come from, relative to their spread: those of the codec are not exact."""
MEL_WEIGHT = 3.0


class MagnitudeLoss(nn.Module):
    """L1 between log-magnitudes, and between the log-mels of the magnitudes."""

    filters: Tensor

    def __init__(self, vocoder: Vocos, mel: MelConfig) -> None:
        super().__init__()
        self.vocoder = vocoder
        self.register_buffer("filters", slaney_filters(mel), persistent=False)

    def forward(self, heard: Tensor, magnitude: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Return both terms of the mel heard ``[B, bins, L]``, magnitudes ``[B, L, K]`` and mel ``[B, L, bins]``."""
        predicted = self.vocoder.magnitude(heard)
        bins = (predicted.clamp_min(math.log(FLOOR)) - magnitude.clamp_min(FLOOR).log()).abs().mean()
        with torch.autocast(heard.device.type, enabled=False):
            bands = (predicted.exp() @ self.filters).clamp_min(1e-5).log()
        return bins, (bands - mel).abs().mean()


class VocoderStage:
    """Train the vocoder on random crops."""

    name = "vocoder"

    def __init__(
        self, corpus: Corpus, config: VocosConfig, mel: MelConfig, vae: AutoencoderKL, options: RunOptions
    ) -> None:
        self.options, self.mel = options, mel
        self.vae = vae.eval().requires_grad_(False)
        vocoder = Vocos(config, mel)
        vocoder.basis.copy_(torch.linalg.pinv(slaney_filters(mel)))
        self.raw = MagnitudeLoss(vocoder, mel)
        self.crops = Crops(corpus, ROWS * mel.hop, options.batch, seed=options.seed + 20)
        self.held_out = Crops(corpus, ROWS * mel.hop, 64, seed=1, held_out=True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser."""
        self.fabric = fabric
        self.vae.to(fabric.device)
        if self.options.compile:
            self.raw.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the model and the optimiser."""
        return {"model": self.raw, "optimizer": self.optimizer}

    @torch.no_grad()
    def _coded(self, mel: Tensor, seed: int) -> Tensor:
        """Send a mel ``[B, L, bins]`` through the autoencoder, with the noise its decoder has to expect."""
        mean, _ = self.vae.encode(mel[:, None])
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
        return self.vae.decode(mean + IMPERFECTION * mean.std() * noise)[:, 0].mT

    def _run(self, wave: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        wave = wave.to(self.fabric.device)
        mel = log_mel(wave, self.mel)
        magnitude = stft_magnitude(wave, self.mel)
        result: tuple[Tensor, Tensor] = self.model(self._coded(mel, seed), magnitude, mel)
        return result

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        bins, bands = self._run(self.crops(index, fabric.global_rank), index)
        descend(fabric, bins + MEL_WEIGHT * bands, self.model, self.optimizer)
        return {"bins_l1": bins.detach(), "mel_l1": bands.detach()}

    def evaluate(self) -> Logs:
        """Return held-out L1 of log-magnitudes and log-mels (nats), and of the mel after synthesis."""

        def one(index: int) -> Logs:
            wave = self.held_out(index)
            bins, bands = self._run(wave, index)
            mel = log_mel(wave.to(self.fabric.device), self.mel)
            sound = log_mel(self.raw.vocoder(self._coded(mel, index)), self.mel)
            return {"bins_l1": bins, "mel_l1": bands, "synthesis_mel_l1": (sound - mel).abs().mean()}

        return mean_logs(one, 2)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write four held-out sounds, each followed by its resynthesis."""
        wave = self.held_out(0)[:4].to(self.fabric.device)
        with torch.no_grad():
            sound = self.raw.vocoder(self._coded(log_mel(wave, self.mel), 0))
        joined = torch.cat([wave, sound], 1).reshape(1, -1).cpu().clamp(-1, 1)
        writer.add_audio("real and resynthesised", joined, index, self.mel.sample_rate)
