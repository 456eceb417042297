"""The denoiser of super-resolution: the latent of the whole band, given the latent of what a low-pass leaves of it.

B windows, C latent channels, T latent steps, F latent columns.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..audio import log_mel
from ..bandlimit import FILTERS, lowpass
from ..config import LatentConfig
from ..diffusion import from_v
from ..nn.unet import UNet
from ..nn.vae import AutoencoderKL
from ..schedule import make_schedule
from ..superres import UNKNOWN, SuperResConfig
from .data import Corpus, Crops
from .diffusion import timesteps
from .loop import Logs, RunOptions, adamw, channels_last, descend, follow, mean_logs

CUTOFFS = (2_000, 8_000)
"""Hz between which low-passes are drawn."""
GRID = 125
"""Hz; multiples of it keep the resampling inside the low-pass short."""
MARGIN = 8
"""Mel rows on either side of a window whose low-pass has not settled."""
DROP = 0.1
PURE_NOISE = 0.4
"""Share of the windows denoised from the noisiest timestep, where every sampler starts and a fast one also ends."""
AVERAGE = 0.999
WEAKEST = 35
"""dB that 9-11 kHz may lie below 3-4 kHz in a recording to learn from."""


def wideband(corpus: Corpus, sample_rate: int) -> Corpus:
    """Return the recordings whose band goes on above 8 kHz; the others would teach that there is nothing."""
    fft = 2048
    band = torch.fft.rfftfreq(fft, 1 / sample_rate)
    window = torch.hann_window(fft)
    kept = []
    for clip in corpus.clips:
        if clip.length < fft:
            continue
        frames = corpus.wave(clip).unfold(0, fft, fft)
        power = torch.fft.rfft(frames[:: max(1, len(frames) // 64)] * window).abs().square().mean(0)
        middle, top = (float(power[(band >= low) & (band < high)].mean()) for low, high in ((3e3, 4e3), (9e3, 11e3)))
        if top > middle * 10 ** (-WEAKEST / 10):
            kept.append(clip)
    return Corpus(corpus.samples, kept)


class VelocityLoss(nn.Module):
    """The squared error of v."""

    scale: Tensor

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.unet = UNet(config.unet)
        self.register_buffer("scale", torch.ones(()))
        self.schedule = make_schedule(config.schedule)

    def forward(self, x0: Tensor, condition: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of latents and conditions ``[B, C, T, F]``, both unscaled, at timesteps ``[B]``."""
        x0, condition = self.scale * x0, self.scale * condition
        joined = torch.cat([self.schedule.add_noise(x0, noise, t), condition], 1)
        predicted: Tensor = self.unet(joined.contiguous(memory_format=torch.channels_last), t)
        return (predicted - self.schedule.velocity(x0, noise, t)).square().mean()


class SuperResStage:
    """Train the U-Net on windows under random low-passes; the autoencoder stands still."""

    name = "superres"

    def __init__(self, corpus: Corpus, config: SuperResConfig, vae: AutoencoderKL, options: RunOptions) -> None:
        self.options, self.mel, self.steps = options, config.latent.mel, config.latent.schedule.steps
        self.vae = vae.eval().requires_grad_(False)
        self.raw = VelocityLoss(config.latent)
        self.average = copy.deepcopy(self.raw.unet).requires_grad_(False)
        length = (config.rows + 2 * MARGIN) * self.mel.hop
        self.crops = Crops(corpus, length, options.batch, seed=options.seed + 30)
        self.held_out = Crops(corpus, length, 32, seed=1, held_out=True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser, and measure the spread of the latents."""
        self.fabric = fabric
        self.vae.to(fabric.device)
        self.average.to(fabric.device)
        for module in (self.vae, self.raw):
            channels_last(module)
        if self.options.compile:
            self.raw.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))
        whole, _ = self._latents(self.held_out(0), np.random.default_rng(0))
        self.raw.scale.copy_(1 / whole.std())

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the U-Net with the scale of the latents, its average and the optimiser."""
        return {"model": self.raw, "average": self.average, "optimizer": self.optimizer}

    @torch.no_grad()
    def _latents(self, wave: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the unscaled latents of windows and of what is left of each under a random low-pass."""
        low, high = CUTOFFS
        left = [
            lowpass(row, self.mel.sample_rate, GRID * int(rng.integers(low // GRID, high // GRID + 1)), kind)
            for row, kind in zip(wave, (FILTERS[i] for i in rng.integers(len(FILTERS), size=len(wave))), strict=True)
        ]
        both = torch.cat([wave, torch.stack(left)]).to(self.fabric.device)
        mel = log_mel(both, self.mel)[:, None, MARGIN:-MARGIN]
        whole, condition = self.vae.encode(mel.contiguous(memory_format=torch.channels_last))[0].chunk(2)
        return whole, condition

    def _run(self, wave: Tensor, rng: np.random.Generator, *, dropout: bool) -> Tensor:
        whole, condition = self._latents(wave, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(whole.shape, generator=generator).to(whole)
        t = timesteps(len(whole), self.steps, generator, PURE_NOISE)
        if dropout:
            dropped = torch.rand(len(whole), 1, 1, 1, generator=generator).to(whole) < DROP
            condition = torch.where(dropped, UNKNOWN, condition)
        result: Tensor = self.model(whole, condition, noise, t.to(whole.device))
        return result

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        rng = np.random.default_rng((self.options.seed, index, fabric.global_rank))
        loss = self._run(self.crops(index, fabric.global_rank), rng, dropout=True)
        descend(fabric, loss, self.model, self.optimizer)
        follow(self.average, self.raw.unet, index, AVERAGE)
        return {"velocity": loss.detach()}

    @torch.no_grad()
    def _guess(self, wave: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-mels ``[B, M, bins]``: the whole band, the low-passed, and the averaged U-Net's first guess."""
        whole, condition = self._latents(wave, rng)
        scale = self.raw.scale
        noise = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(whole)

        def network(x: Tensor, t: int) -> Tensor:
            joined = torch.cat([x, scale * condition], 1).contiguous(memory_format=torch.channels_last)
            result: Tensor = self.average(joined, torch.full((len(x),), t, device=x.device))
            return result

        guess = from_v(network, self.raw.schedule)(noise, self.steps - 1) / scale
        return tuple(self.vae.decode(z)[:, 0] for z in (whole, condition, guess))  # type: ignore[return-value]

    def evaluate(self) -> Logs:
        """Return the held-out velocity loss, and the mel L1 (nats) above 8 kHz of the first guess and of nothing."""
        above = int(0.8 * self.mel.bins)

        def one(index: int) -> Logs:
            wave, rng = self.held_out(index), np.random.default_rng((1, index))
            velocity = self._run(wave, rng, dropout=False)
            whole, condition, guess = (mel[:, :, above:] for mel in self._guess(wave, np.random.default_rng(index)))
            return {
                "velocity": velocity,
                "mel_l1_above": (guess - whole).abs().mean(),
                "mel_l1_without": (condition - whole).abs().mean(),
            }

        return mean_logs(one, 2)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write eight held-out mels above what the low-pass left and the first guess."""
        mels = self._guess(self.held_out(0)[:8], np.random.default_rng(0))
        image = torch.cat(mels, 2).reshape(1, -1, 3 * self.mel.bins).mT
        writer.add_image("mel, low-passed, first guess", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)
