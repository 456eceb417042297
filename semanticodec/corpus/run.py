"""Tokenise a corpus: list it, hand it to an engine, commit what comes back, finish."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..devices import usable_device
from ..errors import ConfigError, SemantiCodecError
from . import card, local, retry
from .inputs import find_items
from .options import CorpusOptions
from .plan import Plan
from .records import Finished, Item
from .shards import (
    CARD,
    FAILURES,
    INSTEAD,
    LOCK,
    MANIFEST,
    NEXT_PLAN,
    PLAN,
    RUN,
    STATISTICS,
    Committer,
    Output,
    read_failures,
    sha256_of,
    write_atomic,
    write_json,
)

CHUNK_ITEMS = 64
"""Items in a chunk at most."""
CHUNK_BATCHES = 32
"""Calls of the encoder that a chunk of long recordings is good for, at least: the last one is seldom full."""
CHANGES = 4
"""Options that are told one by one where they are not those of the first run."""
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
"""How a URL begins, or what pathlib makes of it."""
BYTES_PER_SECOND = 32_000
"""Of sound, as a guess where only the size of a file is known: 16-bit samples at 16 kHz."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        items: inputs dealt with, failures included.
        total: inputs in all.
        seconds: of sound tokenised, earlier runs included.
        new_seconds: of sound tokenised by this run.
        failures: inputs that gave no row.
        share: of the work that is done, 0 to 1, as far as the sizes of the inputs tell.
        begun: the share that was done when this run began.
    """

    items: int
    total: int
    seconds: float
    new_seconds: float
    failures: int
    share: float
    begun: float


def tokenize_corpus(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    options: CorpusOptions | None = None,
    resume: bool = False,
    overwrite: bool = False,
    retry_failures: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Turn a corpus of sound into shards of codes.

    Args:
        inputs: files, folders, globs and manifests, local or as URLs that fsspec knows.
        output: local folder for the result.
        options: how; None takes mini on every core.
        resume: go on with what an earlier run left in ``output``; harmless if there is none.
        overwrite: delete the corpus in ``output`` first.
        retry_failures: as ``resume``, and of a corpus that is finished try again what failed, and nothing else; it ends
            as if that had not failed at first.
        progress: is told how far the run is.

    Returns:
        The statistics, as in ``statistics.json``.

    Raises:
        ConfigError: inputs or options make no sense, or ``output`` holds a corpus and neither ``resume`` nor
            ``overwrite`` is given, or one of other options, or another run is writing to it, or the inputs are no
            longer those of the corpus whose failures are to be tried again; or ``output`` is an input, or holds files
            that no run has written, of the names that a corpus has.
        CheckpointError: weights are missing or damaged.
        SemantiCodecError: the engine ended without having done everything; ``resume`` goes on.
    """
    options = options or CorpusOptions()
    names = [os.fspath(name) for name in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    if not names:
        raise ConfigError("there are no inputs")
    folder = _output(output, names)
    for device in options.devices:
        if options.engine == "local":
            usable_device(device)
    manifest = card.manifest(options, names)
    with _locked(folder):
        folder.make_way()
        if _prepare(folder, manifest, resume=resume or retry_failures, overwrite=overwrite):
            _begin(folder, names, options, manifest)
        elif retry_failures and folder.complete:
            _reopen(folder, names, options, manifest)
        if folder.complete:
            return dict(json.loads((folder.folder / STATISTICS).read_text()))
        plan = Plan(folder.work / PLAN)
        committer = Committer(folder, len(plan), options.form, int(options.shard_mb * 1e6))
        watch = _Watch(plan, committer, progress)
        committer.advance()
        for finished in _engine(folder, options, plan, committer.missing()):
            whole = retry.complete(folder, finished, plan[finished.chunk])
            committer.add(whole)
            watch.tell(whole, finished.seconds)
        if not committer.complete:
            left = sum(1 for _ in committer.missing())
            raise SemantiCodecError(f"the engine ended with {left} chunks still to do; --resume goes on with them")
        return _finish(folder, committer, manifest)


def _output(output: str | os.PathLike[str], names: list[str]) -> Output:
    """Return the folder for the result, if it can be one."""
    if _URL.match(os.fspath(output)):
        raise ConfigError(f"{output} is a URL; the output is a local folder, which can be copied there afterwards")
    for name in names:
        if os.path.isdir(name) and os.path.isdir(output) and os.path.samefile(name, output):
            raise ConfigError(f"{output} is an input and cannot be the output; choose a new folder for the shards")
    return Output(Path(output))


def _prepare(folder: Output, manifest: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Make sure that the folder is for this run; return whether it begins."""
    if overwrite and resume:
        raise ConfigError("what is deleted cannot be gone on with; choose one of overwrite, resume and retry_failures")
    if (other := folder.foreign) is not None:
        raise ConfigError(f"{other} is no tokenisation's; choose another output folder")
    if overwrite:
        return True
    stated = folder.folder / MANIFEST if folder.complete else folder.work / RUN
    if not folder.started:
        return True
    if not stated.exists():
        raise ConfigError(f"{folder.folder} holds what is left of a corpus half deleted; --overwrite deletes the rest")
    if not resume:
        raise ConfigError(f"{folder.folder} holds a corpus already; --resume goes on with it, --overwrite deletes it")
    before = json.loads(stated.read_text())
    if changed := list(_changes({name: before.get(name) for name in manifest}, manifest)):
        more = f"; and {len(changed) - CHANGES} more" if len(changed) > CHANGES else ""
        raise ConfigError(f"{folder.folder} was begun with other options: {'; '.join(changed[:CHANGES])}{more}")
    return False


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Tell what is another value than before, at the bottom of nested dictionaries."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {before!r} and is {now!r}"


@contextlib.contextmanager
def _locked(folder: Output) -> Iterator[None]:
    """Keep two runs out of one folder, and leave no working files in it unless they are needed to go on."""
    if folder.folder.exists() and not folder.folder.is_dir():
        raise ConfigError(f"{folder.folder} is a file; the output is a folder")
    path = folder.work / LOCK
    folder.work.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that ends deletes the file: a lock on one that is no longer there keeps nobody out.
            held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        if not held:
            raise ConfigError(f"another run is writing to {folder.folder}")
        try:
            yield
        finally:
            if folder.complete or not folder.started:
                shutil.rmtree(folder.work)


def _begin(folder: Output, names: list[str], options: CorpusOptions, manifest: dict[str, Any]) -> None:
    """List the inputs, once: a run that goes on takes the list of the first.

    What an earlier run has left goes when the list is there: inputs that do not exist cost no corpus, and leave nothing
    that a later run would have to go on with.
    """
    _list(folder.work / NEXT_PLAN, names, options)
    if folder.started:
        folder.clear()
    (folder.work / NEXT_PLAN).replace(folder.work / PLAN)
    write_json(folder.work / RUN, manifest)


def _list(path: Path, names: list[str], options: CorpusOptions) -> None:
    Plan.write(path, find_items(names), CHUNK_ITEMS, int(options.seconds * CHUNK_BATCHES * BYTES_PER_SECOND))


def _reopen(folder: Output, names: list[str], options: CorpusOptions, manifest: dict[str, Any]) -> None:
    """Turn a finished corpus with failures into one that can be gone on with, as if it had been killed before them."""
    if not sum(marker.failures for marker in folder.markers()):
        return
    if options.keep_features:
        raise ConfigError(
            f"{folder.folder} holds features, and shards are taken apart without them; tokenise what "
            f"{FAILURES} lists into another folder"
        )
    for path in folder.work.iterdir():  # of an earlier try that did not get as far as to take the corpus's place
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _list(folder.work / PLAN, names, options)
    retry.take_apart(folder, options.form)
    write_json(folder.work / RUN, manifest)
    write_atomic(folder.work / INSTEAD, b"")
    folder.make_way()


def _engine(folder: Output, options: CorpusOptions, plan: Plan, missing: Iterator[int]) -> Iterator[Finished]:
    chunks: Iterator[tuple[int, list[Item]]] = ((chunk, retry.missing(folder, chunk, plan[chunk])) for chunk in missing)
    if options.engine == "local":
        return local.run(chunks, options.works())
    from . import cluster  # Ray takes seconds to import

    return cluster.run(chunks, options)


class _Watch:
    """Counts what is done."""

    def __init__(self, plan: Plan, committer: Committer, progress: Callable[[Progress], None] | None) -> None:
        self._plan, self._progress = plan, progress
        self._shares = plan.shares()
        done = [chunk for marker in committer.markers for chunk in range(marker.first, marker.stop)]
        self._items = sum(map(plan.size, done))
        self._share = float(self._shares[done].sum())
        self._seconds = sum(marker.seconds for marker in committer.markers)
        self._failures = sum(marker.failures for marker in committer.markers)
        for finished in committer.known():
            self._count(finished)
        self._new, self._begun = 0.0, self._share
        self._report()

    def _count(self, finished: Finished) -> None:
        self._items += self._plan.size(finished.chunk)
        self._share += float(self._shares[finished.chunk])
        self._seconds += finished.seconds
        self._failures += len(finished.failures)

    def tell(self, finished: Finished, new: float) -> None:
        """Count a chunk of this run, of which so many seconds are new."""
        self._count(finished)
        self._new += new
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            done = (self._items, self._plan.items, self._seconds, self._new, self._failures)
            self._progress(Progress(*done, self._share, self._begun))


def _finish(folder: Output, committer: Committer, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write what describes the corpus; the manifest, which says that it is complete, comes last."""
    failures = read_failures(folder, len(committer.markers))
    sink = pa.BufferOutputStream()
    pq.write_table(failures, sink, compression="zstd")
    write_atomic(folder.folder / FAILURES, sink.getvalue())
    statistics = card.statistics(folder, committer.markers, manifest)
    write_json(folder.folder / STATISTICS, statistics)
    write_atomic(folder.folder / CARD, card.readme(manifest, statistics).encode())
    files = {name: sha256_of(folder.folder / name) for name in (CARD, FAILURES, STATISTICS)}
    write_json(folder.folder / MANIFEST, card.seal(manifest, files, folder.markers_hash()))
    return statistics
