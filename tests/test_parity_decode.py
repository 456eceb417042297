"""The decoder against recorded outputs of the published one, at full size with synthetic weights (spec 4)."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import Goldens, check, check_equal
from torch import Tensor

from semanticodec import latent as latent_module
from semanticodec import published
from semanticodec.codec import SemantiCodec
from semanticodec.config import preset
from semanticodec.diffusion import SamplerOptions
from semanticodec.diffusion import sample as real_sample
from semanticodec.model import CodecModel
from semanticodec.nn.conditioners import interleaved_positions

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("inference")]

WAVE_BOUND = 1e-3
"""Four guided solver steps, the autoencoder and the vocoder multiply the rounding errors of each other."""
RATES = [100, pytest.param(50, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.slow)]
SHAPE = (1, 8, 256, 16)


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Goldens:
    return Goldens(goldens)


@pytest.fixture(scope="module", params=RATES)
def decoder(request: pytest.FixtureRequest, golden: Goldens) -> Iterator[SemantiCodec]:
    rate: int = request.param
    golden.arrays(f"decode_{rate}")
    config = preset(f"semanticodec-{rate}-4096")
    with torch.device("meta"):
        model = CodecModel(config, encoder=False)
    model.codebooks.semantic = torch.from_numpy(golden.synth.semantic_codebook(rate, 4096))
    golden.load(model, f"acoustic_{rate}", f"unet_{rate}", "diffusion_buffers", "vae", "vocoder")
    yield SemantiCodec.from_model(config, model)
    del model
    gc.collect()


def options(steps: int = 4, guidance: float = 2.0, eta: float = 1.0) -> SamplerOptions:
    return SamplerOptions(sampler="ddim", steps=steps, guidance=guidance, eta=eta, path="published")


def tokens(golden: Goldens, rate: int, name: str) -> Tensor:
    return torch.from_numpy(golden.arrays(f"encode_{rate}")[f"{name}.tokens"])


def stream(golden: Goldens, key: str) -> Callable[[int], Tensor]:
    """Return the recorded noise, which comes in the order of the solver's steps whatever they are called."""
    draws = golden.synth.NoiseStream(key)
    return lambda _step: torch.from_numpy(draws(SHAPE))


# --- tables and geometry


def test_positions(golden: Goldens, request: pytest.FixtureRequest) -> None:
    recorded = golden.arrays("posenc")
    check(
        request,
        {"pe_512x192": golden.error(recorded, "pe_512x192", interleaved_positions(512, 192), 8192)},
        part=("semanticodec", "positions"),
    )


def test_token_counts(golden: Goldens, request: pytest.FixtureRequest) -> None:
    cases = json.loads((golden.folder / "token_counts.json").read_text())
    for rate in (100, 50, 25):
        seen, wanted = [], []
        for case in cases:
            samples, recorded = case["samples_16k"], case[str(rate)]
            target, frames = published.token_count(samples, rate)
            assert target == recorded["target_token_len"]
            spans = published.window_spans(frames, rate)
            assert spans == [tuple(span) for span in recorded["decoder_windows"]]
            seen += [frames, published.window_count(samples), published.sample_count(frames, rate)]
            wanted += [recorded["tokens"], recorded["encoder_windows"], recorded["output_samples"]]
        check_equal(
            request,
            f"token counts {rate}",
            np.array(seen),
            np.array(wanted),
            (f"semanticodec-{rate}", "token counts and windows"),
        )


def test_overlap_add(golden: Goldens, request: pytest.FixtureRequest) -> None:
    recorded = golden.arrays("overlap_add")
    errors = {}
    for length in (163872, 20000):
        name = f"ola_{length}"
        windows = [golden.normal(f"ola:{length}:{i}", (1, 1, length), 0.0, 0.1) for i in range(3)]
        joined = published.cross_fade(windows)
        errors[name] = golden.error(recorded, name, joined, 8192)
        assert joined.dtype == torch.float32
    check(request, errors, part=("semanticodec", "cross-fade of windows"))


# --- latents


@pytest.mark.parametrize(
    "setting", ["eta1_cfg2_S4", "eta1_cfg1_S4", pytest.param("eta0_cfg2_S4", marks=pytest.mark.slow)]
)
def test_ddim_trajectory(
    golden: Goldens,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    decoder: SemantiCodec,
    setting: str,
) -> None:
    rate = decoder.config.token_rate
    recorded, key = golden.arrays(f"decode_{rate}"), f"ddim:{rate}:{setting}"
    inputs: list[Tensor] = []
    predictions: list[tuple[int, Tensor]] = []

    def recording(denoise: Callable[[Tensor, int], Tensor], *args: Any, **kwargs: Any) -> Tensor:
        def watched(x: Tensor, t: int) -> Tensor:
            inputs.append(x)
            predictions.append((t, denoise(x, t)))
            return predictions[-1][1]

        return real_sample(watched, *args, **kwargs)

    monkeypatch.setattr(latent_module, "sample", recording)
    eta, guidance, steps = (float(part.lstrip("etacfgS")) for part in setting.split("_"))
    asked, absent = published.conditioning(decoder, tokens(golden, rate, "A_v4096"))
    latent = decoder.model.latent.generate(asked, absent, stream(golden, key), options(int(steps), guidance, eta))
    errors = {"latent": golden.error(recorded, f"{key}.latent", latent, 8192)}
    for step, ((t, x0), x) in enumerate(zip(predictions, [*inputs[1:], latent], strict=True)):
        assert t == recorded[f"{key}.step{step}.t"]
        errors[f"step{step}.pred_x0"] = golden.error(recorded, f"{key}.step{step}.pred_x0", x0, 1024)
        errors[f"step{step}.x_prev"] = golden.error(recorded, f"{key}.step{step}.x_prev", x, 1024)
    check(request, errors, part=(f"semanticodec-{rate}", f"DDIM, {setting}"))


# --- waveforms


@pytest.mark.parametrize("name", [pytest.param("A", marks=pytest.mark.slow), "B"])
def test_decode(golden: Goldens, request: pytest.FixtureRequest, decoder: SemantiCodec, name: str) -> None:
    rate = decoder.config.token_rate
    recorded, key = golden.arrays(f"decode_{rate}"), f"decode:{rate}:{name}_v4096_S4_cfg2"
    latents, mels = [], []
    handle = decoder.model.latent.vae.post_quant_conv.register_forward_pre_hook(
        lambda _m, args: latents.append(args[0] * 0.8)
    )
    last = decoder.model.latent.vae.decoder.register_forward_hook(lambda _m, _a, out: mels.append(out.clone()))
    noise = stream(golden, key)
    wave = published.decode(decoder, tokens(golden, rate, f"{name}_v4096"), lambda _window: noise, options())
    handle.remove()
    last.remove()
    errors = {"wav": golden.error(recorded, f"{key}.wav", wave, 16384)}
    for window, (latent, mel) in enumerate(zip(latents, mels, strict=True)):
        errors[f"latent{window}"] = golden.error(recorded, f"{key}.latent{window}", latent, 2048)
        errors[f"mel{window}"] = golden.error(recorded, f"{key}.mel{window}", mel, 2048)
    if name == "B":
        seam = torch.from_numpy(recorded[f"{key}.wav_seam_151632_163872_step4"])
        errors["seam"] = float((wave[0, 0, 151632:163872:4] - seam).abs().max() / seam.std())
    check(request, errors, WAVE_BOUND, part=(f"semanticodec-{rate}", f"codes to waveform, {name}"))


@pytest.mark.slow
def test_decode_with_torch_generator(golden: Goldens, request: pytest.FixtureRequest, decoder: SemantiCodec) -> None:
    """What a user of the published code gets on a CPU after ``torch.manual_seed(1234)``."""
    if decoder.config.token_rate != 100:
        pytest.skip("recorded at 100 tokens per second")
    generator = torch.Generator().manual_seed(1234)
    wave = published.decode(
        decoder,
        tokens(golden, 100, "A_v4096"),
        lambda _window: lambda _step: torch.randn(SHAPE, generator=generator),
        options(),
    )
    name = "decode:100:A_v4096_S4_cfg2_manual_seed_1234.wav"
    errors = {"wav": golden.error(golden.arrays("decode_100"), name, wave, 16384)}
    check(request, errors, WAVE_BOUND, part=("semanticodec-100", "codes to waveform, torch's own noise"))
