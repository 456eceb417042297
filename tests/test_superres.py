"""Super-resolution on a small random model: what is kept, what is generated, and what no input may break."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import UNET, VAE, fill, random_codes
from tiny import codec as tiny_codec
from torch import Tensor
from typer.testing import CliRunner

from semanticodec import checkpoints, superres
from semanticodec.audio import load, resample, save
from semanticodec.bandlimit import crossfade, lowpass, stft
from semanticodec.cli import app
from semanticodec.config import LatentConfig, MelConfig, VocosConfig
from semanticodec.diffusion import SamplerOptions
from semanticodec.errors import AudioError, CheckpointError, ConfigError
from semanticodec.latent import LatentDiffusion
from semanticodec.superres import MINI_SR, SUPERRES_PRESETS, SuperResConfig, SuperResolution, shared
from semanticodec.systems import SystemConfig
from semanticodec.values import to_json

RATE = 24_000
CONFIG = SuperResConfig(
    "tiny",
    LatentConfig(
        unet=replace(UNET, in_channels=8),
        vae=VAE,
        vocoder=VocosConfig(dim=16, hidden=24, layers=2, right=(1, 1, 0), iterations=4),
        mel=MelConfig(sample_rate=RATE, hop=240, bins=40, fmax=12_000.0),
        steps=2,
        guidance=1.5,
    ),
    rows=32,
    unit=16,
    overlap=8,
    share=0.99,
)


@cache
def model() -> SuperResolution:
    """A small random model; shared, so leave it as it is."""
    latent = LatentDiffusion(CONFIG.latent, vae_encoder=True)
    fill(latent)
    latent.scale.fill_(0.7)
    return SuperResolution(CONFIG, latent)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dull(samples: int, *, cutoff: float = 3000, seed: int = 0, channels: int = 1) -> Tensor:
    """Return noise ``[channels, samples]`` at 24 kHz that ends at ``cutoff``."""
    return lowpass(noise(channels, samples, seed=seed), RATE, cutoff, "ellip")


def test_offload_changes_nothing(tmp_path: Path) -> None:
    checkpoints.save_model(tmp_path, to_json(CONFIG), model().latent.state_dict())
    waiting = SuperResolution.from_pretrained(tmp_path, offload=True)
    wave = dull(4000)
    assert torch.equal(waiting.upsample(wave, RATE), model().upsample(wave, RATE))


@pytest.mark.gpu
def test_half_precision_and_offload_on_a_gpu(tmp_path: Path) -> None:
    checkpoints.save_model(tmp_path, to_json(CONFIG), model().latent.state_dict())
    wave = dull(20_000)
    plain = model().upsample(wave, RATE)
    for dtype, offload, bound in (
        (torch.float32, True, 0.01),
        (torch.bfloat16, False, 0.5),
        (torch.float16, True, 0.3),
    ):
        own = SuperResolution.from_pretrained(tmp_path, device="cuda", dtype=dtype, offload=offload)
        assert ((own.upsample(wave, RATE) - plain).std() / plain.std()).item() < bound


def upsampled(wave: Tensor, rate: int = RATE, **options: Any) -> Tensor:
    return model().upsample(wave, rate, **options)


class TestKept:
    def test_below_the_cutoff_the_recording_stays(self) -> None:
        wave = dull(20_000, channels=2)
        heard = upsampled(wave, cutoff=3000)
        error = lowpass(heard - wave, RATE, 2700, "ellip")[:, 1000:-1000]
        assert error.abs().max() < 1e-2 * wave.abs().max()

    def test_above_the_cutoff_something_is_generated(self) -> None:
        wave = dull(20_000)
        above, before = (stft(x)[:, 300:, 4:-4].abs().mean() for x in (upsampled(wave, cutoff=3000), wave))
        assert above > 100 * before

    @pytest.mark.parametrize("gain", [0.01, 3.0])
    def test_level(self, gain: float) -> None:
        wave = dull(9000)
        torch.testing.assert_close(upsampled(gain * wave), gain * upsampled(wave), rtol=0, atol=2e-3 * gain)

    def test_offset(self) -> None:
        wave = dull(9000)
        torch.testing.assert_close(upsampled(wave + 0.25) - 0.25, upsampled(wave), rtol=0, atol=2e-3)

    def test_channels(self) -> None:
        left, right = dull(9000, seed=1), dull(9000, seed=2)
        heard = upsampled(torch.cat([left, left]))
        assert torch.equal(heard[0], heard[1])
        swapped = [upsampled(torch.cat(pair), cutoff=3000) for pair in ((left, right), (right, left))]
        torch.testing.assert_close(swapped[0].flip(0), swapped[1], rtol=0, atol=1e-5)

    def test_a_full_band_is_only_resampled(self) -> None:
        wave = noise(9000)
        assert torch.equal(upsampled(wave, cutoff=12_000), wave)
        assert torch.equal(upsampled(wave, 48_000, cutoff=20_000), resample(wave, 48_000, RATE))


class TestShapes:
    @pytest.mark.parametrize("rate", [4000, 8000, 11_025, 16_000, 44_100, 48_000])
    @pytest.mark.parametrize("samples", [1, 777, 12_345])
    def test_any_rate_and_length(self, rate: int, samples: int) -> None:
        heard = upsampled(noise(samples), rate)
        assert heard.shape == (-(-samples * RATE // rate),)
        assert heard.dtype == torch.float32
        assert heard.isfinite().all()

    def test_arrays_are_taken(self) -> None:
        wave = dull(5000)
        assert torch.equal(model().upsample(wave.numpy(), RATE), upsampled(wave))

    @pytest.mark.parametrize(
        ("wave", "rate", "complaint"),
        [
            (torch.zeros(0), RATE, "not empty"),
            (torch.zeros(1, 2, 30), RATE, r"\[S\] or \[channels, S\]"),
            (torch.full((100,), math.nan), RATE, "NaN"),
            (torch.zeros(100, dtype=torch.int16), RATE, "floating point"),
            (torch.zeros(100), 3999, "needs 4000 or more"),
        ],
    )
    def test_what_is_no_recording_is_refused(self, wave: Tensor, rate: int, complaint: str) -> None:
        with pytest.raises(AudioError, match=complaint):
            upsampled(wave, rate)

    @pytest.mark.parametrize("cutoff", [0, -1.0, math.inf, math.nan])
    def test_impossible_cutoffs_are_refused(self, cutoff: float) -> None:
        with pytest.raises(ConfigError, match="frequency above 0"):
            upsampled(noise(100), cutoff=cutoff)

    @pytest.mark.parametrize(
        "wave",
        [
            torch.zeros(9000),
            torch.full((9000,), 0.3),
            0.4 * torch.sin(2 * math.pi * 200 / RATE * torch.arange(9000)),
            torch.nn.functional.one_hot(torch.tensor(4000), 9000).float(),
            1e-30 * torch.ones(9000),
        ],
        ids=["silence", "offset", "tone", "impulse", "tiny"],
    )
    def test_what_the_published_code_cannot_take(self, wave: Tensor) -> None:
        heard = upsampled(wave)
        assert heard.isfinite().all()
        assert (lowpass(heard - wave, RATE, 800) / wave.abs().max().clamp_min(1e-30)).abs().max() < 0.05
        if not wave.std():
            assert torch.equal(heard, wave)


class TestDials:
    def test_the_seed_decides(self) -> None:
        wave = dull(9000)
        assert torch.equal(upsampled(wave, seed=3), upsampled(wave, seed=3))
        assert not torch.allclose(upsampled(wave, seed=3), upsampled(wave, seed=4), atol=1e-3)

    def test_the_cutoff_is_found(self) -> None:
        for hertz in (2000, 5000, 9000):
            assert model().cutoff(dull(48_000, cutoff=hertz)) == pytest.approx(hertz, rel=0.05)
            long = torch.cat([dull(24_000, cutoff=hertz), torch.zeros(1, 100 * RATE)], 1)
            assert model().cutoff(long) == pytest.approx(hertz, rel=0.05)
        assert model().cutoff(torch.zeros(1, 500)) == superres.LOWEST_CUTOFF

    def test_one_cutoff_for_a_recording_whose_band_changes(self) -> None:
        wave = torch.cat([dull(24_000, cutoff=6000), 0.1 * dull(24_000, cutoff=2000)], 1)
        assert model().cutoff(wave) == pytest.approx(6000, rel=0.1)

    def test_options_reach_the_solver(self) -> None:
        wave = dull(5000)
        heard = [
            upsampled(wave, options=options)
            for options in (None, SamplerOptions(steps=1), SamplerOptions(guidance=1.0))
        ]
        assert not torch.allclose(heard[0], heard[1], atol=1e-4)
        assert not torch.allclose(heard[0], heard[2], atol=1e-4)

    def test_progress_is_told(self) -> None:
        seen: list[float] = []
        upsampled(dull(20_000), progress=seen.append)
        assert seen == [pytest.approx((i + 1) / 4) for i in range(4)]


class TestSeams:
    def test_windows_cover_everything_with_the_overlap(self) -> None:
        for rows in (1, 16, 17, 32, 33, 56, 57, 1000):
            plan = list(superres._windows(rows, CONFIG))
            assert plan[0][0] == 0
            assert plan[-1][1] >= rows
            assert all(before[1] - after[0] == CONFIG.overlap for before, after in itertools.pairwise(plan))
            assert all((last - first) % CONFIG.unit == 0 for first, last in plan)
            assert sum(last > rows for _, last in plan) <= 1

    def test_a_fade_between_equals_changes_nothing(self) -> None:
        wave = noise(2, 1920)
        torch.testing.assert_close(crossfade(wave, wave, 100), wave, rtol=0, atol=1e-6)

    def test_a_fade_between_strangers_keeps_the_power(self) -> None:
        old, new = noise(200, 1920, seed=1), noise(200, 1920, seed=2)
        power = crossfade(old, new, 100).square().mean(0).unfold(0, 192, 192).mean(1)
        assert (power / 0.04 - 1).abs().max() < 0.1

    def test_a_fade_begins_with_the_old_and_ends_with_the_new(self) -> None:
        old, new = noise(1, 1920, seed=1), noise(1, 1920, seed=2)
        faded = crossfade(old, new, 100)
        assert (faded - old)[:, :10].abs().max() < 0.01
        assert (faded - new)[:, -10:].abs().max() < 0.01

    def test_windows_are_heard_where_they_belong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A model that returns its input's low band leaves the recording as it is, seams included."""
        wave = dull(20_000)
        spans = []

        def echo(_: SuperResolution, low: Tensor, *__: object) -> Tensor:
            first, last = list(superres._windows(84, CONFIG))[len(spans)]
            spans.append(low.shape[1])
            padded = torch.nn.functional.pad(wave, (0, 2 * RATE))
            return padded[:, first * 240 : last * 240].clone()

        monkeypatch.setattr(SuperResolution, "_window", echo)
        result = model()._generate(wave, 3000.0, 0, SamplerOptions(), None)
        torch.testing.assert_close(result, wave, rtol=0, atol=1e-5)
        assert spans == [32, 32, 32, 32]

    def test_blocks_join_like_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        low, high = noise(2, 30_000, seed=1), noise(2, 30_000, seed=2)
        whole = superres._join(low, high, 200)
        monkeypatch.setattr(superres, "BLOCK", 8192)
        torch.testing.assert_close(superres._join(low, high, 200), whole, rtol=0, atol=1e-6)

    def test_the_low_mel_of_a_window_does_not_depend_on_where_it_is_cut(self) -> None:
        wave = dull(48_000, cutoff=4000)
        whole = model()._low_mel(wave, 3000.0, 0, 200)
        part = model()._low_mel(wave, 3000.0, 100, 132)
        kept = superres.mel_edge(CONFIG.latent.mel, 2500.0)
        torch.testing.assert_close(part[:, :, :kept], whole[:, 100:132, :kept], rtol=0, atol=0.05)


def test_the_mel_edge_grows_with_the_cutoff() -> None:
    mel = CONFIG.latent.mel
    edges = [superres.mel_edge(mel, hertz) for hertz in (0.0, 1000.0, 4000.0, 12_000.0)]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (0, mel.bins)


@pytest.mark.parametrize("config", SUPERRES_PRESETS.values(), ids=SUPERRES_PRESETS)
def test_presets_fit_together(config: SuperResConfig) -> None:
    """Windows fill whole latent steps that the U-Net can halve, and the condition joins the noisy latent."""
    latent, factor = config.latent, config.latent.vae.factor * config.latent.unet.factor
    assert config.unit % factor == config.rows % config.unit == 0
    assert latent.mel.bins % factor == 0
    assert latent.unet.in_channels == 2 * latent.unet.out_channels == 2 * latent.vae.latent_channels
    assert 0 < config.overlap < config.rows
    if isinstance(latent.vocoder, VocosConfig):
        assert config is MINI_SR
        assert len(latent.vocoder.right) == latent.vocoder.layers + 1
    else:
        assert math.prod(latent.vocoder.rates) == latent.mel.hop


class TestTogether:
    """With the codec and on the command line."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        state = {name: value.half() for name, value in model().latent.state_dict().items()}
        checkpoints.save_model(tmp_path / "weights", to_json(CONFIG), state)
        return tmp_path / "weights"

    def test_a_saved_model_is_the_same(self, folder: Path) -> None:
        loaded = SuperResolution.from_pretrained(folder)
        assert loaded.config == CONFIG
        wave = dull(5000)
        torch.testing.assert_close(loaded.upsample(wave, RATE), upsampled(wave), rtol=0, atol=0.02)

    def test_damage_is_noticed(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is damaged: the SHA-256"):
            SuperResolution.from_pretrained(folder)

    def test_a_system_takes_the_path_of_its_file(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        asked: list[Any] = []

        def load_latent(system: SystemConfig, place: Any, **_: Any) -> Any:
            asked.extend((system.name, place))
            return SuperResolution.from_pretrained(folder).latent

        monkeypatch.setattr("semanticodec.superres.load_latent", load_latent)
        SuperResolution.from_pretrained("audiosr-speech", weights="there.bin")
        assert asked == ["audiosr-speech", "there.bin"]
        with pytest.raises(ConfigError, match="mini-sr is none"):
            SuperResolution.from_pretrained(weights="there.bin")

    def test_missing_weights_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"neither a preset nor a folder with weights .* mini-sr"):
            SuperResolution.from_pretrained(tmp_path)

    def test_missing_weights_of_mini_say_how_to_make_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoints, "WEIGHTS", tmp_path)
        with pytest.raises(CheckpointError, match=r"--model mini-sr`, or name another model: audiosr-b"):
            SuperResolution.from_pretrained()

    def test_codes_become_wide_sound_in_one_call(self, folder: Path) -> None:
        codec, codes = tiny_codec("mini"), random_codes(tiny_codec("mini").config, 16, batch=2)
        heard = codec.decode(codes, length=5000, upsample=str(folder))
        assert heard.shape == (2, 7500)
        narrow = codec.decode(codes, length=5000)
        loaded = shared(str(folder), "cpu", torch.float32)
        assert loaded is shared(str(folder), "cpu", torch.float32)
        assert torch.equal(heard[1], loaded.upsample(narrow[1], 16_000))
        assert torch.equal(codec.decode(codes, length=5000, upsample=loaded), heard)

    def test_on_the_command_line(self, folder: Path, tmp_path: Path) -> None:
        wave = torch.cat([dull(9000, seed=1), dull(9000, seed=2)]) / 4
        save(tmp_path / "in.wav", wave, RATE)
        out = tmp_path / "out.wav"
        told = ["upsample", str(tmp_path / "in.wav"), "-o", str(out), "--model", str(folder), "--device", "cpu"]
        result = CliRunner().invoke(app, [*told, "--seed", "3", "--steps", "1", "--cutoff", "3000"])
        assert result.exit_code == 0, result.output
        heard, rate = load(out)
        assert rate == RATE
        source, _ = load(tmp_path / "in.wav")
        options = SamplerOptions(steps=1)
        wanted = SuperResolution.from_pretrained(folder).upsample(source, RATE, cutoff=3000, seed=3, options=options)
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)
        assert CliRunner().invoke(app, [*told, "-f", "--published"]).exit_code == 2  # it is no published system
        again = CliRunner().invoke(app, told)
        assert again.exit_code == 1
        assert "exists; --force overwrites it" in again.output
