"""Fitting a prior: what is trained is what is written, to the bit, and it learns what follows what."""

from pathlib import Path

import numpy as np
import tiny
import torch

from semanticodec.training.loop import RunOptions, launch, train
from semanticodec.training.prior import CodedCorpus, PriorStage
from semanticodec.wire import entropy, prior


def test_a_trained_prior_codes_what_it_has_seen_in_fewer_bytes(tmp_path: Path) -> None:
    small = tiny.codec("mini", 100)
    codes = [
        small.encode(tiny.noise(1, 48_000, seed=seed, scale=0.3), 16_000)[0].numpy().astype(np.uint16)
        for seed in range(3)
    ]
    sides = CodedCorpus(codes[:2], small.config), CodedCorpus(codes[2:], small.config)
    sizes = []
    for steps in (1, 40):
        out = tmp_path / str(steps)
        out.mkdir()
        options = RunOptions(out, steps=steps, minutes=10, batch=64, learning_rate=1e-2, evaluate_every=100)
        stage = PriorStage(small, sides, options)
        train(stage, options, launch(options))
        made = prior.parse(stage.raw.tensors())
        given = codes[0][None, :, :40].astype(np.int64)
        data = entropy.encode(made, given)
        assert np.array_equal(entropy.decode(made, data, 40), given)
        sizes.append(len(data))
        # The trained network's probability of a code is that of its integers.
        grids = tuple(grid.numpy()[None] for grid in stage.corpus.grids)
        step, band, _ = stage.corpus.batch(8, 0)
        with torch.no_grad():
            bits = stage.raw(stage.corpus.grids, step, band, torch.full((8,), 2))
        for q in prior.STREAMS:
            seen = []
            for t, b in zip(step.tolist(), band.tolist(), strict=True):
                table = made.frequencies(q, grids, np.array([0]), t - prior.MARGIN, np.array([b]))[0]
                seen.append(-np.log2(table[grids[q][0, t, b + prior.MARGIN]] / table.sum()))
            assert abs(np.mean(seen) - float(bits[q])) < 0.1
    assert sizes[1] < sizes[0]
