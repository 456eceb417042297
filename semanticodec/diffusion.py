"""Denoisers, guidance and samplers of the diffusion core.

Notation is that of :mod:`.schedule`.  A sampler sees the network only as a :data:`Denoiser` ``D(x_t, t) -> x0``; what
the network really predicts (v or noise), how it is guided and what is already given are wrappers around it.  A sampler
walks a :class:`~semanticodec.schedule.Path`, a value that says where to evaluate and where to land, and takes its
random numbers from a :data:`Draw`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .schedule import Path, Schedule, power_path, published_path

Network = Callable[[Tensor, int], Tensor]
"""(x_t [B, ...], t) -> the network's raw prediction, v or noise [B, ...]."""
Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t [B, ...], t) -> estimate of x0 [B, ...]."""
Draw = Callable[[int], Tensor]
"""Solver step (or :data:`INITIAL`) -> standard normal noise shaped like the latents."""

INITIAL = -1
"""The step whose noise is the starting point x_T; solver steps count from 0."""
RENEWAL = 1 << 20
"""Added to a solver step: the noise that renews what :class:`Masked` keeps, before that step."""

C = TypeVar("C")


def from_v(network: Network, schedule: Schedule) -> Denoiser:
    """Return the denoiser of a network that predicts v."""

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]
        return math.sqrt(alpha_bar) * x - math.sqrt(1 - alpha_bar) * network(x, t).to(x)

    return denoise


def from_eps(network: Network, schedule: Schedule) -> Denoiser:
    """Return the denoiser of a network that predicts the noise.

    Raises:
        ConfigError: the schedule ends in pure noise, where the noise says nothing about the signal.
    """
    if schedule.alpha_bar[-1] == 0:
        raise ConfigError("a noise-predicting network cannot start where alpha_bar is 0; use v-prediction")

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha_bar = schedule.alpha_bar[t]
        return (x - math.sqrt(1 - alpha_bar) * network(x, t).to(x)) / math.sqrt(alpha_bar)

    return denoise


def guided(
    network: Callable[[Tensor, int, C], Tensor],
    conditional: C,
    unconditional: C,
    scale: float,
    join: Callable[[C, C], C],
) -> Network:
    """Return the network under classifier-free guidance, both branches evaluated as one batch.

    Args:
        network: (x [B, ...], t, conditioning of B rows) -> prediction or x0; guidance commutes with either reading.
        conditional: conditioning of B rows.
        unconditional: what to steer away from, B rows.
        scale: 1 is plain conditional sampling and evaluates nothing else.
        join: stacks (conditional, unconditional) into the conditioning of 2B rows; called once.

    Returns:
        (x [B, ...], t) -> ``unconditional + scale * (conditional - unconditional)``.
    """
    if scale == 1.0:
        return lambda x, t: network(x, t, conditional)
    both = join(conditional, unconditional)

    def predict(x: Tensor, t: int) -> Tensor:
        toward, away = network(torch.cat((x, x)), t, both).chunk(2)
        return away + scale * (toward - away)

    return predict


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def noise(seed: int, window: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise on the CPU as a pure function of its arguments.

    Args:
        seed: 0 <= seed < 2**64.
        window: absolute index of the window since the start of the file or stream, 0 <= window < 2**64.
        step: solver step, or :data:`INITIAL` for the starting point.
        shape: shape of one window's latents (rows of a batch are drawn one by one, each under its own window).

    Returns:
        float32 tensor.

    Raises:
        ConfigError: a number is out of range.
    """
    if not is_whole(seed):
        raise ConfigError(f"the seed is {seed!r}; a whole number in 0..2**64-1 is needed")
    if not (0 <= seed < 2**64 and 0 <= window < 2**64 and INITIAL <= step < 2**32):
        raise ConfigError(f"noise(seed={seed}, window={window}, step={step}): seed and window must be in 0..2**64-1")
    # Philox is a keyed counter: distinct counter words are disjoint stretches of one stream, so nothing is hashed.
    generator = np.random.Generator(
        np.random.Philox(key=seed, counter=np.array((0, 0, step - INITIAL, window), np.uint64))
    )
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def ddim(denoise: Denoiser, x: Tensor, draw: Draw, path: Path, eta: float) -> Tensor:
    """Sample with DDIM.

    Args:
        denoise: estimates x0 from x_t; called once per timestep of the path.
        x: where the path starts, [B, ...]; left unchanged.
        draw: noise of steps 0, 1, ...; called only where some is added, so never for eta 0.
        path: timesteps and where to land.
        eta: share of fresh noise, from 0 (deterministic) to 1 (ancestral, as DDPM).

    Returns:
        x at the end of the path, [B, ...].

    Source: Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16; with `published_path` and eta 1 it is the published
    decoder, which adds noise in its last step too.
    """
    for i, t in enumerate(path.timesteps):
        a, a_next = path.alpha_bar[i : i + 2]
        x0 = denoise(x, t)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = math.sqrt(a_next) * x0 + math.sqrt(max(0.0, 1 - a_next - sigma**2)) * eps
        if sigma > 0:
            x = x + sigma * draw(i).to(x)
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, draw: Draw, path: Path, eta: float) -> Tensor:
    """Sample with DPM-Solver++(2M), or for eta > 0 with its stochastic variant SDE-DPM-Solver++(2M).

    Takes and returns what :func:`ddim` does; at eta 1 the noise per step is the same as there.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and eq. 18.  With h the step in log(alpha / sigma), ``q`` is
    exp(-h); written in q the formulas hold from pure noise (alpha = 0) and to the clean signal (sigma = 0), both q = 0.
    """
    x0_last, h_last = x, math.inf
    for i, t in enumerate(path.timesteps):
        (alpha, sigma), (alpha_next, sigma_next) = ((math.sqrt(a), math.sqrt(1 - a)) for a in path.alpha_bar[i : i + 2])
        q = alpha * sigma_next / (sigma * alpha_next)
        h = -math.log(q) if q > 0 else math.inf
        x0 = denoise(x, t)
        # Extrapolating x0 needs two finite steps; the first step has no past, and an infinite one no midpoint.
        d = x0 + h / (2 * h_last) * (x0 - x0_last) if h < math.inf else x0
        x = sigma_next / sigma * q**eta * x + alpha_next * (1 - q ** (1 + eta)) * d
        spread = sigma_next * math.sqrt(1 - q ** (2 * eta))
        if spread > 0:
            x = x + spread * draw(i).to(x)
        x0_last, h_last = x0, h
    return x


ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of the newest noise estimate and those before it, by how many there are (Adams-Bashforth)."""


def plms(denoise: Denoiser, x: Tensor, draw: Draw, path: Path, eta: float) -> Tensor:
    """Sample with PLMS, which extrapolates from the last four noise estimates; it draws no noise.

    Takes and returns what :func:`ddim` does; the first step calls the denoiser twice, at its beginning and its end.

    Raises:
        ConfigError: eta is not 0, or the path starts from pure noise, of which no noise estimate says anything.

    Source: Liu et al. 2022 (arXiv 2202.09778), eq. 9 and 12; with `published_path` it is MusicLDM's.
    """
    if eta > 0 or path.alpha_bar[0] == 0:
        raise ConfigError(f"PLMS adds no noise and needs some signal; seen eta {eta}, alpha_bar {path.alpha_bar[0]}")
    del draw

    def estimate(x: Tensor, i: int) -> Tensor:
        a = path.alpha_bar[i]
        return (x - math.sqrt(a) * denoise(x, path.timesteps[i])) / math.sqrt(1 - a)

    def moved(x: Tensor, eps: Tensor, i: int) -> Tensor:
        a, a_next = path.alpha_bar[i : i + 2]
        return math.sqrt(a_next / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - a_next) * eps

    past: list[Tensor] = []
    for i in range(len(path.timesteps)):
        past = [estimate(x, i), *past[:3]]
        if i == 0 and len(path.timesteps) > 1:
            eps = (past[0] + estimate(moved(x, past[0], 0), 1)) / 2
        else:
            eps = torch.stack([w * e for w, e in zip(ADAMS[len(past) - 1], past, strict=True)]).sum(0)
        x = moved(x, eps, i)
    return x


SAMPLERS: dict[str, Callable[[Denoiser, Tensor, Draw, Path, float], Tensor]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "plms": plms,
}
PATHS: dict[str, Callable[[Schedule, int], Path]] = {"power": power_path, "published": published_path}


@dataclass(frozen=True)
class SamplerOptions:
    """What a caller may turn per call; ``None`` means the preset's own value.

    Args:
        sampler: "dpmpp_2m" (DPM-Solver++(2M)), "ddim" or "plms" (only with eta 0).
        steps: network evaluations (PLMS makes one more), at least 1.
        guidance: classifier-free guidance scale; 1 is none.
        eta: share of fresh noise per step in [0, 1]; 0 is deterministic given the starting noise.
        path: "power" runs exactly ``steps`` steps; "published" reproduces the published timesteps.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    sampler: Literal["dpmpp_2m", "ddim", "plms"] = "dpmpp_2m"
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    path: Literal["power", "published"] = "power"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"no sampler is called {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if self.path not in PATHS:
            raise ConfigError(f"no path is called {self.path!r}; choose one of {', '.join(PATHS)}")
        if self.steps is not None and (not is_whole(self.steps) or self.steps < 1):
            raise ConfigError(f"{self.steps!r} solver steps asked for; a whole number from 1 up is needed")
        if self.guidance is not None and not (_is_number(self.guidance) and math.isfinite(self.guidance)):
            raise ConfigError(f"guidance is {self.guidance!r}; a finite number is needed (1 is none)")
        if self.eta is not None and not (_is_number(self.eta) and 0 <= self.eta <= 1):
            raise ConfigError(f"eta is {self.eta!r}; choose from 0 (deterministic) to 1 (all noise drawn afresh)")


PUBLISHED = SamplerOptions(sampler="ddim", steps=50, guidance=2.0, eta=1.0, path="published")
"""What the published decoder does."""
FAST = SamplerOptions(steps=1, guidance=1.0)
"""One step without guidance: for mini about a third less work than its default, and a little less detail."""


@dataclass(frozen=True)
class Masked:
    """Latents that are partly given, the rest to be generated around them.

    Args:
        latents: x0 ``[B, C, T, F]``; only read where the mask keeps them.
        mask: ``[B or 1, 1, T, F]``, 1 keeps, 0 generates, between them is mixed.
        renew: replace the kept part by a freshly noised one before every step, as published (DDIM only).  Otherwise the
            denoiser's estimate of the kept part is replaced by the given one, which serves every sampler.
        reblend: put the kept part back, exactly, in the end; the published code does not.
    """

    latents: Tensor
    mask: Tensor
    renew: bool = False
    reblend: bool = True

    def blend(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Return ``given`` (by default the latents) where the mask keeps, ``x`` elsewhere."""
        given = self.latents if given is None else given
        # Not a weighted sum where the mask is 0 or 1: what is not kept may hold anything, NaN included.
        mixed = self.mask.to(x) * given.to(x) + (1 - self.mask.to(x)) * x
        return torch.where(self.mask == 1, given.to(x), torch.where(self.mask == 0, x, mixed))

    def around(self, denoise: Denoiser) -> Denoiser:
        """Return the denoiser that knows the kept part."""
        return lambda x, t: self.blend(denoise(x, t))


@dataclass(frozen=True)
class Partial:
    """Latents that are noised part of the way and denoised again, instead of starting from pure noise.

    Args:
        latents: x0 ``[B, C, T, F]``.
        strength: how far: 0 < strength <= 1 of the schedule's timesteps; 1 leaves nothing (or all but nothing).
        published: take ``int(strength * steps)`` steps and noise to one timestep above the first, as published, where
            strength 1 is an error.  Otherwise noise to exactly where denoising starts.

    Raises:
        ConfigError: the strength is out of range.
    """

    latents: Tensor
    strength: float
    published: bool = False

    def __post_init__(self) -> None:
        if not (_is_number(self.strength) and 0 < self.strength <= 1):
            raise ConfigError(f"the strength is {self.strength!r}; choose from above 0 (little changes) to 1")

    def begin(self, path: Path, schedule: Schedule, steps: int, noise: Tensor) -> tuple[Tensor, Path]:
        """Return the noised latents, and what is left of the path.

        Raises:
            ConfigError: the published rule finds no timestep to noise to.
        """
        if self.published:
            count = int(self.strength * steps)
            if count >= len(path.timesteps):
                raise ConfigError(
                    f"strength {self.strength} of {steps} steps ends above the published timesteps; choose less"
                )
            top = path.timesteps[-1 - count]
        else:
            count = max(1, sum(t < self.strength * len(schedule) for t in path.timesteps))
            top = path.timesteps[-count]
        first = len(path.timesteps) - count
        rest = Path(path.timesteps[first:], path.alpha_bar[first:])
        t = torch.full((len(self.latents),), top, device=noise.device)
        return schedule.add_noise(self.latents.to(noise), noise, t), rest


def sample(
    denoise: Denoiser,
    draw: Draw,
    schedule: Schedule,
    options: SamplerOptions,
    *,
    steps: int,
    eta: float = 0.0,
    masked: Masked | None = None,
    start: Partial | None = None,
) -> Tensor:
    """Sample latents from noise.

    Args:
        denoise: the (guided) denoiser; ``options.guidance`` is applied by whoever builds it, with :func:`guided`.
        draw: noise of each step; its first call is ``draw(INITIAL)``, on the device and in the dtype to work in.
        schedule: the forward process the network was trained on.
        options: the caller's dials.
        steps: the preset's number of steps, for ``options.steps`` of None.
        eta: the preset's share of fresh noise, for ``options.eta`` of None.
        masked: what is given and shall be kept.
        start: what to start from instead of pure noise.

    Returns:
        x0 latents, shaped like the noise.

    Raises:
        ConfigError: more steps than the schedule has, or options that do not go together.
    """
    steps = steps if options.steps is None else options.steps
    eta = eta if options.eta is None else options.eta
    path = PATHS[options.path](schedule, steps)
    x = draw(INITIAL)
    if start is not None:
        x, path = start.begin(path, schedule, steps, x)
    if masked is None:
        return SAMPLERS[options.sampler](denoise, x, draw, path, eta)
    if not masked.renew:
        x = SAMPLERS[options.sampler](masked.around(denoise), x, draw, path, eta)
    elif options.sampler == "ddim":
        x = _renewing(denoise, x, draw, path, eta, masked)
    else:
        raise ConfigError(f"only the sampler 'ddim' can renew what is kept, {options.sampler!r} was chosen")
    return masked.blend(x) if masked.reblend else x


def _renewing(denoise: Denoiser, x: Tensor, draw: Draw, path: Path, eta: float, masked: Masked) -> Tensor:
    """Sample with DDIM, which remembers nothing between steps, and replace what is kept before each."""
    for i, t in enumerate(path.timesteps):
        a = path.alpha_bar[i]
        given = math.sqrt(a) * masked.latents.to(x) + math.sqrt(1 - a) * draw(i + RENEWAL).to(x)
        x = masked.blend(x, given)
        x = ddim(denoise, x, lambda _, i=i: draw(i), Path((t,), path.alpha_bar[i : i + 2]), eta)  # type: ignore[misc]
    return x
