"""Clocks, this machine's matrix-multiplication peak, operation counts, and who measured: shared by the benchmarks."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from semanticodec.bench.cost import gflop as gflop
from semanticodec.bench.machine import machine as machine

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: elapsed, and spent by this process on all its threads."""

    wall: float
    cpu: float

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, times: int) -> "Timing":
        return Timing(self.wall * times, self.cpu * times)


def timed(run: Callable[[], object], repeats: int, *, warm_up: bool = True) -> Timing:
    """Run once to warm up and ``repeats`` times for the clock; return the smallest time of each clock."""
    if warm_up:
        run()
    seen = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seen.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return least(seen)


def rounds(runs: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True) -> dict[str, list[Timing]]:
    """Time several things, each once per round, after one run to warm up: all see the same machine."""
    seen: dict[str, list[Timing]] = {name: [] for name in runs}
    for round_ in range(repeats):
        for name, run in runs.items():
            seen[name].append(timed(run, 1, warm_up=warm_up and not round_))
    return seen


def in_turn(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time several things in :func:`rounds`; return the smallest time of each clock."""
    return {name: least(seen) for name, seen in rounds(runs, repeats).items()}


def least(seen: Iterable[Timing]) -> Timing:
    """Return the smallest time of each clock: that of the run least disturbed by whatever else the machine does."""
    walls, cpus = zip(*((timing.wall, timing.cpu) for timing in seen), strict=True)
    return Timing(min(walls), min(cpus))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, lowest and highest: what a machine that others use as well makes of the same work."""
    found = sorted(values)
    return {"median": statistics.median(found), "low": found[0], "high": found[-1]}


class Sgemm:
    """The machine's peak: a square float32 matrix product, measured again and again during a run."""

    def __init__(self, size: int = 2048) -> None:
        a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
        self.size = size
        self.gflop = 2 * size**3 / 1e9
        self._run = lambda: a @ b
        self.best = Timing(float("inf"), float("inf"))

    def measure(self) -> None:
        """Time a few products and keep the best so far."""
        now = timed(self._run, 5)
        self.best = Timing(min(self.best.wall, now.wall), min(self.best.cpu, now.cpu))

    @property
    def gflops(self) -> float:
        """GFLOP per elapsed second."""
        return self.gflop / self.best.wall

    @property
    def gflops_cpu(self) -> float:
        """GFLOP per second of processor time."""
        return self.gflop / self.best.cpu


def randomise(tensors: Iterable[Tensor], seed: int) -> None:
    """Fill tensors from one seed, at a scale that keeps activations of order one; meta tensors stay as they are.

    Speed does not depend on the values as long as none are denormal, infinite or NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.is_meta:
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 100
                tensor.normal_(0, fan_in**-0.5, generator=generator)


def company() -> dict[str, float | bool]:
    """Say what else the machine does: its load over the last minute, and whether it has to wait for this process.

    With ``chrt --rr 1`` before the command, the kernel lets nothing else run while this process, its children, or a
    browser of theirs has something to do: the next best thing to a machine with nobody else on it.
    """
    first = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    return {"load": round(os.getloadavg()[0], 1), "first": first}
