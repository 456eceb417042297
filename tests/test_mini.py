"""The shipped weights: what they cost and what comes out, on the shipped recording."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.superres import lsd
from semanticodec import ConfigError, Generator, SemantiCodec, SuperResolution, controls
from semanticodec.audio import load, log_mel, resample
from semanticodec.checkpoints import WEIGHTS
from semanticodec.conditioners.prompts import Prompts
from semanticodec.config import PRESETS, RATES
from semanticodec.controls import loudness
from semanticodec.demo import RECORDING, mel_l1, stoi
from semanticodec.diffusion import SamplerOptions, noise


def test_fits_the_package() -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / "mini").iterdir()) <= 60_000_000


@pytest.mark.parametrize("rate", RATES)
def test_codes_real_sound(rate: int) -> None:
    """Far better than silence or another recording; benchmarks/quality.py has the figures."""
    codec = SemantiCodec.from_pretrained(f"mini-{rate}")
    assert codec.config == PRESETS[f"mini-{rate}"]
    assert 300 <= codec.config.bitrate <= 1400
    wave, source = load(RECORDING)
    wave = resample(wave.mean(0), source, 16_000)
    codes = codec.encode(wave, 16_000)
    sound = codec.decode(codes, length=len(wave))[0]
    assert sound.shape == wave.shape
    assert mel_l1(wave, sound) < 0.85
    heard = stoi(wave, sound)
    assert heard is not None
    assert heard > 0.5
    for stream in codes[0]:
        assert len(stream.unique()) > len(stream) // 3


def test_a_lost_block_is_filled_in() -> None:
    codec = SemantiCodec.from_pretrained("mini-100")
    wave, source = load(RECORDING)
    codes = codec.encode(wave.mean(0), source)
    whole = codec.decode(codes)[0]
    damaged = codes.clone()
    damaged[:, :, 64:80] = -1
    sound = codec.decode(damaged)[0]
    lost = slice(64 // 16 * 5120, 80 // 16 * 5120)
    assert torch.equal(sound[: lost.start - 960], whole[: lost.start - 960])
    level = sound[lost].std() / whole[lost].std()
    assert 0.02 < level < 20


def test_a_row_is_the_same_to_the_bit_in_any_batch() -> None:
    codec = SemantiCodec.from_pretrained("mini-100")
    wave, source = load(RECORDING)
    codes = codec.encode(wave.mean(0)[: 2 * source], source)
    batch = torch.cat([codes, codes.flip(2), codes])
    alone, together = codec.decode(codes), codec.decode(batch)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[1], alone[0])


def test_half_a_model() -> None:
    assert SemantiCodec.from_pretrained("mini-25", parts="encoder").model.latent is None
    assert SemantiCodec.from_pretrained("mini-25", parts="decoder").model.mae is None
    with pytest.raises(ConfigError, match="parts 'decode' are unknown"):
        SemantiCodec.from_pretrained("mini-25", parts="decode")  # type: ignore[arg-type]


def test_hash() -> None:
    codec = SemantiCodec.from_pretrained("mini-25")
    assert len(codec.weights_hash) == 64
    half = SemantiCodec.from_pretrained("mini-25", parts="encoder", dtype=torch.bfloat16)
    assert half.weights_hash == codec.weights_hash
    assert SemantiCodec.from_pretrained("mini-50", parts="encoder").weights_hash != codec.weights_hash


@pytest.mark.parametrize("rate", [8_000, 12_000])
def test_mini_sr_comes_nearer_than_sinc(rate: int) -> None:
    """At least 30 % nearer in log-spectral distance; benchmarks/superres.py has the figures."""
    assert sum(path.stat().st_size for path in (WEIGHTS / "mini-sr").iterdir()) <= 20_000_000
    model = SuperResolution.from_pretrained()
    wave, source = load(RECORDING)
    wave = resample(wave.mean(0), source, model.sample_rate)[: 2 * model.sample_rate]
    narrow = resample(wave, model.sample_rate, rate)
    sinc, ours = resample(narrow, rate, model.sample_rate), model.upsample(narrow, rate)
    assert lsd(wave, ours[: len(wave)]) < 0.7 * lsd(wave, sinc[: len(wave)])


def test_mini_gen_generates_what_labels_say() -> None:
    """Rain goes on, speech comes and goes; benchmarks/generation.py has the figures."""
    assert sum(path.stat().st_size for path in (WEIGHTS / "mini-gen").iterdir()) <= 20_000_000
    generator = Generator.from_pretrained()
    options = SamplerOptions(steps=8)
    rain, speech = (generator.generate(label, duration=1.28, options=options)[0] for label in ("rain", "speech-de"))
    assert torch.equal(rain, generator.generate("rain", duration=1.28, options=options)[0])
    restless, steady = (loudness(log_mel(wave)).std() for wave in (speech, rain))
    assert restless > 2 * steady


def test_mini_gen_follows_a_loudness_curve() -> None:
    """Rain that swells and falls as asked; without the control it does not.  benchmarks/control.py has the figures."""
    generator, network = Generator.from_pretrained(), controls.read(WEIGHTS / "mini-gen")
    curve = -4 + 2 * torch.sin(torch.arange(256) / 20)[None]
    heard = {}
    for scale in (0.0, 1.0):
        told = generator.prompts(Prompts(["rain"]))
        told = replace(told, controls=(controls.follow(network, curve, 64, scale),))
        untold = generator.prompts.unconditional(1, "zeros", None)
        with torch.inference_mode():
            start = noise(0, 0, 0, (8, 64, 16))[None]
            latents = generator.latent.generate(told, untold, lambda _, x=start: x, SamplerOptions(steps=6, eta=0.0))
            heard[scale] = loudness(log_mel(generator.latent.wave(generator.latent.mel(latents))))
    followed, ignored = (float(torch.corrcoef(torch.cat([heard[scale], curve]))[0, 1]) for scale in (1.0, 0.0))
    assert followed > 0.9
    assert ignored < 0.7
