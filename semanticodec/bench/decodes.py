"""Decodes that others have made, as if a codec made them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..config import SAMPLE_RATE
from ..errors import AudioError
from .clips import ENDINGS, Clip, Wave, read
from .codecs import LIBRARIES, READING, About, Coded, content, sources, versions


@dataclass(frozen=True)
class Decodes:
    """A folder of finished decodes, named as the clips are, with the bitrate that its maker states.

    Args:
        name: of the system.
        folder: of sound files; a clip's is the one of its relative path, or of its bare name.
        kbps: stated bitrate.
        family: which curve it belongs to.
        shared: bare names of several clips, of which a file of that name alone could be any.
    """

    name: str
    folder: Path
    kbps: float
    family: str = ""
    shared: frozenset[str] = frozenset()

    def among(self, clips: Iterable[Clip]) -> Decodes:
        """Return the same decodes, which the clips of a run do not mistake for each other's.

        Args:
            clips: whose names differ.
        """
        counts = Counter(Path(clip.name).name for clip in clips)
        # Those without a file would change only the fingerprint.
        shared = {name for name, count in counts.items() if count > 1 and self._file(name)}
        return dataclasses.replace(self, shared=self.shared | shared)

    def missing(self) -> str | None:
        """Say whether the folder is there, with anything in it."""
        if not self.folder.is_dir():
            return f"there is no folder {self.folder}"
        return None if any(f.is_file() for f in self.folder.rglob("*")) else f"no file is in {self.folder}"

    def about(self) -> About:
        """Say whose word the bitrate is."""
        return About(
            self.family or self.name, f"decodes in {self.folder.name}, bitrate stated", SAMPLE_RATE, measured=False
        )

    def fingerprint(self) -> str:
        """Name the files by their content, and what reads them."""
        files = tuple(sorted(f for f in self.folder.rglob("*") if f.is_file()))
        names = ",".join(str(file.relative_to(self.folder)) for file in files)
        made_by = sources(*READING, "bench/codecs", "bench/decodes"), versions(*LIBRARIES)
        named = hashlib.sha256(names.encode()).hexdigest()
        return "/".join((self.name, repr(self.kbps), named, content(files), *made_by, *sorted(self.shared)))

    def encode(self, clip: Clip) -> Coded:
        """Take the stated bitrate.

        Args:
            clip: any.

        Returns:
            No file, and the stated bits.
        """
        return Coded(b"", self.kbps * 1000 * clip.seconds)

    def decode(self, coded: Coded, clip: Clip) -> Wave:  # noqa: ARG002
        """Read the decode of the clip.

        Args:
            coded: not used.
            clip: whose name the decode has.

        Returns:
            Samples ``[S']`` at 16 kHz.

        Raises:
            FileNotFoundError: there is none of that name.
            AudioError: it cannot be read, or could be of another clip.
        """
        bare = Path(clip.name).name
        if found := self._file(clip.name):
            return read(found)
        if bare in self.shared:
            raise AudioError(
                f"several clips are called {bare}: which of them {self._file(bare)} is of cannot be told; wanted are "
                f"folders in {self.folder} as the clips have"
            )
        if found := self._file(bare):
            return read(found)
        raise FileNotFoundError(2, "no decode of this clip", str(self.folder / clip.name))

    def _file(self, stem: str) -> Path | None:
        """Return the sound file of a relative path without its ending, whatever the case of that."""
        place = self.folder / stem
        written = [place.with_name(place.name + ending) for ending in ENDINGS]
        if not any(path.is_file() for path in written) and place.parent.is_dir():
            others = {path.stem + path.suffix.lower(): path for path in sorted(place.parent.iterdir())}
            written = [others[path.name] for path in written if path.name in others]
        return next((path for path in written if path.is_file()), None)
