"""The benchmark of lost blocks: what is lost, what stands in for it, and that it runs on a small codec."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import codec, noise
from typer.testing import CliRunner

from semanticodec import checkpoints
from semanticodec.audio import save
from semanticodec.bench import losses as module
from semanticodec.bench import lossy
from semanticodec.bench.clips import Clip
from semanticodec.bench.codecs import Semanticodec
from semanticodec.bench.curves import write
from semanticodec.bench.losses import (
    MEASURES,
    METHODS,
    PATTERNS,
    RATES,
    Condition,
    conditions,
    differences,
    losses,
    lost_of,
    measure,
    table,
)
from semanticodec.bench.lossy import masked, muted, repeated
from semanticodec.bench.results import Results
from semanticodec.bench.run import Plan, run
from semanticodec.cli import app


@pytest.mark.parametrize("rate", RATES)
def test_random_losses_are_exactly_as_many(rate: float) -> None:
    lost = losses(10_000, rate, "random", 0)
    assert lost.sum() == round(10_000 * rate)
    assert np.array_equal(lost, losses(10_000, rate, "random", 0))
    assert not np.array_equal(lost, losses(10_000, rate, "random", 1))


@pytest.mark.parametrize("rate", RATES)
def test_bursts_last_three_blocks_on_average(rate: float) -> None:
    lost = losses(300_000, rate, "bursts", 0)
    bursts = (np.diff(lost.astype(int), prepend=0) == 1).sum()
    assert lost.sum() == round(300_000 * rate)
    assert len(lost) == 300_000
    assert lost.sum() / bursts == pytest.approx(3, rel=0.1)
    # Over the whole recording, not all at its beginning.
    assert lost[150_000:].sum() == pytest.approx(lost.sum() / 2, rel=0.1)


def test_few_blocks() -> None:
    for pattern in PATTERNS:
        assert losses(10, 0.01, pattern, 0).tolist() == [False] * 10
        assert losses(5, 0.2, pattern, 0).sum() == 1


def test_what_stands_in() -> None:
    codes = torch.arange(1, 11).expand(1, 2, 10)
    lost = (True, False, True, True, False)
    assert masked(codes, lost, 2)[0, 0].tolist() == [-1, -1, 3, 4, -1, -1, -1, -1, 9, 10]
    assert repeated(codes, lost, 2)[0, 1].tolist() == [-1, -1, 3, 4, 3, 4, 3, 4, 9, 10]
    assert repeated(codes[..., :7], lost, 2)[0, 0].tolist() == [-1, -1, 3, 4, 3, 4, 3]
    assert muted(torch.ones(9), lost, 2).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1]


def test_what_a_clip_loses_is_its_own() -> None:
    digests = [f"{n:016x}" + 48 * "0" for n in range(0, 100_000, 500)]  # from every part of the tape alike
    for pattern in PATTERNS:
        lost = [lost_of(digest, 40, Condition(pattern, 0.1, "model"), 0) for digest in digests]
        assert lost == [lost_of(digest, 40, Condition(pattern, 0.1, "silence"), 0) for digest in digests]
        assert len(set(lost)) > 100
        assert np.mean(lost) == pytest.approx(0.1, rel=0.15)
    assert lost_of(digests[-1], 200_000, Condition("random", 0.2, "model"), 0).count(True) == 40_000
    assert not any(lost_of(digests[0], 40, Condition("none", 0.0, "model"), 0))


BLOCKS = 3


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Semanticodec:
    folder, small = tmp_path_factory.mktemp("weights"), codec("mini")
    checkpoints.save(folder, {small.config: small.model.state_dict()})
    return Semanticodec(small.config.name, 1, str(folder))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Four of whole blocks but for the last."""
    folder, found = tmp_path_factory.mktemp("audio"), []
    for seed, kind in enumerate(("music", "sound", "music", "sound")):
        path = folder / f"{kind}{seed}.wav"
        save(path, noise(BLOCKS * 5120 - 5, seed=seed, scale=0.1), 16_000)
        found.append(Clip(path.stem, kind, path))
    return found


@pytest.fixture(scope="module")
def measured(spec: Semanticodec, clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, measure(spec, clips, cache)


def test_scores_and_their_table(tmp_path: Path, measured: tuple[Path, Results], clips: list[Clip]) -> None:
    _, results = measured
    assert results.failed == {}
    assert all(len(results.scores(each.name, "mel_l1")) == len(clips) for each in conditions())
    clean = results.scores("nothing lost", "mel_l1")
    changed = 0
    assert [each.name for each in conditions(["opus-6"]) if not each.rate] == ["nothing lost", "opus-6, nothing lost"]
    for each in conditions():
        lost, scores = results.scores(each.name, "lost"), results.scores(each.name, "mel_l1")
        for clip in clean:
            assert (scores[clip] == clean[clip]) == (lost[clip][0] == 0)
            assert lost[clip][1] == BLOCKS
        changed += sum(share > 0 for share, _ in lost.values())
    assert changed >= 3 * len(METHODS)
    points = table(results)
    assert len(points) == 3 * len(conditions())
    for point in points:
        name = Condition(point.pattern, point.rate, point.method).name
        part = [clip.name for clip in clips if point.kind in ("all", clip.kind)]
        assert point.mel_l1.mean == pytest.approx(np.mean([results.scores(name, "mel_l1")[clip][0] for clip in part]))
        assert point.mel_l1.low <= point.mel_l1.mean <= point.mel_l1.high
        assert point.lost == pytest.approx(np.mean([results.scores(name, "lost")[clip][0] for clip in part]))
    write(tmp_path, results)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "losses.json").read_text())
    assert len(kept["table"]) == len(points)
    assert len(kept["differences"]) == 3 * len(PATTERNS) * len(RATES) * len(METHODS) * len(MEASURES)
    assert len(kept["clips"]) == len(kept["values"][0]["clips"]) == 4


def test_nothing_is_decoded_twice(
    measured: tuple[Path, Results], spec: Semanticodec, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, first = measured
    decodes = len(list(cache.rglob("*.flac")))
    masks = {(lost_of(clip.digest, BLOCKS, each, 0), clip.name) for clip in clips for each in conditions()}
    # What loses the same blocks in two patterns or rates is the same, and without losses it is so for every method.
    # These clips tell no delay, so the shipped voice was asked.
    assert decodes == 1 + len(clips) + len(METHODS) * len({mask for mask in masks if any(mask[0])})
    monkeypatch.setattr(lossy, "_decoded", lambda *_: pytest.fail("decoded again"))
    again = measure(spec, clips[::-1], cache)  # neither the order nor the company of a clip matters
    for each in conditions():
        assert again.scores(each.name, "mel_l1") == first.scores(each.name, "mel_l1")
    # What loses nothing is what the bench decodes anyway.
    run(Plan([spec], clips, cache, ("mel_l1",), compensate=False), "the same")
    assert len(list(cache.rglob("*.flac"))) == decodes


def test_a_killed_run_goes_on(tmp_path: Path, spec: Semanticodec, clips: list[Clip]) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    script = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_losses import Clip, Semanticodec, lossy, measure
decoded = lossy._decoded
def slow(codec, clip, codes):
    with Path({str(log)!r}).open("a") as file:
        file.write("decode" + chr(10))
    time.sleep(0.2)
    return decoded(codec, clip, codes)
lossy._decoded = slow
clips = [Clip(path.stem, path.stem[:5], path) for path in sorted(Path({str(clips[0].path.parent)!r}).iterdir())]
measure({spec!r}, clips, Path({str(cache)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not log.exists() or len(log.read_text().splitlines()) < len(clips) + 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: file.stat().st_mtime_ns for file in cache.rglob("*.flac")}
    assert len(kept) >= len(clips) + 2  # all without losses, and what was decoded before the last
    results = measure(spec, clips, cache)
    assert results.failed == {}
    untouched = [file for file, when in kept.items() if file.stat().st_mtime_ns == when]
    assert len(untouched) >= len(kept) - 1  # all but the one that it died at, if that was not written down yet
    assert len(list(cache.rglob("*.flac"))) > len(kept)


def test_methods_are_paired_on_the_same_clips() -> None:
    clips = {f"c{n}": {"kind": "music" if n < 8 else "sound"} for n in range(12)}
    values = {each.name: {"mel_l1": {clip: [1.0, 1.0] for clip in clips}} for each in conditions()}
    name = Condition("bursts", 0.1, "silence").name
    values[name]["mel_l1"] = {clip: [2.0 + n / 100, 1.0] for n, clip in enumerate(clips)}
    results = Results("t", {}, {}, clips, {}, values)
    found = [each for each in differences(results) if (each.pattern, each.rate) == ("bursts", 0.1)]
    assert {each.measure for each in found} == {"mel_l1"}
    tests = {(each.kind, each.test.first, each.test.second): each.test for each in found}
    assert len(tests) == 3 * 3
    better = tests["all", "model", "silence"]
    assert better.difference == pytest.approx(-1.055)
    assert better.p_holm is not None
    assert better.p_holm < 0.01
    assert tests["all", "model", "repetition"].verdict == (
        "not tested: 0 of 12 clips that differ cannot reach p < 0.05 among 3 pairs"
    )
    assert tests["sound", "model", "silence"].verdict == "not tested: 4 clips cannot reach p < 0.05 among 3 pairs"
    assert tests["music", "model", "silence"].clips == 8


def test_the_command(tmp_path: Path, spec: Semanticodec, clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATES", (0.2,))
    words = ["bench", "losses", str(clips[0].path.parent), "--model", spec.folder, "--steps", "1"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    _, *lines, kept, drawn = done.output.splitlines()
    assert len(lines) == 1 + len(PATTERNS) * len(METHODS)  # nothing lost, and one rate
    assert all(re.search(r"n = \d", line) for line in lines)
    assert kept.startswith(str(tmp_path / "out" / "losses.json"))
    assert drawn == f"{tmp_path / 'out' / 'losses.png'}: curves"
    wrong = CliRunner().invoke(app, [*words, "--beside", "opus-6, mp3-8"])
    assert wrong.exit_code == 1
    assert "no codec mp3-8 whose packets could be lost; there are opus-6, opus-8" in wrong.output
    assert json.loads((tmp_path / "out" / "losses.json").read_text())["model"] == spec.preset
    assert list((tmp_path / "cache").rglob("*.flac"))
