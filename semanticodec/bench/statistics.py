"""Means with bootstrap intervals, and paired tests between systems."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
FEWEST = 6
"""Clips on which two systems must differ to be tested: with five the signed-rank test cannot reach p < 0.05."""
METHOD = (
    f"Wilcoxon's signed-rank test (two-sided) on the clips that both have, if they differ on {FEWEST} or more; "
    "p_holm is corrected for multiple comparisons after Holm, over the pairs of one measure and kind of sound"
)


@dataclass(frozen=True)
class Interval:
    """A weighted mean over clips with its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float
    clips: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Sequence[tuple[float, float]], seed: int = 0) -> Interval | None:
    """Average (value, weight) pairs and resample clips to see how far the mean may be off; None without any clip."""
    if not values or not sum(weight for _, weight in values):
        return None
    data, weights = np.array(values, np.float64).T
    chosen = _chosen(len(data), seed)
    totals = weights[chosen].sum(1)
    means = (data * weights)[chosen].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((data * weights).sum() / weights.sum()), float(low), float(high), len(data))


@functools.lru_cache(4)
def _chosen(clips: int, seed: int) -> NDArray[np.int64]:
    """Draw which clips each resample consists of, ``[RESAMPLES, clips]``: many means are over as many clips."""
    return np.random.default_rng(seed).integers(0, clips, (RESAMPLES, clips))


@dataclass(frozen=True)
class Comparison:
    """Two systems on the clips that both have, by :data:`METHOD`.

    Args:
        first: a system.
        second: another.
        difference: mean of first minus second.
        low: lower end of its bootstrap 95 % interval.
        high: upper end.
        p: of the test alone; None if they differ on too few clips to be tested.
        p_holm: the same after Holm, over all pairs that were tested together.
        clips: in common.
        differing: of these, clips that the two are not equal on.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    clips: int
    differing: int

    @property
    def verdict(self) -> str:
        """The corrected p, or why there is none."""
        if self.p_holm is not None:
            return f"{self.p_holm:.2g}"
        if self.clips < FEWEST:
            return f"not tested: {self.clips} in common, {FEWEST} needed"
        return f"not tested: {self.differing} of {self.clips} differ, {FEWEST} needed"


def paired(scores: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Compare every pair of systems on the clips that they have in common, if there are any.

    Args:
        scores: system -> clip -> value.
    """
    from scipy.stats import wilcoxon

    found = []
    for first, second in itertools.combinations(scores, 2):
        common = sorted(scores[first].keys() & scores[second].keys())
        difference = np.array([scores[first][clip] - scores[second][clip] for clip in common])
        mean = interval([(value, 1.0) for value in difference])
        if mean is not None:
            differing = int(np.count_nonzero(difference))
            p = float(wilcoxon(difference).pvalue) if differing >= FEWEST else None
            found.append(Comparison(first, second, mean.mean, mean.low, mean.high, p, None, mean.clips, differing))
    corrected = iter(holm([pair.p for pair in found if pair.p is not None]))
    return [pair if pair.p is None else dataclasses.replace(pair, p_holm=next(corrected)) for pair in found]


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values of tests that belong together, so that any false alarm among them has the stated chance.

    Source: Holm (1979), as adjusted p-values.
    """
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(factors * np.asarray(values)[order]), 1)
    return [float(value) for value in adjusted[np.argsort(order)]]
