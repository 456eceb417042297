"""This repository's quality runs, and that the README's tables are those of the results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import quality, readme
from semanticodec.bench import losses
from semanticodec.bench.results import Results


def results() -> Results:
    values = {
        "mini": {"kbps_net": {"a": [1.0, 2.0], "b": [2.0, 2.0]}, "stoi": {"a": [0.5, 1.0], "b": [0.7, 1.0]}},
        "theirs 1.5": {"kbps_net": {"a": [0.5, 1.0]}, "stoi": {"a": [0.9, 1.0]}},
    }
    return Results(
        title="t",
        machine={"commit": "0123456789"},
        settings={"rate": 16_000},
        clips={"a": {"kind": "speech"}, "b": {"kind": "music"}},
        systems={"mini": {"family": "mini"}, "theirs 1.5": {"family": "theirs", "measured": False}},
        values=values,
    )


def test_a_table_has_a_row_per_system_by_bitrate():
    text = readme.compared(results(), [("speech", "stoi"), ("speech", "mel_l1"), ("music", "stoi")])
    assert text.splitlines() == [
        "| system | kbit/s | speech: STOI | mel L1 | music: STOI |",
        "|---|---|---|---|---|",
        "| theirs 1.5 | 0.50* | 0.900 |  |  |",
        "| mini | 1.50 | 0.500 |  | 0.700 |",
        "",
        "Clips: 1 of speech, 1 of music; commit 0123456.",
    ]


def test_a_column_of_fewer_clips_says_so():
    found = results()
    found.values["mini"]["mel_l1"] = {"a": [0.5, 1.0]}
    found.clips["b"]["kind"] = "speech"
    text = readme.compared(found, [("speech", "stoi"), ("speech", "mel_l1")])
    assert text.splitlines()[-1] == "Clips: 2 of speech (mel L1 1); commit 0123456."


def test_columns_may_show_how_sure_they_are():
    found = results()
    found.values["mini"]["mel_l1"] = {"a": [0.5, 1.0]}
    found.clips["b"]["kind"] = "speech"
    lines = readme.compared(found, [("speech", "stoi"), ("speech", "mel_l1")], reach=True).splitlines()
    assert lines[3] == "| mini | 1.50 | 0.600 ± 0.100 | 0.500 |"
    assert lines[-1].endswith("interval over speakers and recordings.")


def test_what_codes_tell_stands_beside_what_sound_tells():
    systems = {"ours": {"probe_codes": {"kind": "67 % [35, 95] of 3 (chance 53; by folder, 21 of them)", "sr": "9 %"}}}
    settings = {"probe_baseline": {"kind": "66 % [41, 91] of 3 (chance 53; by folder, 21 of them)"}}
    found = dataclasses.replace(results(), settings=settings, systems=systems)
    assert readme.probed(found, "ours").endswith("by chance): kind 67 % (66 %; 53 %).")
    assert readme.probed(results(), "mini").endswith("by chance): too few to say.")


def test_lost_blocks_have_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clips = {f"{kind}{n}": {"kind": kind} for kind in ("speech", "music", "sound") for n in range(7)}
    better = {"model": 0.0, "repetition": 0.1, "silence": 0.1, "opus-6": 0.2}
    values = {
        each.name: {
            "lost": {clip: [0.9 * each.rate, 20.0] for clip in clips},
            "mel_l1": {clip: [0.5 + each.rate * better[each.method] + int(clip[-1]) / 100, 1.0] for clip in clips},
            "stoi": {clip: [0.75, 1.0] for clip in clips},
            "kbps_net": {clip: [6.5, 1.0] for clip in clips},
        }
        for each in losses.conditions(["opus-6"])
    }
    machine = {"commit": "0123456789"}
    losses.write(tmp_path, Results("t", machine, {"model": "mini-100", "beside": ["opus-6"]}, clips, {}, values))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.losses().splitlines()
    assert lines[0] == "| lost blocks | filled by | speech: STOI | mel L1 | music: mel L1 | sound: mel L1 |"
    assert len(lines) == 2 + 2 + 3 * 4 + 2
    assert lines[3].startswith("| none | opus-6, 6.5 kbit/s | 0.750 (0.750 to 0.750) | 0.530 (0.")
    assert lines[2].startswith("| none |  | 0.750 (0.750 to 0.750) | 0.530 (0.")
    assert lines[9].startswith("| 18.0%, random | repetition | 0.750 (0.750 to 0.750) | 0.550* (0.5")
    assert lines[8].startswith("| 18.0%, random | model | 0.750 (0.750 to 0.750) | 0.530 (0.5")
    assert "mini-100, clips: 7 of speech, 7 of music, 7 of sound" in lines[-1]


def test_tables_go_between_their_marks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "two.md").write_text("| y |")
    monkeypatch.setattr(readme, "TABLES", {"one": lambda: "| x |", "two": (tmp_path / "two.md").read_text})
    text = "a\n<!-- table one -->\nold\n<!-- /table -->\nb <!-- table two --><!-- /table -->"
    done = readme.filled(text)
    assert done == "a\n<!-- table one -->\n\n| x |\n\n<!-- /table -->\nb <!-- table two -->\n\n| y |\n\n<!-- /table -->"
    assert readme.filled(done) == done
    (tmp_path / "two.md").unlink()
    assert "Not measured yet" in readme.filled(done)


def test_the_readme_has_the_tables_of_the_results():
    """`make readme` writes them."""
    pages = [page.read_text() for page in (readme.README, readme.CORPUS)]
    for name in readme.TABLES:
        assert sum(f"<!-- table {name} -->" in page for page in pages) == 1
    for page in pages:
        assert page == readme.filled(page)


def test_recorded_scores_stand_beside_measured_ones(tmp_path: Path):
    (tmp_path / "published_scores.csv").write_text(
        "system,nominal_kbps,name,pesq,stoi,estoi,visqol,mel,gain_db\n"
        "Codec 2,0.7,a.wav,1.25,0.5,0.4,2.5,2.0,0.1\nCodec 2,0.7,b.wav,nan,0.25,0.4,2.5,2.0,0.1\n"
        "theirs,1.5,a.wav,1,1,1,1,1,0\n"
    )
    merged = quality.with_recorded(results(), tmp_path)
    assert list(merged.systems) == ["mini", "theirs 1.5", "Codec 2 0.7"]
    assert merged.values["theirs 1.5"]["stoi"] == {"a": [0.9, 1.0]}  # what was measured stays
    assert merged.values["Codec 2 0.7"]["pesq_wb"] == {"a": [1.25, 1.0]}
    assert merged.values["Codec 2 0.7"]["stoi"] == {"a": [0.5, 1.0], "b": [0.25, 1.0]}
    assert merged.systems["Codec 2 0.7"]["measured"] is False


def test_costs_are_those_of_an_idle_machine():
    measured = results()
    measured.systems["mini"]["peak_memory_mb"] = 700.0
    again = quality.with_costs(results(), measured)
    assert again.systems["mini"] == {"family": "mini", "peak_memory_mb": 700.0}
    assert again.systems["theirs 1.5"] == results().systems["theirs 1.5"]
    assert again.settings["costs_of_commit"] == "0123456789"
    later = quality.with_costs(dataclasses.replace(results(), machine={"commit": "later"}), again)
    assert later.settings["costs_of_commit"] == "0123456789"


def test_runs_of_other_names_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "plans", lambda *_: {})
    with pytest.raises(SystemExit):
        quality.main(["dev", "nonsense"])
    assert "no run nonsense; there are published, dev, fast, steps" in capsys.readouterr().err


def test_the_runs_are_planned(root: Path, tmp_path: Path):
    audio = root.parent / "shared" / "audio"
    if not (audio / "dev" / "manifest.csv").is_file():
        pytest.skip("needs ../shared/audio")
    plans = quality.plans(audio, tmp_path, 1, 3, ["wer", "dwer"])
    assert plans.keys() == set(quality.RUNS)
    assert (len(plans["dev"].clips), plans["dev"].costly_every) == (42, 1)
    assert len(plans["published"].clips) == 24
    assert plans["published"].compensate is False
    assert {clip.name for clip in plans["steps"].clips} <= {clip.name for clip in plans["dev"].clips}
    assert "wer" not in plans["dev"].metrics
    assert {codec.name for codec in plans["steps"].codecs} == {f"{m}@{n}" for m in quality.MINI for n in (1, 2, 4)}
