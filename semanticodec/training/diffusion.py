"""The one objective of all systems: what was added to latents at a random timestep, the condition left out at times.

B rows, C latent channels, T latent steps, F latent columns, L positions of a context.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from ..diffusion import SamplerOptions
from ..errors import ConfigError
from ..latent import Conditioning, Known, LatentDiffusion
from .loop import Logs, RunOptions, adamw, channels_last, descend, follow, mean_logs

DROP = 0.1
"""Published chance that a row learns without its condition, so that guidance has something to steer away from."""
AVERAGE = 0.9999
"""Published decay of the moving average of the weights."""


class Batch(NamedTuple):
    """What one step learns from.

    ``latents`` are ``[B, C, T, F]`` on the scale of the denoiser, T a multiple of the U-Net's factor; ``unconditional``
    is what stands for no condition, with the same kinds of parts as ``conditioning``.
    """

    latents: Tensor
    conditioning: Conditioning
    unconditional: Conditioning


def denoising_loss(
    latent: LatentDiffusion,
    conditioning: Conditioning,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    known: Known | None = None,
) -> Tensor:
    """Return the mean squared error of what the network predicts: the noise, or v, as its configuration says.

    Args:
        latent: its U-Net, and the ControlNets of the conditioning, are run with gradients.
        conditioning: of B rows.
        x0: latents ``[B, C, T, F]`` on the scale of the denoiser, without the known beginning.
        noise: standard normal, of the shape of the beginning and ``x0`` together.
        t: timesteps ``[B]``.
        known: the beginning, which is given and therefore not compared.

    Raises:
        ConfigError: the conditioning does not fit the latents.
    """
    whole = x0 if known is None else torch.cat([known.latents, x0], 2)
    latent.check(conditioning, whole.shape, known=known is not None)
    noisy = latent.schedule.add_noise(whole, noise, t)
    target = noise if latent.config.prediction == "eps" else latent.schedule.velocity(whole, noise, t)
    error = latent.predict(noisy, t, latent.prepare(conditioning), known) - target
    return error[:, :, whole.shape[2] - x0.shape[2] :].square().mean()


def dropped(conditioning: Conditioning, unconditional: Conditioning, rows: Tensor) -> Conditioning:
    """Put the unconditional values of FiLM, contexts and concatenation into some rows.

    Args:
        conditioning: of B rows; its controls stay in every row, since guidance does not steer away from them.
        unconditional: of B rows.
        rows: bool ``[B]``, the rows that lose their condition.

    Raises:
        ConfigError: one of the two lacks what the other has.
    """

    def choose(asked: Tensor, absent: Tensor) -> Tensor:
        return torch.where(rows.to(asked.device).reshape(-1, *[1] * (asked.ndim - 1)), absent.to(asked), asked)

    contexts = []
    for asked, absent in zip(conditioning.contexts, unconditional.contexts, strict=True):
        length = max(asked[0].shape[1], absent[0].shape[1])
        pairs = zip(_padded(*asked, length), _padded(*absent, length), strict=True)
        sequence, mask = (choose(*pair) for pair in pairs)
        contexts.append((sequence, mask))
    kinds = {"film": (conditioning.film, unconditional.film), "concat": (conditioning.concat, unconditional.concat)}
    if lone := [name for name, pair in kinds.items() if (pair[0] is None) != (pair[1] is None)]:
        raise ConfigError(
            f"only one of the conditioning and its unconditional value has {' and '.join(lone)}; give both"
        )
    film, concat = (
        None if asked is None or absent is None else choose(asked, absent) for asked, absent in kinds.values()
    )
    return replace(conditioning, contexts=tuple(contexts), film=film, concat=concat)


def _padded(sequence: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Return a context at ``length`` positions, the new ones hidden."""
    missing = length - sequence.shape[1]
    mask = sequence.new_ones(sequence.shape[:2]) if mask is None else mask
    return functional.pad(sequence, (0, 0, 0, missing)), functional.pad(mask.to(sequence), (0, missing))


def timesteps(count: int, steps: int, generator: torch.Generator, pure_noise: float = 0.0) -> Tensor:
    """Draw timesteps ``[count]`` of ``steps``: a share of ``pure_noise`` is the noisiest, the rest is uniform."""
    t = torch.randint(0, steps, (count,), generator=generator)
    t[: round(count * pure_noise)] = steps - 1
    return t


class DiffusionLoss(nn.Module):
    """:func:`denoising_loss` as a module, so that what learns can be wrapped for several devices."""

    def __init__(self, latent: LatentDiffusion, network: nn.Module) -> None:
        super().__init__()
        # Not a child: only what learns belongs into a checkpoint of the training.
        self._latent = (latent,)
        self.network = network

    @property
    def latent(self) -> LatentDiffusion:
        """The core whose U-Net is run."""
        return self._latent[0]

    def forward(self, conditioning: Conditioning, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss; arguments as for :func:`denoising_loss`."""
        return denoising_loss(self.latent, conditioning, x0, noise, t)


class DiffusionStage:
    """Train a U-Net, a ControlNet beside one that stands still, or either together with its conditioners."""

    name = "diffusion"

    def __init__(
        self,
        latent: LatentDiffusion,
        network: nn.Module,
        batches: Callable[[int, int], Batch],
        held_out: Callable[[int], Batch],
        options: RunOptions,
        *,
        drop: float = DROP,
        pure_noise: float = 0.0,
    ) -> None:
        """Begin.

        Args:
            latent: the core; all of it but ``network`` stands still.
            network: what learns: ``latent.unet``, a ControlNet of the batches' controls, or a list of modules.
            batches: (step, rank) -> what to learn from, on the device of ``latent``.
            held_out: index -> what to measure on.
            options: how; ``batch`` is up to ``batches``.
            drop: chance that a row loses its condition.
            pure_noise: see :func:`timesteps`; published is 0.
        """
        self.batches, self.held_out, self.options, self.drop, self.pure_noise = (
            batches,
            held_out,
            options,
            drop,
            pure_noise,
        )
        latent.requires_grad_(False)
        network.requires_grad_(True)
        self.raw = DiffusionLoss(latent, network)
        self.average = copy.deepcopy(network).requires_grad_(False)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the objective and its optimiser."""
        for module in (self.raw.latent.to(fabric.device), self.raw):
            channels_last(module)
        if self.options.compile:
            self.raw.network.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))
        self.average.to(fabric.device)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return what learns, its average and the optimiser."""
        return {"model": self.raw, "average": self.average, "optimizer": self.optimizer}

    def _run(self, batch: Batch, generator: torch.Generator, *, drop: float, pure_noise: float) -> Tensor:
        count, device = len(batch.latents), batch.latents.device
        rows = torch.rand(count, generator=generator) < drop
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        t = timesteps(count, len(self.raw.latent.schedule), generator, pure_noise).to(device)
        conditioning = dropped(batch.conditioning, batch.unconditional, rows)
        result: Tensor = self.model(conditioning, batch.latents, noise, t)
        return result

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        rank = fabric.global_rank
        rng = np.random.default_rng((self.options.seed, index, rank))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = self.batches(index, rank)
        loss = self._run(batch, generator, drop=self.drop, pure_noise=self.pure_noise)
        descend(fabric, loss, self.model, self.optimizer)
        follow(self.average, self.raw.network, index, AVERAGE)
        return {"loss": loss.detach()}

    def evaluate(self) -> Logs:
        """Return the held-out loss with every condition given."""

        def one(index: int) -> Logs:
            generator = torch.Generator().manual_seed(index)
            return {"loss": self._run(self.held_out(index), generator, drop=0.0, pure_noise=0.0)}

        return mean_logs(one, 2)

    @torch.no_grad()
    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write the mels of a held-out batch above what is generated under the same conditions."""
        batch, latent = self.held_out(0), self.raw.latent
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(batch.latents.shape, generator=generator).to(batch.latents)
        made = latent.generate(batch.conditioning, batch.unconditional, lambda _: start, SamplerOptions(eta=0.0))
        mels = torch.cat([latent.mel(batch.latents), latent.mel(made)], 2)
        image = mels.reshape(1, -1, mels.shape[2]).mT
        writer.add_image("mel and generated", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)
