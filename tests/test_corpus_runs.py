"""Runs of the tokeniser that are interrupted, meet each other or get less than they asked for, and their checking."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from semanticodec.checkpoints import WEIGHTS
from semanticodec.corpus import CorpusOptions, card, local, tokenize_corpus, verify, verify_corpus
from semanticodec.corpus.records import Finished, Item, schema, seconds_of
from semanticodec.corpus.shards import Committer, Output
from semanticodec.corpus.worker import Tokeniser, Work
from semanticodec.errors import ConfigError, SemantiCodecError

OPTIONS = CorpusOptions(model="mini-25", batch_seconds=5.12, shard_mb=0.001)


@pytest.fixture(scope="module")
def tokeniser(threads: None) -> Tokeniser:  # noqa: ARG001
    return Tokeniser(OPTIONS.work("cpu", 0))


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return card.manifest(OPTIONS, [])


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tokeniser: Tokeniser, manifest: dict[str, Any]) -> None:
    """Work in this process, in chunks of one input, and do nothing twice that takes long."""
    done: dict[Any, Finished] = {}

    def run(chunks: Iterator[tuple[int, list[Item]]], works: list[Work]) -> Iterator[Finished]:
        own = tokeniser if works[0] == OPTIONS.work("cpu", 0) else Tokeniser(works[0])
        for chunk, items in chunks:
            key = (works[0], tuple(item.source for item in items))
            if key not in done:
                done[key] = own.run(chunk, items)
            yield dataclasses.replace(done[key], chunk=chunk)

    def stated(options: CorpusOptions, names: list[str]) -> dict[str, Any]:
        return manifest | {"channels": options.channels, "inputs": names}

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(card, "manifest", stated)
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 1)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(3):
        wave = np.random.default_rng(index).normal(0, 0.1, 6_000 + 1_000 * index)
        soundfile.write(folder / f"{index}.wav", wave, 16_000)
    (folder / "bad.wav").touch()
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class PowerFails(BaseException):
    pass


def failing(patch: pytest.MonkeyPatch, owner: Any, name: str, due: Callable[[], bool]) -> None:
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if due():
            raise PowerFails
        return function(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("half", [False, True], ids=["finished", "half done"])
def test_a_deletion_interrupted_anywhere_is_ended_by_the_next(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
):
    first, whole = tmp_path / "first", tmp_path / "whole"

    def stop(status: Any) -> None:
        if half and status.items == 3:
            raise KeyboardInterrupt

    if half:
        with pytest.raises(KeyboardInterrupt):
            tokenize_corpus([clips], first, options=OPTIONS, progress=stop)
    else:
        tokenize_corpus([clips], first, options=OPTIONS)
    (clips / "2.wav").unlink()  # what is left of the first corpus must not get into the second
    tokenize_corpus([clips], whole, options=OPTIONS)
    for call in range(100):
        out = tmp_path / f"out{call}"
        shutil.copytree(first, out)
        calls = iter(range(10**6))
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"), (shutil.os, "unlink")):
                failing(patch, owner, name, lambda: next(calls) == call)  # noqa: B023
            try:
                Output(out).clear()
                break
            except PowerFails:
                pass
        assert Output(out).started
        if any((out / name).exists() for name in ("manifest.json", "_work/run.json")):
            assert contents(out) == contents(first)
        else:
            with pytest.raises(ConfigError, match="--overwrite deletes the rest"):
                tokenize_corpus([clips], out, options=OPTIONS, resume=True)
        tokenize_corpus([clips], out, options=OPTIONS, overwrite=True)
        assert contents(out) == contents(whole)
    assert call > 6
    assert not Output(out).started


def test_a_run_keeps_others_out_of_its_folder(clips: Path, tmp_path: Path):
    tokenize_corpus([clips], tmp_path / "whole", options=OPTIONS)
    out = tmp_path / "out"
    seen = []

    def intrude(status: Any) -> None:
        for how in ({"overwrite": True}, {"resume": True}, {}):
            with pytest.raises(ConfigError, match="another run is writing"):
                tokenize_corpus([clips], out, options=OPTIONS, **how)
        seen.append(status.items)

    tokenize_corpus([clips], out, options=OPTIONS, progress=intrude)
    assert seen == [0, 1, 2, 3, 4]
    tokenize_corpus([clips], out, options=OPTIONS, overwrite=True, progress=intrude)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["data/mine.wav", "README.md", "manifest.json", "statistics.json"])
def test_a_folder_of_somebody_elses_is_left_alone(clips: Path, tmp_path: Path, name: str):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    for how in ({}, {"overwrite": True}, {"resume": True}, {"retry_failures": True}):
        with pytest.raises(ConfigError, match="choose another output folder"):
            tokenize_corpus([clips], tmp_path, options=OPTIONS, **how)
    assert file.read_text() == "mine"
    assert not (tmp_path / "_work").exists()


def test_an_input_is_no_output(clips: Path, tmp_path: Path):
    before = contents(clips)
    (tmp_path / "link").symlink_to(clips)
    with pytest.raises(ConfigError, match="is an input and cannot be the output"):
        tokenize_corpus([clips / "0.wav", clips], tmp_path / "link", options=OPTIONS)
    assert contents(clips) == before
    tokenize_corpus([clips], clips / "codes", options=OPTIONS)  # which is passed over by the next
    assert tokenize_corpus([clips], tmp_path / "again", options=OPTIONS)["rows"] == 3


def test_killed_after_the_manifest(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, shutil, "rmtree", lambda: (out / "manifest.json").exists())
        with pytest.raises(PowerFails):
            tokenize_corpus([clips], out, options=OPTIONS)
    assert (out / "_work").exists()
    assert tokenize_corpus([clips], out, options=OPTIONS, resume=True)["rows"] == 3
    assert not (out / "_work").exists()


@pytest.mark.parametrize("lost", range(4))
def test_an_engine_that_delivers_less(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int):
    whole = local.run

    def less(chunks: Iterator[tuple[int, list[Item]]], works: list[Work]) -> Iterator[Finished]:
        return (finished for finished in whole(chunks, works) if finished.chunk != lost)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(local, "run", less)
        with pytest.raises(SemantiCodecError, match="ended with 1 chunks still to do"):
            tokenize_corpus([clips], out, options=OPTIONS)
    assert not Output(out).complete
    assert tokenize_corpus([clips], out, options=OPTIONS, resume=True)["rows"] == 3


def test_channels_are_no_duplicates(clips: Path, tmp_path: Path):
    wave = np.random.default_rng(9).normal(0, 0.1, (6_000, 2))
    for name in ("stereo", "again"):
        soundfile.write(clips / f"{name}.wav", wave, 16_000)
    options = CorpusOptions(model="mini-25", batch_seconds=5.12, channels="split")
    statistics = tokenize_corpus([clips], tmp_path / "out", options=options)
    assert (statistics["rows"], statistics["duplicates"]) == (7, 2)


@pytest.mark.parametrize("number", [0, -1])
def test_as_few_encoders_as_that(number: int):
    with pytest.raises(ConfigError, match=r"encoders=.* must be more than 0"):
        CorpusOptions(encoders=number)


def test_an_hour_of_codes_has_row_groups_to_share(tmp_path: Path):
    output = Output(tmp_path)
    committer = Committer(output, 16, "parquet", 200_000_000)
    codes = np.zeros(360_000 // 4, np.uint16)  # an hour at 25 frames a second
    facts = dict(frames=len(codes), samples=1, sample_rate=16_000, source="s", offset=0, audio_sha256="0")
    for chunk in range(16):
        rows = pa.Table.from_pylist([{"id": f"{chunk}", "semantic": codes, "acoustic": codes, **facts}], schema(False))
        committer.add(Finished(chunk, rows, [], 3600.0))
    (shard,) = (tmp_path / "data").iterdir()
    assert pq.ParquetFile(shard).num_row_groups >= 4


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "empty object":
            path.write_bytes(b"{}")
        case "list":
            path.write_bytes(b"[]")
        case "longer":
            path.write_bytes(data + b"\n")
        case "other":
            path.write_bytes(data.replace(b'"failures": 1', b'"failures": 2').replace(b"mini-25", b"mini-50"))


def test_verify_tells_of_every_damage(clips: Path, tmp_path: Path):
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=OPTIONS)
    assert verify_corpus(out, sample=0).faults == ()
    assert "not checked: weights" in str(verify_corpus(out, sample=0))
    for name, hows in {
        "failures.parquet": ("missing", "truncated", "longer"),
        "statistics.json": ("missing", "truncated", "empty object", "list", "longer", "other"),
        "README.md": ("missing", "truncated", "longer", "other"),
        "manifest.json": ("truncated", "empty object", "list", "other"),
    }.items():
        for how in hows:
            bad = tmp_path / f"{name} {how}"
            shutil.copytree(out, bad)
            damage(bad / name, how)
            faults = verify_corpus(bad, sample=0).faults
            assert faults, (name, how)
            assert all(name in fault for fault in faults), faults


def test_verify_takes_the_weights_of_the_corpus(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: dict[str, Any]
):
    mine = tmp_path / "mine"
    shutil.copytree(WEIGHTS / "mini", mine)
    options = dataclasses.replace(OPTIONS, model=mine, preset="mini-25")
    assert card._folder(options) == str(mine)
    assert card._folder(OPTIONS) is None
    stated = manifest | {"model_folder": str(mine)}
    monkeypatch.setattr(card, "manifest", lambda *_: stated)
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=options)
    used = []
    load = Work.load
    monkeypatch.setattr(Work, "load", lambda work: used.append((work.model, work.preset)) or load(work))
    report = verify_corpus(out, sample=1)
    assert (report.faults, report.agreement) == ((), (1.0, 1.0))
    assert set(used) == {(str(mine), "mini-25")}
    stated |= {"encoder_sha256": "0" * 64}
    tokenize_corpus([clips], out, options=options, overwrite=True)
    (fault,) = verify_corpus(out, sample=1).faults
    assert "is another model: its encoder_sha256" in fault


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_verify_says_what_it_does_not_check(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: dict[str, Any], form: Any
):
    stated = manifest | {"shards": {"format": form, "megabytes": 200}}
    monkeypatch.setattr(card, "manifest", lambda *_: stated)
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=dataclasses.replace(OPTIONS, form=form))
    report = verify_corpus(out, sample=0)
    assert (report.rows, report.faults, report.agreement) == (3, (), None)
    assert "not checked: weights, and encoding again" in str(report)
    marker = out / "done" / "00000.json"
    marker.write_text(marker.read_text() + "\n")
    (fault,) = verify_corpus(out, sample=0).faults
    assert "a done-marker has changed" in fault


def test_inputs_that_do_not_exist_cost_nothing(clips: Path, tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="does not exist"):
        tokenize_corpus([tmp_path / "typo"], out, options=OPTIONS)
    tokenize_corpus([clips], out, options=OPTIONS)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="does not exist"):
        tokenize_corpus([tmp_path / "typo"], out, options=OPTIONS, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert verify_corpus(out, sample=0).faults == ()


def test_outputs_that_look_like_urls(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert tokenize_corpus([clips], "run:1", options=OPTIONS)["rows"] == 3
    with pytest.raises(ConfigError, match="is a URL; the output is a local folder"):
        tokenize_corpus([clips], "memory://out", options=OPTIONS)
    with pytest.raises(ConfigError, match="is a URL; the output is a local folder"):
        tokenize_corpus([clips], Path("s3://bucket/out"), options=OPTIONS)  # pathlib drops a slash


def test_verify_fails_where_nothing_is_known(clips: Path, tmp_path: Path):
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=OPTIONS)
    (fault,) = verify_corpus(out, sample=1, model="mini-50").faults[:1]
    assert "is another model" in fault
    for path in clips.rglob("*"):
        if path.is_file():
            path.unlink()
    report = verify_corpus(out)
    assert any("could be encoded again" in fault for fault in report.faults)


def test_verify_takes_float32_on_a_cpu_at_its_word(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=OPTIONS)
    again = verify._again

    def other(*given: Any) -> dict[str, Any]:
        row = again(*given)
        return row | {"semantic": np.add(row["semantic"], 1)}

    monkeypatch.setattr(verify, "_again", other)
    (fault,) = verify_corpus(out, sample=1).faults
    assert "codes have changed" in fault


def test_verify_finds_one_of_several_members_of_a_name(clips: Path, tmp_path: Path):
    files = sorted(path for path in clips.rglob("*") if path.is_file())[:2]
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for file in files:
            tar.add(file, "a.wav")
    out = tmp_path / "out"
    assert tokenize_corpus([tmp_path / "d.tar"], out, options=OPTIONS)["rows"] == 2
    report = verify_corpus(out)
    assert (report.faults, report.lost, report.agreement) == ((), (), (1.0, 1.0))


def test_devices_are_of_one_kind():
    with pytest.raises(ConfigError, match="of one kind are needed"):
        dataclasses.replace(OPTIONS, devices=("cpu", "cuda:0"))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["shar", "webdataset", "parquet"])
def test_datasets_reads_every_corpus(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: dict[str, Any], form: Any
):
    datasets = pytest.importorskip("datasets")
    stated = manifest | {"shards": {"format": form, "megabytes": 200}}
    monkeypatch.setattr(card, "manifest", lambda *_: stated)
    if form == "shar":
        pytest.importorskip("lhotse")
    (clips / "bad.wav").write_bytes(b"")
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=dataclasses.replace(OPTIONS, form=form))
    if form != "webdataset":
        failures = datasets.load_dataset(str(out), "failures", split="train", cache_dir=str(tmp_path / "cache"))
        assert failures["id"][:] == ["bad.wav"]
    if form != "shar":
        assert len(datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))) == 3


def test_seconds_do_not_depend_on_how_a_chunk_was_put_together():
    lengths = np.random.default_rng(0).integers(1, 10**6, 400)
    rows = pa.table({"samples": lengths, "sample_rate": [44_100] * 400})
    parts = pa.concat_tables([rows.slice(200), rows.slice(0, 200)])
    assert seconds_of(rows) == seconds_of(parts) == pytest.approx(lengths.sum() / 44_100)
