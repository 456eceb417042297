"""AudioMAE features as the sequence that AudioLDM 2's GPT-2 learns to write."""

from __future__ import annotations

import pytest
import torch
from tiny import config, fill, noise

from semanticodec.audio import PADDING_ROW, fbank
from semanticodec.conditioners.audiomae import context, pool, window
from semanticodec.nn.audiomae import AudioMAE


def test_window_of_a_short_sound() -> None:
    wave = noise(2, 4000, scale=0.1)
    bank = window(wave, 6)
    assert bank.shape == (2, 96, 128)
    rows = 1 + (4000 - 400) // 160
    assert torch.equal(bank[:, :rows], fbank(wave))
    assert torch.equal(bank[:, rows:], torch.full((2, 96 - rows, 128), PADDING_ROW))


def test_window_of_a_long_sound() -> None:
    wave = noise(1, 20_000, scale=0.1)
    assert torch.equal(window(wave, 6), fbank(wave)[:, :96])


@pytest.mark.parametrize(("time", "bands"), [(2, 4), (1, 1), (4, 8)])
def test_pool_is_halfway_between_mean_and_maximum(time: int, bands: int) -> None:
    features = noise(2, 4 * 8, 3)
    out = pool(features, time, bands)
    assert out.shape == (2, 32 // (time * bands), 3)
    grid = features.reshape(2, 4, 8, 3)
    for t in range(4 // time):
        for f in range(8 // bands):
            cell = grid[:, t * time : (t + 1) * time, f * bands : (f + 1) * bands].flatten(1, 2)
            want = (cell.mean(1) + cell.amax(1)) / 2
            torch.testing.assert_close(out[:, t * (8 // bands) + f], want, rtol=1e-6, atol=1e-6)


def test_context() -> None:
    small = config("mini").encoder.mae
    mae = AudioMAE(small)
    fill(mae)
    wave = noise(2, 96 * 160 + 240, scale=0.1)
    vectors, mask = context(mae, wave, 2, 4)
    assert torch.equal(vectors, pool(mae(window(wave, 6)), 2, 4))
    assert torch.equal(mask, torch.ones(2, 6))
