"""Finding, making and joining the edge of a band, against known signals and the published implementation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Goldens, check, check_equal
from torch import Tensor

from semanticodec.audio import log_mel, stft_magnitude
from semanticodec.bandlimit import BINS, FFT, FILTERS, Filter, edge, joined, level, lowpass, stft
from semanticodec.config import MelConfig
from semanticodec.errors import ConfigError

RATE = 24_000
MEL_BOUND = 1e-2
"""Just above the floor of the logarithm the recorded mels carry the rounding of a float32 FFT."""
MEL_48K = MelConfig(sample_rate=48_000, n_fft=2048, hop=480, bins=256, fmin=20.0, fmax=24_000.0)


def tone(hertz: float, samples: int = RATE, rate: int = RATE) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / rate).float()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestEdge:
    def test_is_where_the_share_is_reached(self) -> None:
        magnitude = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
        # cumulative shares: .4 .7 .9 1 1
        assert [edge(magnitude, share) for share in (0.3, 0.5, 0.8, 0.95)] == [0, 0, 1, 2]

    def test_silence_has_no_band(self) -> None:
        assert edge(torch.zeros(3, 7), 0.985) == 0

    def test_all_axes_but_the_last_are_summed(self) -> None:
        magnitude = noise(2, 3, 50).abs()
        assert edge(magnitude, 0.9) == edge(magnitude.sum((0, 1)), 0.9)


class TestLowpass:
    @pytest.mark.parametrize("kind", FILTERS)
    def test_keeps_the_low_band_and_takes_the_high(self, kind: Filter) -> None:
        low, high = tone(500), tone(6000)
        heard = lowpass(low + high, RATE, 3000, kind)
        inside = slice(2000, -2000)
        assert (heard - low)[inside].abs().max() < (0.15 if kind == "bessel" else 0.06)  # which begins early
        assert lowpass(high, RATE, 3000, kind)[inside].abs().max() < 1e-3

    @pytest.mark.parametrize("samples", [1, 2, 50, 1001])
    def test_any_length_and_any_number_of_axes(self, samples: int) -> None:
        wave = noise(2, 3, samples)
        heard = lowpass(wave, RATE, 1234.5)
        assert heard.shape == wave.shape
        assert heard.dtype == torch.float32
        torch.testing.assert_close(heard[1, 2], lowpass(wave[1, 2], RATE, 1234.5), rtol=0, atol=1e-6)

    def test_a_cutoff_beyond_the_band_changes_nothing(self) -> None:
        wave = noise(1000)
        assert torch.equal(lowpass(wave, RATE, 12_000), wave)
        assert not torch.equal(lowpass(wave, RATE, 11_999), wave)

    def test_unknown_filters_and_cutoffs_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"no filter is called 'brick'; choose one of butter"):
            lowpass(noise(10), RATE, 1000, "brick")  # type: ignore[arg-type]
        for cutoff in (0.5, -1.0, math.nan):
            with pytest.raises(ConfigError, match=r"at least 1 is needed"):
                lowpass(noise(10), RATE, cutoff)


class TestJoined:
    def test_takes_each_band_from_its_signal(self) -> None:
        low, high = tone(1000) + tone(9000), 0.5 * tone(2000) + 0.25 * tone(8000)
        heard = joined(low[None], high[None], 400, 2.0)[0]  # bin 400 is 4687 Hz
        torch.testing.assert_close(heard[3000:-3000], (tone(1000) + 0.5 * tone(8000))[3000:-3000], rtol=0, atol=1e-3)

    def test_of_one_signal_is_that_signal(self) -> None:
        wave = noise(2, 5001)
        torch.testing.assert_close(joined(wave, wave, 300, 1.0), wave, rtol=0, atol=1e-6)

    def test_the_gain_continues_the_recording_within_bounds(self) -> None:
        at = torch.zeros(BINS)
        at[100] = 3.0
        assert level(1.1 * at, at, 100) == pytest.approx(1.1)
        assert [level(loud * at, at, 100) for loud in (0.1, 5.0)] == [0.8, 1.2]
        assert level(at, 0 * at, 100) == 1.0


@pytest.fixture(scope="module")
def golden(family: Path) -> Goldens:
    return Goldens(family)


def recorded(
    golden: Goldens, errors: dict[str, float], arrays: dict[str, np.ndarray], name: str, value: Tensor
) -> None:
    errors[name] = golden.error(arrays, name, value, len(arrays[f"{name}.sample"]))


@pytest.mark.parity
class TestPublished:
    def test_lowpass(self, golden: Goldens, request: pytest.FixtureRequest) -> None:
        arrays = golden.arrays("audiosr_prepost")
        wave = golden.normal("lowpass:x", (24_000,), 0.0, 0.2)
        errors: dict[str, float] = {}
        for kind in FILTERS:
            for hertz in ("3750", "7987.5", "20003.9"):
                name = f"lowpass.{kind}_{hertz}"
                recorded(golden, errors, arrays, name, lowpass(wave, 48_000, float(hertz), kind))
        check(request, errors, part=("audiosr-basic", "low-pass"))

    @pytest.mark.parametrize("signal", ["full", "lp4k", "lp8k"])
    def test_preparation(self, golden: Goldens, request: pytest.FixtureRequest, signal: str) -> None:
        arrays = golden.arrays("audiosr_prepost")
        wave = torch.from_numpy(golden.synth.signal48(signal, 5.12) / 32768.0)
        wave = wave - wave.mean()
        wave = (wave / (wave.abs().max() + 1e-8) * 0.5).float()[None]
        magnitude = stft_magnitude(wave, MEL_48K)[..., :1024]
        found = edge(magnitude, 0.985)
        check_equal(
            request,
            "cutoff",
            np.array(found),
            arrays[f"{signal}.cutoff_bin"],
            ("audiosr-basic", f"preparation, {signal}"),
        )
        errors: dict[str, float] = {}
        recorded(golden, errors, arrays, f"{signal}.log_mel_spec", log_mel(wave, MEL_48K))
        for kind in FILTERS:
            low = lowpass(wave, 48_000, float(arrays[f"{signal}.cutoff_hz"]), kind)
            recorded(golden, errors, arrays, f"{signal}.{kind}.waveform_lowpass", low[None])
            recorded(golden, errors, arrays, f"{signal}.{kind}.lowpass_mel", log_mel(low, MEL_48K))
        check(request, errors, MEL_BOUND, part=("audiosr-basic", f"preparation, {signal}"))

    def test_mel_replacement(self, golden: Goldens, request: pytest.FixtureRequest) -> None:
        arrays = golden.arrays("audiosr_prepost")
        low = golden.normal("melrep:in", (2, 64, 256), -9.0, 1.0)
        low[0, :, :100] += 7
        low[1, :, :171] += 6
        out = golden.normal("melrep:out", (2, 1, 64, 256), -4.0, 1.0)
        found = [edge(row.exp(), 0.985) for row in low]
        check_equal(
            request, "mel cutoff", np.array(found), arrays["melrep.cutoff_bins"], ("audiosr-basic", "mel replacement")
        )
        for row, kept, given in zip(out[:, 0], found, low, strict=True):
            row[:, :kept] = given[:, :kept]
        errors: dict[str, float] = {}
        recorded(golden, errors, arrays, "melrep.out", out)
        check(request, errors, part=("audiosr-basic", "mel replacement"))

    @pytest.mark.parametrize(("signal", "gain"), [("lp4k", "1"), ("lp8k", "3"), ("lp8k", "0.2")])
    def test_join(self, golden: Goldens, request: pytest.FixtureRequest, signal: str, gain: str) -> None:
        arrays, name = golden.arrays("audiosr_prepost"), f"post.{signal}_gain{gain}"
        low = torch.from_numpy(golden.synth.signal48(signal, 2.56) / np.float32(32768))
        out = float(gain) * golden.normal(f"post:out:{signal}", (122_880,), 0.0, 0.1)
        sums = [stft(wave).abs().sum(-1) for wave in (low, out)]
        at = edge(sums[0], 0.985)
        check_equal(
            request,
            "cutoff",
            np.array(at),
            arrays[f"{name}.cutoff_bin"],
            ("audiosr-basic", f"joined bands, {signal} {gain}"),
        )
        loudness = level(sums[0], sums[1], at)
        assert loudness == pytest.approx(float(np.clip(arrays[f"{name}.raw_ratio"], 0.8, 1.2)))
        errors: dict[str, float] = {}
        # The published code turns the low band down instead of the high one up.
        recorded(golden, errors, arrays, f"{name}.out", (joined(low, out, at, loudness) / loudness)[None, None])
        check(request, errors, part=("audiosr-basic", f"joined bands, {signal} {gain}"))


def test_spectra_fit_the_bins() -> None:
    assert stft(noise(2, 3000)).shape == (2, BINS, 1 + 3000 // (FFT // 4))
