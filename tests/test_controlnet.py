"""ControlNets: nothing at first, a copy of the U-Net's way down, and what their outputs do to the U-Net."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_unet import CROSS, TINY, T, contexts, noise, randomized
from torch import nn

from semanticodec.config import ControlNetConfig, UNetConfig
from semanticodec.errors import ConfigError
from semanticodec.nn.controlnet import ControlNet
from semanticodec.nn.unet import Residuals, UNet

FILM = replace(CROSS, film_dim=7)


def built(config: UNetConfig = FILM, factor: int = 4) -> tuple[UNet, ControlNet]:
    unet = randomized(config)
    return unet, ControlNet(ControlNetConfig(config, hint_channels=2, hint_factor=factor, hint_widths=(4, 6, 8)))


def test_a_fresh_one_adds_nothing_and_every_parameter_learns() -> None:
    """Zero convolutions get their gradient first, and everything before them once they are not zero any more."""
    unet, control = built()
    control.copy_from(unet)
    x, film = noise(2, 5, 8, 4), noise(2, 7, seed=3)
    hint = control.project_hint(noise(2, 2, 32, 16, seed=4))
    assert hint.shape == (2, 16, 8, 4)
    added = control(x, T, hint, control.project_contexts(contexts(2)), control.project_film(film))
    assert len(added.skips) == len(unet.input_blocks)
    assert not any(skip.any() for skip in (*added.skips, added.middle))
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if name.startswith(("zero_convs", "middle_block_out", "input_hint_block")):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    hint = control.project_hint(noise(2, 2, 32, 16, seed=4))
    added = control(x, T, hint, control.project_contexts(contexts(2)), control.project_film(film))
    unet.requires_grad_(False)
    unet(x, T, unet.project_contexts(contexts(2)), unet.project_film(film), added).square().sum().backward()
    assert [name for name, p in control.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.inference_mode()
def test_copies_the_way_down() -> None:
    unet, control = built(TINY)
    control.copy_from(unet)
    own, base = control.state_dict(), unet.state_dict()
    shared = [name for name in base if name.startswith(("time_embed", "input_blocks", "middle_block"))]
    assert shared
    assert all(torch.equal(own[name], base[name]) for name in shared)
    # With identities for zero convolutions it says what the U-Net has there, the hint added after the first block.
    for layer in (*control.zero_convs, control.middle_block_out):
        nn.init.dirac_(layer[0].weight)
    x, hint = noise(2, 5, 8, 4), torch.zeros(2, 16, 8, 4)
    skips, middle = unet.contract(x, unet.embed(T, None, x.dtype), ())
    added = control(x, T, hint)
    torch.testing.assert_close((*added.skips, added.middle), (*skips, middle))
    first = control(x, T, hint + 1).skips[0]
    torch.testing.assert_close(first, skips[0] + 1)


@torch.inference_mode()
def test_residuals_reach_their_own_level() -> None:
    unet, x = randomized(TINY), noise(2, 5, 8, 4)
    plain = unet(x, T)
    skips, middle = unet.contract(x, unet.embed(T, None, x.dtype), ())
    zero = Residuals(tuple(torch.zeros_like(skip) for skip in skips), torch.zeros_like(middle))
    torch.testing.assert_close(unet(x, T, residuals=zero), plain, rtol=0, atol=0)
    results = []
    for i in range(len(skips) + 1):
        parts = [*zero.skips, zero.middle]
        parts[i] = torch.ones_like(parts[i])
        results.append(unet(x, T, residuals=Residuals(tuple(parts[:-1]), parts[-1])))
    for i, changed in enumerate(results):
        assert (changed - plain).abs().max() > 1e-3
        assert all((changed - other).abs().max() > 1e-4 for other in results[:i])
    doubled = zero + Residuals(tuple(2 * s for s in skips), 2 * middle)
    torch.testing.assert_close(doubled.skips[1], 2 * skips[1])
    torch.testing.assert_close(doubled.middle, 2 * middle)


@pytest.mark.parametrize(("factor", "cells"), [(1, 32), (2, 16), (4, 8)])
def test_hints_shrink_to_the_latent(factor: int, cells: int) -> None:
    assert built(TINY, factor)[1].project_hint(noise(1, 2, 32, 32)).shape == (1, 16, cells, cells)


def test_too_few_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 widths are too few to halve a hint 8 fold"):
        built(TINY, 8)
