"""Work of a run that is in the cache, found again by its results."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .align import Samples, align
from .clips import Clip
from .codecs import found_by
from .results import Results
from .run import Entry


def entry(results: Results, system: str, clip: Clip, cache: Path) -> Entry:
    """Find where the cache keeps a system's work on a clip.

    Args:
        results: of a run.
        system: of the results, with a fingerprint.
        clip: of the same run.
        cache: of the same run.
    """
    facts = results.systems[system]
    return Entry.of(cache, facts["fingerprint"], found_by(clip, by_name=facts.get("by_name", False)))


def aligned(results: Results, system: str, clip: Clip, cache: Path, *, level: bool) -> Samples:
    """Return what a system made of a clip, with the delay undone that was undone in the scores.

    Args:
        results: of a run.
        system: that decoded the clip.
        clip: of the same run.
        cache: of the same run.
        level: whether to match the original's loudness.

    Returns:
        ``[S]`` at 16 kHz, as long as the clip.
    """
    decoded = entry(results, system, clip, cache).decoded()
    return align(clip.wave.astype(np.float64), decoded, delay=results.late(system, clip.name), level=level).wave
