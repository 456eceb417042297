"""What codes tell without being decoded: use and entropy of codebooks, and linear classifiers of labels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .statistics import Interval, interval

FOLDS = 4
"""Parts of the clips, each classified by what was learned on the others; a label needs clips of as many groups."""


@dataclass(frozen=True)
class Use:
    """How one codebook is used.

    Args:
        size: entries.
        used: entries that came up.
        entropy: bits per code of their distribution, without any context; at most ``log2(size)``.
    """

    size: int
    used: int
    entropy: float


def use(codes: Iterable[NDArray[np.int64]], sizes: Sequence[int]) -> list[Use]:
    """Count codes ``[n_q, F]`` of many clips, per codebook.

    Args:
        codes: of each clip, 0 to the size of their codebook - 1.
        sizes: of the codebooks.

    Returns:
        One :class:`Use` per codebook.
    """
    counts = [np.zeros(size, np.int64) for size in sizes]
    for rows in codes:
        for count, row in zip(counts, rows, strict=True):
            count += np.bincount(row, minlength=len(count))
    result = []
    for count in counts:
        share = count[count > 0] / max(count.sum(), 1)
        result.append(Use(len(count), int((count > 0).sum()), float(-(share * np.log2(share)).sum())))
    return result


def bag(codes: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.float32]:
    """Pool codes ``[n_q, F]`` into how often each comes up, ``[sum(sizes)]``, square roots of shares.

    Args:
        codes: of a clip.
        sizes: of the codebooks.
    """
    shares = [np.bincount(row, minlength=size) / row.size for row, size in zip(codes, sizes, strict=True)]
    result: NDArray[np.float32] = np.sqrt(np.concatenate(shares)).astype(np.float32)
    return result


@dataclass(frozen=True)
class Probe:
    """How well labels are told from pooled features, by logistic regression.

    Args:
        label: what was classified.
        accuracy: percent of the clips, its 95 % interval from resampled groups.
        chance: percent that always saying the commonest label would reach.
        classes: of the label.
        level: what the groups are; clips of one group are never on both sides.
        groups: that the clips fall into.
    """

    label: str
    accuracy: Interval
    chance: float
    classes: int
    level: str
    groups: int

    def __str__(self) -> str:
        a = self.accuracy
        return (
            f"{a.mean:.0f} % [{a.low:.0f}, {a.high:.0f}] of {self.classes} (chance {self.chance:.0f}; by {self.level}, "
            f"{self.groups} of them)"
        )


def probe(
    features: Mapping[str, NDArray[np.float32]],
    labels: Mapping[str, str],
    origins: Mapping[str, Mapping[str, str]],
    label: str,
) -> Probe | None:
    """Classify clips by cross-validation; None if fewer than two labels have clips of enough groups.

    Folds are made of whole groups, so that no clip is classified by what was learnt from another piece of the same
    thing.  Of the levels of grouping the first counts that leaves the most labels to tell apart.

    Args:
        features: clip -> pooled features ``[D]``.
        labels: clip -> label; clips without one are left out, and labels with clips of fewer groups than folds.
        origins: level -> clip -> group, the coarsest level first.
        label: what the labels are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    told: dict[str, list[str]] = {}
    for level, groups in origins.items():
        found = {(labels[clip], groups[clip]) for clip in features if clip in labels}
        told[level] = sorted(name for name, count in Counter(name for name, _ in found).items() if count >= FOLDS)
    level = max(told, key=lambda level: len(told[level]))
    classes = told[level]
    if len(classes) < 2:
        return None
    clips = [clip for clip in features if labels.get(clip) in classes]
    x = np.stack([features[clip] for clip in clips])
    y = np.array([classes.index(labels[clip]) for clip in clips])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    owners = [origins[level][clip] for clip in clips]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers that stop early, and of entries that never come up
        right = 100.0 * (cross_val_predict(model, x, y, groups=owners, cv=folds) == y)
    by_group: dict[str, list[float]] = {}
    for group, value in zip(owners, right, strict=True):
        by_group.setdefault(group, []).append(value)
    accuracy = interval([(float(np.mean(values)), float(len(values))) for values in by_group.values()])
    assert accuracy is not None
    chance = 100 * np.bincount(y).max() / len(y)
    return Probe(label, accuracy, float(chance), len(classes), level, len(by_group))
