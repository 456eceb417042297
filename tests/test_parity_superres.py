"""AudioSR from low-passed mel to waveform against the published code, at full size with synthetic weights (spec 6)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Goldens, check
from torch import Tensor
from torch.nn import functional

from semanticodec.audio import log_mel
from semanticodec.bandlimit import edge, joined, level, lowpass, stft
from semanticodec.diffusion import INITIAL, SamplerOptions
from semanticodec.family import system_rules
from semanticodec.keymap import apply_rules
from semanticodec.latent import LatentDiffusion
from semanticodec.loading import fill, matched
from semanticodec.superres import POSTERIOR, SUPERRES_PRESETS, SuperResolution
from semanticodec.systems import system

pytestmark = [pytest.mark.parity, pytest.mark.slow]

KEY = "e2e:sr:lp4k_5.12_butter_S4_g3.5"
OPTIONS = SamplerOptions(sampler="ddim", steps=4, guidance=3.5, eta=1.0, path="published")
SHARE = 0.985
BOUND = 1e-3
"""Guidance of 3.5 and four steps from pure noise multiply rounding errors."""


@pytest.fixture(scope="module")
def golden(family: Path) -> Goldens:
    return Goldens(family)


@pytest.fixture(scope="module")
def model(golden: Goldens) -> SuperResolution:
    golden.arrays("audiosr_e2e")
    row = system("audiosr-basic")
    with torch.device("meta"):
        latent = LatentDiffusion(row.latent, vae_encoder=True)
    rules, found, unmapped = system_rules(row, prompts=False), dict[str, Tensor](), list[str]()
    for entry in golden.synth.checkpoint_entries("audiosr_basic"):
        if entry["key"].startswith("model_ema."):  # names without dots, of weights that AudioSR never uses
            continue
        empty = {entry["key"]: torch.empty(entry["shape"], device="meta")}
        placed, lost = apply_rules(rules, empty, {"latent"})
        unmapped += lost
        for target, shape in placed.items():
            values = torch.from_numpy(np.asarray(golden.synth.fill(entry)))
            found[target.removeprefix("latent.")] = values.reshape(shape.shape)
    fill(latent, matched(found, unmapped, latent.state_dict(), KEY), device="cpu", dtype=torch.float32)
    return SuperResolution(SUPERRES_PRESETS[row.name], latent)


def test_steps_to_waveform(golden: Goldens, model: SuperResolution, request: pytest.FixtureRequest) -> None:
    arrays = golden.arrays("audiosr_e2e")
    prepared = golden.arrays("audiosr_prepost")
    wave = torch.from_numpy(golden.synth.signal48("lp4k", 5.12) / 32768.0)
    wave = wave - wave.mean()
    wave = (wave / (wave.abs().max() + 1e-8) * 0.5).float()[None]
    low = lowpass(wave, 48_000, float(prepared["lp4k.cutoff_hz"]))
    low_mel = log_mel(low, model.config.latent.mel)

    stream = golden.synth.NoiseStream(KEY)
    drawn = [torch.from_numpy(stream(shape)) for shape in json.loads(str(arrays[f"{KEY}.noise_shapes"]))]
    # The first draw is for the mel of the whole band, which only training needs.
    draws = dict(zip((POSTERIOR, INITIAL, 0, 1, 2, 3), drawn[1:], strict=True))

    errors: dict[str, float] = {}

    def compare(name: str, value: Tensor) -> None:
        errors[name] = golden.error(arrays, f"{KEY}.{name}", value, len(arrays[f"{KEY}.{name}.sample"]))

    with torch.inference_mode():
        latents = model.latents(low_mel, draws.__getitem__, OPTIONS)
        compare("latent", latents)
        mel = model.latent.mel(latents)
        compare("mel", mel[:, None])
        mel[:, :, : edge(low_mel.exp(), SHARE)] = low_mel[:, :, : edge(low_mel.exp(), SHARE)]
        compare("mel_replaced", mel[:, None])
        # Whole: the published code keeps the 16 samples that the vocoder adds.
        heard = model.latent.vocoder(mel.mT)
        compare("vocoder", heard[:, None])
    low = functional.pad(low, (0, heard.shape[1] - low.shape[1]))
    sums = [stft(part[0]).abs().sum(-1) for part in (low, heard)]
    at = edge(sums[0], SHARE)
    gain = level(sums[0], sums[1], at)
    published = joined(low, heard, at, gain) / gain
    compare("postprocessed", published[:, None])
    published = published / published.abs().max() * 0.5
    compare("waveform", (published - published.mean())[:, None])
    check(request, errors, BOUND, part=("audiosr-basic", "low band to waveform"))
