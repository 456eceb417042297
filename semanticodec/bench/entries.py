"""Work of a run that is kept in its cache: one small record per (codec, clip), the decode and the codes beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AudioError
from .align import Samples, align
from .clips import Clip, read
from .codecs import Codec, found_by
from .results import Results


@dataclass(frozen=True)
class Entry:
    """Where the cache keeps one codec's work on one clip."""

    cache: Path
    key: str

    @classmethod
    def of(cls, cache: Path, fingerprint: str, content: str) -> Entry:
        """Find the place by content.

        Args:
            cache: folder.
            fingerprint: what :func:`hashed` returns.
            content: what :func:`.codecs.found_by` returns of the clip.
        """
        return cls(cache, hashlib.sha256(f"{fingerprint}\n{content}".encode()).hexdigest()[:32])

    def path(self, ending: str) -> Path:
        """Return the path of a file of this entry."""
        return self.cache / self.key[:2] / (self.key + ending)

    def read(self) -> dict[str, Any]:
        """Return what is known; nothing if this is new, or a disk kept only a part of it."""
        try:
            found: dict[str, Any] = json.loads(self.path(".json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if self.path(".flac").is_file() else {}

    def whole(self) -> bool:
        """Tell whether the work is done, and what was kept of it can be read to its end."""
        try:
            self.decoded()
            self.codes()
        except (AudioError, EOFError, ValueError):  # the disk lost a part of it, or there is nothing yet
            return False
        return bool(self.read())

    def write(self, record: Mapping[str, Any]) -> None:
        """Put a record in the place of the last one, at once."""
        part = self.path(f".{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record))
        part.replace(self.path(".json"))

    def decoded(self) -> NDArray[np.float64]:
        """Return the decode ``[S']`` at 16 kHz, as a 16-bit file holds it."""
        return read(self.path(".flac")).astype(np.float64)

    def codes(self) -> NDArray[np.int64] | None:
        """Return the codes ``[n_q, F]``, if the codec has any."""
        path = self.path(".npy")
        return np.load(path, allow_pickle=False) if path.is_file() else None


def hashed(codec: Codec) -> str:
    """Return the SHA-256 of what a codec's output depends on.

    Args:
        codec: any that is not missing.
    """
    return hashlib.sha256(codec.fingerprint().encode()).hexdigest()


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
