"""From code embeddings to context or grid."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import codec, noise, random_codes
from torch import Tensor

from semanticodec.config import RATES, TokenRate
from semanticodec.nn.conditioners import ContextConditioner, GridConditioner, interleaved_positions


def test_positions_follow_their_formula() -> None:
    table = interleaved_positions(300, 12)
    assert table.dtype == torch.float32
    for p in (0, 1, 17, 299):
        for i in range(6):
            angle = p * math.exp(-2 * i * math.log(10000) / 12)
            assert table[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-4)
            assert table[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-4)


class TestContext:
    conditioner = ContextConditioner(10, 4)

    def test_appends_positions(self) -> None:
        features = noise(2, 10, 3)
        context = self.conditioner(features)
        assert context.shape == (2, 10, 7)
        assert torch.equal(context[..., :3], features)
        assert torch.equal(context[1, :, 3:], interleaved_positions(10, 4))

    def test_missing_frames_are_minus_one(self) -> None:
        """Spec 4.2: rows of -1, with their positions."""
        context = self.conditioner(noise(1, 6, 3))
        assert (context[:, 6:, :3] == -1).all()
        assert torch.equal(context[0, :, 3:], interleaved_positions(10, 4))

    def test_is_rebuilt_not_stored(self) -> None:
        assert not self.conditioner.state_dict()


def grid(rate: TokenRate, features: Tensor) -> Tensor:
    conditioner = codec("mini", rate).model.conditioner
    assert isinstance(conditioner, GridConditioner)
    result: Tensor = conditioner(features)
    return result


class TestGrid:
    @pytest.mark.parametrize("rate", RATES)
    def test_a_frame_lies_on_the_cells_of_its_patches(self, rate: TokenRate) -> None:
        """Each patch has four latent steps and two of the sixteen cells; nothing else changes with it."""
        small = codec("mini", rate)
        time, bands = small.config.stack
        frames = 4 // time * small.config.group
        features = small.embed(random_codes(small.config, frames))
        before = grid(rate, features)
        assert before.shape == (1, small.config.decoder.conditioning.channels, 16, 16)
        for frame in range(frames):
            t, j = divmod(frame, small.config.group)
            changed = features.clone()
            changed[:, frame] += 1
            cells = (grid(rate, changed) != before).any(1)[0]
            want = torch.zeros(16, 16, dtype=torch.bool)
            want[4 * time * t : 4 * time * (t + 1), 2 * bands * j : 2 * bands * (j + 1)] = True
            assert torch.equal(cells, want)

    @pytest.mark.parametrize("part", range(4))
    def test_each_quarter_of_a_joined_frame_is_its_own_patch(self, part: int) -> None:
        """At 25 tokens per second a frame's channels are those of four patches, in the order of spec 3.3."""
        small = codec("mini", 25)
        features = small.embed(random_codes(small.config, small.config.group))
        before = grid(25, features)
        for first, width in ((0, small.config.encoder.acoustic_dim), (small.config.encoder.acoustic_dim, 64)):
            changed = features.clone()
            quarter = width // 4
            changed[:, 1, first + part * quarter : first + (part + 1) * quarter] += 1
            cells = (grid(25, changed) != before).any(1)[0]
            row, column = 4 * (part // 2), 4 + 2 * (part % 2)
            want = torch.zeros(8, 16, dtype=torch.bool)
            want[row : row + 4, column : column + 2] = True
            assert torch.equal(cells, want)

    def test_columns_do_not_know_where_they_are(self) -> None:
        """What a code means does not depend on how long the stream has been running."""
        features = codec("mini").embed(random_codes(codec("mini").config, 24))
        whole = grid(100, features)
        torch.testing.assert_close(whole[:, :, 8:], grid(100, features[:, 16:]), rtol=1e-5, atol=1e-6)

    def test_bands_and_rates_are_told_apart(self) -> None:
        same = torch.zeros(1, 8, 32)
        bands = grid(100, same)[0, :, 0]
        assert len({tuple(bands[:, 2 * f].tolist()) for f in range(8)}) == 8
        assert not torch.equal(grid(100, same), grid(50, torch.zeros(1, 4, 64)))
