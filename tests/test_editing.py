"""Edits on small random models: what is kept is kept to the bit, what is generated follows the condition."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_superres import dull
from tiny import FLAVOURS, UNET, VAE, fill, random_codes
from tiny import config as tiny_config
from torch import Tensor
from typer.testing import CliRunner

from semanticodec.audio import load, save
from semanticodec.bandlimit import lowpass
from semanticodec.cli import app
from semanticodec.codec import SemantiCodec
from semanticodec.config import LatentConfig, VocosConfig
from semanticodec.diffusion import PUBLISHED, SamplerOptions
from semanticodec.editing import Editor, Region, _shared, always, coded
from semanticodec.errors import AudioError, ConfigError
from semanticodec.latent import Conditioning, LatentDiffusion
from semanticodec.model import CodecModel
from semanticodec.regions import cell_mask, composed, grid_spans, placed_windows
from semanticodec.systems import SYSTEMS

RATE = 16_000
CONFIG = LatentConfig(
    unet=dataclasses.replace(UNET, film_dim=6),
    vae=VAE,
    vocoder=VocosConfig(dim=16, hidden=24, layers=2, right=(1, 1, 0), iterations=2),
    steps=3,
    guidance=1.5,
)


@cache
def latent() -> LatentDiffusion:
    module = LatentDiffusion(CONFIG, vae_encoder=True)
    fill(module)
    return module.eval()


def editor(label: float = 1.0, **changes: Any) -> Editor:
    told = Conditioning(film=torch.full((1, 6), label))
    return Editor(
        latent(), always(told, Conditioning(film=torch.zeros(1, 6))), **{"window": 16, "overlap": 4, **changes}
    )


def sound(seconds: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * RATE), generator=generator)


class TestInpaint:
    def test_outside_the_region_nothing_changes(self) -> None:
        wave = sound()
        heard = editor().inpaint(wave, RATE, [Region(0.4, 0.6)])
        first, last = round(0.4 * RATE), round(0.6 * RATE)
        assert torch.equal(heard[:first], wave[:first])
        assert torch.equal(heard[last:], wave[last:])
        assert (heard - wave)[first:last].abs().mean() > 0.02

    def test_ramps_lie_inside_the_region(self) -> None:
        kept, heard = torch.zeros(1, RATE), torch.ones(1, RATE)
        mixed = composed(kept, heard, [Region(0.25, 0.5)], RATE)[0]
        assert mixed[: RATE // 4].max() == mixed[RATE // 2 :].max() == 0
        assert mixed[RATE // 4 + 160 : RATE // 2 - 160].min() == 1
        assert mixed[RATE // 4 : RATE // 4 + 160].diff().min() > 0

    def test_a_band_for_a_stretch(self) -> None:
        wave = sound()
        heard = editor().inpaint(wave, RATE, [Region(0.4, 0.6, low=3000, high=5000)])
        changed = heard - wave
        assert changed[: round(0.4 * RATE)].abs().max() == changed[round(0.6 * RATE) :].abs().max() == 0
        spectrum = torch.fft.rfft(changed[6500:9500] * torch.hann_window(3000)).abs()
        inside, outside = spectrum[600:900].mean(), torch.cat([spectrum[:500], spectrum[1050:]]).mean()
        assert inside > 20 * outside

    def test_several_regions(self) -> None:
        wave = sound()
        heard = editor().inpaint(wave, RATE, [Region(0.1, 0.2), Region(0.8)])
        assert torch.equal(heard[round(0.2 * RATE) : round(0.8 * RATE)], wave[round(0.2 * RATE) : round(0.8 * RATE)])
        assert not torch.equal(heard[:3200], wave[:3200])
        assert not torch.equal(heard[-3200:], wave[-3200:])

    def test_what_is_generated_follows_condition_and_seed(self) -> None:
        wave, region = sound(), [Region(0.4, 0.6)]
        heard = [
            editor(label).inpaint(wave, RATE, region, seed=seed) for label, seed in ((1, 0), (1, 0), (-1, 0), (1, 1))
        ]
        assert torch.equal(heard[0], heard[1])
        assert not torch.allclose(heard[0], heard[2], atol=1e-3)
        assert not torch.allclose(heard[0], heard[3], atol=1e-3)

    def test_the_published_rule(self) -> None:
        wave, region = sound(), [Region(0.4, 0.6)]
        ddim = SamplerOptions(sampler="ddim", eta=1.0)
        published, ours = (editor().inpaint(wave, RATE, region, renew=renew, options=ddim) for renew in (True, False))
        assert torch.equal(published[:6400], wave[:6400])
        assert not torch.allclose(published, ours, atol=1e-3)
        assert torch.equal(editor().inpaint(wave, RATE, region), published)  # it is the default

    def test_only_windows_with_something_to_do_are_generated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        generate = LatentDiffusion.generate
        monkeypatch.setattr(
            LatentDiffusion, "generate", lambda self, *args, **named: calls.append(1) or generate(self, *args, **named)
        )
        editor().inpaint(sound(4.0), RATE, [Region(1.8, 1.9)])  # windows of 0.64 s, 0.48 s apart
        assert len(calls) == 1

    def test_level_and_channels(self) -> None:
        wave, region = sound(), [Region(0.4, 0.6)]
        heard = editor().inpaint(torch.stack([wave, wave]), RATE, region)
        torch.testing.assert_close(heard[0], heard[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(editor().inpaint(4 * wave, RATE, region), 4 * heard[0], rtol=0, atol=2e-3)

    def test_kept_samples_are_kept_to_the_bit(self) -> None:
        wave = sound(1.5)
        heard = editor().inpaint(wave, RATE, [Region(1.001, 1.2)])
        changed = (heard != wave).nonzero()
        assert (int(changed.min()), int(changed.max())) == (16_016, 19_199)

    def test_no_band_above_half_the_rate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LatentDiffusion, "encode", None)
        with pytest.raises(ConfigError, match=r"band from 9000 Hz .* ends at 8000 Hz; begin lower"):
            editor().inpaint(sound(), RATE, [Region(), Region(0, None, 9000)])
        with pytest.raises(ConfigError, match="begin lower"):
            editor().upsample(sound(), RATE, cutoff=8000)

    @pytest.mark.parametrize("regions", [[], [Region(1.0)], [Region(0.5), Region(2.0, 3.0)], [Region(0.5, 0.50001)]])
    def test_regions_outside_are_refused(self, regions: list[Region]) -> None:
        with pytest.raises(ConfigError, match=r"regions within 0 to 1.000 s"):
            editor().inpaint(sound(), RATE, regions)

    @pytest.mark.parametrize("edges", [(-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (math.inf, None)])
    def test_regions_without_inside_are_refused(self, edges: tuple[float, float | None]) -> None:
        with pytest.raises(ConfigError, match="must begin at 0 or later"):
            Region(*edges)
        with pytest.raises(ConfigError, match="Hz"):
            Region(0.0, None, *edges)

    @pytest.mark.parametrize("samples", [1, 100, 641, 5000])
    def test_any_length_and_rate(self, samples: int) -> None:
        heard = editor().inpaint(sound()[:samples], 44_100, [Region()])
        assert heard.shape == (-(-samples * RATE // 44_100),)
        assert heard.isfinite().all()

    def test_what_is_no_recording_is_refused(self) -> None:
        with pytest.raises(AudioError, match=r"\[S\] or \[channels, S\]"):
            editor().inpaint(torch.zeros(1, 1, 5), RATE, [Region()])


class TestComposed:
    kept, heard = sound(seed=2)[None], sound(seed=3)[None]

    def spectrum(self, wave: Tensor) -> Tensor:
        return torch.fft.rfft(wave[0, 4000:7200] * torch.hann_window(3200)).abs()

    def test_bands_of_the_same_time_are_joined(self) -> None:
        mixed = composed(self.kept, self.heard, [Region(0.2, 0.5, 4000), Region(0.2, 0.5, 1000, 2000)], RATE)
        new, old = (self.spectrum(mixed - other) for other in (self.heard, self.kept))
        for band, kept in ((slice(220, 380), False), (slice(820, 1590), False), (slice(420, 780), True)):
            assert (old if kept else new)[band].mean() < 0.05 * (new if kept else old)[band].mean()

    @pytest.mark.parametrize(
        "regions",
        [
            [Region(0.2, 0.5), Region(0.3, 0.7)],
            [Region(0.2, 0.5), Region(0.5, 0.7)],
            [Region(0.2, 0.5, 0, 3000), Region(0.2, 0.5, 3000), Region(0.5, 0.7)],
        ],
    )
    def test_regions_that_overlap_or_touch_are_one(self, regions: list[Region]) -> None:
        whole = composed(self.kept, self.heard, [Region(0.2, 0.7)], RATE)
        for order in itertools.permutations(regions):
            torch.testing.assert_close(composed(self.kept, self.heard, order, RATE), whole, rtol=0, atol=1e-6)

    def test_a_stretch_and_a_band_in_any_order(self) -> None:
        regions = [Region(0.3, 0.5), Region(0.1, 0.8, 2000, 6000), Region(0.4, 0.9, 5000)]
        mixed = [composed(self.kept, self.heard, order, RATE) for order in itertools.permutations(regions)]
        for other in mixed[1:]:
            torch.testing.assert_close(other, mixed[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed[0][:, 4960:7840], self.heard[:, 4960:7840], rtol=0, atol=1e-6)
        assert torch.equal(mixed[0][:, :1600], self.kept[:, :1600])
        assert torch.equal(mixed[0][:, 14_400:], self.kept[:, 14_400:])

    def test_infinity_is_the_end(self) -> None:
        mixed = [composed(self.kept, self.heard, [Region(0.5, stop)], RATE) for stop in (None, math.inf, 7.0)]
        assert torch.equal(mixed[0], mixed[1])
        assert torch.equal(mixed[0], mixed[2])


class TestOutpaint:
    def test_the_recording_stays_in_the_middle(self) -> None:
        wave = sound(0.5)
        heard = editor().outpaint(wave, RATE, before=0.25, after=1.0)
        assert heard.shape == (round(1.75 * RATE),)
        assert torch.equal(heard[4000:12_000], wave)
        assert heard[:3800].abs().mean() > 0.005
        assert heard[12_200:].unfold(0, 800, 800).abs().mean(1).min() > 0.005

    @pytest.mark.parametrize("samples", [1001, 1009, 16_015])
    def test_the_recording_is_kept_to_the_last_sample(self, samples: int) -> None:
        wave = sound(2.0)[:samples]
        heard = editor().outpaint(wave, RATE, before=0.1001, after=0.1)
        assert torch.equal(heard[1602 : 1602 + samples], wave)

    @pytest.mark.parametrize(
        "times",
        [
            {},
            {"before": -1.0, "after": 2.0},
            {"after": math.inf},
            {"before": math.nan},
            {"after": 1e-5},
            {"after": 4e3},
        ],
    )
    def test_impossible_times_are_refused(self, times: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match=r"(at least one must be|one of them) above 0"):
            editor().outpaint(sound(), RATE, **times)

    def test_speech_ends_with_its_window(self) -> None:
        spoken = editor(longest=16)  # of 0.04 s
        spoken.inpaint(sound(0.64), RATE, [Region(0.2, 0.3)])
        with pytest.raises(ConfigError, match=r"0\.7 s are to be edited, and this model speaks for 0\.64 s at a time"):
            spoken.outpaint(sound(0.5), RATE, after=0.2)


class TestUpsample:
    def test_below_the_cutoff_the_recording_stays(self) -> None:
        wave = dull(RATE)[0]
        heard = editor().upsample(wave, RATE, cutoff=4000)
        assert lowpass(heard - wave, RATE, 3500, "ellip")[1000:-1000].abs().max() < 0.01 * wave.abs().max()
        assert not torch.allclose(heard, wave, atol=1e-3)


class TestTransfer:
    def test_the_stronger_the_less_is_left(self) -> None:
        wave = sound()
        with torch.inference_mode():
            given = editor()._encode((wave * 0.5 / wave.abs().max())[None, : 25 * 640])
        keep = torch.zeros(1, 1, 25, 16)
        kept = []
        for strength in (0.01, 0.3, 1.0):
            with torch.inference_mode():
                result = editor()._sample(given, keep, strength, _shared(0), SamplerOptions(steps=20), False)
            kept.append(float(torch.corrcoef(torch.stack([result.flatten(), given.flatten()]))[0, 1]))
        assert kept[0] > 0.9
        assert kept[0] > kept[1] > kept[2]

    def test_the_published_path_has_the_published_rule(self) -> None:
        """Which finds no timestep to noise to at strength 1."""
        with pytest.raises(ConfigError, match="above the published timesteps"):
            editor().transfer(sound(), RATE, strength=1.0, options=PUBLISHED)
        assert editor().transfer(sound(), RATE, strength=0.5, options=PUBLISHED).isfinite().all()

    def test_condition_and_strength_are_heard(self) -> None:
        wave = sound()
        heard = [editor(label).transfer(wave, RATE, strength=s) for label, s in ((1, 0.5), (-1, 0.5), (1, 1.0))]
        assert heard[0].shape == wave.shape
        assert not torch.allclose(heard[0], heard[1], atol=1e-3)
        assert not torch.allclose(heard[0], heard[2], atol=1e-3)

    @pytest.mark.parametrize("strength", [0.0, -1.0, 1.1, math.nan])
    def test_impossible_strengths_are_refused(self, strength: float) -> None:
        with pytest.raises(ConfigError, match="strength"):
            editor().transfer(sound(0.2), RATE, strength=strength)


class TestMasks:
    def test_cells_that_touch_a_region_are_generated(self) -> None:
        keep = cell_mask(CONFIG, 10, [Region(0.05, 0.1)])[0, 0]  # cells of 40 ms
        assert keep.mean(1).tolist() == [1, 0, 0, *[1] * 7]
        keep = cell_mask(CONFIG, 3, [Region(low=4000)])[0, 0]
        assert keep.shape == (3, 16)
        assert (keep[0].diff() <= 0).all()
        assert 0 < keep[0].mean() < 1
        assert cell_mask(CONFIG, 3, [Region(high=100)])[0, 0, 0].tolist() == [0, *[1] * 15]

    def test_every_band_touches_a_cell(self) -> None:
        for low in (0.0, 10.0, 500.0, 3001.0, 7990.0):
            assert cell_mask(CONFIG, 1, [Region(low=low, high=low + 2)]).min() == 0

    def test_regions_are_joined(self) -> None:
        both = cell_mask(CONFIG, 10, [Region(0, 0.1), Region(low=4000)])
        each = cell_mask(CONFIG, 10, [Region(0, 0.1)]) * cell_mask(CONFIG, 10, [Region(low=4000)])
        assert torch.equal(both, each)

    def test_spans_cover_everything(self) -> None:
        for steps in (1, 15, 16, 17, 28, 29, 100):
            spans = list(grid_spans(steps, 16, 4))
            assert (spans[0][0], spans[0][2], spans[-1][1]) == (0, 0, steps)
            assert all(a[1] - b[0] == b[2] == 4 for a, b in itertools.pairwise(spans))
            assert all(last - first <= 16 and last - first > own for first, last, own in spans)


def mask(steps: int, *stretches: tuple[int, int], cells: slice = slice(None)) -> Tensor:
    keep = torch.ones(steps, 4)
    for begin, end in stretches:
        keep[begin:end, cells] = 0.0
    return keep


def differences(steps: int, stretches: Sequence[tuple[int, int]], changed: slice, cells: slice = slice(None)) -> Tensor:
    """Return by how much the generated latent steps of two recordings differ that differ in ``changed``."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, CONFIG.vae.latent_channels, steps, CONFIG.cells, generator=generator)
    other = given.clone()
    given[:, :, changed] = given[:, :, changed].flip(0)
    keep = torch.ones(1, 1, steps, CONFIG.cells)
    for begin, end in stretches:
        keep[:, :, begin:end, cells] = 0.0
    options = SamplerOptions(steps=2)
    with torch.inference_mode():
        results = [editor()._sample(some, keep, None, _shared(0), options, False) for some in (given, other)]
    changes = ((results[0] - results[1]) * (1 - keep)).abs().amax((0, 1, 3))
    return torch.cat([changes[begin:end] for begin, end in stretches])


class TestWindows:
    """Windows of 16 latent steps, of which 4 shall be known on each side."""

    @pytest.mark.parametrize("unit", [1, 2])
    @pytest.mark.parametrize("cells", [slice(None), slice(2, None)])
    @pytest.mark.parametrize("length", [1, 5, 7])
    def test_what_fits_has_both_sides(self, length: int, cells: slice, unit: int) -> None:
        for begin in range(50 - length + 1):
            end = begin + length
            ((first, last, *own),) = placed_windows(mask(50, (begin, end), cells=cells), 16, 4, unit)
            assert own == [begin, end]
            assert first % unit == 0
            assert first <= max(0, begin - 4)
            assert last >= min(50, end + 4)
            assert last - first <= 16

    @pytest.mark.parametrize("unit", [1, 2])
    def test_all_is_filled_once_out_of_what_is_known(self, unit: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            edges = torch.randint(0, 101, (6,), generator=generator).sort().values.tolist()
            keep = mask(100, *zip(edges[::2], edges[1::2], strict=True))
            if keep.all():
                continue
            if not keep.any():
                continue
            for first, last, begin, end in placed_windows(keep, 16, 4, unit):
                assert 0 <= first <= begin < end <= last <= 100
                assert last - first <= 16
                assert not keep[begin:end].all()
                # Where anything is known beside what is new, the window sees of it.
                beside = keep[max(0, begin - 4) : begin].sum() + keep[end : end + 4].sum()
                seen = keep[first:begin].sum() + keep[end:last].sum()
                assert seen >= beside > 0
                keep[begin:end] = 1.0
            assert keep.all()

    def test_from_nothing_it_goes_left_to_right(self) -> None:
        assert placed_windows(mask(40, (0, 40)), 16, 4, 1) == [(0, 16, 0, 16), (12, 28, 16, 28), (24, 40, 28, 40)]

    def test_a_lead_goes_right_to_left(self) -> None:
        assert placed_windows(mask(40, (0, 30)), 16, 4, 1) == [(18, 34, 18, 30), (6, 22, 6, 18), (0, 16, 0, 6)]

    def test_what_a_window_can_fill_together_it_does(self) -> None:
        assert placed_windows(mask(40, (10, 12), (15, 18)), 16, 4, 1) == [(6, 22, 10, 18)]
        assert len(placed_windows(mask(40, (10, 12), (20, 23)), 16, 4, 1)) == 2

    def test_a_gap_in_a_generated_band_has_two_sides(self) -> None:
        keep = mask(40, (0, 40), cells=slice(2, None))
        keep[14:17] = 0.0
        assert placed_windows(keep, 16, 4, 1)[0] == (8, 24, 14, 17)

    @pytest.mark.parametrize("cells", [slice(None), slice(8, None)])
    def test_both_sides_are_heard(self, cells: slice) -> None:
        assert differences(60, [(12, 16)], slice(18, 60), cells).min() > 0
        assert differences(60, [(12, 16)], slice(0, 10), cells).min() > 0

    def test_a_long_region_leads_over_to_what_follows(self) -> None:
        assert differences(100, [(10, 55)], slice(56, 60))[-4:].min() > 0

    @pytest.mark.parametrize("lead", [8, 16, 40])
    def test_a_lead_is_heard_to_come_out_of_the_recording(self, lead: int) -> None:
        assert differences(lead + 20, [(0, lead)], slice(lead, None)).min() > 0

    def test_a_short_recording_is_heard_on_both_sides(self) -> None:
        assert differences(62, [(0, 30), (32, 62)], slice(30, 32)).min() > 0

    @pytest.mark.parametrize(("window", "overlap"), [(4, 3), (4, 2), (2, 1)])
    def test_any_overlap_ends(self, window: int, overlap: int) -> None:
        keep = mask(30, (5, 25))
        for _, _, begin, end in placed_windows(keep, window, overlap, 1):
            keep[begin:end] = 1.0
        assert keep.all()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("rate", [100, 25])
def test_codes_say_what_is_generated(flavour: str, rate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing kept, the latents are those that the codec decodes: windows, past, guidance and noise."""
    small = tiny_config(flavour, rate)
    model = CodecModel(small)
    fill(model)
    codec = SemantiCodec.from_model(small, model)
    # A second official window is given the overlap here, where decoding fades two unrelated ones into each other.
    codes = random_codes(small, small.window_frames + (small.hop_frames if flavour == "mini" else 0))
    seen: list[Tensor] = []
    generate = LatentDiffusion.generate

    def watch(self: LatentDiffusion, *args: Any, **named: Any) -> Tensor:
        seen.append(generate(self, *args, **named))
        return seen[-1]

    options = SamplerOptions(guidance=1.7)
    with monkeypatch.context() as patch:
        patch.setattr(LatentDiffusion, "generate", watch)
        codec.decode(codes, seed=5, options=options)
    own = coded(model, codes)
    steps = small.columns(codes.shape[2]) * 4
    nothing = torch.zeros(1, *seen[0].shape[1:2], steps, 16)
    with torch.inference_mode():
        heard = own._sample(nothing, nothing[:, :1], None, _shared(5), options, False)
    overlap = small.decoder.overlap * 4
    wanted = [part[:, :, overlap * (index > 0 or flavour == "mini") :] for index, part in enumerate(seen)]
    torch.testing.assert_close(heard, torch.cat(wanted, 2)[:, :, :steps], rtol=0, atol=1e-4)


def test_an_editor_is_a_value() -> None:
    assert dataclasses.replace(editor(), overlap=2).overlap == 2


class TestCommandLine:
    @pytest.fixture
    def edit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        """Run ``semanticodec edit`` with the small system in the place of a published one."""
        asked: list[Any] = []

        class Loaded:
            def editor(self, prompt: str, **about: Any) -> Editor:
                asked.extend([prompt, about])
                return editor()

        def load_generator(name: str, **loading: Any) -> Loaded:
            asked.extend([name, loading])
            return Loaded()

        monkeypatch.setattr("semanticodec.generation.Generator.from_pretrained", load_generator)
        save(tmp_path / "in.wav", sound(), RATE)

        def run(*words: str) -> tuple[Tensor, list[Any]]:
            out = tmp_path / "out.wav"
            told = [
                words[0],
                str(tmp_path / "in.wav"),
                "-o",
                str(out),
                "--prompt",
                "rain",
                "--device",
                "cpu",
                "--force",
            ]
            result = CliRunner().invoke(app, ["edit", *told, "--device", "cpu", *words[1:]])
            assert result.exit_code == 0, result.output
            return load(out)[0][0], asked

        return run

    def test_inpaint(self, edit: Any, tmp_path: Path) -> None:
        heard, asked = edit("inpaint", "--start", "0.4", "--stop", "0.6", "--seed", "3", "--steps", "2")
        wave, _ = load(tmp_path / "in.wav")
        options = SamplerOptions(steps=2)
        wanted = editor().inpaint(wave, RATE, [Region(0.4, 0.6)], seed=3, options=options)[0]
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)
        assert (asked[0], asked[2]) == ("mini-gen", "rain")

    def test_several_regions(self, edit: Any, tmp_path: Path) -> None:
        edges = ["--start", "0.1", "--stop", "0.2", "--low", "0", "--start", "0.6", "--stop", "inf", "--low", "3000"]
        heard, _ = edit("inpaint", *edges)
        wave, _ = load(tmp_path / "in.wav")
        wanted = editor().inpaint(wave, RATE, [Region(0.1, 0.2), Region(0.6, None, 3000)])[0]
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)

    def test_what_the_model_is_told(self, edit: Any) -> None:
        options = ["--negative", "noise", "--transcription", "hello", "--dtype", "bfloat16", "--offload"]
        _, asked = edit("outpaint", "--after", "0.1", *options)
        assert asked[1]["offload"]
        assert asked[1]["dtype"] == torch.bfloat16
        assert asked[3] == {"negative": "noise", "transcription": "hello", "policy": "zeros"}

    @pytest.mark.parametrize(
        ("words", "renew", "options"),
        [
            ([], True, SamplerOptions(sampler="ddim")),
            (["--no-renew"], False, SamplerOptions()),
            (["--no-renew", "--published"], False, dataclasses.replace(PUBLISHED, steps=None, guidance=None)),
            (["--published", "--steps", "2"], True, dataclasses.replace(PUBLISHED, steps=2, guidance=None)),
        ],
    )
    def test_the_published_ways(
        self, edit: Any, tmp_path: Path, words: list[str], renew: bool, options: SamplerOptions
    ) -> None:
        heard, _ = edit("inpaint", "--start", "0.4", *words)
        wave, _ = load(tmp_path / "in.wav")
        wanted = editor().inpaint(wave, RATE, [Region(0.4)], renew=renew, options=options)[0]
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)

    def test_a_system_has_its_own_published_steps(self, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr(
            Editor, "transfer", lambda _self, wave, _rate, *, options, **_: seen.append(options) or wave
        )
        edit("transfer", "--model", "audioldm2-full", "--published", "--guidance", "1")
        assert seen == [dataclasses.replace(SYSTEMS["audioldm2-full"].published, guidance=1.0)]

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (["inpaint", "--start", "0.1", "--start", "0.5", "--stop", "0.2"], 2, "--start 2 times"),
            (["inpaint", "--start", "0.5", "--stop", "0.2"], 1, "must begin at 0 or later"),
            (["outpaint", "--after", "0.00001"], 1, "at least one must be above 0"),
            (["upsample", "--cutoff", "9000"], 1, "begin lower"),
            (["transfer", "--model", "mini-50", "--negative", "rain"], 1, "leave out --negative"),
        ],
    )
    def test_what_cannot_be_is_refused(self, tmp_path: Path, words: list[str], code: int, message: str) -> None:
        save(tmp_path / "in.wav", sound(0.2), RATE)
        shared = [str(tmp_path / "in.wav"), "-o", str(tmp_path / "out.wav"), "--device", "cpu"]
        prompt = [] if "--model" in words else ["--prompt", "rain"]
        refused = CliRunner().invoke(app, ["edit", words[0], *shared, *prompt, *words[1:]])
        assert refused.exit_code == code, refused.output
        assert message in refused.output
        assert not (tmp_path / "out.wav").exists()

    def test_transfer(self, edit: Any, tmp_path: Path) -> None:
        heard, _ = edit("transfer", "--strength", "0.3", "--guidance", "1")
        wave, _ = load(tmp_path / "in.wav")
        wanted = editor().transfer(wave, RATE, strength=0.3, options=SamplerOptions(guidance=1.0))[0]
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)

    def test_outpaint_and_upsample(self, edit: Any, tmp_path: Path) -> None:
        assert edit("outpaint", "--before", "0.25", "--after", "0.5")[0].shape == (28_000,)
        heard, _ = edit("upsample", "--cutoff", "4000")
        wave, _ = load(tmp_path / "in.wav")
        torch.testing.assert_close(heard, editor().upsample(wave, RATE, cutoff=4000)[0].clamp(-1, 1), rtol=0, atol=1e-4)

    def test_a_codec_says_by_its_codes_what_is_heard(self, tmp_path: Path) -> None:
        wave, out = sound(0.96), tmp_path / "out.wav"
        save(tmp_path / "in.wav", wave, RATE)
        told = ["edit", "inpaint", str(tmp_path / "in.wav"), "-o", str(out), "--model", "mini-50", "--device", "cpu"]
        result = CliRunner().invoke(app, [*told, "--start", "0.4", "--stop", "0.6"])
        assert result.exit_code == 0, result.output
        wave, heard = load(tmp_path / "in.wav")[0], load(out)[0]
        codec = SemantiCodec.from_pretrained("mini-50")
        wanted = codec.editor(codec.encode(wave, RATE)).inpaint(wave, RATE, [Region(0.4, 0.6)])
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)
        refused = CliRunner().invoke(app, [*told, "--prompt", "rain", "--force"])
        assert refused.exit_code == 1
        assert "leave out --prompt" in refused.output
