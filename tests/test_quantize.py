"""Stacking, nearest neighbours, codebooks and the residual encoder."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import codec, config, fill, noise

from semanticodec.config import STACKING
from semanticodec.nn.quantize import Codebooks, ResidualEncoder, nearest, stack, unstack


@pytest.mark.parametrize("by", STACKING.values())
class TestStacking:
    def test_inverse(self, by: tuple[int, int]) -> None:
        patches = noise(3, 4 * 8, 5)
        frames = stack(patches, by)
        assert frames.shape == (3, 32 // (by[0] * by[1]), 5 * by[0] * by[1])
        assert torch.equal(unstack(frames, by), patches)

    def test_order(self, by: tuple[int, int]) -> None:
        """Spec 3.3: frame (t, j) joins time steps first, then bands, lowest first."""
        patches = torch.tensor([[[10 * t + f] for t in range(4) for f in range(8)]])
        frames = stack(patches, by)[0].tolist()
        time, bands = by
        want = [
            [10 * (time * t + i) + bands * j + k for i in range(time) for k in range(bands)]
            for t in range(4 // time)
            for j in range(8 // bands)
        ]
        assert frames == want


def test_the_slowest_rate_joins_four() -> None:
    patches = torch.tensor([[[10 * t + f] for t in range(2) for f in range(8)]])
    assert stack(patches, (2, 2))[0, 1].tolist() == [2, 3, 12, 13]


class TestNearest:
    @pytest.mark.parametrize("root", [False, True])
    def test_first_on_ties(self, root: bool) -> None:
        table = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
        assert nearest(x, table, root=root).tolist() == [1, 1, 0]

    @given(seed=st.integers(0, 2**31), root=st.booleans())
    def test_is_the_nearest(self, seed: int, root: bool) -> None:
        x, table = noise(2, 7, 6, seed=seed), noise(40, 6, seed=seed + 1)
        codes = nearest(x, table, root=root)
        assert codes.dtype == torch.int64
        distances = torch.cdist(x.double(), table.double().expand(2, -1, -1))
        chosen = distances.gather(2, codes[..., None])[..., 0]
        assert (chosen <= distances.amin(2) + 1e-5).all()

    @pytest.mark.parametrize("shape", [(8,), (0, 8), (1500, 8), (3, 700, 8)])
    def test_of_any_number_of_rows(self, shape: tuple[int, ...]) -> None:
        """Many rows are compared a thousand at a time."""
        x, table = noise(*shape), noise(30, 8, seed=1)
        codes = nearest(x, table)
        assert codes.shape == shape[:-1]
        assert torch.equal(codes, (x[..., None, :] - table).square().sum(-1).argmin(-1))

    def test_roots_tie_where_squares_do_not(self) -> None:
        """Neighbouring squares have the same root in float32; the published quantiser then takes the first."""
        x, table = torch.zeros(1, 2), torch.tensor([[1.0, 2**-11.5], [1.0, 0.0]])
        assert nearest(x, table).item() == 1
        assert nearest(x, table, root=True).item() == 0

    def test_half_precision_is_compared_in_single(self) -> None:
        x, table = noise(50, 8).bfloat16(), noise(30, 8, seed=1).bfloat16()
        assert torch.equal(nearest(x, table), nearest(x.float(), table.float()))


def test_codebooks_start_empty_and_look_up() -> None:
    books = Codebooks(config("mini", 50))
    assert not books.semantic.any()
    books.semantic, books.acoustic = noise(50, 32), noise(70, 32, seed=1)
    semantic, acoustic = books.embed(torch.tensor([[[3, 49], [0, 69]]]))
    assert torch.equal(semantic[0], books.semantic[[3, 49]])
    assert torch.equal(acoustic[0], books.acoustic[[0, 69]])
    assert {name for name, _ in books.named_buffers()} == set(books.state_dict()) == {"semantic", "acoustic"}


@pytest.mark.parametrize("flavour", ["official", "mini"])
def test_missing_codes_embed_as_zeros(flavour: str) -> None:
    small = codec(flavour)
    codes = torch.tensor([[[3, -1, 3, -1], [7, 7, -1, -1]]])
    embedded = small.embed(codes)
    width = small.config.encoder.acoustic_dim
    acoustic, semantic = embedded[0, :, :width], embedded[0, :, width:]
    assert torch.equal(acoustic[:2], small.model.codebooks.acoustic[[7, 7]])
    assert torch.equal(semantic[[0, 2]], small.model.codebooks.semantic[[3, 3]])
    assert not acoustic[2:].any()
    assert not semantic[[1, 3]].any()


class TestResidualEncoder:
    def encoder(self, flavour: str) -> ResidualEncoder:
        module = ResidualEncoder(config(flavour))
        fill(module)
        return module.requires_grad_(False)

    @pytest.mark.parametrize("flavour", ["official", "mini"])
    def test_padding_is_minus_one(self, flavour: str) -> None:
        module = self.encoder(flavour)
        x, semantic = noise(2, 6, 16), noise(2, 6, 16, seed=1)
        padding = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
        got = module(x, semantic, padding)
        assert got.shape == (2, 6, 16)
        hidden, cell = x.clone(), semantic.clone()
        hidden[0, 4:] = cell[0, 4:] = -1
        assert torch.equal(got, module(hidden, cell))
        hidden[0, 4:] = 3.0
        assert torch.equal(module(hidden, cell, padding), got)

    def test_mini_hears_only_the_past(self) -> None:
        module = self.encoder("mini")
        x, semantic = noise(1, 6, 16), noise(1, 6, 16, seed=1)
        before = module(x, semantic)
        x[:, 4] += 1
        after = module(x, semantic)
        assert torch.equal(before[:, :4], after[:, :4])
        assert (before[:, 4:] != after[:, 4:]).any(-1).all()

    def test_official_hears_the_whole_window(self) -> None:
        module = self.encoder("official")
        x, semantic = noise(1, 6, 16), noise(1, 6, 16, seed=1)
        before = module(x, semantic)
        x[:, 4] += 1
        assert (module(x, semantic) != before).any(-1).all()
