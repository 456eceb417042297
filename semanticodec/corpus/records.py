"""What flows through a tokenisation: items to read, what becomes of them, and the columns of a row.

A *chunk* is a run of consecutive items, the unit that is worked on and committed; a *row* is one line of the result: a
recording, or a channel or a stretch of speech of one.
"""

from __future__ import annotations

import math
import os
import re
import stat
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ..config import BANDS, SAMPLE_RATE, CodecConfig

Kind = Literal["file", "tar", "parquet", "arrow", "cut", "bad"]

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("semantic", pa.list_(pa.uint16()), nullable=False),
        pa.field("acoustic", pa.list_(pa.uint16()), nullable=False),
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("sample_rate", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("channel", pa.int16()),
        pa.field("text", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("audio_sha256", pa.string(), nullable=False),
    ]
)
"""One row.

``semantic`` and ``acoustic`` are the two streams of codes, each ``frames`` long; ``samples`` per channel at
``sample_rate`` Hz, the first of them at ``offset`` of ``source`` (``archive#member`` inside tar and Parquet files;
bytes that are not UTF-8 as hexadecimal escapes).  ``channel`` is null where channels were averaged.  ``metadata`` is a
JSON object with every other field of the input.  ``audio_sha256`` is over the samples as read: float32, little-endian,
interleaved.
"""

FEATURES = pa.field("features", pa.list_(pa.float16()), nullable=False)
"""The continuous features of a row, ``[columns * 8, dim]`` flattened; only with ``keep_features``."""


def schema(keep_features: bool) -> pa.Schema:
    """Return the columns of rows with or without features."""
    return SCHEMA.append(FEATURES) if keep_features else SCHEMA


FAILURE_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("offset_seconds", pa.float64(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("metadata", pa.string()),
    ]
)
"""An input that gave no row: the class of the error, and what it said."""


def printable(name: str) -> str:
    """Return a file name with the bytes that are no UTF-8 written as hexadecimal escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def unprintable(name: str) -> str:
    """Undo :func:`printable`."""
    return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes([int(m[1], 16)]), os.fsencode(name)))


def locate(source: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path there.

    fsspec takes ``::`` for a chain of URLs; what has no ``://``, or exists here, is a local name whatever is in it.
    """
    if "://" not in source or os.path.lexists(source):
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(source))
    file_system, path = url_to_fs(source)
    return file_system, str(path)


def is_local(file_system: fsspec.AbstractFileSystem) -> bool:
    """Tell whether paths mean the same without the file system; what is built upon local files has its own URLs."""
    return type(file_system) is LocalFileSystem


def irregular(path: str) -> bool:
    """Return whether something is there that is no file: opening a pipe or a device may wait for ever."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # opening it will tell


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        id: what the row is called.
        kind: how to get at the sound.
        source: path or URL of the file that holds it.
        member: its name inside of ``source``.
        place: (offset, size) in a tar archive, (row group, row) in a Parquet or Arrow file.
        start: of the segment, in seconds.
        duration: of the segment, in seconds; None: to the end.
        channel: the only one to take.
        text: transcript.
        metadata: JSON object with every other field of the input.
        extra: of a cut, its JSON; of a bad item, what is wrong; of a table row, the column with the sound.
        size: bytes that are read for it, as far as known.
    """

    id: str
    kind: Kind
    source: str
    member: str = ""
    place: tuple[int, int] | None = None
    start: float = 0.0
    duration: float | None = None
    channel: int | None = None
    text: str | None = None
    metadata: str | None = None
    extra: str = ""
    size: int = 0

    @property
    def label(self) -> str:
        """Where the sound comes from, printable."""
        return printable(f"{self.source}#{self.member}" if self.member else self.source)


@dataclass(frozen=True, eq=False)
class Span:
    """Samples of consecutive windows of one row, to be encoded.

    Args:
        item: index in the chunk.
        row: index among the item's rows.
        index: of the span in the row.
        wave: float32 ``[context + windows * block + lookahead]`` at 16 kHz.
        end: nothing follows.
    """

    item: int
    row: int
    index: int
    wave: np.ndarray
    end: bool


@dataclass(frozen=True, eq=False)
class Coded:
    """What became of a span: codes uint16 ``[2, frames]``, features float16 or None."""

    item: int
    row: int
    index: int
    codes: np.ndarray
    features: np.ndarray | None


@dataclass(frozen=True)
class RowFacts:
    """All that is known of a row once its samples have been read."""

    item: int
    row: int
    spans: int
    rate: int
    samples: int
    offset: int
    channel: int | None
    suffix: str
    sha256: str


@dataclass(frozen=True)
class ItemDone:
    """An item has been read to its end and gave so many rows."""

    item: int
    rows: int


@dataclass(frozen=True)
class ItemFailed:
    """An item gave no rows."""

    item: int
    error: str
    reason: str


Event = Span | Coded | RowFacts | ItemDone | ItemFailed


def failure_of(item: int, error: Exception) -> ItemFailed:
    """Return what to tell about an error."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # Objects are shown with their address, which no two runs share, and these must end with the same bytes.
    reason = re.sub(r" at 0x[0-9a-f]+", "", reason)
    return ItemFailed(item, type(error).__name__, " ".join(reason.split()).encode("utf-8", "backslashreplace").decode())


@dataclass
class Finished:
    """A chunk that has been worked through."""

    chunk: int
    rows: pa.Table
    failures: list[dict[str, Any]]
    seconds: float


def seconds_of(rows: pa.Table) -> float:
    """Return the seconds of sound in rows, rounded once: the same in whatever order, and from whatever parts."""
    lengths = zip(rows.column("samples").to_pylist(), rows.column("sample_rate").to_pylist(), strict=True)
    return math.fsum(samples / rate for samples, rate in lengths)


class Assembler:
    """Puts the events of one chunk together, whatever their order."""

    def __init__(self, chunk: int, items: list[Item], config: CodecConfig, *, keep_features: bool) -> None:
        self.chunk, self.items = chunk, items
        self._config, self._keep = config, keep_features
        self._coded: dict[tuple[int, int, int], Coded] = {}
        self._facts: dict[tuple[int, int], RowFacts] = {}
        self._rows: dict[int, int] = {}
        self._failed: dict[int, ItemFailed] = {}

    def add(self, event: Event) -> None:
        """Take what became of a part of the chunk."""
        match event:
            case Coded():
                self._coded[event.item, event.row, event.index] = event
            case RowFacts():
                self._facts[event.item, event.row] = event
            case ItemDone():
                self._rows[event.item] = event.rows
            case ItemFailed():
                self._failed[event.item] = event

    @property
    def complete(self) -> bool:
        """Whether every item has failed or has all its rows and all their codes."""
        if len(self._rows.keys() | self._failed.keys()) < len(self.items):
            return False
        return all(
            item in self._failed or all(self._whole(item, row) for row in range(rows))
            for item, rows in self._rows.items()
        )

    def _whole(self, item: int, row: int) -> bool:
        facts = self._facts.get((item, row))
        return facts is not None and all((item, row, index) in self._coded for index in range(facts.spans))

    def finish(self) -> Finished:
        """Return rows and failures, in the order of the items."""
        rows: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        for index, item in enumerate(self.items):
            if index in self._failed:
                failures.append(self.failure(item, self._failed[index]))
                continue
            for row in range(self._rows[index]):
                facts = self._facts[index, row]
                rows.append(self._row(item, facts))
        table = pa.Table.from_pylist(rows, schema(self._keep))
        return Finished(self.chunk, table, failures, seconds_of(table))

    def _row(self, item: Item, facts: RowFacts) -> dict[str, Any]:
        parts = [self._coded[facts.item, facts.row, index] for index in range(facts.spans)]
        frames = self._config.frames(-(-facts.samples * SAMPLE_RATE // facts.rate))
        semantic, acoustic = np.concatenate([part.codes for part in parts], 1)[:, :frames]
        row: dict[str, Any] = {
            "id": item.id + facts.suffix,
            "semantic": semantic,
            "acoustic": acoustic,
            "frames": frames,
            "samples": facts.samples,
            "sample_rate": facts.rate,
            "source": item.label,
            "offset": facts.offset,
            "channel": facts.channel,
            "text": item.text,
            "metadata": item.metadata,
            "audio_sha256": facts.sha256,
        }
        if self._keep:
            features = np.concatenate([part.features for part in parts if part.features is not None])
            row["features"] = features[: self._config.columns(frames) * BANDS].reshape(-1)
        return row

    @staticmethod
    def failure(item: Item, failed: ItemFailed) -> dict[str, Any]:
        """Return the line of the list of failures."""
        return {
            "id": item.id,
            "source": item.label,
            "offset_seconds": item.start,
            "error": failed.error,
            "reason": failed.reason,
            "metadata": item.metadata,
        }
