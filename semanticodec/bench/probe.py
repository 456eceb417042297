"""What codes tell without being decoded: use and entropy of codebooks, and linear classifiers of labels."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOLDS = 4
"""Parts of the clips, each classified by what was learned on the others; a label needs as many clips."""


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
    """Count codes ``[n_q, F]`` of many clips, per codebook."""
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
    """Pool codes ``[n_q, F]`` into how often each comes up, ``[sum(sizes)]``, square roots of shares."""
    shares = [np.bincount(row, minlength=size) / row.size for row, size in zip(codes, sizes, strict=True)]
    result: NDArray[np.float32] = np.sqrt(np.concatenate(shares)).astype(np.float32)
    return result


@dataclass(frozen=True)
class Probe:
    """How well labels are told from pooled features, by logistic regression.

    Args:
        label: what was classified.
        accuracy: percent of the clips.
        chance: percent that always saying the commonest label would reach.
        classes: of the label.
        clips: that have it.
    """

    label: str
    accuracy: float
    chance: float
    classes: int
    clips: int


def probe(features: Mapping[str, NDArray[np.float32]], labels: Mapping[str, str], label: str) -> Probe | None:
    """Classify clips by cross-validation; None if fewer than two labels have enough clips.

    Args:
        features: clip -> pooled features ``[D]``.
        labels: clip -> label; clips without one are left out, and labels with fewer clips than folds.
        label: what the labels are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = Counter(labels[clip] for clip in features if clip in labels)
    clips = [clip for clip in features if counts[labels.get(clip, "")] >= FOLDS]
    classes = sorted({labels[clip] for clip in clips})
    if len(classes) < 2:
        return None
    x = np.stack([features[clip] for clip in clips])
    y = np.array([classes.index(labels[clip]) for clip in clips])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of solvers that stop early, and of entries that never come up
        found = cross_val_score(model, x, y, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0))
    weights = [len(clips) // FOLDS + (fold < len(clips) % FOLDS) for fold in range(FOLDS)]
    chance = 100 * np.bincount(y).max() / len(y)
    return Probe(label, float(100 * np.average(found, weights=weights)), float(chance), len(classes), len(clips))
