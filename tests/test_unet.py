"""The U-Net: its published names, its contexts, and its numbers."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from golden import Goldens, check, shapes
from torch import Tensor, nn

from semanticodec.config import UNetConfig, preset
from semanticodec.errors import ConfigError
from semanticodec.nn.norm import GroupNorm
from semanticodec.nn.unet import GEGLU, Attention, SpatialTransformer, UNet, time_embedding

TINY = UNetConfig(
    in_channels=5, out_channels=3, base=16, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4
)
CROSS = replace(TINY, contexts=(None, 6, 10))


def randomized(config: UNetConfig) -> UNet:
    """Build a U-Net without the zeros it starts from, which would hide everything."""
    generator = torch.Generator().manual_seed(7)
    unet = UNet(config)
    with torch.no_grad():
        for parameter in unet.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return unet


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cross() -> UNet:
    return randomized(CROSS)


def contexts(batch: int, seed: int = 0) -> list[tuple[Tensor, Tensor | None]]:
    return [(noise(batch, 4, 6, seed=seed), None), (noise(batch, 9, 10, seed=seed + 1), None)]


T = torch.tensor([3, 700])


def test_official_sizes() -> None:
    counts = {100: 75_040_584, 50: 85_854_024, 25: 107_480_904}
    for rate, count in counts.items():
        with torch.device("meta"):
            unet = UNet(preset(f"semanticodec-{rate}-4096").decoder.latent.unet)
        assert sum(p.numel() for p in unet.parameters()) == count


def test_mini_runs_and_starts_from_zero() -> None:
    config = preset("mini-100").decoder.latent.unet
    unet = UNet(config)
    out = unet(noise(2, config.in_channels, 12, 16), T)
    assert out.shape == (2, 8, 12, 16)
    assert not out.any()


def test_mini_stages() -> None:
    with torch.device("meta"):
        unet = UNet(preset("mini-100").decoder.latent.unet)
    names = [[type(layer).__name__ for layer in stage] for stage in unet.input_blocks]
    res, attention = ["ResBlock"], ["ResBlock", "SpatialTransformer"]
    assert names == [["Conv2d"], res, ["Downsample"], attention, ["Downsample"], attention]
    assert [type(layer).__name__ for layer in unet.middle_block] == [*attention, "ResBlock"]
    names = [[type(layer).__name__ for layer in stage] for stage in unet.output_blocks]
    assert names == [attention, [*attention, "Upsample"], attention, [*attention, "Upsample"], res, res]


def test_every_parameter_gets_a_gradient(cross: UNet) -> None:
    cross.zero_grad()
    cross(noise(2, 5, 8, 4), T, cross.project_contexts(contexts(2))).square().sum().backward()
    dead = [n for n, p in cross.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert dead == []


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(cross: UNet) -> None:
    x, given = noise(2, 5, 8, 4), contexts(2)
    whole = cross(x, T, cross.project_contexts(given))
    for row in range(2):
        one = slice(row, row + 1)
        alone = cross(x[one], T[one], cross.project_contexts([(c[one], None) for c, _ in given]))
        torch.testing.assert_close(alone, whole[one], rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


@torch.inference_mode()
def test_projected_contexts_serve_many_steps(cross: UNet) -> None:
    projected = cross.project_contexts(contexts(2))
    before = copy.deepcopy(projected)
    x = noise(2, 5, 8, 4)
    for t in (T, T - 1, T):
        torch.testing.assert_close(
            cross(x, t, projected), cross(x, t, cross.project_contexts(contexts(2))), rtol=0, atol=0
        )
    torch.testing.assert_close([c.sites for c in projected], [c.sites for c in before], rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("index", [0, 1])
def test_each_context_matters(cross: UNet, index: int) -> None:
    x, given, other = noise(2, 5, 8, 4), contexts(2), contexts(2, seed=5)
    changed = [other[i] if i == index else given[i] for i in range(2)]
    difference = cross(x, T, cross.project_contexts(given)) - cross(x, T, cross.project_contexts(changed))
    assert difference.abs().max() > 1e-2


@torch.inference_mode()
def test_masked_positions_do_not_matter(cross: UNet) -> None:
    x, ((first, _), second) = noise(2, 5, 8, 4), contexts(2)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    masked = cross(x, T, cross.project_contexts([(first, mask), second]))
    spoiled = torch.where(mask[..., None] == 1, first, 100.0)
    torch.testing.assert_close(cross(x, T, cross.project_contexts([(spoiled, mask), second])), masked, rtol=0, atol=0)
    cut = cross(x[:1], T[:1], cross.project_contexts([(first[:1, [0, 1, 3]], None), (second[0][:1], None)]))
    torch.testing.assert_close(cut, masked[:1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_mask_of_ones_is_no_mask_and_mask_of_zeros_is_finite(cross: UNet) -> None:
    x, (first, (second, _)) = noise(2, 5, 8, 4), contexts(2)
    free = cross(x, T, cross.project_contexts([first, (second, None)]))
    ones = cross(x, T, cross.project_contexts([first, (second, torch.ones(2, 9))]))
    torch.testing.assert_close(ones, free, rtol=1e-4, atol=1e-5)
    assert cross(x, T, cross.project_contexts([first, (second, torch.zeros(2, 9))])).isfinite().all()


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = Attention(dim=12, head_dim=4, context_dim=5)
    x, context = noise(2, 7, 12), noise(2, 6, 5, seed=1)
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        heads.append(F.softmax(q[..., part] @ k[..., part].mT / 2.0, dim=-1) @ v[..., part])
    wanted = attention.to_out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, attention.keys_values(context)), wanted)


def test_gate_is_the_second_half() -> None:
    layer, x = GEGLU(4, 6), noise(2, 4)
    both = layer.proj(x)
    torch.testing.assert_close(layer(x), both[:, :6] * F.gelu(both[:, 6:]))


def test_published_epsilons(cross: UNet) -> None:
    inner = {m.norm for m in cross.modules() if isinstance(m, SpatialTransformer)}
    norms = [m for m in cross.modules() if isinstance(m, GroupNorm | nn.LayerNorm)]
    assert {m.eps for m in norms if m in inner} == {1e-6}
    assert {m.eps for m in norms if m not in inner} == {1e-5}


def test_time_embedding() -> None:
    embedded = time_embedding(torch.tensor([0, 5]), 4)
    wanted = torch.tensor([[0.0, 0.0], [5.0, 0.05]])
    torch.testing.assert_close(embedded, torch.cat([wanted.cos(), wanted.sin()], dim=1))


def test_half_precision_and_channels_last_keep_the_result() -> None:
    unet, x = randomized(TINY), noise(2, 5, 8, 4)
    wanted = unet(x, T)
    last = unet.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), T)
    torch.testing.assert_close(last, wanted, rtol=1e-4, atol=1e-5)
    half = unet.to(torch.bfloat16)(x.bfloat16(), T)
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).square().mean() < 0.02 * wanted.square().mean()


def test_unfit_inputs_are_refused(cross: UNet) -> None:
    given = contexts(2)
    with pytest.raises(ConfigError, match=r"\[10, 6\]"):
        cross.project_contexts(given[::-1])
    with pytest.raises(ConfigError, match="1 contexts were given, 2 needed"):
        cross(noise(2, 5, 8, 4), T, cross.project_contexts(given)[:1])
    with pytest.raises(ConfigError, match="multiples of 2"):
        cross(noise(2, 5, 7, 4), T, cross.project_contexts(given))


@torch.inference_mode()
@pytest.mark.parametrize(("mode", "width"), [("concat", 128), ("add", 64)])
def test_film_stands_beside_the_time_embedding_or_is_added_to_it(mode: Literal["concat", "add"], width: int) -> None:
    unet = randomized(replace(TINY, film_dim=7, film_mode=mode))
    assert unet.input_blocks[1][0].emb_layers[1].in_features == width
    x, film = noise(2, 5, 8, 4), noise(2, 7, seed=1)
    projected = unet.project_film(film)
    emb = unet.embed(T, projected, x.dtype)
    time, told = unet.time_embed(time_embedding(T, 16)), unet.film_emb(film)
    torch.testing.assert_close(emb, torch.cat([time, told], 1) if mode == "concat" else time + told)
    out = unet(x, T, film=projected)
    assert (out - unet(x, T, film=unet.project_film(-film))).abs().max() > 1e-2
    torch.testing.assert_close(unet(x[:1], T[:1], film=projected[:1]), out[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="was not given"):
        unet(x, T)
    with pytest.raises(ConfigError, match="width 6 was given; this U-Net needs 7"):
        unet.project_film(film[:, :6])
    with pytest.raises(ConfigError, match="width 7 was given; this U-Net needs None"):
        randomized(TINY).project_film(film)


@torch.inference_mode()
def test_deeper_transformers_read_the_context_in_every_block(cross: UNet) -> None:
    deep = randomized(replace(CROSS, depth=2))
    projected = deep.project_contexts(contexts(2))
    assert [len(c.sites) for c in projected] == [2 * len(c.sites) for c in cross.project_contexts(contexts(2))]
    x = noise(2, 5, 8, 4)
    plain = deep(x, T, projected)
    for site in range(len(projected[1].sites)):
        sites = list(projected[1].sites)
        sites[site] = tuple(torch.flip(part, (0,)) for part in sites[site])
        changed = deep(x, T, (projected[0], replace(projected[1], sites=tuple(sites))))
        assert (changed - plain).abs().max() > 1e-4, site


@torch.inference_mode()
def test_the_same_number_of_heads_everywhere_or_the_same_width() -> None:
    config = replace(TINY, mults=(1, 2, 4), attention_levels=(1, 2))

    def head_dims(config: UNetConfig) -> list[int]:
        return [m.head_dim for m in UNet(config).modules() if isinstance(m, Attention)][::2]

    assert set(head_dims(config)) == {8}
    assert sorted(set(head_dims(replace(config, heads=4)))) == [8, 16]
    a, b = randomized(config), randomized(replace(config, heads=8))
    b.load_state_dict(a.state_dict())
    assert (a(noise(2, 5, 8, 4), T) - b(noise(2, 5, 8, 4), T)).abs().max() > 1e-4


@torch.inference_mode()
def test_contexts_of_different_lengths_share_a_batch(cross: UNet) -> None:
    """Rows of a guided pair give what they give alone, whichever is longer, and where nothing may be looked at too."""
    x, (first, (second, _)) = noise(2, 5, 8, 4), contexts(2)
    long, short = contexts(1)[1][0], noise(1, 2, 10, seed=8)
    hidden = (short, torch.zeros(1, 2))
    for a, b in (
        ((long, None), (short, None)),
        ((short, torch.tensor([[1, 0]])), (long, None)),
        ((long, None), hidden),
    ):
        caches = [cross.project_contexts([(first[0][i : i + 1], None), part]) for i, part in enumerate((a, b))]
        both = tuple(one.joined(other) for one, other in zip(*caches, strict=True))
        assert both[0].bias is None
        got = cross(x, T, both)
        for row, cache in enumerate(caches):
            one = slice(row, row + 1)
            torch.testing.assert_close(got[one], cross(x[one], T[one], cache), rtol=1e-4, atol=1e-5)
    assert second.shape[1] == 9


def watched(unet: UNet) -> dict[str, nn.Module]:
    """Return the stages whose outputs are recorded."""
    stages = {f"t500.in{i:02}": stage for i, stage in enumerate(unet.input_blocks)}
    stages |= {f"t500.out{i:02}": stage for i, stage in enumerate(unet.output_blocks)}
    return stages | {"t500.mid": unet.middle_block}


@pytest.mark.parity
@pytest.mark.parametrize(
    "rate", [100, pytest.param(50, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_parity(goldens: Path, request: pytest.FixtureRequest, rate: int) -> None:
    golden, name = Goldens(goldens), f"unet_{rate}"
    config = preset(f"semanticodec-{rate}-4096").decoder.latent.unet
    with torch.device("meta"):
        unet = UNet(config)
    assert shapes(unet) == golden.shapes(name, "model.diffusion_model.")
    golden.fill(unet.to_empty(device="cpu"), name, "model.diffusion_model.")

    arrays, x = golden.arrays(name), golden.normal("unet:x", (1, 8, 256, 16))
    tokens = 512 * rate // 100
    width = config.contexts[-1]
    assert width is not None
    context = golden.normal(f"unet:ctx:{rate}", (1, tokens, width), std=0.5)
    half = (torch.arange(tokens) < tokens // 2).float()[None]
    free, masked = (unet.project_contexts([(context, mask)]) for mask in (None, half))

    errors = {}
    for t in (1, 999):
        errors[f"t{t}"] = golden.error(arrays, f"t{t}", unet(x, torch.tensor([t]), free), 8192)
    with golden.watch(arrays, watched(unet), 1024) as inside:
        errors["t500"] = golden.error(arrays, "t500", unet(x, torch.tensor([500]), free), 8192)
    errors["t500_halfmask"] = golden.error(arrays, "t500_halfmask", unet(x, torch.tensor([500]), masked), 4096)
    errors |= inside
    check(request, errors, part=(f"semanticodec-{rate}", "U-Net, every block"))
