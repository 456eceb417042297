"""What ends no run, and what a run's results do not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from typer.testing import CliRunner

from semanticodec.bench.clips import Clip, Wave, find
from semanticodec.bench.codecs import About, Coded
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.metrics import METRICS
from semanticodec.bench.report import hang, write_report
from semanticodec.bench.results import read_results
from semanticodec.bench.run import Plan, run
from semanticodec.cli import app
from semanticodec.config import SAMPLE_RATE
from semanticodec.errors import ConfigError

NAMES = ("speech/a", "speech/b", "music/a")
CODES = np.array([[1, 2, 3], [0, 0, 1]])


@dataclass(frozen=True)
class Odd:
    """A codec that makes something of what it decodes of the clip ``speech/b``, and counts what it codes."""

    name: str = "odd"
    make: Callable[[Wave], NDArray[np.float32]] | None = None
    log: Path | None = None

    def missing(self) -> None:
        """It needs nothing."""

    def about(self) -> About:
        return About("odd", "odd", SAMPLE_RATE)

    def fingerprint(self) -> str:
        return self.name

    def encode(self, clip: Clip) -> Coded:
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{clip.name}\n")
        return Coded(bytes(100), 640.0, CODES)

    def decode(self, coded: Coded, clip: Clip) -> Wave:  # noqa: ARG002
        return self.make(clip.wave) if self.make and clip.name == "speech/b" else clip.wave


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """Clips of a second, one of which shares its bare name with another."""
    folder = tmp_path_factory.mktemp("audio")
    wave, rate = soundfile.read(root / "semanticodec" / "assets" / "demo.flac")
    for place, name in enumerate(NAMES):
        path = folder / f"{name}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave[place * rate : (place + 1) * rate], rate)
    return folder


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda wave: np.where(np.arange(len(wave)) < 3, np.nan, wave), "3 of 16000 decoded samples are no finite"),
        (lambda wave: np.where(np.arange(len(wave)) < 3, -np.inf, wave), "3 of 16000 decoded samples are no finite"),
        (lambda wave: wave[None], r"shape (1, 16000)"),
        (lambda wave: wave[:0], r"shape (0,)"),
    ],
    ids=["nan", "infinite", "two-dimensional", "empty"],
)
def test_a_decode_that_is_no_sound_is_a_failure_of_its_clip(
    make: Callable[[Wave], Wave], reason: str, audio: Path, tmp_path: Path
):
    results = run(Plan([Odd(make=make)], find(audio), tmp_path, ("lsd",)), "x")
    assert results.failed.keys() == {"odd on speech/b"}
    assert reason in results.failed["odd on speech/b"]
    assert results.scores("odd", "lsd").keys() == {"speech/a", "music/a"}


def test_results_do_not_depend_on_what_the_cache_has(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metric = replace(METRICS["lsd"], costly=True)
    monkeypatch.setitem(METRICS, "lsd", metric)
    plan = Plan([Odd()], find(audio), tmp_path, ("lsd", "mel_l1"))
    assert len(run(plan, "all").scores("odd", "lsd")) == 3
    some = replace(plan, costly_every=2)
    assert run(some, "some").scores("odd", "lsd").keys() == {"speech/a", "music/a"}
    monkeypatch.setitem(METRICS, "lsd", replace(metric, kinds=("music",)))
    assert run(plan, "of music").scores("odd", "lsd").keys() == {"music/a"}
    assert len(run(plan, "of music").scores("odd", "mel_l1")) == 3
    taken: list[int] = []
    monkeypatch.setitem(METRICS, "lsd", replace(metric, compute=lambda *_: taken.append(1), version=99))
    run(some, "another version")
    assert len(taken) == 2


@pytest.mark.parametrize("ending", [".flac", ".npy"])
def test_what_a_disk_lost_is_done_again(ending: str, audio: Path, tmp_path: Path):
    log = tmp_path / "log"
    plan = Plan([Odd(log=log)], find(audio), tmp_path / "cache", ("lsd",))
    first = run(plan, "whole")
    file = min(plan.cache.rglob(f"*{ending}"))
    whole = file.read_bytes()
    for size in (len(whole) - 8, 40, 0):
        file.write_bytes(whole[:size])
        done = len(log.read_text().splitlines())
        assert run(plan, "damaged").values["odd"]["lsd"] == first.values["odd"]["lsd"]
        assert len(log.read_text().splitlines()) == done + 1
        assert file.read_bytes() == whole


def test_names_fit_a_disk(audio: Path, tmp_path: Path):
    """Bytes of a name count, of which a letter has up to four; the cut names of two clips differ."""
    with pytest.raises(ConfigError, match="at most 200 bytes"):
        Plan([Odd("声" * 67)], find(audio), tmp_path)
    folder = Path("x" * 100, "y" * 100)
    (tmp_path / "clips" / folder).mkdir(parents=True)
    for place, end in enumerate("uv"):
        wave, rate = soundfile.read(audio / f"{NAMES[place]}.flac")
        soundfile.write(tmp_path / "clips" / folder / f"{'ü' * 60}{end}.flac", wave, rate)
    plan = Plan([Odd("ü" * 100)], find(tmp_path / "clips"), tmp_path / "cache", ("lsd",))
    results = run(plan, "x")
    hang(results, plan.clips, plan.cache, tmp_path, 2)
    shelves = sorted(path for path in (tmp_path / "gallery").iterdir() if path.is_dir())
    assert len(shelves) == 2
    assert all({file.name for file in shelf.iterdir()} == {"original.flac", f"{'ü' * 100}.flac"} for shelf in shelves)
    assert write_report(results, tmp_path).read_text().count("<audio") == 4


def test_a_bare_name_that_several_clips_have_tells_none(audio: Path, tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in NAMES[:2]:
        (theirs / f"{Path(name).name}.flac").write_bytes((audio / f"{name}.flac").read_bytes())
    plan = Plan([Decodes("theirs", theirs, 1.5)], find(audio), tmp_path / "cache", ("lsd",), compensate=False)
    alone = run(replace(plan, clips=[clip for clip in plan.clips if clip.kind == "speech"]), "no two of a name")
    assert alone.scores("theirs", "lsd").keys() == {"speech/a", "speech/b"}
    results = run(plan, "x")  # what the cache has of before is not taken either
    assert results.failed.keys() == {"theirs on speech/a", "theirs on music/a"}
    assert all("several clips are called a" in reason for reason in results.failed.values())
    assert results.scores("theirs", "lsd").keys() == {"speech/b"}
    (theirs / "music").mkdir()
    (theirs / "music" / "a.flac").write_bytes((audio / "music" / "a.flac").read_bytes())
    again = run(plan, "one has a folder")
    assert again.failed.keys() == {"theirs on speech/a"}
    hang(again, plan.clips, plan.cache, tmp_path)
    assert (tmp_path / "gallery" / "music - a" / "theirs.flac").is_file()


def test_what_tells_no_clips_apart_stays(audio: Path):
    """Clips that are left out later have had their names, and names without a file change nothing."""
    theirs = Decodes("theirs", audio / "speech", 1.5)
    assert theirs.among(find(audio)).shared == {"a"}
    assert theirs.among(find(audio)).among(find(audio)[:1]).shared == {"a"}
    assert Decodes("theirs", audio, 1.5).among(find(audio)) == Decodes("theirs", audio, 1.5)


def test_a_clip_that_cannot_be_read_has_its_name_all_the_same(audio: Path, tmp_path: Path):
    (tmp_path / "gone.flac").write_bytes(b"no sound")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "a.flac").write_bytes((audio / "speech" / "a.flac").read_bytes())
    clips = [Clip("speech/a", "speech", audio / "speech" / "a.flac"), Clip("a", "sound", tmp_path / "gone.flac")]
    results = run(Plan([Decodes("theirs", theirs, 1.5)], clips, tmp_path / "cache", ("lsd",)), "x")
    assert results.failed.keys() == {"theirs on speech/a", "a"}


def test_bitrates_of_a_system_make_a_curve(audio: Path, tmp_path: Path):
    theirs = [f"theirs={audio}@{kbps}" for kbps in ("0.35", "0.710")]
    words = ["bench", "run", str(audio), "-o", str(tmp_path), "--codecs", "", "--metrics", "lsd", "--no-costs"]
    given = [word for text in [*theirs, f"alone={audio}@2"] for word in ("--decodes", text)]
    done = CliRunner().invoke(app, [*words, *given])
    assert done.exit_code == 0, done.output
    families = {name: facts["family"] for name, facts in read_results(tmp_path).systems.items()}
    assert families == {"theirs 0.35": "theirs", "theirs 0.71": "theirs", "alone": "alone"}
    twice = CliRunner().invoke(app, [*words, *given, "--decodes", theirs[0]])
    assert (twice.exit_code, "theirs 0.35 comes twice" in twice.output) == (1, True)
    assert CliRunner().invoke(app, [*words, "--decodes", f"{audio}@2"]).exit_code == 2


def test_no_metrics_are_none(audio: Path, tmp_path: Path):
    words = ["bench", "run", str(audio), "-o", str(tmp_path), "--codecs", "", "--decodes", f"theirs={audio}@2"]
    done = CliRunner().invoke(app, [*words, "--metrics", ""])
    assert done.exit_code == 0, done.output
    assert read_results(tmp_path).values["theirs"].keys() == {"kbps_net"}
    assert (tmp_path / "report.html").is_file()
