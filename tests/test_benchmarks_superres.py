"""The figures of super-resolution and of code editing, on sounds whose answer is known and on small models."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_superres import dull, model
from tiny import codec, random_codes

from benchmarks import codes as experiments
from benchmarks import superres
from benchmarks.superres import Row, lsd, summary
from semanticodec.superres import SuperResolution


def test_the_distance_counts_powers_of_ten() -> None:
    wave = 0.1 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert lsd(wave, wave) == 0
    assert lsd(wave, 10 * wave) == pytest.approx(2.0, abs=1e-3)
    assert lsd(torch.zeros(9000), torch.zeros(9000)) == 0


def test_the_gain_is_that_of_the_sums() -> None:
    rows = [Row("a", "music", 8000, 4.0, 1.0), Row("b", "music", 8000, 1.0, 1.0), Row("c", "speech", 8000, 2.0, 1.0)]
    music, speech = summary(rows)
    assert (music["clips"], music["sinc"], music["ours"]) == (2, 2.5, 1.0)
    assert music["smaller"] == pytest.approx(1 - 2.0 / 5.0)
    assert music["low"] <= music["smaller"] <= music["high"]
    assert (speech["kind"], speech["smaller"]) == ("speech", 0.5)


def test_the_command_prints_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [("one", "speech", dull(24_000, cutoff=9000)[0]), ("two", "music", dull(24_000, cutoff=9000, seed=1)[0])]
    monkeypatch.setattr(superres, "development", lambda *_: iter(clips))
    monkeypatch.setattr(SuperResolution, "from_pretrained", lambda *_, **__: model())
    superres.main(["--out", str(tmp_path / "figures.json"), "--threads", "2"])
    assert "smaller by" in capsys.readouterr().out
    kept: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["clip"], row["rate"]) for row in kept["clips"]] == [
        (n, r) for n in ("one", "two") for r in (8000, 12000)
    ]
    assert (tmp_path / "figures.png").stat().st_size > 10_000


def test_experiments_on_codes_find_something() -> None:
    small = codec("mini")
    first, second = (random_codes(small.config, 8 * 24, seed=seed) for seed in (1, 2))
    found: experiments.Found = defaultdict(list)
    experiments.repair(small, first, np.random.default_rng(0), found)
    experiments.crossfade(small, first, second, found)
    experiments.swap(small, first, second, found)
    assert len(found) == 3 * 2 + 2 + 2
    assert all(len(values) == 1 and np.isfinite(values[0]) for values in found.values())
    assert all(values[0] > 0 for name, values in found.items() if name.startswith("repair"))
