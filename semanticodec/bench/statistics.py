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
INTERVALS = (
    "bootstrap 95 %: of clips that are of one speaker or recording (the manifest's column group, or as its column orig "
    "tells) all are drawn or none; others, and those of a single group, are drawn one by one; where there are few "
    "groups, the mean may be further off than that"
)
METHOD = (
    "Wilcoxon's signed-rank test (two-sided) on the clips that both have, if they differ on enough of them to reach "
    "p < 0.05 among all pairs; p_holm is corrected for multiple comparisons after Holm, over the pairs of one measure "
    "and kind of sound; it takes clips as independent and as equally weighty, the differences, which are those of "
    "weighted means, and their intervals do not"
)


@dataclass(frozen=True)
class Interval:
    """A weighted mean over clips with its bootstrap 95 % interval, and of how many groups they are."""

    mean: float
    low: float
    high: float
    clips: int
    groups: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    values: Sequence[tuple[float, float]], groups: Sequence[str] | None = None, seed: int = 0
) -> Interval | None:
    """Average (value, weight) pairs and resample to see how far the mean may be off; None without any weight.

    Args:
        values: of each clip.
        groups: of each clip; whole groups are resampled, since what is alike tells less about other speakers and
            recordings than its number says.  None: each clip is one.
        seed: of the resampling.
    """
    if not values or not sum(weight for _, weight in values):
        return None
    mean, drawn, count = _resampled(values, groups, seed)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(mean, float(low), float(high), len(values), count)


def _resampled(
    values: Sequence[tuple[float, float]], groups: Sequence[str] | None, seed: int
) -> tuple[float, NDArray[np.float64], int]:
    """Return the mean, that of each resample (NaN where it drew no weight), and of how many groups they are.

    What is drawn depends only on the seed and the groups: means of two systems over the same clips are paired.
    """
    data, weights = np.array(values, np.float64).T
    members = np.arange(len(data)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(members.max()) + 1
    if count == 1:  # that of one speaker alone
        members = np.arange(len(data))
    sums, totals = (np.bincount(members, each) for each in (data * weights, weights))
    chosen = _chosen(len(totals), seed)
    drawn = totals[chosen].sum(1)
    means = np.divide(sums[chosen].sum(1), drawn, out=np.full(len(drawn), np.nan), where=drawn > 0)
    return float((data * weights).sum() / weights.sum()), means, count


@functools.lru_cache(4)
def _chosen(groups: int, seed: int) -> NDArray[np.int64]:
    """Draw which groups each resample consists of, ``[RESAMPLES, groups]``: many means are over as many."""
    return np.random.default_rng(seed).integers(0, groups, (RESAMPLES, groups))


@dataclass(frozen=True)
class Comparison:
    """Two systems on the clips that both have, by :data:`METHOD`.

    Args:
        first: a system.
        second: another.
        difference: weighted mean of first minus that of second, each over the clips in common.
        low: lower end of its bootstrap 95 % interval.
        high: upper end.
        p: of the test alone; None if they differ on too few clips to be tested.
        p_holm: the same after Holm, over all pairs that were tested together.
        clips: in common; listeners or trials in a listening test.
        differing: of these, clips that the two are not equal on.
        pairs: with clips in common, this one among them.
        unit: what was counted.
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
    pairs: int
    unit: str = "clips"

    @property
    def verdict(self) -> str:
        """The corrected p, or why there is none."""
        if self.p_holm is not None:
            return f"{self.p_holm:.2g}"
        count = f"{self.clips} {self.unit if self.clips != 1 else self.unit.removesuffix('s')}"
        if can_reject(self.clips, self.pairs):
            count = f"{self.differing} of {count} that differ"
        return f"not tested: {count} cannot reach p < 0.05 among {self.pairs} pair{'s' * (self.pairs > 1)}"


def can_reject(differing: int, pairs: int) -> bool:
    """Tell whether a signed-rank test on so many differences can fall below 0.05 when Holm multiplies it by pairs.

    Args:
        differing: pairs of values that are not equal.
        pairs: of systems that are tested together.
    """
    return pairs * 2.0 ** (1 - differing) <= 0.05


def paired(
    scores: Mapping[str, Mapping[str, float]],
    unit: str = "clips",
    groups: Mapping[str, str] | None = None,
    weights: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Comparison]:
    """Compare every pair of systems on the clips that they have in common, if there are any.

    The difference and its interval are those of the weighted means.  The signed-rank test has no weights: it asks
    whether one system is above the other on clips, each counting once, and may lean the other way.

    Args:
        scores: system -> clip -> value.
        unit: what the inner keys are.
        groups: clip -> group, for the intervals.
        weights: system -> clip -> weight in the mean of that system, above 0, of all that is in scores.  None: all
            are equal.
    """
    from scipy.stats import wilcoxon

    common = {
        (first, second): sorted(clips)
        for first, second in itertools.combinations(scores, 2)
        if (clips := scores[first].keys() & scores[second].keys())
    }
    found = []
    for (first, second), shared in common.items():
        members = [groups[clip] for clip in shared] if groups else None
        (ours, our_draws, _), (theirs, their_draws, _) = (
            _resampled([(scores[name][clip], weights[name][clip] if weights else 1) for clip in shared], members, 0)
            for name in (first, second)
        )
        low, high = np.quantile(our_draws - their_draws, [0.025, 0.975])
        apart = np.array([scores[first][clip] - scores[second][clip] for clip in shared])
        differing = int(np.count_nonzero(apart))
        p = float(wilcoxon(apart).pvalue) if can_reject(differing, len(common)) else None
        facts = (p, None, len(shared), differing, len(common), unit)
        found.append(Comparison(first, second, ours - theirs, float(low), float(high), *facts))
    corrected = iter(holm([pair.p for pair in found if pair.p is not None]))
    return [pair if pair.p is None else dataclasses.replace(pair, p_holm=next(corrected)) for pair in found]


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values of tests that belong together, so that any false alarm among them has the stated chance.

    Args:
        values: p-values, of any order.

    Returns:
        The corrected ones, in the same order, at most 1.

    Source: Holm (1979), as adjusted p-values.
    """
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(factors * np.asarray(values)[order]), 1)
    return [float(value) for value in adjusted[np.argsort(order)]]
