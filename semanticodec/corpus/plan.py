"""The list of what is to be tokenised, on disk: it takes no memory however long it is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .records import Item

PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("source", pa.binary()),
        ("member", pa.binary()),
        ("place", pa.list_(pa.int64())),
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("channel", pa.int16()),
        ("text", pa.string()),
        ("metadata", pa.string()),
        ("extra", pa.string()),
        ("size", pa.int64()),
    ]
)


def to_table(items: list[Item]) -> pa.Table:
    """Write items as a table: a row group of the plan, a block of Ray's."""
    rows = [dataclasses.asdict(item) for item in items]
    for row in rows:
        row["source"], row["member"] = os.fsencode(row["source"]), os.fsencode(row["member"])
        for name in ("text", "extra"):
            if row[name] is not None:
                row[name] = row[name].encode("utf-8", "backslashreplace").decode()
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def from_table(table: pa.Table) -> list[Item]:
    """Read what :func:`to_table` has written."""
    items = []
    for row in table.to_pylist():
        row["source"], row["member"] = os.fsdecode(row["source"]), os.fsdecode(row["member"])
        row["place"] = tuple(row["place"]) if row["place"] else None
        items.append(Item(**row))
    return items


def _hash(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest())


def _hashes(items: list[Item]) -> np.ndarray:
    """Return eight bytes per id: millions fit in memory where the ids would not."""
    return np.array([_hash(item.id) for item in items], np.uint64)


def _tell_apart(items: Iterable[Item], taken: np.ndarray, counts: np.ndarray) -> Iterator[Item]:
    """Number what comes again.

    Args:
        items: all of them.
        taken: hashes of all ids, sorted.
        counts: how often each is there.
    """
    repeated = dict.fromkeys(taken[counts > 1].tolist(), 0)
    given: set[str] = set()
    for item in items:
        number = repeated.get(identity := _hash(item.id))
        if number is None:
            yield item
            continue
        repeated[identity] = number + 1
        while number:
            name = f"{item.id}~{number + 1}"
            place = int(np.searchsorted(taken, np.uint64(_hash(name))))
            if name not in given and (place == len(taken) or int(taken[place]) != _hash(name)):
                given.add(name)
                item = dataclasses.replace(item, id=name)
                break
            number += 1
            repeated[identity] = number + 1
        yield item


class Plan:
    """The list of items on disk, one row group per chunk, so that it takes no memory however long it is."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(os.path.abspath(path))

    @staticmethod
    def write(path: Path, items: Iterable[Item], chunk_items: int, chunk_bytes: int) -> None:
        """Write the list; a chunk ends with the item that brings it to either limit.

        Ids that were given before, in another folder or archive say, are told apart with ``~2``, ``~3`` ...
        """
        path = Path(os.path.abspath(path))  # Arrow takes the beginning of "run:1/..." for the scheme of a URL
        draft = path.with_name(f".{path.name}.tmp")
        Plan._write(draft, items, chunk_items, chunk_bytes)
        listed = Plan(draft)
        hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(listed[chunk]) for chunk in range(len(listed)))])
        taken, counts = np.unique(hashes, return_counts=True)
        if len(taken) < len(hashes):
            told_apart = path.with_name(f".{path.name}.ids.tmp")
            again = (item for chunk in range(len(listed)) for item in listed[chunk])
            Plan._write(told_apart, _tell_apart(again, taken, counts), chunk_items, chunk_bytes)
            told_apart.replace(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())  # what says that the run has begun must not outlive it
        draft.replace(path)

    @staticmethod
    def _write(path: Path, items: Iterable[Item], chunk_items: int, chunk_bytes: int) -> None:
        with pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd") as writer:
            chunk: list[Item] = []
            for item in items:
                chunk.append(item)
                if len(chunk) >= chunk_items or sum(one.size for one in chunk) >= chunk_bytes:
                    writer.write_table(to_table(chunk))
                    chunk = []
            if chunk:
                writer.write_table(to_table(chunk))

    def __len__(self) -> int:
        return int(self._file.num_row_groups)

    @property
    def items(self) -> int:
        """How many items there are."""
        return int(self._file.metadata.num_rows)

    def __getitem__(self, chunk: int) -> list[Item]:
        return from_table(self._file.read_row_group(chunk))

    def size(self, chunk: int) -> int:
        """Return how many items a chunk has."""
        return int(self._file.metadata.row_group(chunk).num_rows)

    def shares(self) -> np.ndarray:
        """Return which part of the work each chunk is, as far as the sizes of files tell, float64 that sums to 1."""
        groups = (self._file.read_row_group(chunk, ["size"])["size"].to_numpy() for chunk in range(len(self)))
        work = np.array([np.maximum(sizes, 1).sum() for sizes in groups], np.float64)
        shares: np.ndarray = work / max(work.sum(), 1)
        return shares
