"""What only Lhotse can load: parts, mixtures and augmented versions of recordings."""

from __future__ import annotations

import json

import numpy as np

from ..errors import AudioError


def load_cut(description: str) -> tuple[np.ndarray, int, float]:
    """Load a cut.

    Args:
        description: the cut as JSON.

    Returns:
        float32 ``[channels, samples]``, the sample rate, and the cut's start in its recording in seconds.

    Raises:
        AudioError: Lhotse cannot load it.
    """
    from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
    from lhotse.serialization import deserialize_item

    try:
        cut = deserialize_item(json.loads(description))
        wave = np.ascontiguousarray(cut.load_audio(), np.float32)
    except (AudioLoadingError, DurationMismatchError, AssertionError, KeyError, TypeError) as error:
        raise AudioError(f"Lhotse cannot load this cut: {error}") from error
    return wave, cut.sampling_rate, getattr(cut, "start", 0.0)
