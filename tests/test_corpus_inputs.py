"""Hostile inputs of a corpus: each becomes a row or a listed failure, and nothing is silently dropped."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile

from semanticodec.config import preset
from semanticodec.corpus import CorpusOptions, inputs, reading
from semanticodec.corpus.plan import Plan
from semanticodec.corpus.records import Item, ItemDone, ItemFailed, failure_of
from semanticodec.errors import ConfigError

HOW = reading.Reading(preset("mini-25"))
RATE = 16_000


def sound(seconds: float = 1.0, form: str = "WAV", kind: str | None = None) -> bytes:
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=form, subtype=kind)
    return file.getvalue()


def outcome(item: Item) -> ItemDone | ItemFailed:
    last = list(reading.read(0, item, HOW))[-1]
    assert isinstance(last, ItemDone | ItemFailed)
    return last


def listed(tmp_path: Path, *names: str | Path) -> list[Item]:
    """List through the plan on disk, as a run does."""
    Plan.write(tmp_path / "plan.parquet", inputs.find_items([str(name) for name in names]), 4, 1 << 40)
    plan = Plan(tmp_path / "plan.parquet")
    return [item for chunk in range(len(plan)) for item in plan[chunk]]


@pytest.mark.parametrize("start", [1e308, 5.0])
def test_a_segment_that_cannot_be_reached_is_a_failure(tmp_path: Path, start: float):
    data = bytearray(sound(10, "FLAC"))
    data[2_000 : len(data) - 100] = bytes(len(data) - 2_100)
    (tmp_path / "a.flac").write_bytes(data)
    failed = outcome(Item("a", "file", str(tmp_path / "a.flac"), start=start, duration=1.0))
    assert isinstance(failed, ItemFailed)
    assert failed.error == ("AudioError" if start == 5.0 else "OverflowError")


def test_a_missing_plugin_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> Any:
        raise ImportError("install gcsfs")

    monkeypatch.setattr(reading, "locate", missing)
    assert outcome(Item("a", "file", "gs://bucket/a.wav")) == ItemFailed(0, "ImportError", "install gcsfs")


def test_reasons_are_the_same_in_every_run():
    assert failure_of(0, ValueError("<x object at 0x7f00> is odd")).reason == "<x object> is odd"


def test_a_url_that_nothing_opens_is_an_error():
    with pytest.raises(ConfigError, match="nonsense"):
        list(inputs.find_items(["nonsense://bucket/a"]))
    pytest.importorskip("aiohttp")
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9/a\.flac cannot be opened: .*Connect"):
        list(inputs.find_items(["http://127.0.0.1:9/a.flac"]))


def test_one_bad_line_does_not_end_a_listing(tmp_path: Path):
    lines = [
        '{"path": "a.wav", "duration": 1e999}',
        '{"path": "a.wav", "duration": 1e20}',
        '{"path": "a.wav", "offset": 1e20}',
        '{"path": "\\ud800.wav"}',
        '{"type": "MonoCut", "id": "x", "supervisions": [1]}',
        '{"type": "MonoCut", "id": "x", "recording": "r"}',
        '{"type": "MonoCut", "id": "x", "duration": 1e20}',
        '{"path": "a.wav", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"path": "nowhere://a.wav"}',
        '{"path": "a.wav"}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.wav").write_bytes(sound())
    found = listed(tmp_path, tmp_path / "m.jsonl")
    assert [item.kind for item in found] == ["bad"] * 8 + ["file"] * 2
    assert [item.id for item in found[:8]] == [f"m.jsonl:{number}" for number in range(1, 9)]
    assert [type(outcome(item)) for item in found] == [ItemFailed] * 9 + [ItemDone]


def test_damage_of_any_kind_does_not_end_a_listing(tmp_path: Path):
    # The magic of gzip and a block of a type that does not exist: zlib.error, which is no OSError.
    (tmp_path / "m.jsonl.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20)
    (item,) = listed(tmp_path, tmp_path / "m.jsonl.gz")
    assert item.kind == "bad"


def test_pipes_are_listed_and_not_opened(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("x.wav", "x.tar", "x.parquet"):
        os.mkfifo(folder / name)
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "in/x.wav"}))
    for item in listed(tmp_path, folder, tmp_path / "m.jsonl"):
        failed = outcome(item)
        assert isinstance(failed, ItemFailed)
        assert "no regular file" in failed.reason


def archive(*members: tuple[str, bytes, bytes]) -> bytes:
    """Return a tar of (name, type, data or where a link leads)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.linkname = data.decode()
                tar.addfile(info)
    return file.getvalue()


FILE = tarfile.REGTYPE
MEMBER = 512 + -(-len(sound()) // 512) * 512


@pytest.mark.parametrize(
    ("damage", "good"),
    [
        (lambda data: data[:MEMBER] + b"\xff" * 512 + data[MEMBER + 512 :], 1),  # a header
        (lambda data: data[: 2 * MEMBER], 2),  # cut between members
        (lambda data: data[: 2 * MEMBER + 100], 2),  # cut in a header
        (lambda data: data[: 3 * MEMBER - 600], 2),  # cut in the sound of a member
        (lambda data: data + data, 3),  # something behind the end
        (lambda data: data, 3),
        (lambda data: data[: 3 * MEMBER + 512], 3),  # one block of zeros is an end too
    ],
    ids=["header", "boundary", "in-header", "in-sound", "behind", "whole", "one-block"],
)
def test_damage_in_an_archive_is_listed(tmp_path: Path, damage: Callable[[bytes], bytes], good: int):
    whole = archive(*((f"{name}.wav", FILE, sound()) for name in "abc"))
    (tmp_path / "s.tar").write_bytes(changed := damage(whole))
    found = listed(tmp_path, tmp_path / "s.tar")
    assert [item.id for item in found if isinstance(outcome(item), ItemDone)] == list("abc")[:good]
    told = [item for item in found if item.kind == "bad"]
    assert [item.id for item in told] == (["s.tar"] if len(changed) > len(whole) or good < 3 else [])
    assert all("is lost" in item.extra for item in told)


def test_links_in_an_archive_are_followed_or_listed(tmp_path: Path):
    data = archive(
        ("d/a.wav", FILE, sound()),
        ("d/hard.wav", tarfile.LNKTYPE, b"d/a.wav"),
        ("d/soft.wav", tarfile.SYMTYPE, b"../d/hard.wav"),
        ("d/t.txt", FILE, b"said"),
        ("d/u.txt", tarfile.LNKTYPE, b"d/t.txt"),
        ("d/u.wav", tarfile.SYMTYPE, b"a.wav"),
        ("d/gone.wav", tarfile.SYMTYPE, b"/etc/a.wav"),
        ("d/pipe.wav", tarfile.FIFOTYPE, b""),
        ("d/other.pdf", tarfile.SYMTYPE, b"nowhere"),
    )
    (tmp_path / "s.tar").write_bytes(data)
    found = {item.id: item for item in listed(tmp_path, tmp_path / "s.tar")}
    assert set(found) == {"d/a", "d/hard", "d/soft", "d/u", "d/gone.wav", "d/pipe.wav"}
    assert {item.place for name, item in found.items() if name[2:] in ("a", "hard", "soft", "u")} == {
        (512, len(sound()))
    }
    assert found["d/u"].text == "said"
    assert [found[name].kind for name in ("d/gone.wav", "d/pipe.wav")] == ["bad", "bad"]


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({}, "cut short: the last page"),
        ({"start": 1.0}, "cut short: the last page"),
        ({"start": 1.0, "duration": 18.5}, "the recording has"),
        ({"start": 0.5, "duration": 1.0}, None),
    ],
)
def test_a_truncated_ogg_is_a_failure(tmp_path: Path, kind: str, part: dict[str, float], told: str | None):
    data = sound(20, "OGG", kind)
    (tmp_path / "a.ogg").write_bytes(data)
    assert isinstance(outcome(Item("a", "file", str(tmp_path / "a.ogg"), **part)), ItemDone)
    (tmp_path / "a.ogg").write_bytes(data[: len(data) // 2])
    result = outcome(Item("a", "file", str(tmp_path / "a.ogg"), **part))
    assert isinstance(result, ItemDone) if told is None else told in result.reason


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("part", [{}, {"start": 1.0, "duration": 18.0}, {"start": 15.0, "duration": 1.0}])
def test_an_ogg_with_garbage_inside_is_a_failure(tmp_path: Path, kind: str, part: dict[str, float]):
    data = bytearray(sound(20, "OGG", kind))
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "a.ogg").write_bytes(data)
    result = outcome(Item("a", "file", str(tmp_path / "a.ogg"), **part))
    # The damage lies around the tenth second; libsndfile sees it where it reads.
    assert isinstance(result, ItemDone) if part.get("start") == 15.0 else "damaged" in result.reason


def test_globs_walk_folders_and_name_what_they_find(tmp_path: Path):
    folder = tmp_path / "g"
    for name in ("a/u.wav", "b/u.wav", "b/deep/v.wav", "a-b.wav", "b/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(sound())
    assert [item.id for item in listed(tmp_path, folder / "*/u.wav")] == ["a/u.wav", "b/u.wav"]
    everything = ["a/u.wav", "a-b.wav", "b/u.wav", "b/deep/v.wav"]
    for pattern in ("*", "**", "[ab]*"):
        assert sorted(item.id for item in listed(tmp_path, folder / pattern)) == sorted(everything)


def test_folders_that_cannot_be_read_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.wav").write_bytes(sound())
    scan = os.scandir

    def closed(path: str) -> Any:
        if path == str(tmp_path / "in" / "a"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = listed(tmp_path, tmp_path / "in")
    assert sorted((item.id, item.kind) for item in found) == [("a", "bad"), ("b/x.wav", "file")]
    assert "Permission denied" in next(item.extra for item in found if item.id == "a")


def test_remote_folders_that_cannot_be_read_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory = fsspec.filesystem("memory")
    for name in ("a/x.wav", "b/deep/x.wav", "b/x.wav", "b/notes.txt"):
        memory.pipe_file(f"/closed/{name}", sound())
    open_list = type(memory).ls

    def closed(self: Any, path: str, **how: Any) -> Any:
        if path.rstrip("/").endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return open_list(self, path, **how)

    monkeypatch.setattr(type(memory), "ls", closed)
    found = listed(tmp_path, "memory://closed")
    assert [(item.id, item.kind) for item in found] == [("b/deep/x.wav", "file"), ("b/x.wav", "file"), ("a", "bad")]
    assert "Permission denied" in found[-1].extra


def cut(sources: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    recording = {"id": "r", "sources": sources, "sampling_rate": RATE, "num_samples": RATE, "duration": 1.0}
    plain = {"type": "MonoCut", "id": "c", "start": 0.25, "duration": 0.5, "channel": 0, "supervisions": []}
    return plain | {"recording": recording | more}


def test_commands_in_cuts_are_not_run(tmp_path: Path):
    source = [{"type": "command", "channels": [0], "source": f"touch {tmp_path / 'harm'}; cat x"}]
    mixed = {"type": "MixedCut", "id": "m", "tracks": [{"type": "Track", "cut": cut(source), "offset": 0.0}]}
    (tmp_path / "cuts.jsonl").write_text("\n".join(map(json.dumps, (cut(source), mixed))))
    for item in listed(tmp_path, tmp_path / "cuts.jsonl"):
        result = outcome(item)
        assert isinstance(result, ItemFailed)
        assert "commands are not run" in result.reason
    assert not (tmp_path / "harm").exists()


def test_lists_of_cuts_and_paths_beside_their_manifest(tmp_path: Path):
    pytest.importorskip("lhotse")
    yaml = pytest.importorskip("yaml")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.wav").write_bytes(sound())
    source = [{"type": "file", "channels": [0], "source": "a.wav"}]
    slow = cut(source, transforms=[{"name": "Volume", "kwargs": {"factor": 0.5}}])
    cuts = [cut(source), slow]
    (tmp_path / "deep" / "cuts.json").write_text(json.dumps(cuts, indent=2))
    (tmp_path / "deep" / "lines.json").write_text("\n".join(map(json.dumps, cuts)))
    (tmp_path / "deep" / "cuts.yaml").write_text(yaml.safe_dump(cuts))
    (tmp_path / "deep" / "odd.yml").write_text("a: b")
    for name in ("cuts.json", "lines.json", "cuts.yaml"):
        found = listed(tmp_path, tmp_path / "deep" / name)
        assert [item.kind for item in found] == ["file", "cut"], name
        assert all(isinstance(outcome(item), ItemDone) for item in found)
        assert json.loads(found[0].metadata or "") == {"recording_id": "r"}
    (bad,) = listed(tmp_path, tmp_path / "deep" / "odd.yml")
    assert "holds a dict" in bad.extra


def test_a_server_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "PAUSES", (0.0, 0.0))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/flaky/a.wav", sound())
    opened = type(memory).open
    failures: list[OSError] = [TimeoutError("no answer"), ConnectionResetError(104, "reset")]

    def flaky(self: Any, *given: Any, **how: Any) -> Any:
        if failures:
            raise failures.pop()
        return opened(self, *given, **how)

    monkeypatch.setattr(type(memory), "open", flaky)
    item = Item("a", "file", "memory://flaky/a.wav")
    assert isinstance(outcome(item), ItemDone)
    failures += [TimeoutError("no answer")] * 3
    assert isinstance(outcome(item), ItemFailed)
    assert not failures
    failures += [PermissionError(13, "closed"), PermissionError(13, "closed")]
    assert isinstance(outcome(item), ItemFailed)
    assert len(failures) == 1


def test_metadata_is_strict_json_and_unicode(tmp_path: Path):
    line = r'{"path": "a.wav", "note": "half \ud800 pair", "snr": NaN, "deep": [{"x": -Infinity, "\udfff": 1}]}'
    (tmp_path / "m.jsonl").write_text(line)
    (item,) = listed(tmp_path, tmp_path / "m.jsonl")
    assert item.metadata is not None
    told = json.loads(item.metadata, parse_constant=lambda name: pytest.fail(name))
    assert told == {"note": r"half \ud800 pair", "snr": None, "deep": [{"x": None, r"\udfff": 1}]}
    json.dumps(told, ensure_ascii=False).encode()


def test_other_names_of_fields_and_labels(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(sound())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav"}')
    (item,) = listed(tmp_path, tmp_path / "metadata.jsonl")
    assert isinstance(outcome(item), ItemDone)
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name, data in (("k.wav", sound()), ("k.cls", b"7"), ("k.TXT", b"said")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (item,) = listed(tmp_path, tmp_path / "w.tar")
    assert (item.text, item.metadata) == ("said", '{"cls": "7"}')


def test_members_of_archives_are_read_piece_by_piece(tmp_path: Path):
    long = sound(300.0)
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name in ("a.wav", "b.wav"):
            member = tarfile.TarInfo(name)
            member.size = len(long)
            tar.addfile(member, io.BytesIO(long))
    _, item = listed(tmp_path, tmp_path / "w.tar")
    tracemalloc.start()
    with reading.open_file(item) as file:
        seen = sum(len(piece) for piece in iter(lambda: file.read(1 << 16), b""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == len(long)
    assert peak < len(long) / 3
    assert isinstance(outcome(item), ItemDone)
    (tmp_path / "w.tar").write_bytes((tmp_path / "w.tar").read_bytes()[: -len(long) // 2])
    failed = outcome(item)
    assert isinstance(failed, ItemFailed)
    assert "before the file does" in failed.reason


def test_a_part_of_a_file_is_a_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with (tmp_path / "x").open("rb") as file:
        part = io.BufferedReader(reading.Part(file, 10, 50), 7)
        assert part.read(3) == bytes([10, 11, 12])
        assert part.seek(-2, io.SEEK_END) == 48
        assert part.read() == bytes([58, 59])
        assert part.seek(0) == 0
        assert part.read() == bytes(range(10, 60))
        assert part.seek(99) == 99
        assert part.read() == b""


def test_folders_pass_over_earlier_outputs_and_list_packed_archives(tmp_path: Path):
    for name in ("done/manifest.json", "begun/_work/run.json", "other/manifest.json"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text('{"format": "semanticodec-corpus"}' if "other" not in name else "[]")
    for folder in ("done", "begun", "other"):
        (tmp_path / "in" / folder / "x.wav").write_bytes(sound())
    for name in ("a.tar.gz", "b.tgz"):
        (tmp_path / "in" / name).write_bytes(b"")
    found = listed(tmp_path, tmp_path / "in")
    assert [(item.id, item.kind) for item in found] == [("a.tar.gz", "bad"), ("b.tgz", "bad"), ("other/x.wav", "file")]
    assert all("gunzip" in item.extra for item in found[:2])


def test_two_colons_in_a_local_name(tmp_path: Path):
    (tmp_path / "in::out").mkdir()
    (tmp_path / "in::out" / "a::b.wav").write_bytes(sound())
    (tmp_path / "m::n.jsonl").write_text('{"path": "in::out/a::b.wav"}')
    names = (
        tmp_path / "in::out",
        tmp_path / "in::out" / "a::b.wav",
        tmp_path / "in::out" / "*",
        tmp_path / "m::n.jsonl",
    )
    for name in names:
        (item,) = listed(tmp_path, name)
        assert isinstance(outcome(item), ItemDone)


def test_ids_are_unique(tmp_path: Path):
    lines = [{"path": "a.wav", "offset": 1000000 + step / 10, "duration": 0.1} for step in range(3)]
    lines += [{"path": "a.wav", "offset": 0.5, "duration": length} for length in (0.25, 0.125)]
    lines += [{"id": name, "path": "a.wav"} for name in ("x", "x", "x~2", "x", "y")]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = listed(tmp_path, tmp_path / "m.jsonl")
    assert [item.id for item in found[:5]] == [
        "a.wav@1000000.0+0.1",
        "a.wav@1000000.1+0.1",
        "a.wav@1000000.2+0.1",
        "a.wav@0.5+0.25",
        "a.wav@0.5+0.125",
    ]
    assert [item.id for item in found[5:]] == ["x", "x~3", "x~2", "x~4", "y"]
    assert not list(tmp_path.glob(".*"))


def test_features_do_not_go_into_shar():
    with pytest.raises(ConfigError, match="parquet"):
        CorpusOptions(keep_features=True, form="shar")
