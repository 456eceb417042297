"""What is asked of a run afterwards: pieces of its decodes to be heard, and what its codes say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny import codec, noise
from typer.testing import CliRunner

from semanticodec import checkpoints
from semanticodec.bench.clips import Clip, find
from semanticodec.bench.codecs import Semanticodec
from semanticodec.bench.commands import Command
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.entries import entry
from semanticodec.bench.listening import Item
from semanticodec.bench.report import hang
from semanticodec.bench.results import Results
from semanticodec.bench.run import Plan, run
from semanticodec.bench.survey import codes_facts, listening_items
from semanticodec.cli import app
from semanticodec.config import SAMPLE_RATE

LATE = 160
"""Samples that one of the systems comes late."""
LENGTHS = {"speech/a": 3.1, "speech/b": 3.3, "speech/short": 1.0, "music/c": 3.2, "sound/short": 0.5}
"""Seconds of the clips."""


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 16-bit noise, of which three are long enough for a listening test."""
    folder = tmp_path_factory.mktemp("audio")
    for seed, (name, seconds) in enumerate(LENGTHS.items()):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / f"{name}.wav", noise(round(seconds * SAMPLE_RATE), seed=seed, scale=0.1), SAMPLE_RATE)
    return folder


@pytest.fixture(scope="module")
def ran(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Results]:
    """A run of a copy, and of decodes of others that come late at half the level; its folder too."""
    out = tmp_path_factory.mktemp("out")
    theirs = tmp_path_factory.mktemp("theirs")
    for clip in find(audio):
        (theirs / clip.name).parent.mkdir(exist_ok=True)
        soundfile.write(theirs / f"{clip.name}.wav", np.pad(clip.wave, (LATE, 0)) / 2, SAMPLE_RATE)
    copy = Command("copy", "cp {input} {coded}", "cp {coded} {output}")
    plan = Plan([copy, Decodes("late", theirs, 1.0)], find(audio), out / "cache", ("lsd",))
    results = run(plan, "x")
    results.save(out)
    return out, plan, results


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """Return how loud the difference of two sounds is beside the first."""
    return float(np.sqrt(np.mean((one - other) ** 2) / np.mean(one**2)))


def test_listeners_hear_decodes_in_time(ran: tuple[Path, Plan, Results]) -> None:
    _, plan, results = ran
    items = {item.name: item for item in listening_items(results, plan.clips, plan.cache, ["late", "copy"], 2, 0)}
    assert items.keys() == {"speech/a", "speech/b", "music/c"}
    for clip in plan.clips:
        if clip.name in items:
            assert np.array_equal(items[clip.name].original, clip.wave.astype(np.float64))
            assert list(items[clip.name].decodes) == ["late", "copy"]
            assert all(differ(clip.wave, decode) < 0.02 for decode in items[clip.name].decodes.values())


def test_the_seed_chooses_what_is_heard(ran: tuple[Path, Plan, Results]) -> None:
    _, plan, results = ran

    def chosen(seed: int) -> list[str]:
        found: list[Item] = listening_items(results, plan.clips, plan.cache, ["copy"], 1, seed)
        return [item.name for item in found]

    draws = {tuple(chosen(seed)) for seed in range(9)}
    assert draws == {("music/c", "speech/a"), ("music/c", "speech/b")} or draws == {
        ("speech/a", "music/c"),
        ("speech/b", "music/c"),
    }
    assert chosen(3) == chosen(3)


def test_what_hangs_in_the_gallery_is_in_time(ran: tuple[Path, Plan, Results], tmp_path: Path) -> None:
    _, plan, results = ran
    hang(results, plan.clips, plan.cache, tmp_path)
    shelves = {path.parent for path in (tmp_path / "gallery").rglob("late.flac")}
    assert len(shelves) == 3  # one of each kind
    for shelf in shelves:
        original, late, copy = (soundfile.read(shelf / f"{name}.flac")[0] for name in ("original", "late", "copy"))
        assert differ(original, late) < 0.02
        assert differ(original, copy) < 0.02


def test_a_listening_test_is_exported_from_a_run(ran: tuple[Path, Plan, Results], audio: Path, tmp_path: Path) -> None:
    out, test, key = ran[0], tmp_path / "mushra", tmp_path / "mushra-key.json"
    words = ["bench", "listen", str(out), str(audio), "--systems", "late,copy", "-o", str(test)]
    done = CliRunner().invoke(app, [*words, "--each", "2"])
    assert done.exit_code == 0, done.output
    assert f"{test}: 3 trials;" in done.output
    meanings = json.loads(key.read_text())
    assert {trial["clip"] for trial in meanings["trials"].values()} == {"speech/a", "speech/b", "music/c"}
    for trial, facts in meanings["trials"].items():
        assert sorted(facts["stimuli"].values()) == ["anchor35", "anchor70", "copy", "late"]
        sounds = {
            meaning: soundfile.read(test / "stimuli" / trial / f"{name}.wav")[0]
            for name, meaning in {**facts["stimuli"], "reference": "reference"}.items()
        }
        assert differ(sounds["reference"], sounds["late"]) < 0.02
        assert differ(sounds["reference"], sounds["anchor35"]) > 0.1
    complaints = [line for line in done.output.splitlines() if "asked for" in line]
    assert [line.partition(" where")[0] for line in sorted(complaints)] == ["music: 1 trial", "sound: 0 trials"]
    again = CliRunner().invoke(app, [*words, "--each", "1"])
    assert [line.partition(":")[0] for line in again.output.splitlines() if "asked for" in line] == ["sound"]


def test_codes_are_counted(audio: Path, tmp_path: Path) -> None:
    small = codec("mini")
    checkpoints.save(tmp_path / "weights", {small.config: small.model.state_dict()})
    spec = Semanticodec(small.config.name, 1, str(tmp_path / "weights"))
    clips = {clip.name: clip for clip in find(audio) if clip.seconds < 2}
    results = run(Plan([spec], list(clips.values()), tmp_path / "cache", ("lsd",), compensate=False), "x")
    facts = codes_facts(spec, results, clips, tmp_path / "cache")
    kept = [entry(results, spec.name, clip, tmp_path / "cache").codes() for clip in clips.values()]
    codes = np.concatenate([rows for rows in kept if rows is not None], 1)
    seconds = sum(clip.seconds for clip in clips.values())
    assert len(kept) == 2
    assert codes.shape[1] >= 50 * seconds  # of whole blocks
    assert facts["tokens_per_second"] == pytest.approx(codes.size / seconds, abs=0.01)
    entropies = []
    for book, size, use in zip(codes, spec.codebook_sizes(), facts["codebook_use"], strict=True):
        counts = np.unique(book, return_counts=True)[1]
        shares = counts / len(book)
        entropies.append(-(shares * np.log2(shares)).sum())
        assert use == f"{100 * len(counts) / size:.0f} % of {size}"
    assert facts["entropy_bits"] == pytest.approx(entropies, abs=0.01)
    # Each frame has a code of every book.
    assert facts["kbps_at_entropy"] == pytest.approx(sum(entropies) * codes.shape[1] / seconds / 1000, abs=1e-3)
    assert facts["kbps_at_entropy"] > 0.05


def test_what_has_no_codes_says_nothing_of_them(ran: tuple[Path, Plan, Results]) -> None:
    _, plan, results = ran
    clips: dict[str, Clip] = {clip.name: clip for clip in plan.clips}
    assert codes_facts(plan.codecs[0], results, clips, plan.cache) == {}
