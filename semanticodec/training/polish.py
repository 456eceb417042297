"""Stage 6: the fast decode end to end, codes standing still: one solver step from pure noise must give the right mel.

U-Net, conditioner and the autoencoder's decoder learn together, two blocks at a time, the second continuing from what
the first became, as in use.  The velocity loss goes on beside it, so that more steps keep their meaning.
B chains of blocks, F frames, D channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..config import LATENT_ROWS, PATCH, RATES
from ..diffusion import Draw, SamplerOptions
from ..latent import Known, LatentDiffusion
from .blocks import Blocks
from .diffusion import denoising_loss, timesteps
from .latent import DROP_PAST, DROP_STREAM, TURNS, LatentLoss, kept, window_conditioning
from .loop import Logs, RunOptions, adamw, channels_last, descend, mean_logs
from .losses import mel_error

VELOCITY_WEIGHT = 2.0
ONE_STEP = SamplerOptions(steps=1, guidance=1.0)


class PolishLoss(nn.Module):
    """The mel error of two consecutive blocks decoded in one step, and the velocity loss of the first."""

    def __init__(self, trained: LatentLoss) -> None:
        super().__init__()
        self._latent = (trained.latent,)
        self.unet = trained.latent.unet
        self.vae = trained.latent.vae
        self.conditioners = trained.conditioners

    @property
    def latent(self) -> LatentDiffusion:
        """The decoder that this trains."""
        return self._latent[0]

    def forward(
        self, features: Tensor, known: Known, latents: Tensor, mels: Tensor, rate: int, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mel error, the velocity loss and the decoded mels ``[2B, M, 64]``.

        Args:
            features: code embeddings ``[3B, F, D]`` of the blocks before, the first and the second blocks.
            known: latents before the first blocks.
            latents: true scaled latents of the first blocks ``[B, C, T, F]``.
            mels: true log-mels ``[2B, M, 64]`` of the first and second blocks.
            rate: token rate.
            noise: ``[3B, C, overlap + T, F]``.
            t: timesteps of the velocity loss ``[B]``.
        """
        before, first, second = self.conditioners[str(rate)](features).chunk(3)
        *starts, other = noise.chunk(3)
        conditioning = window_conditioning(before, first, known)
        velocity = denoising_loss(self.latent, conditioning, latents, other, t, known)
        overlap, heard = known.latents.shape[2], []
        for start in starts:
            z = self.latent.generate(conditioning, conditioning, _always(start), ONE_STEP, known)
            heard.append(self.latent.mel(z)[:, overlap * LATENT_ROWS :])
            known = Known(z[:, :, -overlap:].detach(), torch.ones_like(known.present))
            conditioning = window_conditioning(first, second, known)
        picture = torch.cat(heard)
        return mel_error(picture, mels).mean(), velocity, picture


def _always(start: Tensor) -> Draw:
    """Return the noise of a decode that begins at ``start`` and adds none."""
    return lambda _: start


class PolishStage:
    """Train on precomputed blocks with the codes of the last stage."""

    name = "polish"

    def __init__(self, blocks: Blocks, trained: LatentLoss, options: RunOptions) -> None:
        self.options, self.blocks, self.trained = options, blocks, trained.requires_grad_(False).eval()
        self.overlap = trained.models[RATES[0]].config.decoder.overlap * (PATCH // LATENT_ROWS)
        assert blocks.latents is not None
        assert blocks.mels is not None
        self.latents, self.mels = blocks.latents, blocks.mels
        self.pool = {held: blocks.chains(3, held_out=held) for held in (False, True)}
        self.raw = PolishLoss(trained).requires_grad_(True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the objective and its optimiser."""
        self.fabric = fabric
        self.trained.to(fabric.device)
        self.raw.latent.to(fabric.device)
        channels_last(self.raw)
        if self.options.compile:
            self.raw.unet.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the objective with all modules, and the optimiser."""
        return {"model": self.raw, "optimizer": self.optimizer}

    def _run(
        self, rng: np.random.Generator, rate: int, batch: int, *, held_out: bool, dropout: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both losses, the decoded mels and the true ones for ``batch`` pairs of blocks."""
        device, latent = self.fabric.device, self.raw.latent
        first = rng.choice(self.pool[held_out], batch)

        def take(array: np.ndarray, indices: np.ndarray) -> Tensor:
            return torch.from_numpy(array[indices].astype(np.float32)).to(device)

        patches = take(self.blocks.features, np.concatenate([first - 1, first, first + 1]))
        mels = take(self.mels, np.concatenate([first, first + 1]))
        latents = take(self.latents, first) * latent.scale
        past = take(self.latents, first - 1)[:, :, -self.overlap :] * latent.scale
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        present = torch.rand(batch, generator=generator) >= (DROP_PAST if dropout else 0.0)
        shown = kept(torch.rand(3 * batch, generator=generator), DROP_STREAM if dropout else 0.0)
        window = (latents.shape[1], past.shape[2] + latents.shape[2], latents.shape[3])
        noise = torch.randn((3 * batch, *window), generator=generator).to(device)
        t = timesteps(batch, len(latent.schedule), generator).to(device)
        with torch.no_grad():
            acoustic, semantic, _ = self.trained.codes(rate)(patches)
        weight = shown.to(acoustic)[:, :, None, None]
        features = torch.cat([acoustic * weight[:, 0], semantic * weight[:, 1]], -1)
        known = Known(past, present.to(device))
        error, velocity, picture = self.model(features, known, latents, mels, rate, noise, t)
        return error, velocity, picture, mels

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step at one token rate; the rates take turns."""
        del progress
        rate = TURNS[index % len(TURNS)]
        rng = np.random.default_rng((self.options.seed, index, fabric.global_rank))
        error, velocity, _, _ = self._run(rng, rate, self.options.batch, held_out=False, dropout=True)
        descend(fabric, error + VELOCITY_WEIGHT * velocity, self.model, self.optimizer)
        return {f"error_{rate}": error.detach(), f"velocity_{rate}": velocity.detach()}

    def evaluate(self) -> Logs:
        """Return held-out losses per rate, and the mel L1 (nats), without dropout."""
        logs: Logs = {}
        for rate in RATES:

            def one(index: int, rate: int = rate) -> Logs:
                rng = np.random.default_rng((1, index, rate))
                error, velocity, picture, mels = self._run(rng, rate, 48, held_out=True, dropout=False)
                l1 = (picture - mels).abs().mean()
                return {f"error_{rate}": error, f"velocity_{rate}": velocity, f"mel_l1_{rate}": l1}

            logs |= mean_logs(one, 2)
        return logs

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write the mel of eight held-out blocks above their decodes."""
        with torch.no_grad():
            _, _, picture, mels = self._run(np.random.default_rng(1), RATES[0], 8, held_out=True, dropout=False)
        image = torch.cat([mels[:8], picture[:8]], 2).reshape(1, -1, 2 * mels.shape[2]).mT
        writer.add_image("mel and decode", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)
