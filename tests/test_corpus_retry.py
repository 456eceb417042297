"""What failed in a finished corpus is tried again, and the end is that of a run in which it had worked at first."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from semanticodec.corpus import CorpusOptions, card, local, tokenize_corpus, verify_corpus
from semanticodec.corpus.records import SCHEMA, Finished, Item
from semanticodec.corpus.retry import _Rows
from semanticodec.corpus.shards import Output, read_shards
from semanticodec.corpus.worker import Tokeniser, Work
from semanticodec.errors import ConfigError

OPTIONS = CorpusOptions(model="mini-25", batch_seconds=5.12, channels="split", shard_mb=0.001)
LATE = ("02.wav", "05.wav", "06.wav", "11.wav")
"""Recordings that are not there at first: inside of a chunk, at the end of one, at the start of the next, and last."""


@pytest.fixture(scope="module")
def tokeniser(threads: None) -> Tokeniser:  # noqa: ARG001
    return Tokeniser(OPTIONS.work("cpu", 0))


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return card.manifest(OPTIONS, [])


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tokeniser: Tokeniser, manifest: dict[str, Any]) -> list[str]:
    """Work in this process, in chunks of three inputs; return the ids of those that were worked through."""
    names: list[str] = []

    def run(chunks: Iterator[tuple[int, list[Item]]], _: list[Work]) -> Iterator[Finished]:
        for chunk, items in chunks:
            names.extend(item.id for item in items)
            yield tokeniser.run(chunk, items)

    def stated(options: CorpusOptions, inputs: list[str]) -> dict[str, Any]:
        shards = {"format": options.form, "megabytes": options.shard_mb}
        return manifest | {"shards": shards, "keep_features": options.keep_features, "inputs": inputs}

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(card, "manifest", stated)
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 3)
    return names


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Return a list of recordings, some stereo, one with segments of it, whose names and fields hold what may hurt."""
    lines = []
    for index in range(12):
        wave = np.random.default_rng(index).normal(0, 0.1, (5_000 + 500 * index, 1 + index % 2))
        soundfile.write(tmp_path / f"{index:02d}.wav", wave, 16_000)
        lines.append(
            {"path": f"{index:02d}.wav", "text": f"Nr. {index}, grün", "ü": [1.5, {"z": None, "a": "é" * index}]}
        )
    lines.insert(4, {"path": "03.wav", "offset": 0.1, "duration": 0.2})
    lines.insert(8, {"path": "00.wav"})  # again: its id is told apart
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def away(folder: Path, *, back: bool = False) -> None:
    for name in LATE:
        one, other = folder / name, folder / f"{name}.away"
        (other if back else one).rename(one if back else other)


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and "_work" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["parquet", "webdataset", "shar"])
def test_what_failed_is_tried_again_and_nothing_else(listed: Path, tmp_path: Path, asked: list[str], form: Any):
    if form == "shar":
        pytest.importorskip("lhotse")
    options = dataclasses.replace(OPTIONS, form=form)
    tokenize_corpus([listed], tmp_path / "whole", options=options)
    away(tmp_path)
    out = tmp_path / "out"
    assert tokenize_corpus([listed], out, options=options)["failures"] == 4
    assert len(contents(out)) > 8  # several shards
    asked.clear()
    assert tokenize_corpus([listed], out, options=options, retry_failures=True)["failures"] == 4
    assert asked == list(LATE)
    away(tmp_path, back=True)
    asked.clear()
    assert tokenize_corpus([listed], out, options=options, retry_failures=True)["failures"] == 0
    assert asked == list(LATE)
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "_work").exists()
    asked.clear()
    tokenize_corpus([listed], out, options=options, retry_failures=True)
    assert (asked, contents(out)) == ([], contents(tmp_path / "whole"))


class PowerFails(BaseException):
    pass


def failing(function: Any, calls: Iterator[int], at: int) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise PowerFails
        return function(*args, **kwargs)

    return wrapped


def test_killed_anywhere_it_is_the_old_corpus_or_goes_on(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokeniser: Tokeniser
):
    listed.write_text("\n".join(listed.read_text().splitlines()[:7]))
    tokenize_corpus([listed], tmp_path / "whole", options=OPTIONS)
    away(tmp_path)
    tokenize_corpus([listed], tmp_path / "first", options=OPTIONS)
    away(tmp_path, back=True)
    done: dict[tuple[str, ...], Finished] = {}

    def run(chunks: Iterator[tuple[int, list[Item]]], _: list[Work]) -> Iterator[Finished]:
        for chunk, items in chunks:
            key = tuple(item.id for item in items)
            done[key] = done.get(key) or tokeniser.run(chunk, items)
            yield done[key]

    monkeypatch.setattr(local, "run", run)
    before, whole, seen = contents(tmp_path / "first"), contents(tmp_path / "whole"), set()
    for call in itertools.count():
        out = tmp_path / "out"
        shutil.copytree(tmp_path / "first", out)
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "replace"), (shutil, "rmtree"), (shutil.os, "unlink")):
                patch.setattr(owner, name, failing(getattr(owner, name), calls, call))
            try:
                tokenize_corpus([listed], out, options=OPTIONS, retry_failures=True)
                break
            except PowerFails:
                pass
        state = "going on"
        if Output(out).complete:
            assert contents(out) in (before, whole)
            state = "old" if contents(out) == before else "new"
        seen.add(state)
        how = {"retry_failures": True} if state == "old" or call % 2 else {"resume": True}
        tokenize_corpus([listed], out, options=OPTIONS, **how)
        assert contents(out) == whole, call
        assert not (out / "_work").exists()
        shutil.rmtree(out)
    assert seen == {"old", "going on", "new"}
    assert call > 40


@pytest.mark.usefixtures("listed")
def test_an_archive_that_could_not_be_searched(tmp_path: Path, asked: list[str]):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("00.wav", "01.wav"):
            tar.add(tmp_path / name, f"in/{name}")
    (tmp_path / "b.tar").write_bytes(archive.getvalue())
    inputs = [tmp_path / "02.wav", tmp_path / "b.tar", tmp_path / "03.wav"]
    tokenize_corpus(inputs, tmp_path / "whole", options=OPTIONS)
    (tmp_path / "b.tar").write_bytes(b"\x01" * 600)
    assert tokenize_corpus(inputs, tmp_path / "out", options=OPTIONS)["failures"] == 1
    (tmp_path / "b.tar").write_bytes(archive.getvalue())
    asked.clear()
    tokenize_corpus(inputs, tmp_path / "out", options=OPTIONS, retry_failures=True)
    assert asked == ["in/00", "in/01"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["gone", "new", "other order"])
def test_other_inputs_are_refused(listed: Path, tmp_path: Path, change: str):
    away(tmp_path)
    out = tmp_path / "out"
    tokenize_corpus([listed], out, options=OPTIONS)
    before, lines = contents(out), listed.read_text().splitlines()
    match change:
        case "gone":
            lines.pop(1)
        case "new":
            lines.append(json.dumps({"path": "02.wav.away"}))
        case "other order":
            lines.reverse()
    listed.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"no longer those that .* was made of: .* among them"):
        tokenize_corpus([listed], out, options=OPTIONS, retry_failures=True)
    assert (contents(out), (out / "_work").exists()) == (before, False)
    assert verify_corpus(out, sample=0).faults == ()


def test_features_cannot_be_kept(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = dataclasses.replace(OPTIONS, keep_features=True)
    own = Tokeniser(options.work("cpu", 0))
    monkeypatch.setattr(local, "run", lambda chunks, _: (own.run(*chunk) for chunk in chunks))
    away(tmp_path)
    tokenize_corpus([listed], tmp_path / "out", options=options)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds features"):
        tokenize_corpus([listed], tmp_path / "out", options=options, retry_failures=True)
    assert contents(tmp_path / "out") == before
    with pytest.raises(ConfigError, match="choose one of"):
        tokenize_corpus([listed], tmp_path / "out", options=options, retry_failures=True, overwrite=True)


def test_rows_are_those_of_their_items():
    ids = ["x", "x#1", "x@0", "x@16000#0", "x@16000#1", "x@2y", "y#0", "y#1", "y"]
    facts = {
        "semantic": [],
        "acoustic": [],
        "frames": 0,
        "samples": 1,
        "sample_rate": 1,
        "offset": 0,
        "audio_sha256": "",
    }
    table = pa.Table.from_pylist([facts | {"id": one, "source": "s"} for one in ids], SCHEMA)
    rows = _Rows(iter(table.to_batches(max_chunksize=2)))

    def take(name: str, source: str = "s") -> list[str]:
        return [one for batch in rows.take(Item(name, "file", source)) for one in batch.column("id").to_pylist()]

    assert take("x", "other") == []
    assert take("x") == ["x"]  # a whole recording: what follows is another's
    assert take("x#1") == ["x#1"]
    assert take("x") == ["x@0", "x@16000#0", "x@16000#1"]
    assert take("x@2") == []
    assert take("x@2y") == ["x@2y"]
    assert take("y") == ["y#0", "y#1"]
    assert rows.head == ("y", "s")
    assert take("y") == ["y"]
    assert rows.head is None


def test_metadata_comes_back_as_it_was(listed: Path, tmp_path: Path):
    told = []
    for form in ("parquet", "webdataset"):
        options: Any = dataclasses.replace(OPTIONS, form=form, shard_mb=1)
        tokenize_corpus([listed], tmp_path / form, options=options)
        batches = read_shards(tmp_path / form, options.form, [0])
        told.append([one for batch in batches for one in batch.column("metadata").to_pylist()])
    assert told[0] == told[1]
    assert "\\u00e9" in told[0][3]
