"""The output folder: parts, shards and their commits.

Nothing is ever half there.  A chunk that has been worked through becomes a *part*, one file under ``_work/parts``.
As soon as all parts from the beginning are there, consecutive ones become a *shard* under ``data/``: the shard ends
with the first chunk that brings it to the wanted size, so boundaries are a function of the results in the order of the
input.  Every file is written under a temporary name, flushed to the disk and renamed; the done-marker of a shard
follows its data, and the parts are deleted after the marker, so that a process killed at any moment leaves what the
next one needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import CorruptedError
from .records import FAILURE_SCHEMA, Finished
from .writers import WRITERS, Format

GROUP_BYTES = 1 << 20
"""Size of the pieces (row groups in Parquet) that a shard is written in: some hours, so that readers can share them."""
ROW_BYTES = 300
"""What a row takes beside its codes, text and metadata, about."""
MANIFEST, STATISTICS, CARD, FAILURES = "manifest.json", "statistics.json", "README.md", "failures.parquet"
DATA, DONE, WORK = "data", "done", "_work"
RUN, LOCK = "run.json", "lock"
PLAN, NEXT_PLAN = "plan.parquet", "next.parquet"
INSTEAD = "instead"
"""Says that what is in ``_work`` is to take the place of the finished corpus beside it."""


@dataclass(frozen=True)
class Marker:
    """The proof that a shard is complete.

    Args:
        shard: its number.
        first: its first chunk.
        stop: the chunk after its last.
        rows: in it.
        seconds: of sound.
        failures: inputs among its chunks that gave no row.
        files: file name -> SHA-256.
    """

    shard: int
    first: int
    stop: int
    rows: int
    seconds: float
    failures: int
    files: dict[str, str]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write JSON that people can read, atomically; the same value gives the same bytes."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Output:
    """The folder that a tokenisation writes to."""

    def __init__(self, folder: Path) -> None:
        # Absolute: Arrow takes the beginning of "run:1/data" for the scheme of a URL.
        self.folder = Path(os.path.abspath(folder))
        self.work = self.folder / WORK
        self.parts = self.work / "parts"

    @property
    def started(self) -> bool:
        """Whether a tokenisation was begun here, or its deletion was."""
        return self.complete or (self.folder / DONE).exists() or (self.work / RUN).exists()

    @property
    def complete(self) -> bool:
        """Whether a tokenisation was finished here."""
        return (self.folder / MANIFEST).exists()

    @property
    def foreign(self) -> Path | None:
        """A file that a tokenisation would overwrite and none has made, if there is one."""
        if (self.folder / DONE).exists() or (self.work / RUN).exists():
            return None
        paths = (self.folder / name for name in (DATA, MANIFEST, STATISTICS, CARD, FAILURES))
        return next((path for path in paths if path.exists()), None)

    def clear(self) -> None:
        """Delete what a tokenisation made, and nothing else; the lock stays, and the plan of the next one."""
        # What is left of a deletion that is interrupted must be no corpus that can be read or gone on with, so what
        # says that it is goes first; and must be known as a corpus's rest, which is what the markers, the last, say.
        (self.folder / DONE).mkdir(exist_ok=True)
        for path in (self.work / RUN, *(self.folder / name for name in (MANIFEST, STATISTICS, CARD, FAILURES))):
            path.unlink(missing_ok=True)
        inside = self.work.iterdir() if self.work.exists() else ()
        rest = [path for path in inside if path.name not in (LOCK, NEXT_PLAN)]
        for path in (*rest, self.folder / DATA, self.folder / DONE):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def markers(self) -> list[Marker]:
        """Return the done-markers, in order.

        Raises:
            CorruptedError: a marker is unreadable, or one is missing in between.
        """
        markers = []
        for path in sorted((self.folder / DONE).glob("*.json")):
            try:
                markers.append(Marker(**json.loads(path.read_text())))
            except (ValueError, TypeError) as error:
                raise CorruptedError(f"the done-marker {path} is damaged ({error}); delete it and --resume") from error
        stop = 0
        for number, marker in enumerate(markers):
            if (marker.shard, marker.first) != (number, stop):
                raise CorruptedError(f"the done-marker of shard {number} is missing in {self.folder / DONE}")
            stop = marker.stop
        return markers

    def markers_hash(self) -> str:
        """Return the SHA-256 over all done-markers, which themselves hold the hashes of the shards."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / DONE).glob("*.json")):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def part(self, chunk: int) -> Path:
        """Return where the part of a chunk lies."""
        return self.parts / f"{chunk:09d}.arrow"

    def remains(self, chunk: int) -> Path:
        """Return where the rows of a chunk lie of which some inputs are to be tried again."""
        return self.work / "remains" / f"{chunk:09d}.arrow"

    def make_way(self) -> None:
        """Delete the finished corpus if another is to take its place, which an earlier process may not have ended."""
        if not (self.work / INSTEAD).exists():
            return
        for name in (MANIFEST, STATISTICS, CARD, FAILURES):
            (self.folder / name).unlink(missing_ok=True)
        for name in (DATA, DONE):
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
        _sync(self.folder)
        (self.work / INSTEAD).unlink()


def save_part(path: Path, finished: Finished) -> None:
    """Write a chunk, atomically."""
    about = {b"failures": json.dumps(finished.failures).encode(), b"seconds": repr(finished.seconds).encode()}
    table = finished.rows.replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    write_atomic(path, sink.getvalue())


def load_part(path: Path) -> Finished:
    """Read what :func:`save_part` has written."""
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    about = table.schema.metadata
    rows = table.replace_schema_metadata(None)
    return Finished(int(path.stem), rows, json.loads(about[b"failures"]), float(about[b"seconds"]))


class Committer:
    """Turns finished chunks into shards, whatever order they come in."""

    def __init__(self, output: Output, chunks: int, form: Format, shard_bytes: int) -> None:
        self._output, self._chunks = output, chunks
        self._form, self._shard_bytes = form, shard_bytes
        self.markers = output.markers()
        self._first = self.markers[-1].stop if self.markers else 0
        self._done: dict[int, int] = {}
        for path in sorted(output.parts.glob("[0-9]*.arrow")):
            if int(path.stem) < self._first:  # killed between the marker and the deletion
                path.unlink()
            else:
                self._done[int(path.stem)] = _weight(load_part(path))
        self._next = self._first
        self._bytes = 0

    @property
    def complete(self) -> bool:
        """Whether every chunk is in a shard."""
        return self._first == self._chunks

    def missing(self) -> Iterator[int]:
        """Return the chunks that are still to be worked through."""
        done = set(self._done)
        return (chunk for chunk in range(self._first, self._chunks) if chunk not in done)

    def known(self) -> Iterator[Finished]:
        """Read the parts that an earlier run left."""
        for chunk in sorted(self._done):
            yield load_part(self._output.part(chunk))

    def add(self, finished: Finished) -> None:
        """Commit a chunk, and the shards that it completes."""
        if finished.chunk in self._done or finished.chunk < self._first:
            return
        save_part(self._output.part(finished.chunk), finished)
        self._done[finished.chunk] = _weight(finished)
        self.advance()

    def advance(self) -> None:
        """Commit every shard whose parts are all there."""
        while self._next in self._done:
            self._bytes += self._done[self._next]
            self._next += 1
            if self._bytes >= self._shard_bytes or self._next == self._chunks:
                self._commit(self._first, self._next)
                self._first, self._bytes = self._next, 0

    def _commit(self, first: int, stop: int) -> None:
        number = len(self.markers)
        output = self._output
        failures: list[dict[str, Any]] = []
        rows, seconds = 0, 0.0
        drafts = output.work / "draft"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir(parents=True)
        with WRITERS[self._form](drafts, number) as writer:
            for table, some in self._groups(first, stop):
                failures += [failure for part in some for failure in part.failures]
                seconds += sum(part.seconds for part in some)
                rows += table.num_rows
                if table.num_rows:
                    writer.write(table)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(failures, FAILURE_SCHEMA), sink, compression="zstd")
        write_atomic(output.work / "failures" / f"{number:05d}.parquet", sink.getvalue())
        files = {}
        (output.folder / DATA).mkdir(parents=True, exist_ok=True)
        for draft in sorted(drafts.iterdir()):
            _sync(draft)
            files[draft.name] = sha256_of(draft)
            draft.replace(output.folder / DATA / draft.name)
        _sync(output.folder / DATA)
        marker = Marker(number, first, stop, rows, seconds, len(failures), files)
        write_json(output.folder / DONE / f"{number:05d}.json", dataclasses.asdict(marker))
        self.markers.append(marker)
        for chunk in range(first, stop):
            output.part(chunk).unlink()
            del self._done[chunk]

    def _groups(self, first: int, stop: int) -> Iterator[tuple[pa.Table, list[Finished]]]:
        """Join parts until they have the size of a row group."""
        some: list[Finished] = []
        for chunk in range(first, stop):
            some.append(load_part(self._output.part(chunk)))
            if chunk == stop - 1 or sum(map(_weight, some)) >= GROUP_BYTES:
                yield pa.concat_tables([part.rows for part in some]).combine_chunks(), some
                some = []


def _weight(finished: Finished) -> int:
    """Return about how many bytes the rows take: a function of nothing but what they say."""
    table = finished.rows
    features = table.column("features").combine_chunks() if "features" in table.column_names else None
    frames: int = pc.sum(table.column("frames")).as_py() or 0
    kept: int = 0 if features is None else len(features.flatten())
    told: int = sum(pc.sum(pc.binary_length(table.column(name))).as_py() or 0 for name in ("text", "metadata"))
    return 4 * frames + ROW_BYTES * int(table.num_rows) + 2 * kept + told


def read_failures(output: Output, shards: int) -> pa.Table:
    """Return the failures of all shards, in the order of the input."""
    folder = output.work / "failures"
    tables = [pq.read_table(folder / f"{number:05d}.parquet") for number in range(shards)]
    return pa.concat_tables([FAILURE_SCHEMA.empty_table(), *tables]).combine_chunks()


def read_shards(folder: Path, form: Format, numbers: Iterable[int]) -> Iterator[pa.RecordBatch]:
    """Read the rows of shards in order, some at a time, without features.

    Raises:
        CorruptedError: a shard is damaged, or has other columns.
    """
    for number in numbers:
        try:
            yield from WRITERS[form].read(folder / DATA, number)
        except (pa.ArrowException, OSError, ValueError, LookupError, tarfile.TarError) as error:
            raise CorruptedError(f"shard {number} of {folder} is damaged: {type(error).__name__}: {error}") from error
