"""Sound files, resampling and the two spectrograms."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from tiny import noise
from torch import Tensor

from semanticodec import audio
from semanticodec.audio import (
    FBANK_MEAN,
    FBANK_SCALE,
    check_format,
    checked,
    fbank,
    load,
    log_mel,
    open_sound,
    pieces,
    recording,
    resample,
    save,
)
from semanticodec.errors import AudioError

RATES = (8000, 11025, 22050, 44100, 44101, 48000, 96000)


def sine(hertz: float, rate: int, samples: int) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / rate).float()


class TestFiles:
    @pytest.mark.parametrize(("form", "bound"), [("WAV", 2**-15), ("FLAC", 2**-15), ("OGG", 0.1)])
    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_round_trip(self, tmp_path: Path, form: str, bound: float, channels: int) -> None:
        wave = torch.stack([0.5 * sine(300 * (i + 1), 22050, 3001) for i in range(channels)])
        path, memory = tmp_path / f"a.{form.lower()}", io.BytesIO()
        save(path, wave, 22050)
        save(memory, wave, 22050, format=form)
        memory.seek(0)
        for source in (path, str(path), memory):
            back, rate = load(source)
            assert (rate, back.dtype, back.shape) == (22050, torch.float32, wave.shape)
            assert (back - wave).abs().max() <= bound

    def test_one_channel_without_its_axis(self) -> None:
        memory = io.BytesIO()
        save(memory, noise(100, scale=0.1), 8000, format="WAV")
        memory.seek(0)
        assert load(memory)[0].shape == (1, 100)

    def test_clips_instead_of_wrapping_round(self) -> None:
        memory = io.BytesIO()
        save(memory, torch.tensor([-7.0, -1.0, 0.0, 1.0, 1.5], dtype=torch.float64), 16000, format="WAV")
        memory.seek(0)
        want = torch.tensor([[-1.0, -1.0, 0.0, 1.0, 1.0]])
        torch.testing.assert_close(load(memory)[0], want, rtol=0, atol=2**-15)

    @pytest.mark.parametrize("content", [b"", b"RIFF", b"not a sound at all" * 99, b"fLaC" + bytes(64)])
    def test_refuses_garbage(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.wav"
        path.write_bytes(content)
        with pytest.raises(AudioError, match=r"a\.wav is not audio"):
            load(path)
        with pytest.raises(AudioError, match="not audio"):
            load(io.BytesIO(content))

    def test_refuses_what_is_not_there(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nothing.wav", tmp_path / "nothing.raw"):
            with pytest.raises(AudioError, match="not audio"):
                load(path)

    def test_refuses_no_samples(self) -> None:
        memory = io.BytesIO()
        soundfile.write(memory, np.zeros((0, 2)), 16000, format="WAV")
        memory.seek(0)
        with pytest.raises(AudioError, match="no samples"):
            load(memory)

    @pytest.mark.parametrize(
        ("form", "rate", "channels"),
        [("OGG", 200_001, 1), ("MP3", 44_101, 1), ("MP3", 16_000, 3), ("FLAC", 700_000, 1), ("FLAC", 44_100, 9)],
    )
    def test_refuses_formats_that_have_no_such_files(self, tmp_path: Path, form: str, rate: int, channels: int) -> None:
        path = tmp_path / f"a.{form.lower()}"
        for call in (
            lambda: check_format(form, rate, channels),
            lambda: save(path, torch.zeros(channels, 10), rate),
            lambda: save(io.BytesIO(), torch.zeros(channels, 10), rate, format=form),
        ):
            with pytest.raises(AudioError, match=f"cannot write {form} with {channels} channels at {rate} Hz"):
                call()
        assert not path.exists()
        check_format("OGG", 200_000, 1)

    def test_a_full_disk_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.wav").symlink_to("/dev/full")
        with pytest.raises(AudioError, match=r"cannot write .*a\.wav"):
            save(tmp_path / "a.wav", torch.zeros(10**6), 16000)

    def test_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(tmp_path / "a.flac", noise(2, 2500, scale=0.1), 16000)
        monkeypatch.setattr(audio, "PIECE", 2000)
        with open_sound(tmp_path / "a.flac") as file:
            parts = list(pieces(file))
        assert [part.shape for part in parts] == [(2, 1000), (2, 1000), (2, 500)]
        assert torch.equal(torch.cat(parts, 1), load(tmp_path / "a.flac")[0])
        save(tmp_path / "b.wav", torch.zeros(0), 16000)
        with open_sound(tmp_path / "b.wav") as file, pytest.raises(AudioError, match=r"b\.wav holds no samples"):
            list(pieces(file))

    def test_damage_inside_is_an_error(self, tmp_path: Path) -> None:
        save(tmp_path / "a.flac", noise(1, 100_000, scale=0.1), 16000)
        data = bytearray((tmp_path / "a.flac").read_bytes())
        data[50_000:90_000] = bytes(40_000)
        for whole in (True, False):
            with open_sound(io.BytesIO(data)) as file, pytest.raises(AudioError, match="this is not audio"):
                _ = load(io.BytesIO(data)) if whole else list(pieces(file))

    def test_open_files_have_no_odd_names(self) -> None:
        with pytest.raises(AudioError, match=r"^this is not audio that libsndfile can read: [^<]*$"):
            load(io.BytesIO(b"nothing"))
        with pytest.raises(AudioError, match=r"^cannot write an open file without a format[^<]*$"):
            save(io.BytesIO(), torch.zeros(10), 16000)

    def test_refuses_to_write_the_impossible(self, tmp_path: Path) -> None:
        wave = torch.zeros(2, 10)
        for target, rate, form in (
            (tmp_path / "a.txt", 16000, None),
            (tmp_path / "no" / "a.wav", 16000, None),
            (tmp_path / "a.wav", -5, None),
            (io.BytesIO(), 16000, None),
            (io.BytesIO(), 16000, "HTML"),
        ):
            with pytest.raises(AudioError, match="cannot write"):
                save(target, wave, rate, format=form)


class TestResample:
    @given(
        samples=st.integers(1, 5000), source=st.sampled_from((*RATES, 16000)), target=st.sampled_from((*RATES, 16000))
    )
    def test_length(self, samples: int, source: int, target: int) -> None:
        out = resample(torch.ones(2, 3, samples), source, target)
        assert out.shape == (2, 3, math.ceil(samples * target / source))
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()

    @given(
        source=st.sampled_from(RATES), cuts=st.lists(st.integers(0, 7000), max_size=12), samples=st.integers(1, 7000)
    )
    def test_equals_a_stream_cut_anywhere(self, source: int, cuts: list[int], samples: int) -> None:
        """Bit for bit: what a stream that is flushed with silence gives, whatever the pieces."""
        wave = noise(samples, seed=samples)
        stream = soxr.ResampleStream(source, 16000, 1)
        edges = [0, *sorted(min(cut, samples) for cut in cuts), samples]
        pieces = [stream.resample_chunk(wave[a:b].numpy()) for a, b in itertools.pairwise(edges)]
        pieces.append(stream.resample_chunk(np.zeros(source // 16000 + 2, np.float32), last=True))
        whole = resample(wave, source, 16000).numpy()
        np.testing.assert_array_equal(np.concatenate(pieces)[: len(whole)], whole)

    @pytest.mark.parametrize("rate", RATES)
    def test_keeps_a_sine_in_its_place(self, rate: int) -> None:
        for source, target in ((rate, 16000), (16000, rate)):
            out = resample(sine(1000, source, source), source, target)
            error = (out - sine(1000, target, target))[target // 10 : -target // 10]
            assert error.abs().max() < 2e-5

    def test_the_last_samples_are_sound(self) -> None:
        """soxr alone rounds the length down here; the sample that is missing is not simply a zero."""
        out = resample(torch.ones(1001), 44100, 16000)
        assert soxr.resample(np.ones(1001, np.float32), 44100, 16000).shape == (363,)
        assert len(out) == 364
        assert out[-1].abs() > 0.1

    def test_rows_do_not_depend_on_each_other(self) -> None:
        rows = noise(9, 4001)
        whole = resample(rows, 44100, 16000)
        for row, want in zip(rows, whole, strict=True):
            assert torch.equal(resample(row, 44100, 16000), want)

    def test_same_rate_changes_nothing_but_the_dtype(self) -> None:
        wave = noise(3, 77).double()
        assert torch.equal(resample(wave, 44101, 44101), wave.float())

    @pytest.mark.parametrize("rate", [44100.0, "16000", None, True])
    def test_refuses_rates_that_are_no_whole_numbers(self, rate: object) -> None:
        with pytest.raises(AudioError, match=f"{rate!r} Hz was given; it must be a whole number"):
            resample(torch.zeros(10), rate, 16000)  # type: ignore[arg-type]
        assert torch.equal(resample(torch.ones(10), np.int64(16000), 16000), torch.ones(10))

    @pytest.mark.parametrize("rate", [0, -16000, 1, 999, 2**31])
    def test_refuses_rates_that_make_no_sense(self, rate: int) -> None:
        for pair in ((rate, 16000), (16000, rate), (rate, rate)):
            with pytest.raises(AudioError, match=f"{rate}.* Hz"):
                resample(torch.zeros(10), *pair)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_checked_refuses_what_is_not_finite(bad: float) -> None:
    wave = torch.zeros(2, 9)
    assert checked(wave) is wave
    wave[1, 3:5] = bad
    with pytest.raises(AudioError, match="2 of 18 samples are NaN or infinite"):
        checked(wave)


@pytest.mark.parametrize("level", [1.01e9, -1e19, 3e38])
def test_checked_refuses_what_cannot_be_computed_with(level: float) -> None:
    with pytest.raises(
        AudioError, match=rf"largest sample is {abs(level):.3g}; samples lie in \[-1, 1\]".replace("+", r"\+")
    ):
        checked(torch.tensor([0.5, level]))
    assert torch.isfinite(fbank(checked(noise(2000).clamp(-1, 1) * 1e9))).all()


class TestFilterBank:
    @pytest.mark.parametrize("samples", [400, 559, 560, 4001])
    def test_rows(self, samples: int) -> None:
        assert fbank(torch.zeros(3, samples)).shape == (3, 1 + (samples - 400) // 160, 128)

    def test_equals_torchaudios_kaldi(self) -> None:
        wave = noise(1, 8000, scale=0.1)
        want = torchaudio.compliance.kaldi.fbank(
            wave,
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        got = fbank(wave)[0] * FBANK_SCALE + FBANK_MEAN
        assert (got - want).abs().max() < 2e-2  # torchaudio's float32 filters, near the logarithm's floor
        assert (got - want).abs().mean() < 1e-5

    def test_a_row_sees_only_its_own_samples(self) -> None:
        wave = noise(1, 4000)
        rows = fbank(wave)
        for row in (0, 7, 22):
            other = noise(1, 4000, seed=1) + 3
            start = 160 * row
            other[:, start : start + 400] = wave[:, start : start + 400]
            changed = fbank(other)
            assert torch.equal(changed[:, row], rows[:, row])
            assert not torch.equal(changed[:, row - 1], rows[:, row - 1])

    def test_the_level_it_rests_on_does_not_matter(self) -> None:
        wave = noise(1, 2000, scale=0.1)
        torch.testing.assert_close(fbank(wave + 0.25), fbank(wave), rtol=0, atol=2e-3)

    def test_silence_is_flat(self) -> None:
        """Exactly: a row that varies by rounding alone would not count as padding (spec 3.1)."""
        rows = fbank(torch.zeros(1, 4000))
        assert (rows - (math.log(1.1920929e-07) - FBANK_MEAN) / FBANK_SCALE).abs().max() < 1e-6
        assert (rows.std(-1) == 0).all()


class TestLogMel:
    @pytest.mark.parametrize("samples", [433, 1600, 1759])
    def test_rows(self, samples: int) -> None:
        assert log_mel(torch.zeros(2, samples)).shape == (2, samples // 160, 64)

    @pytest.mark.parametrize("sample", [1601, 1679, 1680, 1759, 2000])
    def test_an_impulse_is_loudest_in_its_own_row(self, sample: int) -> None:
        wave = torch.zeros(1, 4800)
        wave[0, sample] = 1
        assert log_mel(wave).sum(-1).argmax() == sample // 160

    @pytest.mark.parametrize("hertz", [300, 1000, 4000])
    def test_follows_its_definition(self, hertz: int) -> None:
        """HiFi-GAN's: STFT of the signal reflected at its ends, Slaney's triangles, magnitudes, floor 1e-5."""
        wave = (0.3 * sine(hertz, 16000, 3200))[None]
        padded = torch.nn.functional.pad(wave[:, None], (432, 432), mode="reflect")[:, 0]
        spectrum = torch.stft(padded, 1024, 160, window=torch.hann_window(1024), center=False, return_complex=True)
        filters = torchaudio.functional.melscale_fbanks(513, 0, 8000, 64, 16000, "slaney", "slaney")
        want = (spectrum.abs().mT @ filters).clamp_min(1e-5).log()
        torch.testing.assert_close(log_mel(wave), want[:, :20], rtol=0, atol=2e-2)
        lowest, highest = filters[:, int(want[0, 10].argmax())].nonzero()[[0, -1], 0] * 15.625
        assert lowest <= hertz <= highest

    def test_silence(self) -> None:
        assert torch.equal(log_mel(torch.zeros(1, 1600)), torch.full((1, 10, 64), math.log(1e-5)))


def test_what_is_kept_can_be_trained_with_whoever_asked_first():
    audio.slaney_filters.cache_clear()
    audio._hann.cache_clear()
    audio._kaldi_filters.cache_clear()
    with torch.inference_mode():
        kept = (audio.slaney_filters(), audio._hann(400), audio._kaldi_filters())
    assert not any(tensor.is_inference() for tensor in kept)


def test_samples_and_channels_the_wrong_way_round_are_refused() -> None:
    assert recording(torch.zeros(64, 1)).shape == (64, 1)
    with pytest.raises(AudioError, match=r"seen \(2000, 2\): 2000 channels .* transpose"):
        recording(torch.zeros(2000, 2))
