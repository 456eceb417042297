"""The latent-diffusion core: known beginnings, guidance, conditioning, scale, samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tiny import codec, config, fill, noise
from torch import Tensor

from semanticodec.config import ControlNetConfig, LatentConfig, MelConfig, ScheduleConfig, UNetConfig, VAEConfig
from semanticodec.diffusion import INITIAL, Masked, Partial, SamplerOptions
from semanticodec.errors import ConfigError
from semanticodec.latent import Conditioning, Control, Known, LatentDiffusion, guess_scales
from semanticodec.nn.controlnet import ControlNet

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
    latent = LatentDiffusion(small.decoder.latent)
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
    assert LatentDiffusion(config("mini").decoder.latent, vae_encoder=True).vae.encoder is not None


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


# --- systems other than the codec's


UNET = UNetConfig(
    in_channels=6, out_channels=4, base=16, mults=(1, 2, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4
)
SYSTEM = LatentConfig(
    unet=replace(UNET, contexts=(None, 5, 6), film_dim=3),
    vae=VAEConfig(base=8, mults=(1, 2, 2, 2), res_blocks=1, latent_channels=4, groups=4),
    vocoder=replace(config("official").decoder.latent.vocoder, rates=(6, 80), kernels=(12, 160)),
    mel=MelConfig(48_000, 2048, 480, 64, 20.0, 24_000.0),
    prediction="eps",
    steps=3,
)


@pytest.fixture(scope="module")
def system() -> LatentDiffusion:
    latent = LatentDiffusion(SYSTEM, vae_encoder=True)
    fill(latent)
    latent.scale.fill_(0.5)
    return latent


def everything(batch: int, length: int, tokens: int = 3, seed: int = 5) -> Conditioning:
    mask = (torch.arange(tokens) < tokens - 1).float().expand(batch, -1)
    return Conditioning(
        contexts=((noise(batch, tokens, 5, seed=seed), mask), (noise(batch, 4, 6, seed=seed + 1), None)),
        concat=noise(batch, 2, length, 8, seed=seed + 2),
        film=noise(batch, 3, seed=seed + 3),
    )


def run(system: LatentDiffusion, asked: Conditioning, absent: Conditioning, length: int = 8, batch: int = 1, **given):
    options = given.pop("options", SamplerOptions(guidance=2.0))
    rows = given.pop("rows", slice(None))
    return system.generate(
        asked, absent, lambda step: noise(batch, 4, length, 8, seed=step + 20)[rows], options, None, **given
    )


def test_every_kind_of_conditioning_counts_and_rows_are_independent(system: LatentDiffusion) -> None:
    """Guided, so that contexts of different lengths share a batch."""
    asked, absent = everything(2, 8), everything(2, 8, tokens=5, seed=30)
    whole = run(system, asked, absent, batch=2)
    other = everything(2, 8, seed=50)
    for name in ("contexts", "concat", "film"):
        changed = run(system, replace(asked, **{name: getattr(other, name)}), absent, batch=2)
        assert (changed - whole).abs().max() > 1e-3, name
    one = [
        Conditioning(
            tuple((c[1:], None if m is None else m[1:]) for c, m in given.contexts), given.concat[1:], given.film[1:]
        )
        for given in (asked, absent)
    ]
    alone = run(system, one[0], one[1], batch=2, rows=slice(1, 2))
    torch.testing.assert_close(alone, whole[1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 8, 9])
def test_any_length_is_generated_in_whole_windows(system: LatentDiffusion, length: int) -> None:
    seen: list[int] = []
    handle = system.unet.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[2]))
    mask = torch.ones(1, 1, length, 8)
    latents = run(
        system,
        everything(1, length),
        everything(1, length),
        length,
        masked=Masked(noise(1, 4, length, 8, seed=7), mask),
        start=Partial(noise(1, 4, length, 8, seed=7), 1.0),
    )
    handle.remove()
    assert set(seen) == {-(-length // 4) * 4}
    assert torch.equal(latents, noise(1, 4, length, 8, seed=7))


def test_what_the_network_predicts_and_the_schedule_are_the_configurations(system: LatentDiffusion) -> None:
    config = system.config
    other = LatentDiffusion(replace(config, prediction="v", schedule=ScheduleConfig("cosine")), vae_encoder=True)
    other.load_state_dict(system.state_dict())
    given = everything(1, 8), everything(1, 8)
    assert other.schedule.alpha_bar[-1] == 0
    assert (run(system, *given) - run(other, *given)).abs().max() > 0.1
    impossible = LatentDiffusion(replace(config, schedule=ScheduleConfig("cosine")))
    with pytest.raises(ConfigError, match="alpha_bar is 0"):
        run(impossible, *given)


def test_the_preset_says_how_much_noise_is_fresh(system: LatentDiffusion) -> None:
    noisy = LatentDiffusion(replace(system.config, eta=0.7), vae_encoder=True)
    noisy.load_state_dict(system.state_dict())
    given = everything(1, 8), everything(1, 8)
    own = run(noisy, *given)
    assert torch.equal(own, run(system, *given, options=SamplerOptions(guidance=2.0, eta=0.7)))
    assert not torch.equal(own, run(system, *given))


def test_encoding_gives_latents_on_the_denoisers_scale(system: LatentDiffusion) -> None:
    mel = noise(2, 32, 64)
    posterior = system.encode(mel)
    mean, logvar = system.vae.encode(mel[:, None])
    torch.testing.assert_close(posterior.mean, 0.5 * mean)
    torch.testing.assert_close(posterior.std, 0.5 * (logvar / 2).exp())
    assert posterior.mean.shape == (2, 4, 4, 8)
    picked = posterior.sample(noise(2, 4, 4, 8, seed=1))
    torch.testing.assert_close(picked, posterior.mean + posterior.std * noise(2, 4, 4, 8, seed=1))
    torch.testing.assert_close(system.mel(posterior.mean), system.vae.decode(posterior.mean / 0.5)[:, 0])
    assert system.wave(system.mel(posterior.mean)).shape == (2, 32 * 480)


# --- what does not fit


def refused(system: LatentDiffusion, asked: Conditioning, absent: Conditioning, match: str, **given: float) -> None:
    """Expect a ConfigError before anything is computed."""
    ran: list[object] = []
    handles = [module.register_forward_pre_hook(lambda *a: ran.append(a)) for module in system.modules()]
    with pytest.raises(ConfigError, match=match):
        run(system, asked, absent, batch=2, options=SamplerOptions(**given))
    for handle in handles:
        handle.remove()
    assert not ran


@pytest.mark.parametrize("half", ["conditioning", "unconditional conditioning"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"concat": None}, r"concat of the {} is missing; this U-Net needs \[2, 2, 8, 8\]"),
        ({"concat": noise(2, 2, 7, 8)}, r"concat of the {} has the shape \[2, 2, 7, 8\]"),
        ({"concat": noise(2, 3, 8, 8)}, r"concat of the {} has the shape \[2, 3, 8, 8\]"),
        ({"film": None}, r"film vector of the {} is missing; this U-Net needs \[2, 3\]"),
        ({"film": noise(1, 3)}, r"film vector of the {} has the shape \[1, 3\]"),
        ({"contexts": ((noise(1, 3, 5), None), (noise(2, 4, 6), None))}, r"context of the {} has .*\[1, 3, 5\]"),
        ({"contexts": ((noise(2, 0, 5), None), (noise(2, 4, 6), None))}, r"context of the {} has .*\[2, 0, 5\]"),
        ({"contexts": ((noise(2, 5), None), (noise(2, 4, 6), None))}, r"context of the {} has .*\[2, 5\]"),
        (
            {"contexts": ((noise(2, 3, 5), torch.ones(2, 4)), (noise(2, 4, 6), None))},
            r"mask in the {} has the shape \[2, 4\]; this U-Net needs \[2, 3\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    system: LatentDiffusion, half: str, change: dict[str, object], match: str
) -> None:
    good, bad = everything(2, 8), replace(everything(2, 8), **change)
    asked, absent = (bad, good) if half == "conditioning" else (good, bad)
    refused(system, asked, absent, match.format(half), guidance=2.0)
    if half == "conditioning":
        refused(system, bad, bad, match.format(half), guidance=1.0)
    else:
        run(system, good, bad, batch=2, options=SamplerOptions(guidance=1.0))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_concat_that_nothing_reads_is_refused(guidance: float) -> None:
    plain = LatentDiffusion(replace(SYSTEM, unet=replace(SYSTEM.unet, in_channels=4)))
    given = everything(2, 8)
    without = replace(given, concat=None)
    refused(plain, given, without, "concat of the conditioning .* does not take one; leave it out", guidance=guidance)
    refused(plain, given, given, "concat of the conditioning .* does not take one", guidance=guidance)


def test_a_beginning_that_the_network_is_not_told_of_is_refused() -> None:
    plain = LatentDiffusion(replace(SYSTEM, unet=replace(UNET, in_channels=4)))
    start = Known(noise(1, 4, 2, 8), torch.tensor([True]))
    with pytest.raises(ConfigError, match="4 input channels, which has none to be told of it; give it as masked"):
        plain.generate(Conditioning(), Conditioning(), lambda _: noise(1, 4, 8, 8), SamplerOptions(), start)


# --- controls


@pytest.fixture(scope="module")
def control(system: LatentDiffusion) -> Control:
    network = ControlNet(ControlNetConfig(system.config.unet, hint_factor=8, hint_widths=(4, 4, 8, 8)))
    fill(network, seed=9)
    return Control(network, noise(1, 1, 64, 64, seed=11))


def test_controls_are_told_and_leave_the_base_alone(system: LatentDiffusion, control: Control) -> None:
    asked, absent = everything(1, 8), everything(1, 8, tokens=5, seed=30)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    plain = run(system, asked, absent)
    with_it = replace(asked, controls=(control,))
    both = run(system, with_it, replace(absent, controls=(control,)))
    assert (both - plain).abs().max() > 1e-3
    assert (run(system, with_it, absent) - both).abs().max() > 1e-3
    off = replace(asked, controls=(replace(control, scales=0.0),))
    torch.testing.assert_close(run(system, off, absent), plain, rtol=1e-4, atol=1e-5)
    other = replace(control, hint=noise(1, 1, 64, 64, seed=12))
    assert (run(system, replace(asked, controls=(other,)), absent) - run(system, with_it, absent)).abs().max() > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.state_dict().items())


def test_several_controls_add_up(system: LatentDiffusion, control: Control) -> None:
    asked, absent = everything(1, 8), everything(1, 8, seed=30)
    half = replace(control, scales=0.5)
    twice = run(system, replace(asked, controls=(half, half)), absent)
    torch.testing.assert_close(twice, run(system, replace(asked, controls=(control,)), absent), rtol=1e-3, atol=1e-4)


def test_every_output_has_its_scale(system: LatentDiffusion, control: Control) -> None:
    outputs = control.network.outputs
    with pytest.raises(ConfigError, match="finite"):
        replace(control, scales=math.nan)
    assert guess_scales(outputs)[-1] == 1
    assert guess_scales(13)[0] == pytest.approx(0.825**12)
    asked, absent = everything(1, 8), everything(1, 8, seed=30)
    results = []
    for i in range(outputs):
        scales = tuple(float(j == i) for j in range(outputs))
        results.append(run(system, replace(asked, controls=(replace(control, scales=scales),)), absent))
    plain = run(system, asked, absent)
    assert all((result - plain).abs().max() > 1e-4 for result in results)


def test_other_controls_in_the_unconditional_are_refused(system: LatentDiffusion, control: Control) -> None:
    asked, absent = everything(1, 8), everything(1, 8)
    with pytest.raises(ConfigError, match="the same, in this order, or none"):
        run(system, asked, replace(absent, controls=(control,)))


@pytest.mark.parametrize("scales", [(), (0.5,), (1.0,) * 99])
def test_every_output_needs_its_scale(control: Control, scales: tuple[float, ...]) -> None:
    outputs = control.network.outputs
    with pytest.raises(ConfigError, match=rf"{len(scales)} scales were given for the {outputs} outputs.*one number"):
        replace(control, scales=scales)


@pytest.mark.parametrize("shape", [(2, 1, 60, 64), (2, 1, 72, 64), (2, 2, 64, 64), (1, 1, 64, 64), (2, 1, 64, 32)])
def test_a_hint_of_another_size_is_refused(system: LatentDiffusion, control: Control, shape: tuple[int, ...]) -> None:
    asked = replace(everything(2, 8), controls=(replace(control, hint=noise(*shape)),))
    absent = everything(2, 8)
    needed = r"this U-Net needs \[2, 1, 64, 64\]; give that \(controls.following"
    refused(system, asked, absent, f"hint in the conditioning .*{needed}", guidance=2.0)
    refused(system, absent, asked, f"hint in the unconditional conditioning .*{needed}", guidance=2.0)


def test_a_control_of_another_network_is_refused(system: LatentDiffusion, control: Control) -> None:
    config = control.network.control
    for other in (replace(config, hint_factor=4), replace(config, unet=replace(config.unet, depth=2))):
        asked = replace(everything(2, 8), controls=(replace(control, network=ControlNet(other)),))
        refused(system, asked, everything(2, 8), "was made for another U-Net or autoencoder", guidance=1.0)
