"""Check a finished corpus: hashes, columns, ranges, and whether encoding again gives the same codes."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import PRESETS, SAMPLE_RATE, CodecConfig, config_from_json
from ..errors import ConfigError, CorruptedError, SemantiCodecError
from .card import encoder_hash, manifest_hash
from .inputs import find_items
from .records import Item, locate, unprintable
from .shards import DATA, DONE, FAILURES, MANIFEST, STATISTICS, Marker, Output, read_shards, sha256_of
from .worker import Tokeniser, Work

FAULTS = 100
"""Faults that are told one by one."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        rows: read and checked.
        faults: what is wrong; empty if all is well.
        sampled: rows that were encoded again.
        lost: sampled rows whose sound is gone, has changed or cannot be read alone.
        agreement: share of equal (semantic, acoustic) codes among the sampled rows, None if there are none.
        unchecked: what was not looked at.
    """

    rows: int
    faults: tuple[str, ...]
    sampled: int
    lost: tuple[str, ...]
    agreement: tuple[float, float] | None
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in a few lines."""
        lines = [f"{self.rows} rows checked, {len(self.faults)} faults", *self.faults]
        if self.agreement is not None:
            semantic, acoustic = self.agreement
            lines.append(
                f"{self.sampled} rows encoded again: {semantic:.4%} of the semantic and {acoustic:.4%} of the acoustic "
                "codes are the same"
            )
        lines += [f"not encoded again: {reason}" for reason in self.lost]
        return "\n".join([*lines, *(f"not checked: {what}" for what in self.unchecked)])


def verify_corpus(
    folder: str | os.PathLike[str],
    *,
    sample: int = 16,
    model: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Report:
    """Re-read a corpus and encode a sample of it again.

    Args:
        folder: written by :func:`semanticodec.corpus.tokenize_corpus`.
        sample: rows to encode again, spread evenly.
        model: weights to encode with; None takes those that the corpus names, a preset's or a folder's.
        preset: which preset to take from a folder with several; None takes the corpus's.
        device: to encode on.
        dtype: to encode in.

    Raises:
        ConfigError: there is no finished corpus in ``folder``.
        CheckpointError: the weights are not there.
    """
    output = Output(Path(folder))
    if not output.complete:
        state = "holds no corpus" if output.folder.is_dir() else "is no folder"
        state = "is not finished: --resume goes on with it" if output.started else state
        raise ConfigError(f"{folder} {state}")
    try:
        manifest = _manifest(output.folder / MANIFEST)
    except CorruptedError as error:
        return Report(0, (str(error),), 0, (), None, ("anything else, for want of a manifest",))
    check = _Check(output, manifest, config_from_json(json.dumps(manifest["config"])))
    check.files()
    picked = check.rows(sample)
    agreement: tuple[float, float] | None = None
    sampled, lost = 0, list[str]()
    if picked:
        own = manifest["model_folder"]
        work = Work(
            os.fspath(model or (unprintable(own) if own else manifest["model"])),
            preset or (None if model in PRESETS else manifest["model"]),
            device,
            dtype,
            manifest["windows"]["batch_seconds"],
            0,
            manifest["channels"],
            vad=False,
            keep_features=False,
        )
        same = check.weights(work)
        agreement, sampled, lost = _encode_again(picked, work)
        check.again(work, agreement, len(picked), same=same)
    unchecked: tuple[str, ...] = () if picked else ("weights, and encoding again: no rows were sampled",)
    return Report(check.total, tuple(check.faults), sampled, tuple(lost), agreement, unchecked)


def _manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        CorruptedError: it is not what a run has written.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        stated = manifest["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptedError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if stated != manifest_hash(manifest):
        raise CorruptedError(f"{path} has changed since it was written")
    return manifest


class _Check:
    """Goes through a corpus and collects what is wrong."""

    def __init__(self, output: Output, manifest: dict[str, Any], config: CodecConfig) -> None:
        self._output, self._manifest, self._config = output, manifest, config
        self.faults: list[str] = []
        self.total = 0
        self._good: list[Marker] = []

    def fault(self, text: str) -> None:
        """Note a fault."""
        if len(self.faults) < FAULTS:
            self.faults.append(text)

    def files(self) -> None:
        """Compare every file with its done-marker."""
        data = self._output.folder / DATA
        try:
            markers = self._output.markers()
        except SemantiCodecError as error:
            self.fault(str(error))
            return
        self._good = [marker for marker in markers if self._unchanged(data, marker.files) and marker.rows]
        present = {path.name for path in data.iterdir()} if data.is_dir() else set()
        for name in sorted(present.difference(*(marker.files for marker in markers))):
            self.fault(f"{data / name} belongs to no shard")
        self._unchanged(self._output.folder, self._manifest["files"])
        if self._output.markers_hash() != self._manifest.get("markers_sha256"):
            self.fault(f"{self._output.folder / DONE}: a done-marker has changed since the corpus was finished")
        self._counts(sum(marker.rows for marker in markers), sum(marker.failures for marker in markers))

    def _unchanged(self, folder: Path, files: dict[str, str]) -> bool:
        """Compare files with their hashes; tell whether all are as they were."""
        before = len(self.faults)
        for name, digest in sorted(files.items()):
            path = folder / name
            if not path.is_file():
                self.fault(f"{path} is missing")
            elif sha256_of(path) != digest:
                self.fault(f"{path} has changed since it was written")
        return len(self.faults) == before

    def _counts(self, rows: int, failures: int) -> None:
        """Compare what the done-markers count with what is stated and listed."""
        path = self._output.folder / STATISTICS
        try:
            stated = json.loads(path.read_text())
            for name, count in (("rows", rows), ("failures", failures)):
                if stated[name] != count:
                    self.fault(f"{path} counts {stated[name]} {name}, the done-markers {count}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.fault(f"{path} cannot be read: {type(error).__name__}: {error}")
        path = self._output.folder / FAILURES
        try:
            listed = pq.read_metadata(path).num_rows
            if listed != failures:
                self.fault(f"{path} has {listed} lines, the done-markers count {failures} failures")
        except (OSError, pa.ArrowException) as error:
            self.fault(f"{path} cannot be read: {type(error).__name__}: {error}")

    def weights(self, work: Work) -> bool:
        """Compare the weights that are to encode again with those that the corpus was made with."""
        before = len(self.faults)
        # As the corpus was made: the hash is over the values in its floating-point type.
        codec = dataclasses.replace(work, device="cpu", dtype=self._manifest["dtype"]).load()
        for name, found in (("weights_sha256", codec.weights_hash), ("encoder_sha256", encoder_hash(codec))):
            if found != self._manifest[name]:
                self.fault(f"{work.model} is another model: its {name} is {found}, the corpus's {self._manifest[name]}")
        return len(self.faults) == before

    def again(self, work: Work, agreement: tuple[float, float] | None, picked: int, *, same: bool) -> None:
        """Judge what encoding again has shown; ``same``: with the weights of the corpus."""
        exact = same and {work.dtype, self._manifest["dtype"]} == {"float32"} and work.device == "cpu"
        if agreement is None:
            self.fault(f"none of {picked} sampled rows could be encoded again: nothing is known of their codes")
        elif agreement != (1.0, 1.0) and exact and self._manifest["device_kind"] == "cpu":
            self.fault("codes have changed, which in float32 on a CPU must be the same from one run to the next")

    def rows(self, sample: int) -> list[dict[str, Any]]:
        """Check every row of the undamaged shards; return a sample of them, spread evenly."""
        total = sum(marker.rows for marker in self._good)
        wanted = {int(Fraction(2 * k + 1, 2 * sample) * total) for k in range(sample)}
        picked: list[dict[str, Any]] = []
        try:
            numbers = [marker.shard for marker in self._good]
            for batch in read_shards(self._output.folder, self._manifest["shards"]["format"], numbers):
                inside = [index for index in range(batch.num_rows) if self.total + index in wanted]
                picked += batch.take(pa.array(inside, pa.int64())).to_pylist()
                self._batch(batch)
        except CorruptedError as error:
            self.fault(str(error))
        return picked

    def _batch(self, batch: pa.RecordBatch) -> None:
        self.total += batch.num_rows
        frames = batch.column("frames").to_numpy()
        samples = [
            self._config.frames(-(-count * SAMPLE_RATE // rate))
            for count, rate in zip(
                batch.column("samples").to_pylist(), batch.column("sample_rate").to_pylist(), strict=True
            )
        ]
        for stream, size in zip(("semantic", "acoustic"), self._config.codebook_sizes, strict=True):
            column = batch.column(stream)
            lengths = column.value_lengths().to_numpy()
            codes = column.flatten().to_numpy()
            if len(codes) and codes.max() >= size:
                self.fault(f"{stream} codes reach {codes.max()}, the codebook ends at {size - 1}")
            for index in np.flatnonzero((lengths != frames) | (lengths != samples)):
                row = batch.column("id")[int(index)].as_py()
                self.fault(f"{row!r} has {lengths[index]} {stream} codes, {samples[index]} are due")


def _encode_again(rows: list[dict[str, Any]], work: Work) -> tuple[tuple[float, float] | None, int, list[str]]:
    tokeniser = Tokeniser(work)
    equal, seen, sampled = np.zeros(2), 0, 0
    lost: list[str] = []
    for row in rows:
        try:
            again = _again(row, tokeniser, work)
        except (SemantiCodecError, OSError, tarfile.TarError) as error:
            lost.append(f"{row['id']}: {error}")
            continue
        sampled, seen = sampled + 1, seen + row["frames"]
        for stream, name in enumerate(("semantic", "acoustic")):
            if len(again[name]) == len(row[name]):  # else it is another model
                equal[stream] += np.count_nonzero(np.equal(again[name], row[name]))
    agreement = (float(equal[0] / seen), float(equal[1] / seen)) if seen else None
    return agreement, sampled, lost


def _again(row: dict[str, Any], tokeniser: Tokeniser, work: Work) -> dict[str, Any]:
    """Encode what a row was made of.

    Raises:
        ConfigError: it is gone, cannot be read, or holds another sound.
    """
    told = f"{row['source']} is no longer there"
    for item in _items(row, work):
        finished = tokeniser.run(0, [item])
        for one in finished.rows.to_pylist():
            if row["channel"] in (None, one["channel"]) and one["audio_sha256"] == row["audio_sha256"]:
                return dict(one)
        told = finished.failures[0]["reason"] if finished.failures else f"{row['source']} holds another sound now"
    raise ConfigError(told)


def _items(row: dict[str, Any], work: Work) -> Iterator[Item]:
    """Yield what a row may have been made of: names in archives and manifests may come again."""
    channel = row["channel"] if work.channels == "downmix" else None
    start, duration = row["offset"] / row["sample_rate"], row["samples"] / row["sample_rate"]
    source = unprintable(row["source"])
    archive, mark, member = source.rpartition("#")
    for candidate in (row["source"], source):
        # A "#" may be a part of the file's own name, in a URL as well.
        plain = not mark and candidate == source
        if plain or os.path.exists(candidate) or ("://" in candidate and _exists(candidate)):
            yield Item(row["id"], "file", candidate, start=start, duration=duration, channel=channel)
            return
    with fsspec.open(archive, "rb"):
        pass
    for item in find_items([archive]):
        if item.member == member:
            cut = item.kind == "cut"
            yield item if cut else dataclasses.replace(item, start=start, duration=duration, channel=channel)


def _exists(source: str) -> bool:
    file_system, path = locate(source)
    return bool(file_system.exists(path))
