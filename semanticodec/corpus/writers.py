"""Shards in three formats, written and read: Parquet, WebDataset, Lhotse Shar.  The same rows give the same bytes."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import SAMPLE_RATE
from .manifests import metadata
from .records import SCHEMA

ROWS_AT_ONCE = 256
"""Rows that are read back at once where the format does not say."""

Format = Literal["parquet", "webdataset", "shar"]


class ParquetShards:
    """``train-00000.parquet``, compressed with zstd; one row group per call."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = self._place(folder, number)
        self._writer: pq.ParquetWriter | None = None

    @staticmethod
    def _place(folder: Path, number: int) -> Path:
        return folder / f"train-{number:05d}.parquet"

    @classmethod
    def read(cls, folder: Path, number: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a shard, a row group at a time, without features."""
        file = pq.ParquetFile(cls._place(folder, number))
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, SCHEMA.names).combine_chunks().to_batches()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd", compression_level=6)
        self._writer.write_table(table, row_group_size=table.num_rows)


class WebDatasetShards:
    """``train-00000.tar``: per row ``KEY.codes.npy`` (uint16 ``[2, frames]``) and ``KEY.json`` with everything else."""

    def __init__(self, folder: Path, number: int) -> None:
        self._number, self._rows = number, 0
        self._path = self._place(folder, number)
        self._tar: tarfile.TarFile | None = None

    @staticmethod
    def _place(folder: Path, number: int) -> Path:
        return folder / f"train-{number:05d}.tar"

    @classmethod
    def read(cls, folder: Path, number: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a shard, some at a time, without features."""

        def rows() -> Iterator[dict[str, Any]]:
            codes = np.zeros((2, 0), np.uint16)
            with tarfile.open(cls._place(folder, number)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".codes.npy"):
                        codes = np.load(io.BytesIO(file.read()), allow_pickle=False)
                    elif member.name.endswith(".json"):
                        yield _row(codes, json.load(file))

        return _batches(rows())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if self._tar is None:
            self._tar = tarfile.TarFile(self._path, "w", format=tarfile.PAX_FORMAT)
        for codes, facts, features in _rows(table):
            # Keys are numbers: ids may hold dots and slashes, which mean something in a WebDataset.
            key = f"{self._number:05d}{self._rows:09d}"
            self._rows += 1
            self._add(f"{key}.codes.npy", _npy(codes))
            if features is not None:
                self._add(f"{key}.features.npy", _npy(features))
            self._add(f"{key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())

    def _add(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


class SharShards:
    """Lhotse Shar: ``cuts.000000.jsonl.gz`` and ``codes.000000.tar``, a TemporalArray ``[frames, 2]`` per cut."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._open = False

    @staticmethod
    def _places(folder: Path, number: int) -> tuple[Path, Path]:
        return folder / f"cuts.{number:06d}.jsonl.gz", folder / f"codes.{number:06d}.tar"

    @classmethod
    def read(cls, folder: Path, number: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a shard, some at a time."""
        from lhotse import CutSet

        def rows() -> Iterator[dict[str, Any]]:
            cuts, codes = cls._places(folder, number)
            for cut in CutSet.from_shar(fields={"cuts": [str(cuts)], "codes": [str(codes)]}):
                facts = {name: value for name, value in cut.custom.items() if name != "codes"}
                text = cut.supervisions[0].text if cut.supervisions else None
                yield _row(cut.load_codes().T, facts | {"id": cut.id, "text": text})

        return _batches(rows())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._cuts.close()
            self._raw.close()
            self._arrays.close()

    def _begin(self) -> None:
        from lhotse.shar import ArrayTarWriter

        cuts, codes = self._places(self._folder, self._number)
        self._raw = cuts.open("wb")
        self._cuts = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
        self._arrays = ArrayTarWriter(str(codes), shard_size=None)
        self._arrays.__enter__()
        self._open = True

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        from lhotse import MonoCut, SupervisionSegment
        from lhotse.array import Array, TemporalArray
        from lhotse.shar.utils import to_shar_placeholder

        if not self._open:
            self._begin()
        for codes, facts, _ in _rows(table):
            rate = facts["sample_rate"]
            duration = facts["samples"] / rate
            samples = -(-facts["samples"] * SAMPLE_RATE // rate)
            frames = codes.T
            shift = float(Fraction(samples, SAMPLE_RATE) / len(frames))
            array = TemporalArray(Array("shar", "", "", list(frames.shape)), 0, shift, 0.0)
            spoken = (
                []
                if facts["text"] is None
                else [SupervisionSegment(facts["id"], facts["id"], 0.0, duration, text=facts["text"])]
            )
            custom = {name: value for name, value in facts.items() if name not in ("id", "text")}
            cut = MonoCut(facts["id"], 0.0, duration, facts["channel"] or 0, spoken, custom=custom)
            cut.codes = to_shar_placeholder(array)
            self._arrays.write(facts["id"], np.ascontiguousarray(frames), array)
            self._cuts.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")


WRITERS: dict[Format, type[ParquetShards] | type[WebDatasetShards] | type[SharShards]] = {
    "parquet": ParquetShards,
    "webdataset": WebDatasetShards,
    "shar": SharShards,
}


def _rows(table: pa.Table) -> Iterator[tuple[np.ndarray, dict[str, Any], np.ndarray | None]]:
    """Yield codes ``[2, frames]``, everything else that is known, and features."""
    rest = table.drop_columns([name for name in ("semantic", "acoustic", "features") if name in table.column_names])
    semantic, acoustic = (table.column(name) for name in ("semantic", "acoustic"))
    features = table.column("features") if "features" in table.column_names else None
    for index, facts in enumerate(rest.to_pylist()):
        facts["metadata"] = None if facts["metadata"] is None else json.loads(facts["metadata"])
        codes = np.stack([stream[index].values.to_numpy() for stream in (semantic, acoustic)])
        yield codes, facts, None if features is None else features[index].values.to_numpy()


def _row(codes: np.ndarray, facts: dict[str, Any]) -> dict[str, Any]:
    """Undo what :func:`_rows` did to a row."""
    return facts | {"metadata": metadata(facts["metadata"] or {}), "semantic": codes[0], "acoustic": codes[1]}


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield pa.RecordBatch.from_pylist(some, SCHEMA)


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
