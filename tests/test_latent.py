"""The latent-diffusion core: known beginnings, guidance, conditioning, scale, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import codec, config, fill, noise
from torch import Tensor

from semanticodec.diffusion import INITIAL, SamplerOptions
from semanticodec.latent import Conditioning, Known, LatentDiffusion

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def core(flavour: str) -> LatentDiffusion:
    latent = codec(flavour).model.latent
    assert latent is not None
    return latent


def shape(flavour: str, batch: int) -> tuple[int, int, int, int]:
    return batch, 8, 4 * config(flavour).decoder.columns, 16


def conditioning(flavour: str, batch: int, seed: int = 1, value: float | None = None) -> Conditioning:
    """Return random conditioning, or one that is ``value`` everywhere."""

    def some(*size: int) -> Tensor:
        return noise(*size, seed=seed) if value is None else torch.full(size, value)

    if flavour == "official":
        return Conditioning(contexts=((some(batch, 64, 32 + 192), None),))
    return Conditioning(concat=some(batch, 32, 12, 16))


def known(batch: int, present: tuple[bool, ...], seed: int = 2) -> Known:
    return Known(noise(batch, 8, 4, 16, seed=seed), torch.tensor(present))


def draw(flavour: str, batch: int) -> Tensor:
    return noise(*shape(flavour, batch), seed=3)


def generate(flavour: str, batch: int, options: SamplerOptions, start: Known | None = None, **given: Conditioning):
    if start is None and flavour == "mini":
        start = known(batch, (True,) * batch)
    return core(flavour).generate(
        given.get("asked", conditioning(flavour, batch)),
        given.get("absent", conditioning(flavour, batch, value=0.0)),
        lambda step: draw(flavour, batch) if step == INITIAL else 1 / 0,
        options,
        start,
    )


class TestKnown:
    def test_place(self) -> None:
        start, x = known(2, (True, False)), noise(2, 8, 12, 16, seed=4)
        kept = x.clone()
        filled, mask = start.place(x), start.mask(x)
        assert torch.equal(filled[0, :, :4], start.latents[0])
        assert not filled[1, :, :4].any()
        assert torch.equal(filled[:, :, 4:], kept[:, :, 4:])
        assert mask.shape == (2, 1, 12, 16)
        assert mask[0, :, :4].all()
        assert mask.sum() == 4 * 16
        assert torch.equal(x, kept)

    @pytest.mark.parametrize("guidance", [1.0, 2.5])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_is_returned_unchanged(self, guidance: float, eta: float) -> None:
        start = known(2, (True, True))
        options = SamplerOptions(guidance=guidance, eta=eta, steps=3)
        latents = core("mini").generate(
            conditioning("mini", 2),
            conditioning("mini", 2, value=0.0),
            lambda step: noise(*shape("mini", 2), seed=step + 9),
            options,
            start,
        )
        assert torch.equal(latents[:, :, :4], start.latents)
        assert torch.isfinite(latents).all()

    @pytest.mark.parametrize("guidance", [1.0, 2.5])
    def test_counts_only_where_it_is_present(self, guidance: float) -> None:
        first, second = known(2, (True, False)), known(2, (True, False), seed=5)
        a, b = (generate("mini", 2, SamplerOptions(guidance=guidance), start) for start in (first, second))
        assert torch.equal(a[1], b[1])
        assert torch.isfinite(a[1]).all()
        assert (a[0, :, 4:] != b[0, :, 4:]).any()

    def test_presence_is_told(self) -> None:
        """A row that was given zeros is another case than a row that was given nothing."""
        zeros = Known(torch.zeros(1, 8, 4, 16), torch.tensor([True]))
        none = replace(zeros, present=torch.tensor([False]))
        a, b = (generate("mini", 1, SamplerOptions(), start) for start in (zeros, none))
        assert (a[:, :, 4:] - b[:, :, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("flavour", ["official", "mini"])
class TestGuidance:
    @pytest.mark.parametrize("scale", [0.0, 2.0, -1.5])
    def test_steers_away_from_the_unconditional(self, flavour: str, scale: float) -> None:
        """With one step the result is linear in the prediction, so that the formula can be checked on the outside."""
        asked, absent = conditioning(flavour, 2), conditioning(flavour, 2, value=0.0)
        one = SamplerOptions(steps=1, guidance=1.0)
        toward = generate(flavour, 2, one, asked=asked)
        away = generate(flavour, 2, one, asked=absent)
        assert (toward - away).abs().max() > 1e-4
        got = generate(flavour, 2, replace(one, guidance=scale), asked=asked, absent=absent)
        torch.testing.assert_close(got, away + scale * (toward - away), rtol=1e-4, atol=1e-5)

    def test_one_does_not_look_at_the_unconditional(self, flavour: str) -> None:
        batches: list[int] = []
        handle = core(flavour).unet.register_forward_hook(lambda _m, args, _out: batches.append(len(args[0])))
        a = generate(flavour, 2, SamplerOptions(guidance=1.0), absent=conditioning(flavour, 2, value=math.nan))
        assert batches == [2, 2]
        batches.clear()
        generate(flavour, 2, SamplerOptions(guidance=1.5, steps=3))
        assert batches == [4, 4, 4]
        handle.remove()
        assert torch.isfinite(a).all()

    def test_the_preset_says_how_much(self, flavour: str) -> None:
        own = core(flavour).config.guidance
        a, b, c = (generate(flavour, 1, SamplerOptions(guidance=value)) for value in (None, own, own + 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("flavour", ["official", "mini"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rows_do_not_depend_on_each_other(flavour: str, guidance: float) -> None:
    asked, absent = conditioning(flavour, 3), conditioning(flavour, 3, value=0.0)
    start = known(3, (True, False, True)) if flavour == "mini" else None
    options = SamplerOptions(guidance=guidance)
    whole = generate(flavour, 3, options, start, asked=asked, absent=absent)
    for i in range(3):
        row = slice(i, i + 1)
        one, other = (
            Conditioning(
                tuple((context[row], mask) for context, mask in c.contexts), None if c.concat is None else c.concat[row]
            )
            for c in (asked, absent)
        )
        alone = core(flavour).generate(
            one,
            other,
            lambda _step, row=row: draw(flavour, 3)[row],
            options,
            None if start is None else Known(start.latents[row], start.present[row]),
        )
        torch.testing.assert_close(alone, whole[row], rtol=1e-4, atol=1e-5)


def test_constant_contexts_are_projected_once() -> None:
    calls: list[int] = []
    unet = core("official").unet
    site = next(m for name, m in unet.named_modules() if name.endswith("attn2.to_k") and m.in_features == 224)
    handle = site.register_forward_hook(lambda _m, args, _out: calls.append(len(args[0])))
    generate("official", 2, SamplerOptions(steps=5, guidance=2.0))
    handle.remove()
    assert calls == [2, 2]


def test_scale_is_taken_off_before_the_autoencoder() -> None:
    small = config("mini")
    latent = LatentDiffusion(small.decoder)
    fill(latent)
    latents = noise(1, 8, 12, 16)
    plain = latent.mel(latents)
    assert plain.shape == (1, 48, 64)
    latent.scale.fill_(0.25)
    torch.testing.assert_close(latent.mel(latents / 4), plain)
    assert "scale" in latent.state_dict()


@pytest.mark.parametrize("flavour", ["official", "mini"])
def test_wave_is_160_samples_per_row(flavour: str) -> None:
    wave = core(flavour).wave(noise(2, 21, 64))
    assert (wave.shape, wave.dtype) == ((2, 21 * 160), torch.float32)


def test_the_encoder_of_the_autoencoder_is_for_training() -> None:
    assert core("mini").vae.encoder is None
    assert LatentDiffusion(config("mini").decoder, vae_encoder=True).vae.encoder is not None


@pytest.mark.parametrize("flavour", ["official", "mini"])
def test_bfloat16(flavour: str) -> None:
    latent = codec(flavour, dtype=torch.bfloat16).model.latent
    assert latent is not None
    start = known(2, (True, False)) if flavour == "mini" else None
    asked, absent = conditioning(flavour, 2), conditioning(flavour, 2, value=0.0)
    half = [Conditioning(tuple((x.bfloat16(), m) for x, m in c.contexts), c.concat) for c in (asked, absent)]
    latents = latent.generate(*half, lambda _step: draw(flavour, 2), SamplerOptions(guidance=2.0), start)
    assert latents.dtype == torch.float32
    if start is not None:
        assert torch.equal(latents[0, :, :4], start.latents[0])
    mel = latent.mel(latents)
    assert mel.dtype == torch.bfloat16
    wave = latent.wave(mel)
    assert wave.dtype == torch.float32
    assert torch.isfinite(wave).all()
