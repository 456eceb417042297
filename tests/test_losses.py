"""The benchmark of lost blocks: what is lost, what stands in for it, and that it runs on a small codec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import codec, noise

from semanticodec.audio import save
from semanticodec.bench.clips import Clip
from semanticodec.bench.losses import METHODS, PATTERNS, RATES, losses, masked, muted, repeated, scores, table, write
from semanticodec.diffusion import SamplerOptions


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
    lost = np.array([True, False, True, True, False])
    assert masked(codes, lost, 2)[0, 0].tolist() == [-1, -1, 3, 4, -1, -1, -1, -1, 9, 10]
    assert repeated(codes, lost, 2)[0, 1].tolist() == [-1, -1, 3, 4, 3, 4, 3, 4, 9, 10]
    assert repeated(codes[..., :7], lost, 2)[0, 0].tolist() == [-1, -1, 3, 4, 3, 4, 3]
    assert muted(torch.ones(9), lost, 2).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1]


def test_scores_and_their_table(tmp_path: Path) -> None:
    small = codec("mini")
    # The lengths are those of whole blocks but for the last, and short enough to be quick.
    clips = []
    for seed, kind in enumerate(("music", "sound")):
        save(tmp_path / f"{kind}.wav", noise(3 * 5120 - 5, seed=seed, scale=0.1), 16_000)
        clips.append(Clip(kind, kind, tmp_path / f"{kind}.wav"))
    options = SamplerOptions(steps=1, guidance=1.0)
    rows = list(scores(small, clips, options, 0))
    assert len(rows) == 2 * len(PATTERNS) * len(METHODS) * (1 + len(RATES))
    clean = {(row.file, row.mel_l1) for row in rows if not row.lost}
    assert len(clean) == 2  # without a loss every method, pattern and rate is the same
    assert {row.blocks for row in rows} == {3}
    lossy = [row for row in rows if row.lost and row.pattern == "random"]
    assert lossy
    for row in lossy:
        assert (row.file, row.mel_l1) not in clean
    entries = table(rows)
    assert len(entries) == len(PATTERNS) * len(METHODS) * (1 + len(RATES))
    for entry in entries:
        part = [row for row in rows if (row.method, row.pattern, row.rate) == (entry.method, entry.pattern, entry.rate)]
        assert entry.mel_l1.mean == pytest.approx(np.mean([row.mel_l1 for row in part]))
        assert entry.lost == sum(row.lost for row in part) / 6
        assert entry.stoi is None
    write(tmp_path, small, rows, options)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "losses.json").read_text())["table"]) == len(entries)
