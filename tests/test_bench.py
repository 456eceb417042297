"""The bench as a whole: adapters, cached runs that survive a kill, results, report, listening tests, command line."""

from __future__ import annotations

import base64
import csv
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from chrome import opened
from typer.testing import CliRunner

from benchmarks.page import CHROMIUM, launched
from semanticodec.bench import neural
from semanticodec.bench.clips import Clip, Wave, find, read
from semanticodec.bench.codecs import About, Codec, Coded, Semanticodec, ours
from semanticodec.bench.commands import Command, classical, configured
from semanticodec.bench.cost import cost
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.entries import Entry
from semanticodec.bench.leaderboard import codec_superb, versa, write_leaderboards
from semanticodec.bench.metrics import METRICS
from semanticodec.bench.neural import Hub
from semanticodec.bench.report import hang, write_report
from semanticodec.bench.results import Results, read_results
from semanticodec.bench.run import Plan, run
from semanticodec.bench.sounds import Sound
from semanticodec.bench.survey import _labels, _mel_statistics, _probes, listening_items, origin, survey
from semanticodec.cli import app
from semanticodec.config import SAMPLE_RATE
from semanticodec.errors import AudioError, ConfigError, SemantiCodecError

QUICK = ("mel_l1", "stft", "lsd")
COPY = Command("copy", "cp {input} {coded}", "cp {coded} {output}", delay=0.0)


@dataclass(frozen=True)
class Worse:
    """A codec that adds noise, comes late and too quiet, and writes a line for every clip that it codes."""

    name: str
    level: float
    log: Path | None = None
    pause: float = 0.0
    late: int = 0

    def missing(self) -> str | None:
        return "is never there" if self.name == "missing" else None

    def about(self) -> About:
        return About("worse", "noise", SAMPLE_RATE, 0.1, parameters=7)

    def fingerprint(self) -> str:
        return f"{self.name} {self.level} {self.late}"

    def encode(self, clip: Clip) -> Coded:
        if self.name == "broken" and clip.kind == "music":
            raise AudioError("cannot code music")
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{self.name} {clip.name}\n")
        time.sleep(self.pause)
        return Coded(bytes(100), 640.0, np.array([[1, 2, 3], [0, 0, 1]]))

    def decode(self, coded: Coded, clip: Clip) -> Wave:  # noqa: ARG002
        noise = np.random.default_rng(0).standard_normal(len(clip.wave)).astype(np.float32)
        return np.pad(0.5 * (clip.wave + self.level * noise), (self.late, 0))


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Eight short clips with a manifest, cut from the shipped voice."""
    folder = tmp_path_factory.mktemp("audio")
    wave, rate = soundfile.read(root / "semanticodec" / "assets" / "demo.flac")
    rows = []
    for n in range(8):
        piece = wave[n * rate // 2 : n * rate // 2 + rate]
        soundfile.write(folder / f"c{n}.flac", piece, rate)
        rows.append((f"c{n}.flac", "music" if n == 7 else "speech", "some words", "ab"[n % 2]))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "kind", "text", "note"), *rows])
    return folder


@pytest.fixture(scope="module")
def ran(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Results]:
    codecs = [Worse("good", 0.001, late=100), Worse("bad", 0.05), Worse("broken", 0.2), Worse("missing", 1), COPY]
    plan = Plan(codecs, find(audio), tmp_path_factory.mktemp("cache"), (*QUICK, "stoi"))
    return plan, run(plan, "test")


def test_a_run_finds_what_is_known(ran: tuple[Plan, Results]):
    _, results = ran
    assert results.skipped == {"missing": "is never there"}
    assert results.failed == {"broken on c7": "AudioError: cannot code music"}
    assert list(results.systems) == ["good", "bad", "broken", "copy"]
    assert results.systems["good"]["delay_samples"] == 100
    for name in QUICK:
        means = [results.mean(system, name, "speech") for system in ("copy", "good", "bad", "broken")]
        values = [mean.mean for mean in means if mean]
        assert values == sorted(values)
        assert len(set(values)) == 4
    bits = {kind: results.mean("bad", f"kbps_{kind}", "speech") for kind in ("net", "file", "gross")}
    assert bits["net"] is not None
    assert bits["file"] is not None
    assert bits["gross"] is not None
    assert bits["net"].mean == pytest.approx(0.64)
    assert bits["file"].mean == pytest.approx(0.8)
    assert bits["gross"].mean > bits["net"].mean
    assert set(results.scores("broken", "mel_l1")) == {f"c{n}" for n in range(7)}
    assert {pair.clips for pair in results.compare("mel_l1", "speech")} == {7}
    gain = results.mean("good", "gain")
    assert gain is not None
    assert gain.mean == pytest.approx(6.02, abs=0.5)


def test_nothing_is_done_twice(audio: Path, tmp_path: Path):
    log = tmp_path / "log"
    plan = Plan([Worse("a", 0.01, log)], find(audio), tmp_path / "cache", ("mel_l1",))
    first = run(plan, "one")
    again = run(replace(plan, metrics=("mel_l1", "lsd")), "two")
    assert len(log.read_text().splitlines()) == 1 + 8  # the first one before, so that times are of warm codecs
    assert again.values["a"]["mel_l1"] == first.values["a"]["mel_l1"]
    assert "lsd" in again.values["a"]
    other = run(replace(plan, codecs=[Worse("a", 0.02, log)]), "other setting")
    assert len(log.read_text().splitlines()) == 2 * (1 + 8)
    assert other.values["a"]["mel_l1"] != first.values["a"]["mel_l1"]
    shutil.copy(audio / "c0.flac", tmp_path / "c0.flac")
    moved = [Clip("elsewhere", "speech", tmp_path / "c0.flac")]
    run(replace(plan, clips=moved), "the same sound under another name")
    assert len(log.read_text().splitlines()) == 2 * (1 + 8)


def test_a_killed_run_goes_on(audio: Path, tmp_path: Path):
    log, cache = tmp_path / "log", tmp_path / "cache"
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_bench import Worse, Plan, find, run
codecs = [Worse("slow", 0.01, Path({str(log)!r}), 0.2)]
run(Plan(codecs, find(Path({str(audio)!r})), Path({str(cache)!r}), ("lsd",)), "x")
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(log.read_text().splitlines())
    results = run(Plan([Worse("slow", 0.01, log)], find(audio), cache, ("lsd",)), "x")
    assert len(results.values["slow"]["lsd"]) == 8
    lines = log.read_text().splitlines()
    assert len(set(lines)) == 8
    # only the clip that was being coded when the process died is coded again, beside one per process to warm up
    assert done < 9
    assert len(lines) <= 9 + 2


def test_what_cannot_be_read_does_not_end_a_run(audio: Path, tmp_path: Path):
    shutil.copytree(audio, tmp_path / "audio")
    (tmp_path / "audio" / "c2.flac").write_bytes(b"no sound")
    plan = Plan([COPY], find(tmp_path / "audio"), tmp_path / "cache", ("lsd",))
    results = run(plan, "one is broken")
    assert results.failed.keys() == {"c2"}
    assert "AudioError" in results.failed["c2"]
    assert set(results.scores("copy", "lsd")) == set(results.clips) == {f"c{n}" for n in range(8)} - {"c2"}
    assert "probe_baseline" in survey(results, plan, costs=False).settings
    hang(results, plan.clips, plan.cache, tmp_path)
    (tmp_path / "audio" / "c3.flac").unlink()
    with pytest.raises(AudioError, match="none of the 2 clips can be read; c2"):
        run(replace(plan, clips=find(tmp_path / "audio")[2:4]), "none is left")


def test_a_damaged_cache_is_done_again(audio: Path, tmp_path: Path):
    log = tmp_path / "log"
    plan = Plan([Worse("a", 0.01, log)], find(audio)[:3], tmp_path / "cache", ("lsd",))
    first = run(plan, "whole")
    records = sorted(plan.cache.rglob("*.json"))
    records[0].write_text(records[0].read_text()[:30])
    records[1].with_suffix(".flac").unlink()
    done = len(log.read_text().splitlines())
    again = run(plan, "damaged")
    assert len(log.read_text().splitlines()) == done + 2
    assert again.values["a"]["lsd"] == first.values["a"]["lsd"]


@dataclass(frozen=True)
class Named(Worse):
    """A codec that says which process it works in."""

    def encode(self, clip: Clip) -> Coded:
        with Path(f"{self.log}.pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return super().encode(clip)


def test_a_killed_run_leaves_no_processes(audio: Path, tmp_path: Path):
    log = tmp_path / "log"
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
from test_bench import Named, Plan, find, run
if __name__ == "__main__":
    codecs = [Named("slow", 0.01, Path({str(log)!r}), 600)]
    run(Plan(codecs, find(Path({str(audio)!r})), Path({str(tmp_path / "cache")!r}), ("lsd",), jobs=2), "x")
"""
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"])
    pids: set[int] = set()
    while len(pids) < 2:
        assert process.poll() is None
        time.sleep(0.05)
        if (names := Path(f"{log}.pids")).exists():
            pids = {int(line) for line in names.read_text().split()}
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30

    def alive(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")
        try:
            return status.read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    try:
        while any(map(alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Deadly(Worse):
    """A codec that ends its process, as compiled code can."""

    def encode(self, clip: Clip) -> Coded:
        if clip.name == "c2" and self.pause:
            os._exit(9)
        return super().encode(clip)


def test_a_process_that_dies_is_no_riddle(audio: Path, tmp_path: Path):
    log, clips = tmp_path / "log", find(audio)[:4]
    with pytest.raises(SemantiCodecError, match=r"died while coding 'deadly c[012]' or .*-j 1"):
        run(Plan([Deadly("deadly", 0.01, log, 0.01)], clips, tmp_path / "cache", ("lsd",), jobs=2), "x")
    whole = {path.with_suffix(".flac") for path in (tmp_path / "cache").rglob("*.json")}
    done = {path: path.stat().st_mtime_ns for path in whole}
    results = run(Plan([Deadly("deadly", 0.01, log)], clips, tmp_path / "cache", ("lsd",)), "x")
    assert len(results.values["deadly"]["lsd"]) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


@dataclass(frozen=True)
class Cutting(Worse):
    """A codec that cuts its look-ahead off the beginning of every second clip, as speexdec does of some."""

    def decode(self, coded: Coded, clip: Clip) -> Wave:
        late = super().decode(coded, clip)
        return late[self.late :] if int(clip.name[-1]) % 2 else late


def test_each_clip_has_its_own_delay_undone(audio: Path, tmp_path: Path):
    codecs = [Worse("in time", 0.001), Cutting("cutting", 0.001, late=160)]
    results = run(Plan(codecs, find(audio), tmp_path, ("lsd",)), "x")
    assert results.systems["cutting"]["delay_samples"] in (0, 160)
    assert {clip: results.late("cutting", clip) for clip in results.clips} == {
        f"c{n}": 0 if n % 2 else 160 for n in range(8)
    }
    scores = [results.scores(name, "lsd") for name in ("in time", "cutting")]
    assert all(scores[1][clip][0] == pytest.approx(value, rel=0.05) for clip, (value, _) in scores[0].items())
    page = write_report(results, tmp_path / "report").read_text()
    assert re.search(r"<td>(10\.0 or 0\.0|0\.0 or 10\.0)</td>", page)


def test_clips_that_tell_no_delay_leave_it_to_the_shipped_voice(tmp_path: Path):
    rng = np.random.default_rng(0)
    (tmp_path / "sound").mkdir()
    for n in range(2):  # too short for a delay to be told
        soundfile.write(tmp_path / "sound" / f"c{n}.wav", 0.1 * rng.standard_normal(300), SAMPLE_RATE)
    shutil.copytree(tmp_path / "sound", tmp_path / "done")
    codecs = [Worse("late", 0.001, late=100), Decodes("done", tmp_path / "done", 1.0)]
    results = run(Plan(codecs, find(tmp_path / "sound"), tmp_path / "cache", ("lsd",)), "x")
    assert results.systems["late"]["delay_samples"] == 100
    assert [results.late("late", clip) for clip in results.clips] == [100, 100]
    assert results.systems["done"]["delay_samples"] is None


def test_little_speech_is_helped_by_the_other_kinds(audio: Path, tmp_path: Path):
    """Of a codec with two delays each one has to be told twice, by whatever clips."""
    for n in range(8):
        kind = "speech" if n < 3 else "music"
        (tmp_path / kind).mkdir(exist_ok=True)
        shutil.copy(audio / f"c{n}.flac", tmp_path / kind / f"{n}.flac")
    results = run(Plan([Cutting("cutting", 0.001, late=160)], find(tmp_path), tmp_path / "cache", ("lsd",)), "x")
    assert {clip: results.late("cutting", clip) for clip in results.clips} == {
        f"{'speech' if n < 3 else 'music'}/{n}": 0 if n % 2 else 160 for n in range(8)
    }


def test_decodes_of_equal_clips_are_each_their_own(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clips, theirs = tmp_path / "clips", tmp_path / "theirs"
    wave, rate = soundfile.read(audio / "c0.flac")
    for folder, level in ((clips, 0.0), (theirs, 0.05)):
        folder.mkdir()
        soundfile.write(folder / "a.wav", wave, rate)
        noise = np.random.default_rng(0).standard_normal(len(wave))
        soundfile.write(folder / "b.wav", wave + level * noise, rate)
    plan = Plan([Decodes("theirs", theirs, 1.0)], find(clips), tmp_path / "cache", ("lsd",))
    results = run(plan, "x")
    (good, _), (bad, _) = results.scores("theirs", "lsd").values()
    assert good < 0.5 < bad  # what rounding to 16 bits leaves
    monkeypatch.setattr("semanticodec.bench.report.SECONDS", 1)
    hang(results, plan.clips, plan.cache, tmp_path / "report", 2)
    hung = [soundfile.read(tmp_path / "report" / "gallery" / f"sound - {name}" / "theirs.flac")[0] for name in "ab"]
    assert np.abs(hung[0] - hung[1]).max() > 0.05


@dataclass(frozen=True)
class Slow(Worse):
    """A codec that takes long the first time that a process uses it, as those do that compile or load late."""

    used: ClassVar[set[str]] = set()

    def encode(self, clip: Clip) -> Coded:
        time.sleep(0 if self.name in self.used else 0.5)
        self.used.add(self.name)
        return super().encode(clip)


def test_times_are_of_warm_codecs(audio: Path, tmp_path: Path):
    clips = find(audio)[:3]
    plan = Plan([Slow("wakes late", 0.01)], clips, tmp_path, ("lsd",))
    results = run(plan, "x")
    walls = [value * weight for value, weight in results.scores("wakes late", "encode_wall").values()]
    assert len(walls) == 3
    assert max(walls) < 0.4
    assert "untimed" in results.settings["timing"]
    assert "timed_by" not in results.systems["wakes late"]
    # What another machine timed is told apart.
    entry = Entry.of(tmp_path, results.systems["wakes late"]["fingerprint"], clips[0].digest)
    entry.write(entry.read() | {"timed_by": "an older machine"})
    by = run(plan, "x").systems["wakes late"]["timed_by"]
    assert len(by) == 2
    assert "an older machine" in by
    entry.write({name: value for name, value in entry.read().items() if name != "timed_by"})
    assert "an older version" in run(plan, "x").systems["wakes late"]["timed_by"]


def test_an_upgrade_of_a_package_measures_again(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    for name in ("stoi", "lsd"):
        metric = METRICS[name]

        def compute(*_: Sound, name: str = name) -> float:
            taken.append(name)
            return float(len(taken))

        monkeypatch.setitem(METRICS, name, replace(metric, compute=compute))
    plan = Plan([COPY], find(audio)[:1], tmp_path, ("stoi", "lsd"))
    run(plan, "x")
    run(plan, "x")
    assert taken == ["stoi", "lsd"]
    release = importlib.metadata.version
    monkeypatch.setattr(
        "semanticodec.bench.metrics.release", lambda of: f"{of}-{'99' if of == 'pystoi' else release(of)}"
    )
    assert run(plan, "x").values["copy"]["stoi"]["c0"] == [3.0, 1.0]
    assert taken == ["stoi", "lsd", "stoi"]
    assert METRICS["stoi"].made_by == "1+pystoi-99"
    assert METRICS["wer"].made_by == f"3+pocketsphinx-{release('pocketsphinx')}+jiwer-{release('jiwer')}"


def test_notes_of_an_older_version_are_taken_again(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = Plan([COPY], find(audio)[:1], tmp_path, ("lsd",))
    run(plan, "x")
    monkeypatch.setattr("semanticodec.bench.run.bandwidth", lambda *_: 500.0)
    assert run(plan, "x").values["copy"]["band"]["c0"][0] > 500
    monkeypatch.setattr("semanticodec.bench.run.ALIGNED", "later")
    assert run(plan, "x").values["copy"]["band"]["c0"] == [500.0, 1.0]


@pytest.mark.parametrize(("found", "noted"), [(7000.0, {"c0": [4000.0, 1.0]}), (0.0, {"c0": [0.0, 1.0]}), (None, {})])
def test_no_band_goes_beyond_what_a_codec_works_at(
    found: float | None,
    noted: dict[str, list[float]],
    audio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("semanticodec.bench.run.bandwidth", lambda *_: found)
    values = run(Plan([replace(COPY, rate=8000)], find(audio)[:1], tmp_path, ("lsd",)), "x").values["copy"]
    assert values.get("band", {}) == noted


def test_processes_find_the_same(ran: tuple[Plan, Results], tmp_path: Path):
    plan, results = ran
    some = replace(plan, codecs=[COPY], clips=plan.clips[:3], metrics=("lsd",), cache=tmp_path, jobs=2)
    told: list[tuple[str, int, int]] = []
    again = run(some, "two processes", lambda stage, _, done, total: told.append((stage, done, total)))
    for clip in some.clips:
        assert again.values["copy"]["lsd"][clip.name] == results.values["copy"]["lsd"][clip.name]
    assert ("scoring", 3, 3) in told


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(AudioError, match=r"there is no file .*gone\.wav"):
        read(tmp_path / "gone.wav")


def test_plans_are_checked(audio: Path, tmp_path: Path):
    clips = find(audio)
    with pytest.raises(ConfigError, match=r"names of their own.*copy comes twice"):
        Plan([COPY, COPY], clips, tmp_path)
    for name in ("a/b", "..\\b", "original", "", "a\n"):
        with pytest.raises(ConfigError, match="name is a file's too"):
            Plan([replace(COPY, name=name)], clips, tmp_path)
    with pytest.raises(ConfigError, match="unknown metrics mos"):
        Plan([COPY], clips, tmp_path, ("mos",))


def test_a_metric_that_fails_loses_only_its_value(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def odd(original: Sound, decoded: Sound) -> float:  # noqa: ARG001
        raise KeyError("odd clip")

    monkeypatch.setitem(METRICS, "lsd", replace(METRICS["lsd"], compute=odd))
    results = run(Plan([COPY], find(audio)[:2], tmp_path, ("lsd", "mel_l1")), "odd")
    assert results.failed == {f"copy on c{n}: lsd": "KeyError: 'odd clip'" for n in (0, 1)}
    assert len(results.scores("copy", "mel_l1")) == 2


def test_names_are_no_markup(audio: Path, tmp_path: Path):
    hostile = replace(COPY, name="<img src=x>")
    plan = Plan([hostile], find(audio)[:2], tmp_path / "cache", ("lsd",))
    results = run(plan, "<b>")
    hang(results, plan.clips, plan.cache, tmp_path)
    page = write_report(results, tmp_path).read_text()
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
    assert "<b>" not in page.partition("<title>")[2].partition("</title>")[0]


def test_results_are_kept_and_read(ran: tuple[Plan, Results], tmp_path: Path):
    _, results = ran
    results.save(tmp_path)
    assert read_results(tmp_path) == replace(results, machine=dict(results.machine))
    rows = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows == lines == list(results.rows())
    tests = json.loads((tmp_path / "results.json").read_text())["tests"]
    assert "Holm" in tests["method"]
    assert tests["pairs"].keys() == {*QUICK, "stoi"}
    for measure, kinds in tests["pairs"].items():
        assert kinds.keys() == {"all", "speech", "music"}
        for kind, rows in kinds.items():
            named = [dict(zip(tests["columns"], row, strict=True)) for row in rows]
            # The music is one clip, which "broken" has not: a test says that it is none.
            assert len(named) == (3 if kind == "music" else 6)
            for row, pair in zip(named, results.compare(measure, None if kind == "all" else kind), strict=True):
                assert (row["first"], row["second"], row["clips"]) == (pair.first, pair.second, pair.clips)
                if pair.clips < 8:  # among 6 pairs (3 of the one clip of music), 7 clips are too few
                    assert (row["p"], row["p_holm"]) == (None, None)
                    count = f"{pair.clips} clip{'s' * (pair.clips > 1)} cannot reach p < 0.05 among {len(named)} pairs"
                    assert row["not_tested"] == f"not tested: {count}"
                else:
                    assert row["p_holm"] == pytest.approx(pair.p_holm, rel=0.01)
                    assert row["p_holm"] >= row["p"] >= 2 / 2**8 - 1e-4
                    assert row["not_tested"] == ""
            assert {pair.clips for pair in results.compare(measure)} == {7, 8}
    assert "of one speaker or recording" in tests["intervals"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(results, values={**results.values, "bad": {"lsd": {"c0": [float("nan"), 1.0]}}}).write(tmp_path / "x")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="no results"):
        read_results(tmp_path)


def test_the_report_is_one_page(ran: tuple[Plan, Results], tmp_path: Path):
    plan, results = ran
    results = survey(results, replace(plan, codecs=[COPY]), costs=True)
    assert results.systems["copy"]["peak_memory_mb"] > 0
    page = write_report(results, tmp_path).read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "http" not in re.sub(r"xmlns(:\w+)?=\"[^\"]*\"|href=\"#", "", page)
    assert page.count("<svg") >= 4
    for name in results.systems:
        assert f'<th scope="row">{name}</th>' in page
    assert "cannot code music" in page
    assert page.count("not tested: 1 clip cannot reach p &lt; 0.05 among 3 pairs") == 3 * 4  # of the one clip of music
    assert {"rate-mel_l1.png", "rate-mel_l1.svg", "bars-stoi.png"} <= {f.name for f in (tmp_path / "plots").iterdir()}
    assert len(re.findall(r'id="([^"]*)"', page)) == len(set(re.findall(r'id="([^"]*)"', page)))


def test_labels_and_groups_come_from_the_manifest(tmp_path: Path):
    rows = [("file", "kind", "source", "repo", "lang", "sha1", "orig")]
    for n in range(16):
        speaker, piece = divmod(n, 2)
        rows.append(
            (
                f"c{n}.flac",
                "speech",
                "books" if n < 8 else "radio",
                "x/books" if n < 8 else "y/radio",
                "en" if n % 4 < 2 else "",
                f"{n:04x}",
                f"data/{speaker}/{speaker}-77-{piece:04}.flac",
            )
        )
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    clips = {clip.name: clip for clip in find(tmp_path)}
    assert origin(clips["c3"]) == {"source": "books", "folder": "data/1", "recording": "data/1/1-77"}
    assert origin(Clip("a/b-1_2", "sound", tmp_path)) == {"source": "a", "folder": "a", "recording": "a/b-1"}
    assert clips["c3"].group == "data/1"
    assert Clip("x", "speech", tmp_path, labels={"orig": "a.wav"}).group == "x"  # of no folder, of no speaker
    piece = Clip("m", "music", tmp_path, labels={"orig": "loops/arovane_beat_a.flac"})
    assert piece.group == "loops/arovane_beat"
    assert dataclasses.replace(piece, labels=piece.labels | {"group": "arovane"}).group == "arovane"
    assert (Clip("a/b-1", "sound", tmp_path).group, Clip("c", "speech", tmp_path, None, {"group": "me"}).group) == (
        "a/b-1",
        "me",
    )
    rng = np.random.default_rng(0)
    pooled = {name: rng.random(3).astype(np.float32) for name in clips}
    found = _probes(pooled, clips)
    # One kind, one language, the repository is the source by another name, and a checksum is no label.
    assert list(found) == ["source"]
    assert found["source"].endswith("of 2 (chance 50; by folder, 8 of them)")
    assert _labels(clips, clips).keys() == {"kind", "source", "lang"}


def test_recordings_hang_in_the_gallery(ran: tuple[Plan, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan, results = ran
    monkeypatch.setattr("semanticodec.bench.report.SECONDS", 1)
    hang(results, plan.clips, plan.cache, tmp_path)
    names = {file.name for file in (tmp_path / "gallery" / "speech - c0").iterdir()}
    monkeypatch.setattr(
        "semanticodec.bench.report.SECONDS", 100
    )  # no clip lasts so long, and the first hangs all the same
    hang(results, plan.clips, plan.cache, tmp_path)
    assert names == {file.name for file in (tmp_path / "gallery" / "speech - c0").iterdir()}
    assert names == {"original.flac", "good.flac", "bad.flac", "broken.flac", "copy.flac"}
    page = write_report(results, tmp_path).read_text()
    (sound, *_) = re.findall(r'src="data:audio/flac;base64,([^"]*)"', page)
    assert base64.b64decode(sound)[:4] == b"fLaC"
    assert page.count("<audio") == page.count('src="data:image/png') == 5 + 4


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_report_works_in_a_browser(ran: tuple[Plan, Results], tmp_path: Path):
    page_file = write_report(ran[1], tmp_path)
    asked: list[str] = []
    with launched() as browser, opened(browser, "about:blank", microphone=False) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        column = "table.sort tbody tr th"
        first = page.locator(column).first.text_content()
        page.locator("table.sort thead button").first.click()
        assert first == "good"
        assert page.locator(column).first.text_content() == "bad"  # in the order of the alphabet
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert page.evaluate("document.body.scrollWidth") <= page.evaluate("innerWidth")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_leaderboards_get_their_forms(ran: tuple[Plan, Results], tmp_path: Path):
    _, results = ran
    coded = {**results.systems["bad"], "tokens_per_second": 100.0, "codebook_use": ["1 % of 9", "2 % of 9"]}
    values = {**results.values["bad"], "wer": {"c0": [40.0, 5.0]}, "speaker": {"c0": [0.9, 1.0]}}
    results = replace(results, systems={**results.systems, "bad": coded}, values={**results.values, "bad": values})
    both = codec_superb(results, "bad")
    assert set(both["results"]["bad"]) == {"Speech", "Music", "overall"}
    assert both["results"]["bad"]["Speech"].keys() == {"stoi"}  # its mel and stft are other measures than ours
    assert both["row"]["bad"]["bps"] == pytest.approx(0.64)
    assert both["row"]["bad"]["tps"] == 50  # frames, of two codes each
    assert both["row"]["bad"].keys() == {"bps", "tps", "speech_stoi", "music_stoi", "overall_stoi"}
    assert "tps" not in codec_superb(results, "copy")["row"]["copy"]
    records = versa(results, "bad")
    assert [record["key"] for record in records] == [f"c{n}" for n in range(8)]
    assert all(isinstance(value, float) for record in records for name, value in record.items() if name != "key")
    assert (records[0]["wer"], records[0]["spk_similarity"]) == (0.4, 0.9)
    # What VERSA takes for better when less, by the name alone.
    less = {name for name in records[0] if any(part in name for part in ("wer", "error", "distance"))}
    assert less == {"wer", "log_mel_distance", "multi_stft_distance", "log_spectral_distance"}
    assert records[0].keys() - less == {"key", "stoi", "spk_similarity"}
    results = replace(results, values={**results.values, "broken": {}})
    written, left_out = write_leaderboards(results, tmp_path)
    assert left_out == ["broken"]
    assert len(written) == 9
    uses = {path.name: use for path, use in written.items()}
    assert "web/src/results/data.js" in uses["bad.row.json"]
    assert "absent metrics as 0" in uses["bad.json"]
    assert "VERSA" in uses["bad.jsonl"]
    assert not (tmp_path / "versa" / "broken.jsonl").exists()
    assert json.loads((tmp_path / "versa" / "bad.jsonl").read_text().splitlines()[0]) == records[0]


def test_classical_codecs_run(audio: Path):
    clip = find(audio)[0]
    run_at_all = 0
    for codec in classical():
        if codec.missing() is not None:
            assert "is not installed" in str(codec.missing())
            continue
        if codec.name not in ("opus-6", "codec2-1300", "speex-wb-q1", "mp3-16", "aac-16"):
            continue
        coded = codec.encode(clip)
        assert 0 < coded.net_bits <= 8 * len(coded.data)
        wave = codec.decode(coded, clip)
        assert len(wave) == pytest.approx(len(clip.wave), abs=2500)
        assert np.abs(wave).max() > 0.01
        run_at_all += 1
    assert run_at_all or shutil.which("ffmpeg") is None


def test_missing_programs_are_named():
    assert Command("x", "no-such-program {input} {coded}", "cp {coded} {output}").missing() == (
        "no-such-program is not installed"
    )


def test_two_lines_make_a_codec(audio: Path, tmp_path: Path):
    file = tmp_path / "codecs.toml"
    file.write_text('[mine]\nencode = "cp {input} {coded}"\ndecode = "cp {coded} {output}"\nrate = 8000\nraw = true\n')
    (codec,) = configured(file)
    clip = find(audio)[0]
    coded = codec.encode(clip)
    assert coded.net_bits == pytest.approx(8000 * 16 * clip.seconds, rel=1e-3)
    assert np.corrcoef(codec.decode(coded, clip)[: len(clip.wave)], clip.wave)[0, 1] > 0.9
    for text, complaint in (
        ('[a]\nencode = "cp {input} {coded}"\n', "needs encode = and decode ="),
        ('[a]\nencode = "cp {input} {coded}"\ndecode = "cp {coded} {output}"\nspeed = 3\n', "speed wrong"),
        ('[a]\nencode = "cp {input}"\ndecode = "cp {coded} {output}"\n', "needs {input} and {coded}"),
        ('[a]\nencode = "cp \'{input} {coded}"\ndecode = "cp {coded} {output}"\n', "cannot be split into words"),
        ("a = ", "Invalid value"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            configured(file)


def test_braces_of_a_command_are_its_own(audio: Path, tmp_path: Path):
    file = tmp_path / "codecs.toml"
    file.write_text(
        """[mine]\nencode = "sh -c '{ cp $0 $1; }' {input} {coded}"\ndecode = "cp {coded} {output}"\ndelay = 1\n"""
    )
    (codec,) = configured(file)
    assert codec.encode(find(audio)[0]).data[:4] == b"RIFF"
    assert codec.about().delay == 1.0


def test_failing_programs_say_why(audio: Path):
    clip = find(audio)[0]
    with pytest.raises(AudioError, match=r"exit code 1.*missing"):
        replace(COPY, encode_command="false {input} {coded}").encode(clip)
    with pytest.raises(AudioError, match="missing"):
        replace(COPY, encode_command="true {input} {coded}").encode(clip)


def test_finished_decodes_are_ranked(audio: Path, tmp_path: Path):
    for file in audio.glob("c*.flac"):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "c3.flac").unlink()
    plan = Plan([Decodes("theirs", tmp_path, 1.5)], find(audio), tmp_path / "cache", ("lsd",), compensate=False)
    results = run(plan, "decodes")
    assert list(results.failed) == ["theirs on c3"]
    assert results.systems["theirs"]["measured"] is False
    assert {clip: value for clip, (value, _) in results.scores("theirs", "kbps_net").items()} == pytest.approx(
        {f"c{n}": 1.5 for n in range(8) if n != 3}
    )
    net, lsd = results.mean("theirs", "kbps_net"), results.mean("theirs", "lsd")
    assert net is not None
    assert lsd is not None
    assert net.mean == pytest.approx(1.5)
    assert lsd.mean < 0.5  # rounded to 16 bits
    assert results.mean("theirs", "kbps_file") is None
    assert "there is no folder" in str(Decodes("x", tmp_path / "none", 1).missing())


def test_our_own_codec_at_measured_bits(audio: Path):
    clip = find(audio)[0]
    (codec,) = ours(("mini-25",), (1,))
    assert codec.missing() is None
    assert codec.name == "mini-25@1"
    coded = codec.encode(clip)
    assert coded.codes is not None
    assert coded.net_bits == coded.codes.shape[1] * 25
    assert coded.data[:3] == b"SCD"
    assert coded.entropy_bits is not None
    assert 0.5 * coded.net_bits < coded.entropy_bits < 1.2 * coded.net_bits
    assert len(codec.decode(coded, clip)) == len(clip.wave)
    assert np.array_equal(codec.decode(replace(coded, codes=None), clip), codec.decode(coded, clip))
    assert codec.about().delay == pytest.approx(0.395, abs=1e-3)
    assert codec.pool(coded.codes).ndim == 1
    assert codec.fingerprint() != replace(codec, seed=1).fingerprint()
    default, fast = ours(("mini-25",), fast=True)
    assert (default.name, fast.name) == ("mini-25", "mini-25@fast")
    assert not np.allclose(default.decode(coded, clip), fast.decode(coded, clip))
    assert "in the Hugging Face cache" in str(Semanticodec("semanticodec-25-4096").missing())
    assert "no weights of mini-25 in /nowhere" in str(Semanticodec("mini-25", folder="/nowhere").missing())


def tiny_hub(kind: str, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "encodec": lambda: transformers.EncodecModel(
            transformers.EncodecConfig(num_filters=2, hidden_size=8, codebook_size=1024, num_lstm_layers=1)
        ),
        "dac": lambda: transformers.DacModel(
            transformers.DacConfig(
                encoder_hidden_size=4,
                decoder_hidden_size=16,
                n_codebooks=3,
                codebook_size=16,
                codebook_dim=2,
            )
        ),
        "mimi": lambda: transformers.MimiModel(
            transformers.MimiConfig(
                num_filters=2,
                hidden_size=16,
                codebook_size=16,
                codebook_dim=8,
                vector_quantization_hidden_dimension=8,
                num_quantizers=4,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=16,
                upsample_groups=16,
            )
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small[kind]().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["encodec", "dac", "mimi"])
def test_neural_codecs_of_transformers(kind: str, audio: Path, tmp_path: Path):
    tiny_hub(kind, tmp_path / "model")
    codec = Hub(kind, str(tmp_path / "model"), 2)  # type: ignore[arg-type]
    assert codec.missing() is None
    clip = find(audio)[0]
    coded = codec.encode(clip)
    assert coded.codes is not None
    assert coded.codes.shape[0] == 2
    (size, _) = codec.codebook_sizes()
    assert coded.codes.max() < size
    assert coded.net_bits == pytest.approx(coded.codes.size * (size - 1).bit_length(), abs=8)
    assert len(codec.decode(coded, clip)) == pytest.approx(len(clip.wave), abs=1000)
    assert np.array_equal(codec.decode(replace(coded, codes=None), clip), codec.decode(coded, clip))
    about = codec.about()
    assert about.parameters
    assert about.rate in (16_000, 24_000)
    assert "there is no" in str(Hub("mimi", str(tmp_path), 2).missing())
    assert "not in the Hugging Face cache" in str(Hub("mimi", "nobody/nothing", 2).missing())


def test_folders_without_models_are_skipped_with_the_reason(tmp_path: Path):
    pytest.importorskip("transformers")
    (tmp_path / "mimi").mkdir()
    (tmp_path / "mimi" / "config.json").write_text('{"model_type": "mimi"}')
    (tmp_path / "mimi" / "model.safetensors").write_bytes(b"junk" * 9)
    reasons = {codec.name: str(codec.missing()) for codec in neural.hub(tmp_path)}
    assert "there is no" in reasons["encodec_24khz-2q"]
    assert "there is no" in reasons["dac_16khz-1q"]
    assert "cannot be loaded: SafetensorError" in reasons["mimi-4q"]


def test_costs_are_of_the_codec_alone(audio: Path):
    clip = find(audio)[0]
    found = cost(Semanticodec("mini-25"), clip)
    assert found.gflop_per_second is not None
    assert 1 < found.gflop_per_second < 500
    assert 100 < found.peak_memory_mb < 4000
    assert found.first_block_ms is not None
    assert found.first_block_ms > 335  # a block and the filter bank, and the work


def test_items_come_from_a_run(ran: tuple[Plan, Results]):
    plan, results = ran
    with pytest.raises(ConfigError, match="3 to 12 s"):
        listening_items(results, plan.clips, plan.cache, ["copy"], 1, 0)
    with pytest.raises(ConfigError, match="no decodes of 'nobody'"):
        listening_items(results, plan.clips, plan.cache, ["nobody"], 1, 0)


def test_costs_that_cannot_be_measured_cost_nothing_else(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []

    def fail(_codec: Codec, clip: Clip) -> None:
        asked.append(clip.seconds)
        raise AudioError("too long")

    monkeypatch.setattr("semanticodec.bench.survey.cost", fail)
    soundfile.write(tmp_path / "dot.wav", np.ones(100), SAMPLE_RATE)
    clips = [*find(audio)[:3], *find(tmp_path)]
    plan = Plan([COPY], clips, tmp_path / "cache", ("lsd",))
    results = survey(run(plan, "x"), plan, costs=True)
    assert results.failed == {"copy: costs": "AudioError: too long"}
    assert asked == [max(clip.seconds for clip in clips)]
    assert all(np.isfinite(_mel_statistics(clip)).all() for clip in clips)


def test_the_command_line(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neural, "hub", lambda _: iter(()))
    file = tmp_path / "codecs.toml"
    file.write_text('[copy]\nencode = "cp {input} {coded}"\ndecode = "cp {coded} {output}"\n')
    out = tmp_path / "out"
    words = ["bench", "run", str(audio), "-o", str(out), "--config", str(file), "--metrics", "lsd", "--every", "4"]
    words += ["--decodes", f"same={audio}@2", "--only", "copy,same", "--no-costs"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    results = read_results(out)
    assert list(results.systems) == ["copy", "same"]
    assert len(results.clips) == 3
    assert (out / "report.html").is_file()
    assert CliRunner().invoke(app, ["bench", "report", str(out / "results.json")]).exit_code == 1
    elsewhere = ["-o", str(tmp_path / "elsewhere")]
    assert CliRunner().invoke(app, ["bench", "report", str(out / "results.json"), *elsewhere]).exit_code == 0
    assert (tmp_path / "elsewhere" / "report.html").is_file()
    rows = CliRunner().invoke(app, ["bench", "leaderboard", str(out)]).output
    assert "copy.row.json: a row for Codec-SUPERB's page" in rows
    assert CliRunner().invoke(app, ["bench", "leaderboard", str(out / "results.json")]).exit_code == 1
    ranked = CliRunner().invoke(app, ["bench", "leaderboard", str(out / "results.json"), *elsewhere])
    assert str(tmp_path / "elsewhere" / "codec-superb" / "copy.json") in ranked.output
    twice = CliRunner().invoke(app, ["bench", "listen", str(out), str(audio), "--systems", "copy,copy"])
    assert (twice.exit_code, "each system once per trial" in twice.output) == (1, True)
    assert "mini-100" in CliRunner().invoke(app, ["bench", "codecs"]).output
    wrong = CliRunner().invoke(app, [*words[:-1], "--only", "lyra"])
    assert wrong.exit_code == 1
    assert "no codec lyra among" in wrong.output
    nowhere = CliRunner().invoke(app, ["bench", "run", str(tmp_path / "clips"), "-o", str(tmp_path / "new")])
    assert (nowhere.exit_code, (tmp_path / "new").exists()) == (1, False)
    assert "there is no folder" in nowhere.output
    assert CliRunner().invoke(app, [*words, "--codecs", "modern"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "run", str(audio), "-o", str(out), "--codecs", ""]).exit_code == 2
    for kbps in ("nan", "inf", "0", "-1", "x"):
        assert CliRunner().invoke(app, [*words, "--decodes", f"other={audio}@{kbps}"]).exit_code == 2
    with file.open("a") as more:
        more.write('[useless]\nencode = "cp {input}.none {coded}"\ndecode = "cp {coded} {output}"\n')
    failed = CliRunner().invoke(app, [*words[:-2], "copy,useless"])  # costs too: of what could be coded
    assert failed.exit_code == 1
    assert failed.output.splitlines()[-1] == "useless: failed on every clip"
    assert list(read_results(out).systems) == ["copy", "useless"]
    assert "peak_memory_mb" in read_results(out).systems["copy"]
    ranked = CliRunner().invoke(app, ["bench", "leaderboard", str(out)])
    assert "useless: left out" in ranked.output
    with file.open("a") as more:
        more.write('[absent]\nencode = "no-such-program {input} {coded}"\ndecode = "cp {coded} {output}"\n')
    none = CliRunner().invoke(app, [*words[:-2], "absent", "--no-costs"])
    assert none.exit_code == 1
    assert "absent: no-such-program is not installed" in none.output
    assert "none of the codecs can run here" in none.output


def test_metrics_say_what_they_need(monkeypatch: pytest.MonkeyPatch):
    assert METRICS["lsd"].missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'semanticodec[bench]'" in str(METRICS["visqol"].missing())
