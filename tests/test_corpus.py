"""Corpus tokenisation: what is read, what comes out, and that nothing is lost, doubled or different."""

from __future__ import annotations

import gc
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
import torch
from typer.testing import CliRunner

from benchmarks import poison
from benchmarks.hostile import damaged, hostile_corpus, sound, wav
from semanticodec.audio import fbank_windows
from semanticodec.cli import app
from semanticodec.config import COLUMN, preset
from semanticodec.corpus import CorpusOptions, inputs, local, reading, tokenize_corpus, verify_corpus
from semanticodec.corpus.encoding import WindowEncoder
from semanticodec.corpus.plan import Plan
from semanticodec.corpus.records import (
    Assembler,
    Event,
    Finished,
    Item,
    ItemDone,
    RowFacts,
    Span,
    printable,
    schema,
    unprintable,
)
from semanticodec.corpus.shards import Committer, Output
from semanticodec.corpus.worker import Tokeniser, Work, read_ahead, read_all
from semanticodec.datasets import TokenDataset
from semanticodec.errors import ConfigError, CorruptedError, SemantiCodecError
from semanticodec.tokens import Vocabulary

WORK = Work("mini-25", None, "cpu", "float32", 5.12, 0, "downmix", vad=False, keep_features=False)
RATE = 16_000


@pytest.fixture(scope="module")
def tokeniser(threads: None) -> Tokeniser:  # noqa: ARG001
    return Tokeniser(WORK)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Seven sound files of several formats, lengths and rates, in a tree."""
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for index, (name, samples, rate, channels) in enumerate(
        [
            ("a.wav", 9_000, 16_000, 1),
            ("b.flac", 30_000, 44_100, 2),
            ("c.ogg", 20_000, 22_050, 1),
            ("deep/d.wav", 1, 16_000, 1),
            ("deep/e.wav", 40_000, 192_000, 8),
            ("deep/f.aiff", 5_121, 8_000, 1),
            ("g.mp3", 16_000, 16_000, 1),
        ]
    ):
        soundfile.write(folder / name, sound(samples, channels, index), rate)
    return folder


def rows_of(finished: Finished) -> list[dict[str, Any]]:
    return finished.rows.to_pylist()


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of everything in a finished corpus."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- inputs -------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_sounds_in_order(clips: Path):
    (clips / "notes.txt").write_text("no sound")
    (clips / "deep" / "loop").symlink_to(clips)
    found = list(inputs.find_items([str(clips)]))
    assert [item.id for item in found] == [
        "a.wav",
        "b.flac",
        "c.ogg",
        "g.mp3",
        "deep/d.wav",
        "deep/e.wav",
        "deep/f.aiff",
    ]
    assert all(item.size == os.path.getsize(item.source) for item in found)


def test_globs_and_single_files(clips: Path):
    assert [item.id for item in inputs.find_items([f"{clips}/*.wav", str(clips / "c.ogg")])] == ["a.wav", "c.ogg"]
    assert [item.id for item in inputs.find_items([f"file://{clips}/deep"])] == ["d.wav", "e.wav", "f.aiff"]


def test_what_is_not_there_is_an_error(clips: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        list(inputs.find_items([str(clips / "nowhere")]))
    (clips / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no sound"):
        list(inputs.find_items([str(clips / "empty")]))


@pytest.mark.parametrize("packed", [False, True])
def test_a_manifest_carries_every_field_through(clips: Path, packed: bool):
    lines = [
        {"audio_filepath": "a.wav", "duration": 0.5, "text": "hello", "speaker": 7},
        {"path": str(clips / "b.flac"), "offset": 0.25, "duration": 0.25, "id": "mine"},
        {"nothing": 1},
    ]
    data = "\n".join([*map(json.dumps, lines), "not json"]).encode()
    manifest = clips / ("m.jsonl.gz" if packed else "m.json")
    manifest.write_bytes(gzip.compress(data) if packed else data)
    first, second, *bad = inputs.find_items([str(manifest)])
    assert (first.id, first.source, first.text, first.duration) == ("a.wav", str(clips / "a.wav"), "hello", None)
    assert json.loads(first.metadata or "") == {"duration": 0.5, "speaker": 7}
    assert (second.id, second.start, second.duration) == ("mine", 0.25, 0.25)
    assert [item.kind for item in bad] == ["bad", "bad"]
    assert "entry 3" in bad[0].extra
    assert "entry 4" in bad[1].extra


def test_archives_tables_and_cuts_hold_the_same_sound(clips: Path, tokeniser: Tokeniser):
    data = (clips / "a.wav").read_bytes()
    with tarfile.open(clips / "shard.tar", "w") as tar:
        for name, content in (
            ("x/a.wav", data),
            ("x/a.json", b'{"text": "t", "n": 1}'),
            ("b.flac", (clips / "b.flac").read_bytes()),
            ("b.txt", b"spoken\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    column = pa.array([{"bytes": data, "path": path} for path in ("a.wav", "a.wav", None)])
    table = pa.table({"audio": column, "text": ["t", "u", "v"], "n": [1, 2, 3]})
    pq.write_table(table, clips / "t.parquet", row_group_size=2)
    with pa.OSFile(str(clips / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    items = [item for name in ("shard.tar", "t.parquet", "t.arrow") for item in inputs.find_items([str(clips / name)])]
    assert [item.id for item in items[:2]] == ["x/a", "b"]
    assert [item.text for item in items] == ["t", "spoken", "t", "u", "v", "t", "u", "v"]
    called = {"audio": {"path": "a.wav"}}
    of_table = [{"n": 1} | called, {"n": 2} | called, {"n": 3}]
    assert [json.loads(item.metadata or "{}") for item in items] == [{"n": 1}, {}, *of_table, *of_table]
    whole = tokeniser.run(0, list(inputs.find_items([str(clips / "a.wav"), str(clips / "b.flac")])))
    expected = rows_of(whole)
    rows = rows_of(tokeniser.run(0, items))
    for row, twin in zip(rows, [expected[0], expected[1], *[expected[0]] * 6], strict=True):
        assert row["audio_sha256"] == twin["audio_sha256"]
        assert row["semantic"] == twin["semantic"]
        assert row["acoustic"] == twin["acoustic"]
    assert [row["source"].rpartition("/")[2] for row in rows[1:4]] == ["shard.tar#b.flac", "t.parquet#0", "t.parquet#1"]


def test_lhotse_cuts(clips: Path, tokeniser: Tokeniser):
    lhotse = pytest.importorskip("lhotse")
    recording = lhotse.Recording.from_file(clips / "b.flac")
    spoken = lhotse.SupervisionSegment("s", recording.id, 0.0, 0.5, text="two words")
    cut = lhotse.MonoCut("one", 0.1, 0.5, 1, [spoken], recording=recording)
    slow = lhotse.MonoCut("two", 0.1, 0.5, 1, [], recording=recording.resample(16_000))
    lhotse.CutSet.from_cuts([cut, slow]).to_file(str(clips / "cuts.jsonl"))
    one, two = inputs.find_items([str(clips / "cuts.jsonl")])
    assert (one.kind, one.start, one.duration, one.channel, one.text) == ("file", 0.1, 0.5, 1, "two words")
    assert two.kind == "cut"
    first, second = rows_of(tokeniser.run(0, [one, two]))
    assert (first["offset"], first["samples"], first["sample_rate"], first["channel"]) == (4_410, 22_050, 44_100, 1)
    assert (second["samples"], second["sample_rate"]) == (8_000, 16_000)
    wave, _ = soundfile.read(clips / "b.flac", dtype="float32")
    codec = tokeniser._encoder._codec
    codes = codec.encode(torch.from_numpy(wave[4_410:26_460, 1].copy()), 44_100)[0]
    assert [first["semantic"], first["acoustic"]] == codes.tolist()


def test_a_plan_keeps_items_as_they_are(tmp_path: Path):
    odd = os.fsdecode(b"/x/caf\xe9.wav")
    items = [
        Item(f"i{n}", "tar", odd, member=odd, place=(n, 5), start=0.1, duration=0.3, channel=1, text="t", size=10)
        for n in range(10)
    ]
    Plan.write(tmp_path / "plan.parquet", items, 4, 1 << 30)
    plan = Plan(tmp_path / "plan.parquet")
    assert (len(plan), plan.items, plan.size(2)) == (3, 10, 2)
    assert plan.shares().tolist() == [0.4, 0.4, 0.2]
    assert [item for chunk in range(3) for item in plan[chunk]] == items
    Plan.write(tmp_path / "plan.parquet", items, 100, 25)
    assert len(Plan(tmp_path / "plan.parquet")) == 4


def test_names_that_are_no_utf8():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.wav")
    assert printable(name) == "caf\\xe9 é.wav"
    assert unprintable(printable(name)) == name


# --- reading and encoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", tiny.FLAVOURS)
@pytest.mark.parametrize("samples", [1, 2_559, 5_120, 5_121, 25_600, 25_840, 25_841, 70_001])
def test_spans_have_the_windows_of_the_whole(flavour: str, samples: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "SPAN_SECONDS", 1)
    codec = tiny.codec(flavour)
    wave = tiny.noise(2, samples)
    spans = list(reading.cut_spans(iter(wave.split(999, 1)), codec.config))
    assert [end for _, end in spans] == [False] * (len(spans) - 1) + [True]
    encoder = WindowEncoder(codec, 1.0, keep_features=False)
    for row in range(2):
        banks = torch.cat([encoder._windows(Span(0, 0, 0, part[row].numpy(), end)) for part, end in spans])
        context = codec.config.encoder.context * COLUMN
        mark = codec.config.encoder.mask_padding
        expected = [window[row] for window in fbank_windows([wave], context, codec.config.block, mark_end=mark)]
        assert torch.equal(banks, torch.stack(expected))


def encode(codec: Any, waves: list[np.ndarray], seconds: float, *, features: bool = False) -> list[dict[str, Any]]:
    """Encode waves at 16 kHz as one chunk."""
    items = [Item(str(index), "file", "") for index in range(len(waves))]

    def events() -> Iterator[Event]:
        for index, wave in enumerate(waves):
            spans = list(reading.cut_spans(iter([torch.from_numpy(wave)[None]]), codec.config))
            for number, (part, end) in enumerate(spans):
                yield Span(index, 0, number, part[0].numpy(), end)
            yield RowFacts(index, 0, len(spans), RATE, len(wave), 0, 0, "", "")
            yield ItemDone(index, 1)

    assembler = Assembler(0, items, codec.config, keep_features=features)
    for event in WindowEncoder(codec, seconds, keep_features=features).encode(events()):
        assembler.add(event)
    assert assembler.complete
    return rows_of(assembler.finish())


@pytest.mark.parametrize("flavour", tiny.FLAVOURS)
@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.3, 40.0])
def test_codes_do_not_depend_on_neighbours_or_batch(flavour: str, seconds: float):
    codec = tiny.codec(flavour)
    waves = [sound(samples, seed=samples)[:, 0] for samples in (50_000, 1, 7_000, 100_000, 20_480)]
    together = encode(codec, waves, seconds)
    shuffled = encode(codec, waves[::-1], seconds)[::-1]
    for wave, row, other in zip(waves, together, shuffled, strict=True):
        codes = codec.encode(wave, RATE)[0].tolist()
        assert [row["semantic"], row["acoustic"]] == codes
        assert [other["semantic"], other["acoustic"]] == codes


def test_features_are_those_of_the_codec():
    codec = tiny.codec("mini", 25)
    wave = sound(12_345)[:, 0]
    row = encode(codec, [wave], 1.0, features=True)[0]
    expected = codec.features(wave, RATE)[0]
    assert torch.equal(torch.tensor(row["features"]).half().view(expected.shape), expected.half())


def test_long_recordings_pass_through_span_by_span(tmp_path: Path, tokeniser: Tokeniser):
    file = tmp_path / "long.wav"
    soundfile.write(file, sound(150 * RATE), RATE)
    events = list(reading.read(0, Item("long", "file", str(file)), reading.Reading(tokeniser._how.config)))
    spans = [event for event in events if isinstance(event, Span)]
    assert len(spans) == 3
    assert max(len(span.wave) for span in spans) < 62 * RATE
    row = rows_of(tokeniser.run(0, [Item("long", "file", str(file))]))[0]
    codec = tokeniser._encoder._codec
    wave, _ = soundfile.read(file, dtype="float32")
    assert [row["semantic"], row["acoustic"]] == codec.encode(torch.from_numpy(wave), RATE)[0].tolist()


def test_rows_say_where_they_come_from(clips: Path, tokeniser: Tokeniser):
    items = list(inputs.find_items([str(clips)]))
    rows = {row["id"]: row for row in rows_of(tokeniser.run(0, items))}
    assert set(rows) == {item.id for item in items}
    wave, rate = soundfile.read(clips / "deep" / "e.wav", dtype="float32")
    row = rows["deep/e.wav"]
    assert (row["samples"], row["sample_rate"], row["channel"], row["offset"]) == (40_000, 192_000, None, 0)
    assert row["audio_sha256"] == hashlib.sha256(wave.tobytes()).hexdigest()
    config = tokeniser._how.config
    assert row["frames"] == len(row["semantic"]) == len(row["acoustic"]) == config.frames(-(-40_000 * RATE // rate))
    assert rows["deep/d.wav"]["samples"] == 1
    assert rows["a.wav"]["channel"] == 0


def test_split_stereo_makes_a_row_per_channel(clips: Path):
    work = Work("mini-25", None, "cpu", "float32", 5.12, 0, "split", vad=False, keep_features=False)
    items = list(inputs.find_items([str(clips / "b.flac"), str(clips / "a.wav")]))
    left, right, only = rows_of(Tokeniser(work).run(0, items))
    assert [left["id"], right["id"], only["id"]] == ["b.flac#0", "b.flac#1", "a.wav"]
    assert (left["channel"], right["channel"], only["channel"]) == (0, 1, 0)
    assert left["acoustic"] != right["acoustic"]
    wave, rate = soundfile.read(clips / "b.flac", dtype="float32")
    codec = Tokeniser(work)._encoder._codec
    for channel, row in enumerate((left, right)):
        assert [row["semantic"], row["acoustic"]] == codec.encode(wave[:, channel].copy(), rate)[0].tolist()


def test_reading_ahead_gives_the_same(clips: Path, tokeniser: Tokeniser):
    items = list(inputs.find_items([str(clips)]))
    ahead = Assembler(0, items, tokeniser._how.config, keep_features=False)
    for event in tokeniser._encoder.encode(read_ahead(items, tokeniser._how, 3)):
        ahead.add(event)
    assert ahead.complete
    assert ahead.finish().rows.equals(tokeniser.run(0, items).rows)


@pytest.mark.filterwarnings("ignore")  # of Ray about itself
def test_what_passes_through_ray_comes_out_whole(clips: Path, tokeniser: Tokeniser):
    """The two stages of the pipeline in this process; tests/test_corpus_ray.py starts clusters."""
    cluster = pytest.importorskip("semanticodec.corpus.cluster")
    (clips / "bad.wav").write_bytes(b"")
    items = list(inputs.find_items([str(clips)]))
    events = list(read_all(items, tokeniser._how))
    table = cluster._table([cluster._row(chunk, event) for chunk in (3, 4) for event in events])
    encoded = cluster._Encoder(WORK)(table)
    expected = tokeniser.run(3, items)
    for chunk in (3, 4):
        assembler = Assembler(chunk, items, tokeniser._how.config, keep_features=False)
        for row in reversed(encoded.to_pylist()):
            if row["chunk"] == chunk:
                assert not assembler.complete
                assembler.add(cluster._event(row))
        assert assembler.complete
        finished = assembler.finish()
        assert finished.rows.equals(expected.rows)
        assert finished.failures == expected.failures


def test_a_cluster_that_is_not_there_is_noticed_at_once():
    cluster = pytest.importorskip("semanticodec.corpus.cluster")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        cluster._call(address)
    for gone in (address, f"ray://{address}"):
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {gone}"):
            cluster._call(gone)
    for elsewhere in (None, "auto", "local"):
        cluster._call(elsewhere)


def test_threads_stop_when_nobody_reads_on(clips: Path, tokeniser: Tokeniser):
    events = read_ahead(list(inputs.find_items([str(clips)])), tokeniser._how, 2)
    next(events)
    events.close()


def test_vad_keeps_what_is_spoken(tmp_path: Path, root: Path):
    wave, rate = soundfile.read(root / "semanticodec" / "assets" / "demo.flac", dtype="float32", always_2d=True)
    voice = wave[: 2 * rate, 0]
    quiet = np.zeros(3 * rate, np.float32)
    soundfile.write(tmp_path / "v.wav", np.concatenate([quiet, voice, quiet, voice]), rate, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", quiet, rate)
    how = reading.Reading(tiny.config("mini"), vad=True)
    segments = list(reading._segments(Item("v", "file", str(tmp_path / "v.wav")), how))
    assert len(segments) >= 2
    for first, count in segments:
        begin, end = (first or 0) / rate, ((first or 0) + (count or 0)) / rate
        assert end - begin > 0.2
        assert 2.6 < begin < end < 5.5 or 7.6 < begin < end <= 10.001
    events = list(reading.read(0, Item("v", "file", str(tmp_path / "v.wav")), how))
    facts = [event for event in events if type(event).__name__ == "RowFacts"]
    assert [(one.offset, one.samples) for one in facts] == segments
    assert facts[0].suffix == f"@{segments[0][0]}"
    (failed,) = reading.read(0, Item("s", "file", str(tmp_path / "silent.wav")), how)
    assert "nobody speaks" in failed.reason  # type: ignore[union-attr]


def test_a_corrupt_corpus(tmp_path: Path, tokeniser: Tokeniser):
    good, bad = hostile_corpus(tmp_path)
    finished = tokeniser.run(0, list(inputs.find_items([str(tmp_path)])))
    assert {row["id"] for row in rows_of(finished)} == {printable(name) for name in good}
    failures = {failure["id"]: failure for failure in finished.failures}
    assert set(failures) == bad
    assert {failures[name]["error"] for name in damaged()} == {"AudioError"}
    assert "promises 32000 bytes and 9956 follow" in failures["truncated.wav"]["reason"]
    assert failures["gone.wav"]["error"] == "FileNotFoundError"
    assert all(failure["reason"] for failure in finished.failures)


@pytest.mark.parametrize(
    ("start", "duration", "complaint"),
    [
        (1.0, 1.0, "begins at 1.0 s, the recording has 1.000"),
        (-1.0, 1.0, "begins at -1.0 s"),
        (0.5, 1.0, "ends at 1.500 s"),
        (0.5, 0.0, "lasts 0.0 s"),
    ],
)
def test_segments_that_are_not_there(
    tmp_path: Path, tokeniser: Tokeniser, start: float, duration: float, complaint: str
):
    (tmp_path / "a.wav").write_bytes(wav(16_000))
    finished = tokeniser.run(0, [Item("a", "file", str(tmp_path / "a.wav"), start=start, duration=duration)])
    assert complaint in finished.failures[0]["reason"]


def test_a_segment_is_what_the_cut_file_gives(tmp_path: Path, tokeniser: Tokeniser):
    data = sound(48_000)
    soundfile.write(tmp_path / "a.wav", data, 48_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", data[12_000:36_000], 48_000, subtype="FLOAT")
    items = [
        Item("a", "file", str(tmp_path / "a.wav"), start=0.25, duration=0.5),
        Item("b", "file", str(tmp_path / "b.wav")),
        Item("c", "file", str(tmp_path / "a.wav"), start=0.25, duration=0.8),  # a rounded end
    ]
    one, two, three = rows_of(tokeniser.run(0, items))
    assert (one["offset"], one["samples"]) == (12_000, 24_000)
    assert one["semantic"] == two["semantic"]
    assert one["audio_sha256"] == two["audio_sha256"]
    assert three["samples"] == 36_000


# --- commits ------------------------------------------------------------------------------------------------------


def finished_chunk(chunk: int, rows: int = 3) -> Finished:
    generator = np.random.default_rng(chunk)
    made = []
    for row in range(rows):
        codes = generator.integers(0, 4096, (2, 100 + row))
        facts = dict(frames=100 + row, samples=1, sample_rate=RATE, source="s", offset=0, audio_sha256=f"{chunk}{row}")
        made.append({"id": f"{chunk}-{row}", "semantic": codes[0], "acoustic": codes[1], **facts})
    failure = {"id": f"f{chunk}", "source": "s", "offset_seconds": 0.0, "error": "E", "reason": "r", "metadata": None}
    return Finished(chunk, pa.Table.from_pylist(made, schema(False)), [failure], 0.5)


def commit(folder: Path, order: list[int], stop: Callable[[int], bool] = lambda _: False) -> None:
    output = Output(folder)
    output.parts.mkdir(parents=True, exist_ok=True)
    committer = Committer(output, 10, "parquet", 5_000)
    committer.advance()
    missing = set(committer.missing())
    for number, chunk in enumerate(chunk for chunk in order if chunk in missing):
        if stop(number):
            return
        committer.add(finished_chunk(chunk))


def test_shards_are_a_function_of_the_results_alone(tmp_path: Path):
    commit(tmp_path / "a", list(range(10)))
    commit(tmp_path / "b", [9, 3, 1, 0, 2, 7, 8, 6, 5, 4])
    commit(tmp_path / "c", [5, 4, 3, 0, 1, 9, 2, 8, 7, 6], stop=lambda number: number == 4)
    assert not (tmp_path / "c" / "done").exists() or len(list((tmp_path / "c" / "done").iterdir())) < 3
    commit(tmp_path / "c", list(range(10)))
    expected = contents(tmp_path / "a")
    assert len([name for name in expected if name.startswith("data")]) > 2
    assert contents(tmp_path / "b") == contents(tmp_path / "c") == expected
    tables = [pq.read_table(file) for file in sorted((tmp_path / "a" / "data").iterdir())]
    ids = pa.concat_tables(tables).column("id").to_pylist()
    assert ids == [f"{chunk}-{row}" for chunk in range(10) for row in range(3)]


@pytest.mark.parametrize("call", range(0, 32, 3))
def test_a_commit_interrupted_anywhere_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    """Every rename and deletion is a moment at which the power may fail."""
    commit(tmp_path / "whole", list(range(10)))
    calls = iter(range(10**6))

    class PowerFails(BaseException):
        pass

    def failing(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                raise PowerFails
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, failing(getattr(Path, name)))
        with pytest.raises(PowerFails):
            commit(tmp_path / "cut", list(range(10)))
    commit(tmp_path / "cut", list(range(10)))
    assert {name: value for name, value in contents(tmp_path / "cut").items() if ".tmp" not in name} == contents(
        tmp_path / "whole"
    )


def test_damaged_markers_are_noticed(tmp_path: Path):
    commit(tmp_path, list(range(10)))
    first, *_ = sorted((tmp_path / "done").iterdir())
    first.write_text("{")
    with pytest.raises(CorruptedError, match="done-marker"):
        Output(tmp_path).markers()
    first.unlink()
    with pytest.raises(CorruptedError, match="shard 0 is missing"):
        Output(tmp_path).markers()


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tokeniser: Tokeniser) -> None:
    """Work in this process instead of starting others, which takes seconds each."""

    def run(chunks: Iterator[tuple[int, list[Item]]], works: list[Work]) -> Iterator[Finished]:
        own = tokeniser if works[0] == WORK else Tokeniser(works[0])
        for chunk, items in chunks:
            yield own.run(chunk, items)

    monkeypatch.setattr(local, "run", run)


OPTIONS = CorpusOptions(model="mini-25", batch_seconds=5.12, shard_mb=0.001)


@pytest.mark.usefixtures("here")
def test_a_corpus_loads_everywhere(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    duckdb = pytest.importorskip("duckdb")
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 2)
    (clips / "bad.wav").write_bytes(b"")
    out = tmp_path / "out"
    seen = []
    statistics = tokenize_corpus([clips], out, options=OPTIONS, progress=seen.append)
    assert (statistics["rows"], statistics["failures"], statistics["duplicates"]) == (7, 1, 0)
    assert statistics["shards"] > 1
    assert [status.items for status in seen] == [0, 2, 4, 6, 8]
    assert seen[-1].total == 8
    shares = [status.share for status in seen]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1], seen[-1].begun) == (0, pytest.approx(1), 0)
    assert seen[-1].new_seconds == pytest.approx(statistics["hours"] * 3600, abs=0.01)
    rows = pa.concat_tables([pq.read_table(file) for file in sorted((out / "data").iterdir())])
    codes = rows.column("semantic").to_pylist()
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["semantic"][:] == codes
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    told: dict[str, Any] = {}
    _, card, _ = (out / "README.md").read_text().split("```")
    exec(card.removeprefix("python").replace("FOLDER", str(out)), told)
    first = rows.slice(0, 1).to_pylist()[0]
    assert told["sound"].shape == (1, -(-first["samples"] * 16_000 // first["sample_rate"]))
    frame = pandas.concat([pandas.read_parquet(file) for file in sorted((out / "data").iterdir())])
    assert [list(one) for one in frame["semantic"]] == codes
    packed = TokenDataset(out, Vocabulary.of(preset("mini-25"), "flat"), 16, epochs=1)
    assert len(list(packed)) > 1
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT semantic FROM '{out}/data/*.parquet'").fetchall()
        assert [one for (one,) in found] == codes
        (failed,) = connection.execute(f"SELECT id, error FROM '{out}/failures.parquet'").fetchall()
    assert failed == ("bad.wav", "AudioError")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == "mini-25"
    assert len(manifest["weights_sha256"]) == len(manifest["encoder_sha256"]) == 64
    assert not (out / "_work").exists()
    book = statistics["codebooks"]["semantic"]
    flat = np.concatenate(codes)
    assert book["used"] == len(np.unique(flat))
    p = np.unique(flat, return_counts=True)[1] / len(flat)
    assert book["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-5)
    assert "7 rows, 25 tokens per second" in (out / "README.md").read_text()


@pytest.mark.usefixtures("here")
def test_resume_overwrite_and_other_options(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 2)
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = tokenize_corpus([clips], whole, options=OPTIONS)

    def interrupt(status: Any) -> None:
        if status.items >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([clips], out, options=OPTIONS, progress=interrupt)
    with pytest.raises(ConfigError, match="--resume goes on with it"):
        tokenize_corpus([clips], out, options=OPTIONS)
    with pytest.raises(ConfigError, match=r"model was 'mini-25' and is 'mini-50'; .*; and \d more") as told:
        tokenize_corpus([clips], out, options=CorpusOptions(model="mini-50", batch_seconds=5.12), resume=True)
    assert len(str(told.value)) < 600
    with pytest.raises(ConfigError, match="is not finished"):
        verify_corpus(out)
    with pytest.raises(ConfigError, match="is no folder"):
        verify_corpus(tmp_path / "typo")
    with pytest.raises(ConfigError, match="is what a tokenisation has made"):
        tokenize_corpus([out], tmp_path / "again", options=OPTIONS)
    (clips / "new.wav").write_bytes(wav(100))  # came too late: the list was made by the first run
    assert tokenize_corpus([clips], out, options=OPTIONS, resume=True) == expected
    assert contents(out) == contents(whole)
    assert tokenize_corpus([clips], out, options=OPTIONS, resume=True) == expected
    (out / "mine.txt").write_text("stays")
    assert tokenize_corpus([clips], out, options=OPTIONS, overwrite=True)["rows"] == expected["rows"] + 1
    assert (out / "mine.txt").exists()


@pytest.mark.usefixtures("here")
def test_verify_finds_what_is_wrong(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 4)
    odd = clips / os.fsdecode(b"caf\xe9.wav")
    odd.write_bytes(wav(3_000, seed=9))
    with tarfile.open(clips / "s.tar", "w") as tar:
        tar.add(clips / "c.ogg", "c.ogg")
    out = tmp_path / "out"
    tokenize_corpus([clips], out, options=OPTIONS)
    report = verify_corpus(out)
    assert (report.rows, report.faults, report.sampled, report.lost) == (9, (), 9, ())
    assert report.agreement == (1.0, 1.0)
    (clips / "a.wav").write_bytes(wav(9_000, seed=77))
    (clips / "b.flac").unlink()
    report = verify_corpus(out)
    assert report.sampled == 7
    assert len(report.lost) == 2
    assert "another sound" in "".join(report.lost)
    first, second, *_ = sorted((out / "data").iterdir())
    table = pq.read_table(first)
    codes = table.column("semantic").to_pylist()
    codes[0][0] = 60_000
    codes[1].pop()
    pq.write_table(table.set_column(1, table.schema.field(1), [pa.array(codes, pa.list_(pa.uint16()))]), first)
    second.unlink()
    (out / "data" / "stray.parquet").touch()
    report = verify_corpus(out, sample=0)
    told = "\n".join(report.faults)
    assert "has changed since" in told
    assert "is missing" in told
    assert "belongs to no shard" in told
    assert report.agreement is None
    # the hash made right, the contents are looked at
    marker = out / "done" / "00000.json"
    facts = json.loads(marker.read_text())
    facts["files"][first.name] = hashlib.sha256(first.read_bytes()).hexdigest()
    marker.write_text(json.dumps(facts))
    told = str(verify_corpus(out, sample=0))
    assert "reach 60000" in told
    assert "are due" in told


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Lhotse leaves its files open
def test_webdataset_and_shar(clips: Path, tmp_path: Path):
    lhotse = pytest.importorskip("lhotse")
    options = {form: CorpusOptions(model="mini-25", batch_seconds=5.12, form=form) for form in ("webdataset", "shar")}
    plain = CorpusOptions(model="mini-25", batch_seconds=5.12)
    tokenize_corpus([clips], tmp_path / "parquet", options=plain)
    expected = {row["id"]: row for row in pq.read_table(tmp_path / "parquet" / "data").to_pylist()}
    for form in ("webdataset", "shar"):
        for name in ("one", "two"):
            tokenize_corpus([clips], tmp_path / form / name, options=options[form])
        assert contents(tmp_path / form / "one" / "data") == contents(tmp_path / form / "two" / "data")
        report = verify_corpus(tmp_path / form / "one")
        assert (report.rows, report.faults, report.agreement) == (len(expected), (), (1.0, 1.0))
        told = [json.loads((tmp_path / at / "statistics.json").read_text()) for at in ("parquet", f"{form}/one")]
        assert told[0] == told[1]
    with tarfile.open(tmp_path / "webdataset" / "one" / "data" / "train-00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 14
    for name in sorted(members):
        if name.endswith(".json"):
            facts = json.loads(members[name])
            codes = np.load(io.BytesIO(members[name.replace(".json", ".codes.npy")]))
            assert codes.dtype == np.uint16
            assert codes.tolist() == [expected[facts["id"]][stream] for stream in ("semantic", "acoustic")]
    cuts = list(lhotse.CutSet.from_shar(in_dir=tmp_path / "shar" / "one" / "data"))
    assert {cut.id for cut in cuts} == set(expected)
    for cut in cuts:
        row = expected[cut.id]
        assert cut.load_codes().T.tolist() == [row["semantic"], row["acoustic"]]
        assert cut.duration == pytest.approx(row["samples"] / row["sample_rate"])
    gc.collect()


@pytest.mark.usefixtures("here")
def test_features_in_parquet(clips: Path, tmp_path: Path):
    options = CorpusOptions(model="mini-25", keep_features=True)
    tokenize_corpus([clips / "a.wav"], tmp_path / "out", options=options)
    (row,) = pq.read_table(tmp_path / "out" / "data").to_pylist()
    wave, rate = soundfile.read(clips / "a.wav", dtype="float32")
    expected = Tokeniser(options.work("cpu", 0))._encoder._codec.features(wave, rate)[0].half()
    assert torch.equal(torch.tensor(row["features"]).half().view(expected.shape), expected)


def test_options_that_make_no_sense():
    for wrong in ({"engine": "slurm"}, {"channels": "left"}, {"form": "csv"}, {"dtype": "int8"}, {"workers": 0}):
        with pytest.raises(ConfigError):
            CorpusOptions(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no inputs"):
        tokenize_corpus([], "nowhere")


@pytest.fixture
def poisoned(tmp_path: Path) -> Iterator[None]:
    with poison.known(tmp_path / "plugin"):
        yield


@pytest.mark.usefixtures("poisoned")
def test_workers_that_die_take_nothing_with_them(clips: Path, tokeniser: Tokeniser):
    (clips / "poison.wav").write_bytes(wav(2_000))
    items = list(inputs.find_items([f"poison://{clips}"]))
    assert len(items) == 8
    done = {finished.chunk: finished for finished in local.run(iter([(0, items), (1, items[:1])]), [WORK])}
    assert set(done) == {0, 1}
    (failure,) = done[0].failures
    assert (failure["id"], failure["error"]) == ("poison.wav", "WorkerDied")
    assert "signal 9" in failure["reason"]
    good = [item for item in items if "poison.wav" not in item.source]
    assert done[0].rows.equals(tokeniser.run(0, good).rows)
    assert done[1].rows.equals(tokeniser.run(1, items[:1]).rows)


def test_errors_of_workers_reach_the_caller():
    wrong = Work("/nowhere", None, "cpu", "float32", 1.0, 0, "downmix", vad=False, keep_features=False)
    with pytest.raises(SemantiCodecError, match="nowhere is neither a preset nor a folder"):
        list(local.run(iter([(0, [])]), [wrong]))


def test_the_command_line(clips: Path, tmp_path: Path):
    runner = CliRunner()
    out = tmp_path / "out"
    (clips / "bad.wav").write_bytes(b"")
    command = ["tokenize", str(clips), "--output", str(out), "--model", "mini-25", "--workers", "1"]
    done = runner.invoke(app, command)
    assert done.exit_code == 1, done.output
    assert "7 rows" in done.output
    assert "1 inputs failed" in done.output
    assert "--retry-failures tries them again" in " ".join(done.output.split())
    assert "--resume" in runner.invoke(app, command).output
    retried = runner.invoke(app, [*command, "--retry-failures"])
    assert (retried.exit_code, retried.output) == (1, done.output)
    again = runner.invoke(app, ["tokenize", "verify", str(out), "--sample", "2"])
    assert again.exit_code == 0, again.output
    assert "7 rows checked, 0 faults" in again.output
    assert "100.0000% of the semantic" in again.output
    assert runner.invoke(app, ["tokenize", str(clips)]).exit_code == 2
    for other in ("--resume", "--retry-failures"):
        assert runner.invoke(app, ["tokenize", str(clips), "-o", str(out), other, "--overwrite"]).exit_code == 2


def test_progress_without_a_terminal_is_a_line_now_and_then(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = ["tokenize", str(clips), "--model", "mini-25", "--workers", "1", "-o"]
    quiet = CliRunner().invoke(app, [*command, str(tmp_path / "quiet")])
    assert "tokenising" not in quiet.output
    monkeypatch.setattr(sys.modules["semanticodec.cli.tokenize"], "SILENCE", 0.0)
    told = CliRunner().invoke(app, [*command, str(tmp_path / "told")])
    assert "tokenising 100.0%: 7/7 inputs" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_can_go_on(tmp_path: Path, sign: signal.Signals):
    """In real processes: the whole command is stopped while it works, and goes on."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for index in range(200):
        (clips / f"{index:03d}.wav").write_bytes(wav(3 * RATE, seed=index))
    entry = "from semanticodec.cli import main; main()"
    command = [sys.executable, "-c", entry, "tokenize", str(clips), "--model", "mini-25", "--workers", "2"]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "out"
    with subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("_work/parts/[0-9]*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sign)
        _, told = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sign]
    assert ("--resume goes on" in told) == (sign == signal.SIGINT)
    assert not (out / "manifest.json").exists()
    subprocess.run([*command, "-o", str(out), "--resume"], check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
