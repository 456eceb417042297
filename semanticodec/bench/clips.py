"""Recordings to compare codecs on: 16 kHz mono, each of a kind, with what its manifest says about it."""

from __future__ import annotations

import csv
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ..audio import load, mono, resample
from ..config import SAMPLE_RATE
from ..errors import AudioError
from .folders import recordings

KINDS = ("speech", "music", "sound")
ENDINGS = (".flac", ".wav", ".ogg", ".opus", ".mp3")
Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One recording, of which two are equal if all that is known of them is; the same sound has the same digest.

    Args:
        name: relative path without its ending, which decodes of it share.
        kind: "speech", "music" or "sound".
        path: of the sound file.
        text: what is said, if known.
        labels: further columns of the manifest.
    """

    name: str
    kind: str
    path: Path
    text: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __reduce__(self) -> tuple[type[Clip], tuple[object, ...]]:
        # Other processes read the file themselves.
        return Clip, (self.name, self.kind, self.path, self.text, dict(self.labels))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @functools.cached_property
    def wave(self) -> Wave:
        """Samples ``[S]`` at 16 kHz, channels averaged: what every codec is given and compared with."""
        return read(self.path)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.wave) / SAMPLE_RATE

    @property
    def group(self) -> str:
        """What it shares with other clips that makes them alike.

        The manifest's column ``group``; without that, as its column ``orig`` tells, the speaker (the folder of the
        original) of speech and the recording of other kinds; without both, or a folder in ``orig``, the clip is alone.
        """
        if found := self.labels.get("group"):
            return found
        if "/" not in self.labels.get("orig", ""):
            return self.name
        return origin(self)["folder" if self.kind == "speech" else "recording"]


def origin(clip: Clip) -> dict[str, str]:
    """Return what a clip comes from, the coarsest first: clips of one group are not learnt and tested on.

    * source: the manifest's column ``source``, a data set; the folder if there is no such column
    * folder: of the original file, the manifest's column ``orig`` (or of the clip, without the column): a speaker of
      LibriSpeech, a class of ESC-10, an album
    * recording: the original file without the last part of its name after - or _, which numbers what was cut from it:
      a chapter (367-130732-0001), a recording (4-184575-A), takes and variants (arovane_beat_a).  Names that happen to
      begin alike fall into one group too, which errs on the safe side.
    """
    path = PurePosixPath(clip.labels.get("orig") or clip.name)
    folder = str(path.parent)
    return {
        "source": clip.labels.get("source", folder),
        "folder": folder,
        "recording": f"{folder}/{re.sub(r'[-_][^-_]*$', '', path.stem)}",
    }


def read(path: Path) -> Wave:
    """Read a sound file as 16 kHz mono, float32 ``[S]``.

    Args:
        path: of the file.

    Raises:
        AudioError: there is no such file, or it holds no sound.
    """
    if not path.is_file():
        raise AudioError(f"there is no file {path}")
    wave, rate = load(path)
    result: Wave = resample(mono(wave[None]), rate, SAMPLE_RATE)[0].numpy()
    return result


def find(folder: Path) -> list[Clip]:
    """Return the clips of a folder.

    Args:
        folder: with a ``manifest.csv`` (columns file and kind; text, group, orig and others if known), or with sound
            files, whose kind is the name of the folder that they are in, if that is one of the kinds, else "sound".
            What an earlier run or export put below it is left out.

    Raises:
        AudioError: there is nothing, a kind is unknown, or the manifest cannot be read.
    """
    if not folder.is_dir():
        raise AudioError(f"there is no folder {folder}")
    manifest = folder / "manifest.csv"
    if manifest.is_file():
        clips = list(_rows(manifest))
    else:
        files = [file for file in recordings(folder) if file.suffix.lower() in ENDINGS]
        clips = [
            Clip(_stem(folder, file), file.parent.name if file.parent.name in KINDS else "sound", file)
            for file in files
        ]
    if not clips:
        raise AudioError(f"no manifest.csv and no {', '.join(ENDINGS)} in {folder}")
    wrong = {clip.kind for clip in clips} - set(KINDS)
    if wrong:
        raise AudioError(f"{manifest}: kind is {', '.join(sorted(wrong))}; wanted is one of {', '.join(KINDS)}")
    return clips


def thin(clips: Iterable[Clip], every: int) -> list[Clip]:
    """Keep every ``every``-th clip of each kind, in the given order."""
    counts = dict.fromkeys(KINDS, -1)
    kept = []
    for clip in clips:
        counts[clip.kind] += 1
        if counts[clip.kind] % every == 0:
            kept.append(clip)
    return kept


def _rows(manifest: Path) -> Iterator[Clip]:
    """Yield what each row of a manifest stands for."""
    folder = manifest.parent
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            if not {"file", "kind"} <= set(columns) or len(set(columns)) < len(columns):
                raise AudioError(f"{manifest} has columns {', '.join(columns)}; file and kind are needed, each once")
            for row in reader:
                if None in row or None in row.values():
                    count = "more" if None in row else "fewer"
                    raise AudioError(
                        f"line {reader.line_num} of {manifest} has {count} fields than the "
                        f"{len(columns)} columns; text with commas needs quotes around it"
                    )
                path = folder / row["file"]
                if ".." in PurePath(row["file"]).parts or not path.is_relative_to(folder) or path == folder:
                    raise AudioError(
                        f"line {reader.line_num} of {manifest}: wanted is a file in {folder}, seen is {row['file']!r}"
                    )
                rest = {name: value for name, value in row.items() if name not in ("file", "text") and value}
                yield Clip(_stem(folder, path), row["kind"], path, row.get("text") or None, rest)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AudioError(f"{manifest} is no CSV file in UTF-8: {error}") from error


def _stem(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()
