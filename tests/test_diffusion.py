"""Schedules, denoisers, guidance, samplers: published numbers, diffusers' numbers, cases solved in closed form."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from functools import cache
from pathlib import Path as Folder
from typing import Literal

import numpy as np
import pytest
import torch
from golden import Goldens, check
from torch import Tensor

from semanticodec.config import ScheduleConfig
from semanticodec.diffusion import (
    INITIAL,
    PUBLISHED,
    RENEWAL,
    Denoiser,
    Draw,
    Masked,
    Partial,
    SamplerOptions,
    ddim,
    dpmpp_2m,
    from_eps,
    from_v,
    guided,
    noise,
    plms,
    sample,
)
from semanticodec.errors import ConfigError
from semanticodec.schedule import Path, Schedule, make_schedule, power_path, published_path

SCHEDULE = make_schedule(ScheduleConfig())
CRASHING = (3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001))
"""Step counts at which the published code runs past the end of its tables."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def forbidden(step: int) -> Tensor:
    raise AssertionError(f"noise of step {step} was drawn")


def even_path(steps: int) -> Path:
    """What the default path has to beat: evenly spaced timesteps (diffusers calls them trailing)."""
    timesteps = [1000 * k // steps - 1 for k in range(steps, 0, -1)]
    return Path(tuple(timesteps), (*(SCHEDULE.alpha_bar[t] for t in timesteps), 1.0))


class Gaussian:
    """x0 ~ N(mean, std^2): the best denoiser and the end point of its ODE are known in closed form."""

    mean = torch.tensor([-1.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    std = torch.tensor([0.05, 0.3, 1.0, 1.7], dtype=torch.float64)

    def __init__(self, alpha_bar: Sequence[float] = SCHEDULE.alpha_bar) -> None:
        self.alpha_bar = alpha_bar

    def denoise(self, x: Tensor, t: int) -> Tensor:
        alpha_bar = self.alpha_bar[t]
        gain = math.sqrt(alpha_bar) * self.std**2 / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return self.mean + gain * (x - math.sqrt(alpha_bar) * self.mean)

    def start(self, count: int) -> Tensor:
        """Draw x_T from its true distribution, which still knows a little of the mean."""
        return self.transport(randn(count, 4), 0.0, self.alpha_bar[-1])

    def transport(self, x: Tensor, start: float, end: float) -> Tensor:
        """Follow the ODE exactly: every sample keeps its distance from the mean, in standard deviations."""
        z = (x - math.sqrt(start) * self.mean) / (start * self.std**2 + 1 - start).sqrt()
        return math.sqrt(end) * self.mean + (end * self.std**2 + 1 - end).sqrt() * z


class Mixture:
    """x0 from a random handful of narrow Gaussians in four dimensions; the best denoiser is known in closed form."""

    def __init__(self, seed: int) -> None:
        self.means = 0.9 * randn(2 + 3 * seed, 4, seed=seed)
        self.std = 0.03 * 3.0 ** torch.arange(4)
        self.lines = torch.nn.functional.normalize(randn(4, 64, seed=seed), dim=0)

    def denoise(self, x: Tensor, t: int) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar[t]
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        offset = x[:, None] - math.sqrt(alpha_bar) * self.means
        share = (-offset.square() / (2 * variance)).sum(-1).softmax(-1)
        return torch.einsum("bk,bkd->bd", share, self.means + math.sqrt(alpha_bar) * self.std**2 / variance * offset)

    def draw(self, count: int) -> Tensor:
        which = torch.randint(len(self.means), (count,), generator=torch.Generator().manual_seed(2))
        return self.means[which] + self.std * randn(count, 4, seed=3)

    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the sliced Wasserstein distance of two equally large sets of samples."""
        return float(((a @ self.lines).sort(0)[0] - (b @ self.lines).sort(0)[0]).square().mean().sqrt())


class TestSchedule:
    def test_documented_ends(self) -> None:
        assert len(SCHEDULE) == 1000
        assert SCHEDULE.alpha_bar[0] == pytest.approx(0.9985, abs=1e-7)
        assert SCHEDULE.alpha_bar[-1] == pytest.approx(1.4230398e-4, rel=1e-7)
        assert SCHEDULE.alpha_bar == tuple(np.float32(SCHEDULE.alpha_bar).tolist())

    @pytest.mark.parity
    def test_published_buffers(self, goldens: Folder) -> None:
        buffers = Goldens(goldens).arrays("schedule")
        assert np.array_equal(np.float32(SCHEDULE.alpha_bar), buffers["alphas_cumprod"])
        one = torch.ones(1000, 1)
        signal, sigma = (SCHEDULE.add_noise(x0, one - x0, torch.arange(1000))[:, 0] for x0 in (one, 0 * one))
        np.testing.assert_allclose(signal, buffers["sqrt_alphas_cumprod"], rtol=2e-7)
        np.testing.assert_allclose(sigma, buffers["sqrt_one_minus_alphas_cumprod"], rtol=4e-6)

    def test_rows_have_their_own_timesteps(self) -> None:
        x0, eps, t = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0, 999, 400])
        x, v = SCHEDULE.add_noise(x0, eps, t), SCHEDULE.velocity(x0, eps, t)
        for row, step in enumerate(t.tolist()):
            alpha, sigma = math.sqrt(SCHEDULE.alpha_bar[step]), math.sqrt(1 - SCHEDULE.alpha_bar[step])
            torch.testing.assert_close(x[row], alpha * x0[row] + sigma * eps[row], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(v[row], alpha * eps[row] - sigma * x0[row], rtol=1e-6, atol=1e-6)

    def test_keeps_dtype_without_rounding_alpha_bar_to_it(self) -> None:
        x = SCHEDULE.add_noise(
            torch.zeros(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16), torch.zeros(1).long()
        )
        assert x.dtype == torch.bfloat16
        assert x.item() == pytest.approx(math.sqrt(0.0015), rel=2**-8)

    @pytest.mark.parametrize("alpha_bar", [(), (1.0, 0.5), (0.9, 0.9), (0.5, 0.6), (0.5, -0.1), (math.nan,)])
    def test_refuses_nonsense(self, alpha_bar: tuple[float, ...]) -> None:
        with pytest.raises(ConfigError, match="alpha_bar"):
            Schedule(alpha_bar)

    def test_is_a_value(self) -> None:
        assert make_schedule(ScheduleConfig()) == SCHEDULE
        assert make_schedule(ScheduleConfig(steps=999)) != SCHEDULE
        with pytest.raises(FrozenInstanceError):
            SCHEDULE.alpha_bar = ()  # type: ignore[misc]


class TestPaths:
    def test_published_timesteps(self) -> None:
        assert published_path(SCHEDULE, 50).timesteps == tuple(range(981, 0, -20))
        assert published_path(SCHEDULE, 50).alpha_bar[-1] == SCHEDULE.alpha_bar[0]
        assert len(published_path(SCHEDULE, 30).timesteps) == 31

    def test_every_step_count(self) -> None:
        for steps in range(1, 1001):
            power, published = power_path(SCHEDULE, steps), published_path(SCHEDULE, steps)
            assert len(power.timesteps) == steps
            assert power.timesteps[0] == 999
            assert power.alpha_bar[-1] == 1
            assert len(published.timesteps) == math.ceil(1000 / (1000 // steps)) - (steps in CRASHING)
            assert published.alpha_bar[-1] == SCHEDULE.alpha_bar[0]
            for path in (power, published):
                assert list(path.timesteps) == sorted(set(path.timesteps) & set(range(1000)), reverse=True)
                assert path.alpha_bar[:-1] == tuple(SCHEDULE.alpha_bar[t] for t in path.timesteps)

    @pytest.mark.parametrize(("sampler", "bound"), [(dpmpp_2m, 2e-3), (ddim, 2e-2)])
    def test_evaluates_exactly_as_often_as_asked(self, sampler: Callable[..., float], bound: float) -> None:
        """For every step count; a plain float stands in for the latents, which makes half a million steps cheap."""
        worst = 0.0
        for steps in range(1, 1001):
            calls = 0

            def denoise(x: float, t: int) -> float:
                nonlocal calls
                calls += 1
                alpha_bar = SCHEDULE.alpha_bar[t]
                return math.sqrt(alpha_bar) * 0.25 * x / (alpha_bar * 0.25 + 1 - alpha_bar)

            x0 = sampler(denoise, 1.0, forbidden, power_path(SCHEDULE, steps), 0.0)
            assert calls == steps
            assert math.isfinite(x0)
            if steps >= 50:
                worst = max(worst, abs(x0 - 0.5))
        assert worst < bound

    @pytest.mark.parametrize("path", [power_path, published_path])
    @pytest.mark.parametrize("steps", [-1, 0, 1001])
    def test_refuses_other_counts(self, path: Callable[[Schedule, int], Path], steps: int) -> None:
        with pytest.raises(ConfigError, match=rf"{steps} solver steps .* 1 to 1000"):
            path(SCHEDULE, steps)

    @pytest.mark.parity
    def test_published_tables(self, goldens: Folder, request: pytest.FixtureRequest) -> None:
        tables = Goldens(goldens).arrays("ddim_schedule")
        runs = sorted({name.partition(".timesteps")[0] for name in tables if name.endswith(".timesteps")})
        assert len(runs) >= 10
        errors = {}
        for run in runs:
            steps, eta = (float(part) for part in run.removeprefix("S").split("_eta"))
            path = published_path(SCHEDULE, int(steps))
            assert np.array_equal(path.timesteps[::-1], tables[f"{run}.timesteps"])
            assert np.array_equal(path.alpha_bar[-2::-1], tables[f"{run}.alphas"])
            assert np.array_equal(path.alpha_bar[:0:-1], tables[f"{run}.alphas_prev"])
            sigmas = tables[f"{run}.sigmas"]
            errors[f"{run}.sigmas"] = float(
                np.abs(noise_scales(path, eta)[::-1] - sigmas).max() / max(sigmas.max(), 1e-3)
            )
        check(request, errors, 2e-6, part=("semanticodec", "DDIM tables"))


def noise_scales(path: Path, eta: float) -> list[float]:
    """Recover how much noise DDIM adds in each step, by denoising such that nothing else is left to explain x."""
    seen: list[float] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        seen.append(x.item())
        return x / math.sqrt(SCHEDULE.alpha_bar[t])

    one = torch.ones(1, dtype=torch.float64)
    seen.append(ddim(denoise, one, lambda _: one, path, eta).item())
    growth = [math.sqrt(b / a) for a, b in itertools.pairwise(path.alpha_bar)]
    return [after - g * before for (before, after), g in zip(itertools.pairwise(seen), growth, strict=True)]


class TestParity:
    @pytest.mark.parity
    @pytest.mark.parametrize("rate", [100, 50, 25])
    def test_published_trajectories(self, goldens: Folder, rate: int, request: pytest.FixtureRequest) -> None:
        """Every recorded step of the published sampler, its own x0 estimates played back; all of it is pointwise."""
        golden = Goldens(goldens)
        arrays = golden.arrays(f"decode_{rate}")
        runs = sorted(
            name.removesuffix(".noise_draws") for name in arrays if name.startswith("ddim:") and name.endswith("_draws")
        )
        assert len(runs) >= 3
        errors = {}
        for run in runs:
            eta, _, steps = run.split(":")[2].split("_")
            x0s = [torch.from_numpy(arrays[f"{run}.step{i}.pred_x0.sample"]) for i in range(int(steps[1:]))]
            points = golden.synth.sample_index(8 * 256 * 16, 1024)
            stream = golden.synth.NoiseStream(run)
            seen: list[Tensor] = []

            def denoise(
                x: Tensor,
                t: int,
                seen: list[Tensor] = seen,
                run: str = run,
                x0s: list[Tensor] = x0s,
            ) -> Tensor:
                assert t == arrays[f"{run}.step{len(seen)}.t"]
                seen.append(x)
                return x0s[len(seen) - 1]

            def draw(_: int, stream: Callable[..., np.ndarray] = stream, points: np.ndarray = points) -> Tensor:
                return torch.from_numpy(stream((1, 8, 256, 16)).reshape(-1)[points])

            options = replace(PUBLISHED, steps=int(steps[1:]), eta=float(eta.removeprefix("eta")))
            seen.append(sample(denoise, draw, SCHEDULE, options, steps=1))
            for i, x in enumerate(seen[1:]):
                recorded = arrays[f"{run}.step{i}.x_prev.sample"]
                errors[f"{run}.step{i}"] = float(np.abs(x.numpy() - recorded).max() / recorded.std())
        check(request, errors, 5e-6, part=(f"semanticodec-{rate}", "DDIM, recorded estimates played back"))


def network(x: Tensor, t: int) -> Tensor:
    """A smooth made-up prediction."""
    return torch.tanh(1.5 * x + 0.3) * math.cos(t / 700) + 0.1 * x


WRAPPERS = {"v_prediction": from_v, "epsilon": from_eps}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestDiffusers:
    BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}  # noqa: RUF012

    @pytest.mark.parametrize("prediction", WRAPPERS)
    @pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize("steps", [4, 10, 50])
    def test_ddim(self, prediction: str, eta: float, steps: int) -> None:
        from diffusers import DDIMScheduler  # takes seconds

        scheduler = DDIMScheduler(
            **self.BETAS,
            prediction_type=prediction,
            timestep_spacing="leading",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        )
        scheduler.set_timesteps(steps)
        x = expected = randn(2, 3, 4, dtype=torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            fresh = noise(1, 0, i, (2, 3, 4)) if eta else None
            expected = scheduler.step(network(expected, int(t)), t, expected, eta=eta, variance_noise=fresh).prev_sample
        ours = ddim(
            WRAPPERS[prediction](network, SCHEDULE),
            x,
            lambda i: noise(1, 0, i, (2, 3, 4)),
            # diffusers lands on the alpha_bar one interval below, which for the last step is the first one.
            published_path(SCHEDULE, steps),
            eta,
        )
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))

    @pytest.mark.parametrize("prediction", WRAPPERS)
    @pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
    @pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50])
    def test_dpmpp_2m(self, prediction: str, algorithm: str, eta: float, steps: int) -> None:
        from diffusers import DPMSolverMultistepScheduler  # takes seconds

        path = power_path(SCHEDULE, steps)
        scheduler = DPMSolverMultistepScheduler(
            **self.BETAS,
            prediction_type=prediction,
            algorithm_type=algorithm,
            solver_order=2,
            final_sigmas_type="zero",
            lower_order_final=False,
        )
        scheduler.set_timesteps(timesteps=list(path.timesteps))
        x = expected = randn(2, 3, 4, dtype=torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            fresh = noise(1, 0, i, (2, 3, 4)) if eta else None
            expected = scheduler.step(network(expected, int(t)), t, expected, variance_noise=fresh).prev_sample
        ours = dpmpp_2m(WRAPPERS[prediction](network, SCHEDULE), x, lambda i: noise(1, 0, i, (2, 3, 4)), path, eta)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


class TestClosedForm:
    @pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
    def test_order_of_convergence(self, sampler: Callable[..., Tensor], order: int) -> None:
        """Halving steps even in log(alpha / sigma) divides the error by 2 to the order."""
        errors = []
        for steps in (32, 64, 128, 256):
            alpha_bar = [1 / (1 + math.exp(-2 * x)) for x in np.linspace(-4.4, 3.2, steps + 1)]
            case, x = Gaussian(alpha_bar), randn(64, 4)
            ours = sampler(case.denoise, x, forbidden, Path(tuple(range(steps)), tuple(alpha_bar)), 0.0)
            exact = case.transport(x, alpha_bar[0], alpha_bar[-1])
            errors.append(float((ours - exact).square().mean().sqrt()))
        orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        assert all(abs(measured - order) < 0.15 for measured in orders), (errors, orders)

    @pytest.mark.parametrize("steps", [4, 8, 12, 20, 50, 200])
    def test_dpmpp_2m_beats_ddim(self, steps: int) -> None:
        case, x = Gaussian(), randn(64, 4)
        exact = case.transport(x, SCHEDULE.alpha_bar[-1], 1.0)
        fine, coarse = (
            float((s(case.denoise, x, forbidden, power_path(SCHEDULE, steps), 0.0) - exact).square().mean().sqrt())
            for s in (dpmpp_2m, ddim)
        )
        assert fine < 0.6 * coarse

    @pytest.mark.parametrize("steps", [20, 50, 200])
    def test_plms_beats_ddim(self, steps: int) -> None:
        """With one evaluation more."""
        case, x, path = Gaussian(), randn(64, 4), published_path(SCHEDULE, steps)
        exact = case.transport(x, path.alpha_bar[0], path.alpha_bar[-1])
        fine, coarse = (
            float((s(case.denoise, x, forbidden, path, 0.0) - exact).square().mean().sqrt()) for s in (plms, ddim)
        )
        assert fine < 0.2 * coarse

    def test_plms_refuses_noise(self) -> None:
        for eta, alpha_bar in ((0.5, (0.1, 1.0)), (0.0, (0.0, 1.0))):
            with pytest.raises(ConfigError, match="PLMS adds no noise and needs some signal"):
                plms(Gaussian().denoise, randn(1, 4), forbidden, Path((5,), alpha_bar), eta)

    def test_one_step_of_plms_is_ddim(self) -> None:
        case, x, path = Gaussian(), randn(2, 4), published_path(SCHEDULE, 1)
        assert torch.allclose(plms(case.denoise, x, forbidden, path, 0.0), ddim(case.denoise, x, forbidden, path, 0.0))

    @pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
    @pytest.mark.parametrize("eta", [0.5, 1.0])
    def test_fresh_noise_keeps_the_distribution(self, sampler: Callable[..., Tensor], eta: float) -> None:
        case, count = Gaussian(), 20_000
        x0 = sampler(
            case.denoise, case.start(count), lambda i: randn(count, 4, seed=i + 1), power_path(SCHEDULE, 300), eta
        )
        torch.testing.assert_close(x0.mean(0), case.mean, rtol=0, atol=0.04)
        torch.testing.assert_close(x0.std(0), case.std, rtol=0.02, atol=0.015)

    @pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_starts_from_pure_noise(self, sampler: Callable[..., Tensor], eta: float) -> None:
        """A schedule without terminal signal: alpha_bar = 0 must not divide anything (AudioSR's ends like that)."""
        schedule = Schedule((*(math.cos((t + 1) / 1000 * math.pi / 2) ** 2 for t in range(999)), 0.0))
        case, x = Gaussian(schedule.alpha_bar), randn(20_000, 4)

        def v(x: Tensor, t: int) -> Tensor:
            alpha, sigma = math.sqrt(schedule.alpha_bar[t]), math.sqrt(1 - schedule.alpha_bar[t])
            return (alpha * x - case.denoise(x, t)) / sigma

        x0 = sampler(from_v(v, schedule), x, lambda i: randn(20_000, 4, seed=i + 1), power_path(schedule, 200), eta)
        torch.testing.assert_close(x0.mean(0), case.mean, rtol=0, atol=0.04)
        torch.testing.assert_close(x0.std(0), case.std, rtol=0.02, atol=0.015)


@cache
def exact(case: Mixture, x: Tensor) -> Tensor:
    """Follow the ODE in steps too small to matter."""
    return dpmpp_2m(case.denoise, x, forbidden, power_path(SCHEDULE, 500), 0.0)


class TestMixture:
    """What the choices of this package are worth, on data with structure: means over five mixtures."""

    CASES = tuple(Mixture(seed) for seed in range(5))
    START = randn(2000, 4)

    def mean_distance(
        self, run: Callable[[Mixture, Tensor], Tensor], target: Callable[[Mixture, Tensor], Tensor]
    ) -> float:
        x = self.START
        return sum(case.distance(run(case, x), target(case, x)) for case in self.CASES) / len(self.CASES)

    @pytest.mark.parametrize(("steps", "share"), [(4, 0.7), (8, 0.5), (20, 0.4)])
    def test_power_path_beats_even_spacing(self, steps: int, share: float) -> None:
        power, even = (
            self.mean_distance(
                lambda case, x, path=path: dpmpp_2m(case.denoise, x, forbidden, path, 0.0),
                exact,
            )
            for path in (power_path(SCHEDULE, steps), even_path(steps))
        )
        assert power < share * even

    @pytest.mark.parametrize(("steps", "share"), [(4, 0.75), (8, 0.6), (20, 0.8)])
    def test_stochastic_dpmpp_2m_beats_ancestral_ddim(self, steps: int, share: float) -> None:
        fine, coarse = (
            self.mean_distance(
                lambda case, x, sampler=sampler: sampler(
                    case.denoise, x, lambda i: randn(*x.shape, seed=i + 10), power_path(SCHEDULE, steps), 1.0
                ),
                lambda case, x: case.draw(len(x)),
            )
            for sampler in (dpmpp_2m, ddim)
        )
        assert fine < share * coarse


class TestDenoisers:
    @pytest.mark.parametrize("t", [0, 17, 500, 999])
    def test_recover_x0(self, t: int) -> None:
        x0, eps, step = randn(2, 3), randn(2, 3, seed=1), torch.tensor([t, t])
        x, v = SCHEDULE.add_noise(x0, eps, step), SCHEDULE.velocity(x0, eps, step)
        torch.testing.assert_close(from_v(lambda _x, _t: v, SCHEDULE)(x, t), x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(from_eps(lambda _x, _t: eps, SCHEDULE)(x, t), x0, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("wrap", [from_v, from_eps])
    def test_work_in_the_latents_precision(self, wrap: Callable[..., Denoiser]) -> None:
        """However little precision the network has, no more is lost on the way."""
        x = randn(2, 3, dtype=torch.float32)
        half, full = (
            wrap(lambda x, _t, to=to: x.bfloat16().to(to), SCHEDULE)(x, 300) for to in (torch.bfloat16, x.dtype)
        )
        assert torch.equal(half, full)

    def test_eps_cannot_start_from_pure_noise(self) -> None:
        with pytest.raises(ConfigError, match="v-prediction"):
            from_eps(network, Schedule((0.5, 0.0)))


class TestGuidance:
    def test_equals_two_evaluations(self) -> None:
        x, here, there = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
        batches: list[int] = []

        def model(x: Tensor, t: int, condition: Tensor) -> Tensor:
            batches.append(len(x))
            return network(x + condition, t)

        predict = guided(model, here, there, 2.5, lambda a, b: torch.cat((a, b)))
        result = predict(x, 10)
        assert batches == [4]
        toward, away = model(x, 10, here), model(x, 10, there)
        torch.testing.assert_close(result, away + 2.5 * (toward - away), rtol=1e-12, atol=1e-12)

    def test_scale_one_evaluates_only_the_condition(self) -> None:
        def join(_a: str, _b: str) -> str:
            raise AssertionError("joined")

        def model(x: Tensor, t: int, condition: str) -> Tensor:
            assert (len(x), t, condition) == (2, 10, "here")
            return x

        x = randn(2, 3)
        assert guided(model, "here", "there", 1.0, join)(x, 10) is x

    def test_joins_once(self) -> None:
        joined: list[tuple[str, str]] = []

        def join(a: str, b: str) -> str:
            joined.append((a, b))
            return a + b

        predict = guided(lambda x, _t, _c: x, "here", "there", 3.0, join)
        for t in (3, 2, 1):
            predict(randn(2, 3), t)
        assert joined == [("here", "there")]

    @pytest.mark.parametrize("wrap", [from_v, from_eps])
    def test_guides_a_prediction_as_it_guides_x0(self, wrap: Callable[..., Denoiser]) -> None:
        model: Callable[[Tensor, int, Tensor], Tensor] = lambda x, t, c: network(x + c, t)  # noqa: E731
        x, here, there = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
        result = wrap(guided(model, here, there, 2.0, lambda a, b: torch.cat((a, b))), SCHEDULE)(x, 600)
        toward, away = (wrap(lambda x, t, c=c: model(x, t, c), SCHEDULE)(x, 600) for c in (here, there))
        torch.testing.assert_close(result, away + 2.0 * (toward - away), rtol=1e-10, atol=1e-10)


class TestNoise:
    KEYS = tuple(itertools.product((0, 1, 2**64 - 2, 2**64 - 1), (0, 1, 2**63, 2**64 - 1), (INITIAL, 0, 1, 999)))

    def test_is_a_pure_function_of_its_key(self) -> None:
        first = {key: noise(*key, (2, 8)) for key in self.KEYS}
        for key in random.Random(0).sample(self.KEYS, len(self.KEYS)):
            assert torch.equal(noise(*key, (2, 8)), first[key])
        assert len({tuple(value.flatten().tolist()) for value in first.values()}) == len(self.KEYS)

    def test_is_standard_normal_and_unrelated_between_keys(self) -> None:
        drawn = torch.stack([noise(*key, (8, 256, 16)).flatten() for key in self.KEYS])
        assert drawn.dtype == torch.float32
        assert drawn.device.type == "cpu"
        torch.testing.assert_close(drawn.mean(1), torch.zeros(64), rtol=0, atol=5 / 32768**0.5)
        torch.testing.assert_close(drawn.std(1), torch.ones(64), rtol=0, atol=5 / 65536**0.5)
        torch.testing.assert_close(torch.corrcoef(drawn), torch.eye(64), rtol=0, atol=6 / 32768**0.5)

    def test_values_are_pinned(self) -> None:
        """A stream that was stored with its seed must sound the same next year."""
        torch.testing.assert_close(
            noise(1234, 5, 6, (3,)), torch.tensor([0.142763495, 1.785964131, 0.763003349]), rtol=0, atol=0
        )

    def test_leaves_global_generators_alone(self) -> None:
        before = torch.get_rng_state()
        noise(0, 0, 0, (4,))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("key", [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 2**64, 0), (0, 0, -2)])
    def test_refuses_other_keys(self, key: tuple[int, int, int]) -> None:
        with pytest.raises(ConfigError, match="noise"):
            noise(*key, (1,))

    @pytest.mark.parametrize("seed", [1.5, True, "1", None])
    def test_refuses_seeds_that_are_no_whole_numbers(self, seed: object) -> None:
        with pytest.raises(ConfigError, match=f"seed is {seed!r}"):
            noise(seed, 0, 0, (1,))  # type: ignore[arg-type]
        assert torch.equal(noise(np.int64(7), 0, 0, (4,)), noise(7, 0, 0, (4,)))


class TestSample:
    @pytest.mark.parametrize(
        ("options", "drawn"),
        [
            (SamplerOptions(), [INITIAL]),
            (SamplerOptions("ddim"), [INITIAL]),
            (SamplerOptions("plms"), [INITIAL]),
            (replace(PUBLISHED, steps=None, eta=0.0), [INITIAL]),
            # Landing on the clean signal leaves no room for noise; the published path stops short of it.
            (SamplerOptions(eta=1.0), [INITIAL, 0, 1, 2]),
            (SamplerOptions("ddim", eta=1.0), [INITIAL, 0, 1, 2]),
            (replace(PUBLISHED, steps=None), [INITIAL, 0, 1, 2, 3]),
        ],
    )
    def test_draws_only_what_it_needs(self, options: SamplerOptions, drawn: list[int]) -> None:
        calls: list[int] = []

        def draw(step: int) -> Tensor:
            calls.append(step)
            return noise(0, 0, step, (1, 4))

        sample(Gaussian().denoise, draw, SCHEDULE, options, steps=4)
        assert calls == drawn

    @pytest.mark.parametrize("options", [SamplerOptions(), SamplerOptions(eta=0.7), replace(PUBLISHED, steps=None)])
    def test_rows_do_not_depend_on_each_other(self, options: SamplerOptions) -> None:
        windows = (7, 0, 123)
        denoise = from_v(network, SCHEDULE)

        def run(rows: Sequence[int]) -> Tensor:
            draw: Draw = lambda step: torch.stack([noise(3, row, step, (8, 12, 16)) for row in rows])  # noqa: E731
            return sample(denoise, draw, SCHEDULE, options, steps=6)

        whole = run(windows)
        assert whole.dtype == torch.float32
        for row, window in enumerate(windows):
            assert torch.equal(run([window])[0], whole[row])

    @pytest.mark.parametrize("options", [SamplerOptions(), PUBLISHED])
    def test_leaves_the_noise_alone(self, options: SamplerOptions) -> None:
        x = randn(2, 3)
        kept = x.clone()
        sample(from_v(network, SCHEDULE), lambda _: x, SCHEDULE, options, steps=3)
        assert torch.equal(x, kept)

    def test_own_steps_win_over_the_presets(self) -> None:
        for options, expected in ((SamplerOptions(), 7), (SamplerOptions(steps=3), 3)):
            seen: list[int] = []

            def denoise(x: Tensor, t: int, seen: list[int] = seen) -> Tensor:
                seen.append(t)
                return x

            sample(denoise, lambda _: randn(1), SCHEDULE, options, steps=7)
            assert len(seen) == expected

    def test_refuses_more_steps_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match="1001 solver steps"):
            sample(network, forbidden, SCHEDULE, SamplerOptions(steps=1001), steps=1)


class TestOptions:
    @pytest.mark.parametrize(
        "dials",
        [
            {"sampler": "euler"},
            {"path": "even"},
            {"steps": 0},
            {"steps": -3},
            {"steps": 2.5},
            {"guidance": math.nan},
            {"guidance": math.inf},
            {"eta": -0.1},
            {"eta": 1.1},
            {"eta": math.nan},
        ],
    )
    def test_refuses(self, dials: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=str(next(iter(dials.values())))):
            SamplerOptions(**dials)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "dials",
        [{"guidance": "a"}, {"guidance": True}, {"eta": "x"}, {"eta": True}, {"steps": True}],
    )
    def test_refuses_other_types(self, dials: dict[str, object]) -> None:
        (name, value), *_ = dials.items()
        with pytest.raises(ConfigError, match=rf"{value!r}.*needed|{name} is {value!r}"):
            SamplerOptions(**dials)  # type: ignore[arg-type]

    def test_are_a_value(self) -> None:
        assert SamplerOptions() == SamplerOptions("dpmpp_2m", None, None, None, "power")
        assert hash(SamplerOptions(steps=3)) == hash(SamplerOptions(steps=3))
        with pytest.raises(FrozenInstanceError):
            PUBLISHED.steps = 3  # type: ignore[misc]


class Pair:
    """Two correlated normal numbers per cell, whose denoiser is known: what is kept of one tells about the other."""

    rho = 0.9

    def denoise(self, x: Tensor, t: int) -> Tensor:
        a = SCHEDULE.alpha_bar[t]
        prior = torch.tensor([[1.0, self.rho], [self.rho, 1.0]], dtype=x.dtype)
        gain = math.sqrt(a) * prior @ torch.linalg.inv(a * prior + (1 - a) * torch.eye(2, dtype=x.dtype))
        return torch.einsum("ij,bjtf->bitf", gain, x)


def draws(*shape: int) -> Callable[[int], Tensor]:
    return lambda step: randn(*shape, seed=step + 100)


class TestMasked:
    SHAPE = (4, 2, 40, 50)

    def given(self, **dials: bool) -> Masked:
        mask = torch.zeros(1, 2, 1, 1)
        mask[:, 0] = 1
        latents = torch.full(self.SHAPE, math.nan, dtype=torch.float64)
        latents[:, 0] = 2.0
        return Masked(latents, mask, **dials)

    @pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
    @pytest.mark.parametrize("path", ["power", "published"])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_keeps_exactly_and_generates_what_belongs_to_it(
        self, sampler: Literal["ddim", "dpmpp_2m"], path: Literal["power", "published"], eta: float
    ) -> None:
        options = SamplerOptions(sampler, path=path, eta=eta)
        x = sample(Pair().denoise, draws(*self.SHAPE), SCHEDULE, options, steps=50, masked=self.given())
        assert (x[:, 0] == 2).all()
        # given 2 the other has the mean 1.8; replacing what is kept falls short of that, less with fresh noise
        assert (1.15 if eta else 0.8) < x[:, 1].mean() < 1.9
        assert x[:, 1].std() < 0.75

    def test_renewed_with_fresh_noise_before_every_step(self) -> None:
        seen, drawn = [], []

        def denoise(x: Tensor, t: int) -> Tensor:
            seen.append((t, x))
            return Pair().denoise(x, t)

        def draw(step: int) -> Tensor:
            drawn.append(step)
            return draws(*self.SHAPE)(step)

        given = self.given(renew=True, reblend=False)
        options = SamplerOptions("ddim", steps=4, eta=1.0, path="published")
        x = sample(denoise, draw, SCHEDULE, options, steps=1, masked=given)
        assert drawn == [INITIAL, RENEWAL, 0, RENEWAL + 1, 1, RENEWAL + 2, 2, RENEWAL + 3, 3]
        for i, (t, inside) in enumerate(seen):
            a = SCHEDULE.alpha_bar[t]
            wanted = math.sqrt(a) * 2 + math.sqrt(1 - a) * draws(*self.SHAPE)(RENEWAL + i)[:, 0]
            torch.testing.assert_close(inside[:, 0], wanted)
        # the published rule puts nothing back in the end, so that the kept part has drifted
        assert 0.005 < (x[:, 0] - 2).abs().mean() < 0.2
        back = sample(denoise, draw, SCHEDULE, options, steps=1, masked=replace(given, reblend=True))
        assert (back[:, 0] == 2).all()
        torch.testing.assert_close(back[:, 1], x[:, 1], rtol=0, atol=0)

    def test_fractions_are_mixed(self) -> None:
        x, latents = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        mask = torch.tensor([[0.0, 0.25], [0.5, 1.0]])[None, None]
        torch.testing.assert_close(Masked(latents, mask).blend(x), mask)

    def test_only_ddim_can_renew(self) -> None:
        with pytest.raises(ConfigError, match="only the sampler 'ddim' can renew"):
            sample(
                Pair().denoise, draws(*self.SHAPE), SCHEDULE, SamplerOptions(), steps=3, masked=self.given(renew=True)
            )


class TestPartial:
    def started(self, start: Partial, options: SamplerOptions) -> tuple[list[int], Tensor, Tensor]:
        timesteps: list[int] = []
        inputs: list[Tensor] = []

        def denoise(x: Tensor, t: int) -> Tensor:
            timesteps.append(t)
            inputs.append(x)
            return start.latents

        result = sample(denoise, draws(2, 1, 4, 4), SCHEDULE, options, steps=20, start=start)
        return timesteps, inputs[0], result

    @pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 1.0])
    @pytest.mark.parametrize("options", [SamplerOptions(), SamplerOptions("ddim", path="published")])
    def test_noises_to_where_denoising_starts(self, strength: float, options: SamplerOptions) -> None:
        latents = randn(2, 1, 4, 4, seed=5)
        timesteps, first, _ = self.started(Partial(latents, strength), options)
        every, _, _ = self.started(Partial(latents, 1.0), options)
        assert timesteps == every[-len(timesteps) :]
        assert timesteps[0] < 1000 * strength or len(timesteps) == 1
        assert len(timesteps) == len(every) or every[-len(timesteps) - 1] >= 1000 * strength
        wanted = SCHEDULE.add_noise(latents, draws(2, 1, 4, 4)(INITIAL), torch.tensor([timesteps[0]] * 2))
        torch.testing.assert_close(first, wanted)

    def test_as_published_one_timestep_noisier(self) -> None:
        latents = randn(2, 1, 4, 4, seed=5)
        options = SamplerOptions("ddim", steps=10, eta=0.0, path="published")
        timesteps, first, _ = self.started(Partial(latents, 0.59, published=True), options)
        assert timesteps == [401, 301, 201, 101, 1]
        wanted = SCHEDULE.add_noise(latents, draws(2, 1, 4, 4)(INITIAL), torch.tensor([501] * 2))
        torch.testing.assert_close(first, wanted)
        with pytest.raises(ConfigError, match=r"strength 1\.0 of 10 steps ends above the published timesteps"):
            self.started(Partial(latents, 1.0, published=True), options)

    @pytest.mark.parametrize("strength", [0.0, -1, 1.1, math.nan, "1", True])
    def test_refuses(self, strength: float) -> None:
        with pytest.raises(ConfigError, match="the strength is"):
            Partial(torch.zeros(1), strength)


def test_the_cosine_schedule_is_the_published_one() -> None:
    schedule = make_schedule(ScheduleConfig("cosine"))
    for t, value in {0: 0.999959, 21: 0.997971, 250: 0.845888, 500: 0.492285, 981: 7.86715e-4, 999: 0.0}.items():
        assert schedule.alpha_bar[t] == pytest.approx(value, rel=1e-5, abs=1e-9)
