"""Means with bootstrap intervals, and paired tests between systems."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


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
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(data), (RESAMPLES, len(data)))
    totals = weights[chosen].sum(1)
    means = (data * weights)[chosen].sum(1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((data * weights).sum() / weights.sum()), float(low), float(high), len(data))


@dataclass(frozen=True)
class Comparison:
    """Two systems on the clips that both have.

    Args:
        first: a system.
        second: another.
        difference: mean of first minus second.
        p: of the Wilcoxon signed-rank test that the median difference is nought, after Benjamini and Hochberg over all
            pairs that were tested together.
        clips: in common.
    """

    first: str
    second: str
    difference: float
    p: float
    clips: int


def paired(scores: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Test every pair of systems on the clips that they have in common.

    Args:
        scores: system -> clip -> value.
    """
    from scipy.stats import false_discovery_control, wilcoxon

    found = []
    for first, second in itertools.combinations(scores, 2):
        common = sorted(scores[first].keys() & scores[second].keys())
        difference = np.array([scores[first][clip] - scores[second][clip] for clip in common])
        if len(difference) < 6 or not difference.any():
            continue  # no p below 0.03 is possible, or there is nothing to tell apart
        found.append((first, second, float(difference.mean()), float(wilcoxon(difference).pvalue), len(common)))
    if not found:
        return []
    adjusted = false_discovery_control([p for *_, p, _ in found])
    return [Comparison(a, b, d, float(q), n) for (a, b, d, _, n), q in zip(found, adjusted, strict=True)]
