"""Which part of a recording is generated anew: as samples, spectrum bins, latent cells, and in which windows.

C channels of one recording, S samples, T latent steps, F latent cells per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .audio import slaney_filters
from .bandlimit import BINS, joined
from .config import LatentConfig
from .errors import ConfigError

RAMP = 0.01
"""Seconds in which the kept part fades into the generated one, inside the latter."""


@dataclass(frozen=True)
class Region:
    """A stretch of time, a band, or a band for a stretch of time, that is generated anew.

    Args:
        start: seconds.
        stop: seconds; None or infinity is the end.
        low: Hz.
        high: Hz; None is half the sample rate.

    Raises:
        ConfigError: nothing lies between the edges.
    """

    start: float = 0.0
    stop: float | None = None
    low: float = 0.0
    high: float | None = None

    def __post_init__(self) -> None:
        for begin, end, unit in ((self.start, self.stop, "s"), (self.low, self.high, "Hz")):
            if not (begin >= 0 and begin < (math.inf if end is None else end)):
                raise ConfigError(
                    f"a region from {begin} to {end} {unit} was given; it must begin at 0 or later, and end"
                )

    def samples(self, sample_rate: int, total: int) -> tuple[int, int]:
        """Return its first sample and the one after its last, in a recording of ``total`` samples."""
        first, last = (
            total if edge is None or edge * sample_rate >= total else round(edge * sample_rate)
            for edge in (self.start, self.stop)
        )
        return first, last

    def bins(self, sample_rate: int) -> tuple[int, int]:
        """Return the first spectrum bin of its band and the one after its last; there is at least one."""
        low, high = (
            BINS if edge is None or 2 * edge >= sample_rate else round(2 * edge / sample_rate * (BINS - 1))
            for edge in (self.low, self.high)
        )
        low = min(low, BINS - 1)
        return low, max(low + 1, high)


def cell_mask(config: LatentConfig, steps: int, regions: Sequence[Region]) -> Tensor:
    """Return which latent cells are kept, ``[1, 1, steps, F]``: 1, or 0 where a cell touches a region."""
    mel, step = config.mel, config.step_samples
    # A cell ends at its highest filter's peak, where the next one begins: every frequency lies in a cell.
    peaks = slaney_filters(mel).argmax(0) * (mel.sample_rate / mel.n_fft)
    highs = peaks.reshape(-1, config.vae.factor)[:, -1]
    lows = torch.cat([torch.zeros_like(highs[:1]), highs[:-1]])
    highs[-1] = math.inf
    keep = torch.ones(1, 1, steps, config.cells)
    for region in regions:
        first, last = region.samples(mel.sample_rate, steps * step)
        cells = (highs >= region.low) & (lows < (math.inf if region.high is None else region.high))
        keep[:, :, first // step : -(-last // step), cells] = 0.0
    return keep


def composed(kept: Tensor, heard: Tensor, regions: Sequence[Region], sample_rate: int) -> Tensor:
    """Return ``kept`` ``[C, S]`` with the regions of ``heard``, in any order; outside their time to the bit."""
    total = kept.shape[1]
    bands = [(region.bins(sample_rate), region.samples(sample_rate, total)) for region in regions]
    edges = sorted({0, BINS, *(edge for band, _ in bands for edge in band)})
    # Bands that are generated at the same times are one.
    parts: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for low, high in pairwise(edges):
        times = _union(span for (first, last), span in bands if first <= low < last)
        parts.setdefault(times, []).append((low, high))
    weights = {times: _weight(times, total, int(RAMP * sample_rate)) for times in parts}
    if len(parts) == 1:
        result = torch.lerp(kept, heard, *weights.values())
    else:
        result = kept.clone()
        for times, own in parts.items():
            for low, high in own if times else ():
                result += weights[times] * _band(heard - kept, low, high)
    return torch.where(torch.stack(list(weights.values())).amax(0) > 0, result, kept)


def _union(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return spans in order, those joined that overlap or touch."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return tuple(result)


def _band(wave: Tensor, low: int, high: int) -> Tensor:
    """Return what lies from bin ``low`` up to bin ``high``."""
    samples = wave.shape[1]
    wave = functional.pad(wave, (0, max(0, 2 * BINS - samples)))
    nothing = torch.zeros_like(wave)
    if low > 0:
        wave = joined(nothing, wave, low, 1.0)
    if high < BINS:
        wave = joined(wave, nothing, high, 1.0)
    return wave[:, :samples]


def _weight(spans: Iterable[tuple[int, int]], total: int, ramp: int) -> Tensor:
    """Return 1 in the spans, 0 outside, with ramps inside them where the recording goes on."""
    weight = torch.zeros(total)
    for first, last in spans:
        position = torch.arange(last - first) + 0.5
        own = torch.ones(last - first)
        length = max(1, min(ramp, (last - first) // 2))
        if first > 0:
            own = torch.minimum(own, position / length)
        if last < total:
            own = torch.minimum(own, (last - first - position) / length)
        weight[first:last] = own
    return weight


def grid_spans(steps: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last + 1, how many were in the window before) of the windows that cover ``steps``."""
    first = own = 0
    while True:
        last = min(first + window, steps)
        yield first, last, own
        if last == steps:
            return
        first, own = last - overlap, overlap


Window = tuple[int, int, int, int]
"""First latent step that a window sees, the one after its last, and the same of what is new in it."""


def grid_windows(steps: int, window: int, overlap: int) -> list[Window]:
    """Return windows from left to right, each a continuation of the one before."""
    return [(first, last, first + own, last) for first, last, own in grid_spans(steps, window, overlap)]


def placed_windows(keep: Tensor, window: int, overlap: int, unit: int) -> list[Window]:
    """Return windows around what ``keep`` ``[T, F]`` leaves open, in order, each at a multiple of ``unit``."""
    steps = len(keep)
    size = window - unit + 1
    whole = (keep == 0).all(1)
    partly = (keep < 1).any(1) & ~whole
    windows: list[Window] = []
    # Stretches of which nothing is known come first: where all is open in part, they too have two sides.
    for rows in (whole, partly):
        if rows.all():
            windows += grid_windows(steps, window, overlap)
            continue
        for begin, end in _stretches(rows.tolist(), size, overlap):
            for first, own, next_own in _filled(begin, end, steps, size, overlap):
                first -= first % unit
                windows.append((first, min(first + window, steps), own, next_own))
    return windows


def _stretches(rows: Sequence[bool], window: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of runs of True; neighbours that one window can fill together are one."""
    steps, last = len(rows), 0
    found: tuple[int, int] | None = None
    for value, run in groupby(rows):
        first, last = last, last + len(list(run))
        if not value:
            continue
        if found is not None and last - found[0] <= _room(found[0], last, steps, window, overlap):
            first = found[0]
        elif found is not None:
            yield found
        found = first, last
    if found is not None:
        yield found


def _room(begin: int, end: int, steps: int, window: int, overlap: int) -> int:
    """Return how much a window can fill from ``begin`` to ``end`` if it sees the overlap on both sides."""
    return max(1, window - min(overlap, begin) - min(overlap, steps - end))


def _filled(begin: int, end: int, steps: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (first, first new step, the one after the last) that fill a stretch out of its surroundings."""
    if min(overlap, begin) < min(overlap, steps - end):
        # There is more to go on from after the stretch: the same from right to left.
        for first, own, next_own in _filled(steps - end, steps - begin, steps, window, overlap):
            yield max(0, steps - first - window), steps - next_own, steps - own
        return
    while end - begin > _room(begin, end, steps, window, overlap):
        size = window - min(overlap, begin)
        if end < steps:
            # The last part shall be long enough to lead over to what follows.
            size = min(size, (end - begin + 1) // 2)
        yield max(0, begin + size - window), begin, begin + size
        begin += size
    yield max(0, min(begin - (window - end + begin) // 2, steps - window)), begin, end
