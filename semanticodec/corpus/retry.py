"""Try again what failed in a finished corpus, and end with what a run gives in which it had worked at first.

Whether an input gives rows decides where a shard ends, and so where all behind it begin.  So the inputs are listed
anew, the shards are turned back into parts, those of chunks with a failure into *remains*, and a run goes on from there
with the inputs that are missing.  All this lies in ``_work``, which means nothing beside a finished corpus, until one
file says that it takes the corpus's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError
from .plan import Plan
from .records import SCHEMA, Finished, Item, printable, seconds_of
from .shards import FAILURES, PLAN, Output, load_part, read_shards, save_part
from .writers import Format

_SUFFIX = re.compile(r"(@\d+)?(#\d+)?")
"""What a stretch of speech and a channel add to the id of their item."""


def take_apart(corpus: Output, form: Format) -> None:
    """Write the parts and remains of a finished corpus beside the new list of its inputs, which is there.

    Raises:
        ConfigError: the list is not the one that the corpus was made of, as far as it did not fail.
        CorruptedError: a shard or a marker is damaged.
    """
    plan = Plan(corpus.work / PLAN)
    failed = set(pq.read_table(corpus.folder / FAILURES, columns=["id"]).column("id").to_pylist())
    gone, new = set(failed), ""
    rows = _Rows(read_shards(corpus.folder, form, [marker.shard for marker in corpus.markers() if marker.rows]))
    for chunk in range(len(plan)):
        taken: list[pa.RecordBatch] = []
        places: list[int] = []
        items = plan[chunk]
        for index, item in enumerate(items):
            if item.id in failed:
                gone.discard(item.id)
                continue
            some = rows.take(item)
            new = new or (not some and item.id) or ""
            taken += some
            places += [index] * len(some)
        table = _join(taken)
        if len(set(places)) == len(items):
            save_part(corpus.part(chunk), Finished(chunk, table, [], seconds_of(table)))
        else:
            table = table.append_column("item", pa.array(places, pa.int32()))
            save_part(corpus.remains(chunk), Finished(chunk, table, [], 0.0))
    if (left := rows.head) is not None:
        raise ConfigError(_other(corpus, f"{left[0]} was among them, and is not, or not where it was"))
    if new and not gone:  # else it may be in what could not be searched
        raise ConfigError(_other(corpus, f"{printable(new)} was not among them"))


def _other(corpus: Output, told: str) -> str:
    return (
        f"the inputs are no longer those that {corpus.folder} was made of: {told}; bring them back to try again what "
        "failed, or tokenise into another folder"
    )


def missing(corpus: Output, chunk: int, items: list[Item]) -> list[Item]:
    """Return the items of a chunk that have to be worked through: those without rows in its remains."""
    if not corpus.remains(chunk).exists():
        return items
    there = set(load_part(corpus.remains(chunk)).rows.column("item").to_pylist())
    return [item for index, item in enumerate(items) if index not in there]


def complete(corpus: Output, finished: Finished, items: list[Item]) -> Finished:
    """Put what :func:`missing` has given, and the remains of the chunk, together in the order of its items."""
    if not corpus.remains(finished.chunk).exists():
        return finished
    kept = load_part(corpus.remains(finished.chunk)).rows
    there = kept.column("item").to_pylist()
    failed = {failure["id"] for failure in finished.failures}
    new = _Rows(iter(finished.rows.combine_chunks().to_batches()))
    places = list(there)
    taken = []
    for index, item in enumerate(items):
        if index not in there and item.id not in failed:
            some = new.take(item)
            taken += some
            places += [index] * len(some)
    table = pa.concat_tables([kept.drop_columns(["item"]), _join(taken)])
    table = table.take(np.argsort(places, kind="stable")).combine_chunks()
    return Finished(finished.chunk, table, finished.failures, seconds_of(table))


def _join(batches: list[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches, SCHEMA).combine_chunks()


class _Rows:
    """Rows in the order of the items that they came of."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._batch, self._at = pa.RecordBatch.from_pylist([], SCHEMA), 0
        self._names: list[tuple[str, str]] = []

    @property
    def head(self) -> tuple[str, str] | None:
        """The id and source of the next row; None at the end."""
        while self._at == len(self._names):
            if (batch := next(self._batches, None)) is None:
                return None
            self._batch, self._at = batch.cast(SCHEMA), 0
            self._names = list(zip(batch.column("id").to_pylist(), batch.column("source").to_pylist(), strict=True))
        return self._names[self._at]

    def take(self, item: Item) -> list[pa.RecordBatch]:
        """Return the next rows as long as they are those of an item."""
        taken: list[pa.RecordBatch] = []
        while (head := self.head) and head[1] == item.label and head[0].startswith(item.id):
            suffix = _SUFFIX.fullmatch(head[0], len(item.id))
            if suffix is None or (taken and not suffix[0]):
                break
            taken.append(self._batch.slice(self._at, 1))
            self._at += 1
            if not suffix[0]:  # it is all of the recording
                break
        return taken
