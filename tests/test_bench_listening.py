"""Listening tests: what is exported for webMUSHRA, and what its answers say."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from semanticodec.audio import resample
from semanticodec.bench.align import loudness
from semanticodec.bench.clips import find
from semanticodec.bench.listening import ANCHORS, Item, analyse, export, key_of
from semanticodec.cli import app
from semanticodec.config import SAMPLE_RATE
from semanticodec.errors import ConfigError

ROW = ("session_test_id", "listener", "session_uuid", "trial_id", "rating_stimulus", "rating_score", "rating_time")
COLUMNS = (*ROW, "rating_comment")
"""Of what webMUSHRA's service/write.php writes."""
MEANT = {"reference": 100.0, "a": 70.0, "b": 30.0, "anchor70": 50.0, "anchor35": 20.0}


def items(count: int = 2) -> list[Item]:
    rng = np.random.default_rng(0)
    return [
        Item(
            f"clip{n}",
            rng.standard_normal(SAMPLE_RATE) * 0.1,
            {"a": rng.standard_normal(15_000) * 0.3, "b": np.zeros(9)},
        )
        for n in range(count)
    ]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def answered(path: Path, key: Path, listeners: Mapping[str, Callable[[str, int], float]], *, uuid: bool = True) -> Path:
    """Write what listeners (name -> score of a condition in the n-th trial) answer, as webMUSHRA does."""
    columns = [name for name in COLUMNS if uuid or name != "session_uuid"]
    test, trials = read(key)["testId"], read(key)["trials"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for place, (listener, rated) in enumerate(listeners.items()):
            for number, (trial, facts) in enumerate(trials.items()):
                for stimulus, condition in {"reference": "reference", **facts["stimuli"]}.items():
                    cells = (test, listener.strip(), f"id-{place}", trial, stimulus, rated(condition, number), 900)
                    writer.writerow({**dict(zip(ROW, cells, strict=True)), "rating_comment": 'a "good" one,\nreally'})
    return path


def honest(change: float = 0.0, **others: float) -> Callable[[str, int], float]:
    return lambda condition, number: others.get(condition, MEANT[condition] - change)  # noqa: ARG005


def test_listening_tests_are_exported(tmp_path: Path):
    keys = [read(export(items(), tmp_path / name, seed=seed)) for name, seed in (("one", 3), ("one", 3), ("one", 4))]
    assert keys[0] == keys[1]
    assert keys[1]["trials"] != keys[2]["trials"]
    export(items(), tmp_path / "one", seed=3)
    config = read(tmp_path / "one" / "config.yaml")
    trials = [page for page in config["pages"] if page["type"] == "mushra"]
    assert [page["id"] for page in trials] == ["trial001", "trial002"]
    assert config["testId"] == "one"
    assert config["pages"][-1]["type"] == "finish"
    assert config["pages"][-1]["writeResults"]
    assert config["pages"][-1]["questionnaire"][0]["name"] == "listener"
    for page in trials:
        meaning = keys[0]["trials"][page["id"]]["stimuli"]
        assert sorted(meaning.values()) == ["a", "anchor35", "anchor70", "b"]
        assert page["stimuli"].keys() == meaning.keys()
        assert page["randomize"]
        assert not any(page[name] for name in ("createAnchor35", "createAnchor70", "showConditionNames"))
        levels = {}
        for name, path in {"reference": page["reference"], **page["stimuli"]}.items():
            wave, rate = soundfile.read(tmp_path / Path(path).relative_to("configs"))
            assert (rate, len(wave)) == (48_000, 48_000)
            levels[meaning.get(name, name)] = np.sqrt((wave**2).mean())
            spectrum = np.abs(np.fft.rfft(wave))
            if (cutoff := ANCHORS.get(meaning.get(name, ""))) is not None:
                above = spectrum[cutoff + 500 :].max()
                assert 20 * np.log10(above / spectrum[: cutoff - 500].max()) < -40
        assert levels["a"] == pytest.approx(levels["reference"], rel=0.1)
    with pytest.raises(ConfigError, match="12 systems"):
        export([Item("x", np.ones(9), {str(n): np.ones(9) for n in range(12)})], tmp_path / "four")


def test_nothing_that_is_published_tells_the_systems(tmp_path: Path):
    made = [Item("clip", np.random.default_rng(0).standard_normal(8000), {"opus-6": np.ones(9), "mini": np.ones(9)})]
    key = export(made, tmp_path / "mushra")
    assert key == key_of(tmp_path / "mushra") == tmp_path / "mushra-key.json"
    assert "opus-6" in key.read_text()
    published = [path for path in (tmp_path / "mushra").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wav" for path in published) == 5
    secrets = re.compile(rb"opus|mini|anchor(35|70)\b.*wav|\bclip\b", re.IGNORECASE)
    for path in published:
        assert not secrets.search(path.name.encode())
        assert not secrets.search(path.read_bytes().replace(b"createAnchor", b"")), path
    for place in (tmp_path / "mushra" / "key.json", tmp_path / "web" / "configs" / "key.json"):
        with pytest.raises(ConfigError, match="listeners could read"):
            export(made, tmp_path / "web" / "configs" / "test" if "web" in place.parts else tmp_path / "mushra", place)
    with pytest.raises(ConfigError, match="listeners could read"):
        export(made, tmp_path / "web" / "configs" / "test")
    assert not (tmp_path / "web").exists()
    assert export(made, tmp_path / "web" / "configs" / "test", tmp_path / "safe" / "key.json").is_file()


def test_a_second_export_leaves_nothing_of_the_first(tmp_path: Path):
    key = export(items(3), tmp_path / "mushra", seed=1)
    old = {path.relative_to(tmp_path) for path in (tmp_path / "mushra").rglob("*.wav")}
    export(items(1), tmp_path / "mushra", seed=2)
    stimuli = {path.relative_to(tmp_path) for path in (tmp_path / "mushra").rglob("*.wav")}
    pages = [page for page in read(tmp_path / "mushra" / "config.yaml")["pages"] if page["type"] == "mushra"]
    told = {path for page in pages for path in (page["reference"], *page["stimuli"].values())}
    assert {f"configs/{path.as_posix()}" for path in stimuli} == told
    assert old - stimuli
    assert list(read(key)["trials"]) == ["trial001"]


def test_what_is_not_ours_stays(tmp_path: Path):
    theirs = tmp_path / "theirs"
    (theirs / "stimuli").mkdir(parents=True)
    (theirs / "stimuli" / "mine.wav").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not made by semanticodec bench"):
        export(items(1), theirs)
    assert (theirs / "stimuli" / "mine.wav").read_bytes() == b"mine"
    (tmp_path / "test-key.json").write_text("of answers that are still to come")
    with pytest.raises(ConfigError, match="may be needed"):
        export(items(1), tmp_path / "test")
    assert "still to come" in (tmp_path / "test-key.json").read_text()


def test_stimuli_are_no_recordings_of_a_later_run(tmp_path: Path):
    soundfile.write(tmp_path / "take.wav", np.zeros(800), SAMPLE_RATE)
    export(items(1), tmp_path / "mushra")
    assert [clip.name for clip in find(tmp_path)] == ["take"]


def test_answers_are_screened_and_averaged(tmp_path: Path):
    key = export(items(4), tmp_path / "mushra", seed=1)
    listeners = {f"ok{n}": honest(n) for n in range(6)}
    listeners |= {"deaf": honest(reference=60), "kind": honest(anchor70=95)}
    answers = answered(tmp_path / "mushra.csv", key, listeners)
    verdict = analyse(answers, key)
    assert verdict.kept == [f"ok{n} id-{n}" for n in range(6)]
    assert {who: why.split()[2:4] for who, why in verdict.excluded.items()} == {
        "deaf id-6": ["hidden", "reference"],
        "kind id-7": ["7", "kHz"],
    }
    assert {name: mean.mean for name, mean in verdict.means.items()} == {n: v - 2.5 for n, v in MEANT.items()}
    assert list(verdict.means) == ["reference", "a", "anchor70", "b", "anchor35"]
    assert all(mean.low < mean.mean < mean.high for mean in verdict.means.values())
    assert {mean.clips for mean in verdict.means.values()} == {pair.clips for pair in verdict.comparisons} == {6}
    pair = next(pair for pair in verdict.comparisons if (pair.first, pair.second) == ("a", "b"))
    assert pair.difference == pytest.approx(40)
    assert {p.first for p in verdict.comparisons} | {p.second for p in verdict.comparisons} == {"reference", "a", "b"}
    assert (pair.p, pair.p_holm) == (None, None)  # 3 pairs / 2**5 is more than 0.05
    done = CliRunner().invoke(app, ["bench", "analyse", str(answers), str(key)])
    assert done.exit_code == 0, done.output
    assert "left out deaf" in done.output
    assert "6 listeners; 95 % intervals over them" in done.output
    assert re.search(r"a +67\.5 \[\d+\.\d, \d+\.\d\], n = 6", done.output)
    assert "a - b: +40.0, p (Holm) = not tested: 6 listeners cannot reach p < 0.05 among 3 pairs" in done.output


def test_when_nobody_is_left_that_is_said(tmp_path: Path):
    key = export(items(1), tmp_path / "mushra", seed=1)
    answers = answered(tmp_path / "mushra.csv", key, {"deaf": honest(10, reference=50)})
    for more in ([], ["--form", "json"]):
        done = CliRunner().invoke(app, ["bench", "analyse", str(answers), str(key), *more])
        assert done.exit_code == 1
        assert "no listener's answers count" in done.output
        assert "rated the hidden reference below 90" in done.output


def test_one_slip_in_ten_leaves_nobody_out(tmp_path: Path):
    key = export(items(10), tmp_path / "mushra", seed=1)

    def slips(count: int) -> Callable[[str, int], float]:
        return lambda condition, number: 60 if condition == "reference" and number < count else MEANT[condition]

    verdict = analyse(answered(tmp_path / "mushra.csv", key, {"one": slips(1), "two": slips(2)}), key)
    assert verdict.kept == ["one id-0"]


def test_a_mid_anchor_that_hardly_anyone_hears_leaves_nobody_out(tmp_path: Path):
    key = export(items(1), tmp_path / "mushra", seed=1)
    few, many = ({f"l{n}": honest(anchor70=95 if n < kind else 50) for n in range(8)} for kind in (2, 3))
    assert len(analyse(answered(tmp_path / "few.csv", key, few), key).excluded) == 2  # a quarter of them
    assert analyse(answered(tmp_path / "many.csv", key, many), key).excluded == {}


def test_people_with_the_same_initials_are_two(tmp_path: Path):
    key = export(items(1), tmp_path / "mushra", seed=1)
    people = {"AB": honest(), "AB ": honest(10)}
    for uuid, names in ((True, ["AB id-0", "AB id-1"]), (False, ["AB", "AB (2)"])):
        people["AB "] = honest(10, reference=100)
        verdict = analyse(answered(tmp_path / "mushra.csv", key, people, uuid=uuid), key)
        assert verdict.kept == names
        assert verdict.means["a"].mean == 65
        assert verdict.means["a"].low < 65 < verdict.means["a"].high


def test_answers_that_do_not_fit_are_named(tmp_path: Path):
    key = export(items(1), tmp_path / "mushra", seed=1)
    answers = answered(tmp_path / "mushra.csv", key, {"AB": honest()})
    other = export(items(1), tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"row 2: of the test 'mushra', .*other-key\.json of 'other'"):
        analyse(answers, other)
    one = items(1)[0]
    longer = replace(one, decodes={"a": one.decodes["a"], "c": one.decodes["b"]})
    for made in ([longer], [replace(one, name="another")], items(2)):  # of the same name and seed
        again = export(made, tmp_path / "elsewhere" / "mushra", seed=1)
        with pytest.raises(ConfigError, match=r"row 3: s\d+ of trial001 is not in"):
            analyse(answers, again)
    with pytest.raises(ConfigError, match="is no key"):
        analyse(answers, tmp_path / "mushra" / "config.yaml")
    text = answers.read_text()
    answers.write_text(text.replace(",70.0,", ",seventy,"))
    with pytest.raises(ConfigError, match="the score is 'seventy'; wanted is 0 to 100"):
        analyse(answers, key)
    with pytest.raises(ConfigError, match="--listener"):
        analyse(answers, key, listener="email")
    answers.write_bytes(text.replace("AB", "Jö").encode("latin-1"))
    with pytest.raises(ConfigError, match="no CSV file in UTF-8"):
        analyse(answers, key)
    answers.write_text("trial_id\n1\n")
    with pytest.raises(ConfigError, match="needs the columns"):
        analyse(answers, key)


def test_a_peak_in_one_stimulus_turns_all_of_its_trial_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "test"
    folder.mkdir()
    monkeypatch.chdir(folder)
    clicks = np.zeros(3 * SAMPLE_RATE)
    clicks[::4000] = 1.0
    smeared = np.convolve(clicks, np.hanning(400), "same") * np.random.default_rng(0).standard_normal(len(clicks))
    key = export([Item("clicks", clicks, {"a": smeared})], Path())
    page = next(page for page in read(folder / "config.yaml")["pages"] if page["type"] == "mushra")
    meaning = read(key)["trials"][page["id"]]["stimuli"]
    levels = {}
    for name, path in {"reference": page["reference"], **page["stimuli"]}.items():
        assert path.startswith("configs/test/stimuli/")
        wave, _ = soundfile.read(folder / Path(path).relative_to("configs/test"))
        assert np.abs(wave).max() <= 0.991
        levels[meaning.get(name, name)] = loudness(resample(torch.from_numpy(wave), 48_000, SAMPLE_RATE).numpy())
    assert levels["a"] == pytest.approx(levels["reference"], abs=0.5)
