"""Stage 4: the vocoder, first on spectra alone, then also against small multi-resolution discriminators.

It hears true mels and, half of the time, mels that went through the autoencoder, which is what it gets in use.

B batch, S samples, L mel rows.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.tensorboard import SummaryWriter

from ..audio import log_mel
from ..config import HOP, SAMPLE_RATE, CodecConfig, VocosConfig
from ..nn.vae import AutoencoderKL
from ..nn.vocos import Vocos
from .data import Corpus, Crops
from .loop import Logs, RunOptions, adamw, descend, mean_logs

ROWS = 64
EDGE = 6
"""Mel rows at each end whose samples are not judged: there the vocoder lacks context that it has in use."""
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256), (2048, 512))
ADVERSARIAL_FROM = 0.85
"""Share of the run after which the discriminators join; before, they would only chase noise."""
MEL_WEIGHT, MATCH_WEIGHT, RECONSTRUCTION_WEIGHT = 2.0, 2.0, 5.0


def spectrum(wave: Tensor, size: int, hop: int) -> Tensor:
    """Return the complex STFT ``[B, size // 2 + 1, frames]`` of ``[B, S]``."""
    window = torch.hann_window(size, device=wave.device)
    result: Tensor = torch.stft(wave, size, hop, window=window, center=False, return_complex=True) / size**0.5
    return result


def spectral_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean over resolutions of the log-magnitude L1.

    The usual term in linear magnitudes is left out: while phases are uncertain it is smallest for a sound that is too
    quiet (8 dB, measured), and log-mels are what the codec is scored on.
    """
    total = fake.new_zeros(())
    for size, hop in RESOLUTIONS:
        a, b = (spectrum(wave, size, hop).abs().clamp_min(1e-4) for wave in (fake, real))
        total = total + (a.log() - b.log()).abs().mean()
    return total / len(RESOLUTIONS)


class ResolutionDiscriminator(nn.Module):
    """Judge the complex spectrum at one resolution.

    Source: the multi-resolution discriminator of UnivNet and DAC, much narrower.
    """

    def __init__(self, size: int, hop: int, width: int = 12) -> None:
        super().__init__()
        self.size, self.hop = size, hop
        shapes = [(2, width, 1), (width, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 2)]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (3, 7), stride=(1, stride), padding=(1, 3))) for a, b, stride in shapes
        )
        self.out = weight_norm(nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """Return the activations of every layer for ``[B, S]``; the last is the verdict."""
        complex_ = spectrum(wave, self.size, self.hop)
        x = torch.view_as_real(complex_).permute(0, 3, 2, 1)
        # Compressing the magnitudes lets the quiet upper bands be heard at all.
        x = x / x.square().sum(1, keepdim=True).clamp_min(1e-8) ** 0.35
        activations = []
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), 0.1)
            activations.append(x)
        return [*activations, self.out(x)]


class Discriminators(nn.Module):
    """One discriminator per resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(ResolutionDiscriminator(*shape) for shape in RESOLUTIONS[1:])

    def forward(self, wave: Tensor) -> list[list[Tensor]]:
        """Return each discriminator's activations for ``[B, S]``."""
        return [part(wave) for part in self.parts]


class VocoderStage:
    """Train the vocoder on random crops."""

    name = "vocoder"

    def __init__(self, corpus: Corpus, config: CodecConfig, vae: AutoencoderKL, options: RunOptions) -> None:
        self.vae = vae.eval().requires_grad_(False)
        assert isinstance(config.decoder.vocoder, VocosConfig)
        self.options = options
        self.generator: nn.Module = Vocos(config.decoder.vocoder)
        self.judges: nn.Module = Discriminators()
        self.crops = Crops(corpus, ROWS * HOP, options.batch, seed=options.seed + 20)
        self.held_out = Crops(corpus, ROWS * HOP, 64, seed=1, held_out=True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap both players and their optimisers."""
        self.fabric = fabric
        self.vae.to(fabric.device)
        if self.options.compile:
            self.generator.compile()
        self.model, self.optimizer = fabric.setup(self.generator, adamw(self.generator, self.options.learning_rate))
        self.judge, self.judge_optimizer = fabric.setup(self.judges, adamw(self.judges, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return both optimisers."""
        return [self.optimizer, self.judge_optimizer]

    def state(self) -> dict[str, Any]:
        """Return both players and their optimisers."""
        return {
            "model": self.generator,
            "judges": self.judges,
            "optimizer": self.optimizer,
            "judge_optimizer": self.judge_optimizer,
        }

    def _synthesise(self, wave: Tensor, *, coded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return (fake, real) without the edges, and the L1 between their mels; ``coded`` mels went through the VAE."""
        wave = wave.to(self.fabric.device)
        mel = log_mel(wave)
        if coded:
            with torch.no_grad():
                mel = self.vae.decode(self.vae.encode(mel[:, None])[0])[:, 0]
        fake = self.model(mel.mT)
        inner = slice(EDGE * HOP, -EDGE * HOP)
        fake, real = fake[:, inner], wave[:, inner]
        return fake, real, (log_mel(fake) - log_mel(real)).abs().mean()

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step, of both players once the discriminators have joined."""
        fake, real, mel = self._synthesise(self.crops(index, fabric.global_rank), coded=index % 2 == 1)
        spectral = spectral_loss(fake, real)
        logs: Logs = {"mel_l1": mel.detach(), "spectral": spectral.detach()}
        if progress < ADVERSARIAL_FROM:
            descend(fabric, spectral + MEL_WEIGHT * mel, self.model, self.optimizer)
            return logs
        verdicts = zip(self.judge(fake.detach()), self.judge(real), strict=True)
        hinge = sum((functional.relu(1 + f[-1]) + functional.relu(1 - r[-1])).mean() for f, r in verdicts)
        assert isinstance(hinge, Tensor)
        descend(fabric, hinge, self.judge, self.judge_optimizer)
        with torch.no_grad():
            wanted = self.judge(real)
        self.judges.requires_grad_(False)
        seen = self.judge(fake)
        self.judges.requires_grad_(True)
        adversarial = -torch.stack([f[-1].mean() for f in seen]).mean()
        matching = torch.stack(
            [
                (a - b).abs().mean() / b.abs().mean()
                for f, r in zip(seen, wanted, strict=True)
                for a, b in zip(f[:-1], r[:-1], strict=True)
            ]
        ).mean()
        loss = adversarial + MATCH_WEIGHT * matching + RECONSTRUCTION_WEIGHT * (spectral + MEL_WEIGHT * mel)
        descend(fabric, loss, self.model, self.optimizer, clip=10.0)
        return {**logs, "hinge": hinge.detach(), "adversarial": adversarial.detach(), "matching": matching.detach()}

    def evaluate(self) -> Logs:
        """Return held-out mel L1 (nats) and spectral loss from mels that went through the autoencoder."""

        def one(index: int) -> Logs:
            fake, real, mel = self._synthesise(self.held_out(index), coded=True)
            return {"mel_l1": mel, "spectral": spectral_loss(fake, real)}

        return mean_logs(one, 2)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write four held-out sounds, each followed by its resynthesis."""
        with torch.no_grad():
            fake, real, _ = self._synthesise(self.held_out(0)[:4], coded=True)
        sound = torch.cat([real, fake], 1).reshape(1, -1).cpu().clamp(-1, 1)
        writer.add_audio("real and resynthesised", sound, index, SAMPLE_RATE)
