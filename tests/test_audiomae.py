"""AudioMAE's encoder: patches, positions, blocks."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import config, fill, noise
from torch.nn import functional

from semanticodec.nn import audiomae
from semanticodec.nn.audiomae import AudioMAE, position_table


@pytest.fixture(scope="module")
def mae() -> AudioMAE:
    module = AudioMAE(config("mini").encoder.mae)
    fill(module)
    return module.requires_grad_(False).eval()


def test_position_table() -> None:
    table = position_table(6, 16)
    assert table.shape == (1, 49, 16)
    assert not table[0, 0].any()
    for t in range(6):
        for f in range(8):
            row = table[0, 1 + 8 * t + f].tolist()
            for half, position in ((row[:8], t), (row[8:], f)):
                angles = [position / 10000 ** (i / 4) for i in range(4)]
                assert half == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)


def test_a_patch_is_one_token(mae: AudioMAE) -> None:
    """Token 8 t + f sees rows 16 t.. and bins 16 f.., and before the blocks nothing else."""
    x = noise(1, 96, 128)
    before = mae.embed(x)
    assert before.shape == (1, 48, 16)
    for t, f in ((0, 0), (3, 5), (5, 7)):
        changed = x.clone()
        changed[:, 16 * t + 15, 16 * f] += 1
        differs = (mae.embed(changed) != before).any(-1)[0].nonzero()[:, 0].tolist()
        assert differs == [8 * t + f]


def test_blocks_mix_the_whole_window(mae: AudioMAE) -> None:
    x = noise(1, 96, 128)
    before = mae(x)
    x[:, 40, 40] += 1
    assert (mae(x) != before).any(-1).all()


def test_features_are_the_mean_of_the_last_blocks(mae: AudioMAE) -> None:
    x = noise(2, 96, 128)
    outputs: list[torch.Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in mae.blocks]
    features = mae(x)
    for handle in handles:
        handle.remove()
    assert [out.shape for out in outputs] == [(2, 49, 16)] * 3
    want = (mae.norm(outputs[1]) + mae.norm(outputs[2]))[:, 1:] / 2
    torch.testing.assert_close(features, want, rtol=1e-6, atol=1e-6)


def test_attention_is_softmax_over_heads(mae: AudioMAE) -> None:
    attention = mae.blocks[0].attn
    x = noise(1, 5, 16)
    q, k, v = attention.qkv(x)[0].reshape(5, 3, 2, 8).permute(1, 2, 0, 3)
    mixed = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    want = attention.proj(mixed.transpose(0, 1).reshape(5, 16))
    torch.testing.assert_close(attention(x)[0], want, rtol=1e-5, atol=1e-6)


def test_any_subset_of_patches(mae: AudioMAE) -> None:
    """Masked training shows the blocks only some patches; where they stand is in their positions alone."""
    tokens = mae.embed(noise(1, 96, 128))
    chosen = torch.tensor([3, 17, 40, 8])
    got = mae.transform(tokens[:, chosen])
    assert got.shape == (1, 4, 16)
    again = mae.transform(tokens[:, chosen.flip(0)])
    torch.testing.assert_close(again.flip(1), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("wide", "large"), [(True, True), (True, False), (False, True)])
def test_large_layers_are_convolutions_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, wide: bool, large: bool
) -> None:
    calls = []
    convolve = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", lambda *given: calls.append(1) or convolve(*given))
    monkeypatch.setattr(audiomae, "WIDE", wide)
    monkeypatch.setattr(audiomae, "LARGE", 12 * 20 if large else 12 * 20 + 1)
    layer, x = audiomae.Linear(12, 20), noise(3, 7, 12)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))
    assert len(calls) == (wide and large)
    half = layer.bfloat16()(x.bfloat16())
    assert torch.equal(half, functional.linear(x.bfloat16(), layer.weight, layer.bias))
    assert len(calls) == (wide and large)


def test_rows_do_not_depend_on_each_other(mae: AudioMAE) -> None:
    x = noise(3, 96, 128)
    whole = mae(x)
    for row in range(3):
        torch.testing.assert_close(mae(x[row : row + 1])[0], whole[row], rtol=1e-5, atol=1e-5)


def test_positions_are_part_of_the_checkpoint(mae: AudioMAE) -> None:
    assert "pos_embed" in mae.state_dict()
    assert "pos_embed" not in dict(mae.named_parameters())
