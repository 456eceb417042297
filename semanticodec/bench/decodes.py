"""Decodes that others have made, as if a codec made them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..config import SAMPLE_RATE
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
    """

    name: str
    folder: Path
    kbps: float
    family: str = ""

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
        return "/".join((self.name, repr(self.kbps), named, content(files), *made_by))

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
            AudioError: it cannot be read.
        """
        for stem in (clip.name, Path(clip.name).name):
            for ending in ENDINGS:
                path = self.folder / (stem + ending)
                if path.is_file():
                    return read(path)
        raise FileNotFoundError(2, "no decode of this clip", str(self.folder / clip.name))
