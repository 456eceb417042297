"""Shards in three formats: Parquet, WebDataset, Lhotse Shar.  The same rows give the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import SAMPLE_RATE

Format = Literal["parquet", "webdataset", "shar"]


class ParquetShards:
    """``train-00000.parquet``, compressed with zstd; one row group per call."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"train-{number:05d}.parquet"
        self._writer: pq.ParquetWriter | None = None

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
        self._path = folder / f"train-{number:05d}.tar"
        self._tar: tarfile.TarFile | None = None

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._cuts.close()
            self._raw.close()
            self._arrays.close()

    def _begin(self) -> None:
        from lhotse.shar import ArrayTarWriter

        name = f"{self._number:06d}"
        self._raw = (self._folder / f"cuts.{name}.jsonl.gz").open("wb")
        self._cuts = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
        self._arrays = ArrayTarWriter(str(self._folder / f"codes.{name}.tar"), shard_size=None)
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


WRITERS: dict[Format, Callable[[Path, int], ParquetShards | WebDatasetShards | SharShards]] = {
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


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
