"""AudioLDM, AudioLDM 2, MusicLDM and AudioSR against recorded outputs, at full size with synthetic weights.

Without `slow` one timestep of the smallest U-Nets, the 48 kHz autoencoder and vocoder, schedules, front ends and two
trajectories run; `pytest -m parity -q` runs all, and prints the table.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Goldens, check, check_equal, shapes
from torch import Tensor, nn
from torch.nn import functional

from semanticodec import latent as latent_module
from semanticodec.audio import log_mel, slaney_filters
from semanticodec.config import HiFiGANConfig, MelConfig, ScheduleConfig
from semanticodec.diffusion import INITIAL, RENEWAL, Draw, Masked, Partial, SamplerOptions, from_v
from semanticodec.diffusion import sample as real_sample
from semanticodec.errors import ConfigError
from semanticodec.latent import Conditioning, LatentDiffusion
from semanticodec.nn.hifigan import HiFiGAN
from semanticodec.nn.unet import UNet
from semanticodec.nn.vae import AutoencoderKL
from semanticodec.schedule import make_schedule, published_path
from semanticodec.systems import MEL_48K, SYSTEMS

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("inference")]

UNETS = {
    "audioldm-s-full": "unet_audioldm_s",
    "audioldm-m-full": "unet_audioldm_m",
    "audioldm-l-full": "unet_audioldm_l",
    "audioldm2-full": "unet_audioldm2_full",
    "audioldm2-full-large-1150k": "unet_audioldm2_large",
    "audiosr-basic": "unet_audiosr",
}
FAST = {"audioldm-s-full", "audiosr-basic"}
UNCONDITIONAL = -11.4981
SCALE = 0.8


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield
    gc.collect()


@pytest.fixture(scope="module")
def golden(family: Path) -> Goldens:
    return Goldens(family)


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


# --- networks


@lru_cache(maxsize=1)
def unet_of(golden: Goldens, system: str) -> UNet:
    """Return the U-Net with the synthetic raw weights; the last one is kept, since making them takes seconds."""
    with torch.device("meta"):
        unet = UNet(SYSTEMS[system].latent.unet)
    golden.fill(unet.to_empty(device="cpu"), UNETS[system], "model.diffusion_model.")
    return unet


def conditioning(golden: Goldens, system: str, batch: int, tag: str, length: int = 64) -> Conditioning:
    """Return the recorded conditions called ``tag``."""
    synth = golden.synth
    if system == "audiosr-basic":
        value = UNCONDITIONAL * np.ones((batch, 16, length, 32), np.float32)
        latent = value if tag == "uncond" else synth.concat_cond(batch, tag, (16, length, 32))
        return Conditioning(concat=SCALE * torch.from_numpy(latent))
    if system.startswith("audioldm2"):
        full = {"rows": (13, 13)} if tag == "fullmask" else {}
        made = synth.uncond_audioldm2(batch) if tag == "uncond" else synth.ctx_audioldm2(batch, tag[:5], **full)
        return Conditioning(contexts=tuple((torch.from_numpy(x), torch.from_numpy(mask)) for x, mask in made))
    return Conditioning(film=torch.from_numpy(synth.film(batch, tag))[:, 0])


def evaluate(golden: Goldens, system: str, x: Tensor, t: list[int], tag: str) -> Tensor:
    unet, given = unet_of(golden, system), conditioning(golden, system, len(x), tag, x.shape[2])
    joined = x if given.concat is None else torch.cat([x, given.concat], 1)
    result: Tensor = unet(joined, torch.tensor(t), unet.project_contexts(given.contexts), unet.project_film(given.film))
    return result


@pytest.mark.parametrize("system", [name if name in FAST else slow(name) for name in UNETS])
def test_unet_blocks(golden: Goldens, request: pytest.FixtureRequest, system: str) -> None:
    arrays, unet = golden.arrays(UNETS[system]), unet_of(golden, system)
    x = golden.normal("unet:x", (1, SYSTEMS[system].latent.unet.out_channels, 64, SYSTEMS[system].latent.cells))
    stages: dict[str, nn.Module] = {f"t500.in{i:02}": stage for i, stage in enumerate(unet.input_blocks)}
    stages |= {f"t500.out{i:02}": stage for i, stage in enumerate(unet.output_blocks)} | {"t500.mid": unet.middle_block}
    if unet.film_emb is not None:
        stages["t500.film_emb"] = unet.film_emb
    with golden.watch(arrays, stages) as errors:
        result = evaluate(golden, system, x, [500], "cond")
    errors["t500"] = golden.error(arrays, "t500", result)
    check(request, errors, part=(system, "U-Net, every block"))


@pytest.mark.slow
@pytest.mark.parametrize("system", UNETS)
def test_unet_timesteps_and_conditions(golden: Goldens, request: pytest.FixtureRequest, system: str) -> None:
    arrays, latent = golden.arrays(UNETS[system]), SYSTEMS[system].latent
    shape = (1, latent.unet.out_channels, 64, latent.cells)
    x, x2 = golden.normal("unet:x", shape), golden.normal("unet:x2", shape)
    errors = {}
    for t in (1, 999):
        errors[f"t{t}"] = golden.error(arrays, f"t{t}", evaluate(golden, system, x, [t], "cond"))
        time = unet_of(golden, system).embed(torch.tensor([t]), None, x.dtype) if latent.unet.film_dim is None else None
        if time is not None:
            recorded = torch.from_numpy(arrays[f"t{t}.time_embed"])
            errors[f"t{t}.time_embed"] = float((time[0] - recorded).abs().max() / recorded.std())
    cases = {
        "batch2_t500_20": (torch.cat([x, x2]), [500, 20], "cond2"),
        "t500_uncond": (x, [500], "uncond"),
        "batch2_t500_20_fullmask": (torch.cat([x, x2]), [500, 20], "fullmask"),
        "full_t500": (
            golden.normal("unet:xfull", (1, shape[1], 256 if shape[1] == 8 else 128, shape[3])),
            [500],
            "cond",
        ),
    }
    for name, (noisy, t, tag) in cases.items():
        if f"{name}.sample" in arrays:
            errors[name] = golden.error(arrays, name, evaluate(golden, system, noisy, t, tag))
    check(request, errors, part=(system, "U-Net, timesteps and conditions"))


@pytest.mark.slow
def test_unet_averaged_weights(golden: Goldens, request: pytest.FixtureRequest) -> None:
    system = "audioldm-s-full"
    arrays, x = golden.arrays(UNETS[system]), golden.normal("unet:x", (1, 8, 64, 16))
    with torch.device("meta"):
        unet = UNet(SYSTEMS[system].latent.unet)
    entries = {e["key"]: e for e in golden.synth.ema_entries(golden.entries(UNETS[system]))}
    flat = {name: entries[f"model_ema.diffusion_model{name.replace('.', '')}"] for name in unet.state_dict()}
    unet.load_state_dict(
        {name: torch.from_numpy(golden.synth.fill(entry)) for name, entry in flat.items()}, assign=True
    )
    film = unet.project_film(conditioning(golden, system, 1, "cond").film)
    errors = {"ema_t500": golden.error(arrays, "ema_t500", unet(x, torch.tensor([500]), film=film))}
    check(request, errors, part=(system, "U-Net, averaged weights"))


@pytest.mark.parametrize("rate", [slow("16k"), "48k"])
def test_autoencoder(golden: Goldens, request: pytest.FixtureRequest, rate: str) -> None:
    system = "audioldm-s-full" if rate == "16k" else "audiosr-basic"
    config, arrays = SYSTEMS[system].latent, golden.arrays(f"vae_{rate}")
    with torch.device("meta"):
        vae = AutoencoderKL(config.vae)
    assert shapes(vae) == golden.shapes(f"vae_{rate}", "first_stage_model.")
    golden.fill(vae.to_empty(device="cpu"), f"vae_{rate}", "first_stage_model.")
    mel = golden.normal(f"vae:mel:{rate}", (1, 1, 16 * config.vae.factor, config.mel.bins), -3.0, 2.0)
    z = golden.normal(f"vae:z:{rate}", (1, config.vae.latent_channels, 16, config.cells))
    mean, logvar = vae.encode(mel)
    noise = torch.from_numpy(golden.synth.NoiseStream(f"vae:sample:{rate}")(mean.shape))
    results = {"encode.mean": mean, "encode.logvar": logvar, "decode.mel": vae.decode(z)}
    results["encode.sample"] = mean + (0.5 * logvar).exp() * noise
    errors = {name: golden.error(arrays, name, value) for name, value in results.items()}
    check(request, errors, part=(f"all at {rate}", "autoencoder, both ways"))


@pytest.mark.parametrize("rate", [slow("16k"), "48k"])
def test_vocoder(golden: Goldens, request: pytest.FixtureRequest, rate: str) -> None:
    system = "audioldm-s-full" if rate == "16k" else "audiosr-basic"
    config, arrays = SYSTEMS[system].latent, golden.arrays(f"vocoder_{rate}")
    assert isinstance(config.vocoder, HiFiGANConfig)
    with torch.device("meta"):
        vocoder = HiFiGAN(config.vocoder, config.mel.bins)
    prefix = "first_stage_model.vocoder."
    assert shapes(vocoder) == golden.shapes(f"vocoder_{rate}", prefix)
    golden.fill(vocoder.to_empty(device="cpu"), f"vocoder_{rate}", prefix)
    wave = vocoder(golden.normal(f"voc:mel:{rate}", (1, config.mel.bins, 40), -3.0, 2.0))
    errors = {"wav": golden.error(arrays, "wav_digest", wave[:, None])}
    if "wav_b2" in arrays:
        both = vocoder(golden.normal(f"voc:mel2:{rate}", (2, config.mel.bins, 9), -3.0, 2.0))
        recorded = torch.from_numpy(arrays["wav_b2"])
        errors["wav_b2"] = float((both[:, None] - recorded).abs().max() / recorded.std())
    check(request, errors, part=(f"all at {rate}", "vocoder"))


# --- front ends


def normalised(wave: Tensor) -> Tensor:
    """Return what the published code makes of a sound: no mean, peak 0.5."""
    centred = wave - wave.mean()
    return centred / (centred.abs().max() + 1e-8) * 0.5


def pcm(golden: Goldens, name: str) -> Tensor:
    return torch.from_numpy(golden.synth.signal16(name) / np.float32(32768))


@pytest.mark.parametrize("framing", ["A", "B"])
def test_front_end_16k(golden: Goldens, request: pytest.FixtureRequest, framing: str) -> None:
    arrays, errors = golden.arrays("frontends"), {}
    cases = (("A", 512), ("A", 1024), ("C", 1024), ("C", 1000)) if framing == "A" else (("A", 512), ("C", 1024))
    for signal, rows in cases:
        wave = normalised(pcm(golden, signal))
        if framing == "A":
            wave = functional.pad(wave, (0, max(0, rows * 160 - len(wave))))
            wave = wave / wave.abs().max() * 0.5
            mel = log_mel(wave[None], framing="tacotron")[0, :rows]
        else:
            # Rows of no sound are zeros, magnitude 1, in the training code.
            mel = functional.pad(log_mel(wave[None])[0], (0, 0, 0, rows))[:rows]
        errors[f"{signal}_{rows}"] = golden.error(arrays, f"{framing}.{signal}_{rows}.logmel", mel)
    check(request, errors, part=("all at 16k", f"log-mel, framing {framing}"))


def test_front_end_48k(golden: Goldens, request: pytest.FixtureRequest) -> None:
    arrays, errors = golden.arrays("frontends"), {}
    for signal, seconds in (("full", 5.12), ("lp4k", 3.3)):
        wave = normalised(torch.from_numpy(golden.synth.signal48(signal, seconds)).reshape(-1).float())
        padded = functional.pad(wave, (0, 245_760 - len(wave)))
        name = f"48k.{signal}_{seconds}"
        errors[name] = golden.error(arrays, f"{name}.logmel", log_mel(padded[None], MEL_48K)[0])
    for mel, rate in ((MelConfig(), "16k"), (MEL_48K, "48k")):
        errors[f"filters {rate}"] = golden.error(arrays, f"mel_basis_{rate}", slaney_filters(mel).mT.contiguous())
    # Of a band-limited sound the upper bins lie at the floor of the reference's float32 FFT.
    check(request, errors, 1e-3, part=("all at 48k", "log-mel"))


# --- schedules


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule(golden: Goldens, request: pytest.FixtureRequest, kind: str) -> None:
    schedule = make_schedule(ScheduleConfig(kind))  # type: ignore[arg-type]
    recorded = golden.arrays("schedule")[f"{kind}.alphas_cumprod"]
    errors = {"alphas_cumprod": float(np.abs(np.array(schedule.alpha_bar, np.float32) - recorded).max())}
    tables = golden.arrays("ddim_schedule")
    timesteps: list[tuple[np.ndarray, np.ndarray]] = []
    for name in (n for n in tables if n.startswith(kind) and n.endswith(".timesteps")):
        path = published_path(schedule, int(name.split(".S")[1].split("_")[0]))
        timesteps.append((np.array(path.timesteps[::-1]), tables[name]))
        for part, values in (("alphas", path.alpha_bar[-2::-1]), ("alphas_prev", path.alpha_bar[:0:-1])):
            seen = np.array(values, np.float64)
            other = name.replace("timesteps", part)
            errors[other] = float(np.abs(seen - tables[other]).max())
    part = ("AudioSR" if kind == "cosine" else "all but AudioSR", f"{kind} schedule, DDIM tables")
    check_equal(request, "timesteps", *(np.concatenate(side) for side in zip(*timesteps, strict=True)), part)
    check(request, errors, part=part)


def test_number_of_steps(golden: Goldens, request: pytest.FixtureRequest) -> None:
    """Ours leaves out the one timestep that the published tables do not have."""
    tables, schedule = golden.arrays("ddim_schedule"), make_schedule(ScheduleConfig())
    steps = np.array([len(published_path(schedule, s).timesteps) for s in range(1, 1001)])
    missing = np.isin(np.arange(1, 1001), tables["overrun_S"])
    check_equal(request, "steps", steps + missing, tables["steps_for_S"], ("all", "number of DDIM steps"))


def test_velocity(golden: Goldens, request: pytest.FixtureRequest) -> None:
    arrays, schedule = golden.arrays("traj_audiosr"), make_schedule(ScheduleConfig("cosine"))
    x, noise = (golden.normal(f"v:{name}", (2, 16, 8, 4)) for name in "xn")
    t = torch.tensor([500, 999])
    results = {
        "get_v": schedule.velocity(x, noise, t),
        "q_sample": schedule.add_noise(x, noise, t),
        "predict_start_from_z_and_v": torch.cat(
            [from_v(lambda _x, _t, i=i: noise[i : i + 1], schedule)(x[i : i + 1], int(t[i])) for i in range(2)]
        ),
    }
    errors = {
        name: float((value - torch.from_numpy(arrays[f"vpred.{name}"])).abs().max()) for name, value in results.items()
    }
    check(request, errors, part=("audiosr-basic", "v-prediction"))


# --- trajectories


def core(golden: Goldens, system: str) -> LatentDiffusion:
    """Return a core whose U-Net is the recorded one; nothing else of it is used."""
    with torch.device("meta"):
        latent = LatentDiffusion(SYSTEMS[system].latent)
    latent.unet = unet_of(golden, system)
    latent.scale = torch.ones(())
    return latent


def draws(golden: Goldens, key: str, shape: tuple[int, ...], steps: int, *, masked: bool = False) -> Draw:
    """Return the recorded noise, drawn in the published order: one for eta even where eta is 0."""
    stream = golden.synth.NoiseStream(key)
    order = [INITIAL]
    for i in range(steps):
        order += [RENEWAL + i, i] if masked else [i]
    made = {step: torch.from_numpy(stream(shape)) for step in order}
    return made.__getitem__


def run(
    golden: Goldens,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
    file: str,
    key: str,
    what: str,
    **given: Masked | Partial,
) -> None:
    """Sample as a recorded trajectory did, and compare the estimates, the inputs and the end."""
    arrays = golden.arrays(file)
    settings = dict(part for part in ((p[0], p[1:]) for p in key.split(":")[-1].split("_")) if part[0] in "SgB")
    steps, batch = int(settings["S"]), int(settings.get("B", "1"))
    eta = float(key.split("_eta")[1].split("_")[0]) if "_eta" in key else 1.0
    options = SamplerOptions("ddim", steps=steps, guidance=float(settings["g"]), eta=eta, path="published")
    latent = SYSTEMS[system].latent
    shape = (batch, latent.unet.out_channels, 64, latent.cells)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def watching(denoise: Callable[[Tensor, int], Tensor], *args: object, **dials: object) -> Tensor:
        def watched(x: Tensor, t: int) -> Tensor:
            x0 = denoise(x, t)
            seen.append((t, x, x0))
            return x0

        return real_sample(watched, *args, **dials)  # type: ignore[arg-type]

    monkeypatch.setattr(latent_module, "sample", watching)
    asked, absent = (conditioning(golden, system, batch, tag) for tag in ("cond", "uncond"))
    noise = draws(golden, key, shape, steps, masked="masked" in given)
    result = core(golden, system).generate(asked, absent, noise, options, **given)  # type: ignore[arg-type]
    errors = {"latent": golden.error(arrays, f"{key}.latent", result)}
    for i, (t, x, x0) in enumerate(seen):
        name = f"{key}.step{i}"
        if f"{name}.t" in arrays:
            assert t == arrays[f"{name}.t"]
            errors[f"step{i}.x_in"] = golden.error(arrays, f"{name}.x_in", x)
            errors[f"step{i}.pred_x0"] = golden.error(arrays, f"{name}.pred_x0", x0)
    if f"{key}.z_enc.sample" in arrays:
        errors["z_enc"] = golden.error(arrays, f"{key}.z_enc", seen[0][1])
    check(request, errors, bound=1e-3, part=(system, what))


@pytest.mark.parametrize(
    "setting", ["S4_eta1_g2.5_B2", slow("S4_eta0_g2.5_B2"), slow("S4_eta1_g1_B1"), slow("S10_eta1_g2.5_B1")]
)
def test_audioldm_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    run(golden, request, monkeypatch, "audioldm-s-full", "traj_audioldm_s", f"ddim:s:{setting}", f"DDIM {setting}")


@pytest.mark.parametrize("kind", ["inpaint", slow("default"), slow("superres")])
def test_masked_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    key = f"masked:s:{kind}:S4_eta1_g2.5"
    mask = torch.from_numpy(golden.arrays("traj_audioldm_s")[f"{key}.mask"]).reshape(1, 1, 64, 16)
    masked = Masked(golden.normal("edit:z0", (1, 8, 64, 16), 0.0, 0.8), mask, renew=True, reblend=False)
    run(golden, request, monkeypatch, "audioldm-s-full", "traj_audioldm_s", key, f"masked, {kind}", masked=masked)


@pytest.mark.parametrize("setting", ["S4_strength0.5", slow("S10_strength0.25"), slow("S10_strength0.9")])
def test_partial_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    start = Partial(golden.normal("edit:z0", (1, 8, 64, 16), 0.0, 0.8), float(setting.split("th")[1]), published=True)
    key = f"partial:s:{setting}_g2.5"
    run(
        golden,
        request,
        monkeypatch,
        "audioldm-s-full",
        "traj_audioldm_s",
        key,
        f"style transfer {setting}",
        start=start,
    )


@pytest.mark.slow
def test_strength_one_is_the_published_error(golden: Goldens) -> None:
    assert "partial:s:S10_strength1_g2.5.error" in golden.arrays("traj_audioldm_s")
    start = Partial(torch.zeros(1, 8, 64, 16), 1.0, published=True)
    options = SamplerOptions("ddim", steps=10, path="published")
    with pytest.raises(ConfigError, match="ends above the published timesteps"):
        real_sample(lambda x, _t: x, lambda _s: torch.zeros(1, 8, 64, 16), make_schedule(ScheduleConfig()), options,
                    steps=1, start=start)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["1", "2"])
def test_plms_trajectory(golden: Goldens, request: pytest.FixtureRequest, guidance: str) -> None:
    """MusicLDM's, recorded on the network of audioldm-s; its noise is drawn and not used."""
    arrays, key = golden.arrays("traj_plms"), f"plms:s:S10_g{guidance}"
    latent, shape = core(golden, "audioldm-s-full"), (1, 8, 64, 16)
    asked, absent = (conditioning(golden, "audioldm-s-full", 1, tag) for tag in ("cond", "uncond"))
    options = SamplerOptions("plms", steps=10, guidance=float(guidance), path="published")
    result = latent.generate(asked, absent, draws(golden, key, shape, 0), options)
    errors = {"latent": golden.error(arrays, f"{key}.latent", result)}
    check(request, errors, bound=1e-3, part=("musicldm", f"PLMS S10_g{guidance}"))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["S4_eta0_g3.5_B1", "S4_eta1_g3.5_B2", "S4_eta1_g1_B1", "S10_eta1_g3.5_B1"])
def test_audioldm2_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Contexts of 13 and of 1 token share a batch here; the published code runs them apart."""
    key = f"ddim:2full:{setting}"
    run(golden, request, monkeypatch, "audioldm2-full", "traj_audioldm2_full", key, f"DDIM {setting}")


@pytest.mark.slow
def test_audioldm2_masked_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "masked:2full:S4_eta1_g2.5"
    mask = torch.from_numpy(golden.arrays("traj_audioldm2_full")[f"{key}.mask"]).reshape(1, 1, 64, 16)
    masked = Masked(golden.normal("edit:z0", (1, 8, 64, 16), 0.0, 0.8), mask, renew=True, reblend=False)
    run(golden, request, monkeypatch, "audioldm2-full", "traj_audioldm2_full", key, "masked", masked=masked)


@pytest.mark.parametrize("setting", [slow("S4_eta1_g3.5"), slow("S4_eta0_g3.5"), slow("S4_eta1_g1")])
def test_audiosr_trajectory(
    golden: Goldens, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    run(golden, request, monkeypatch, "audiosr-basic", "traj_audiosr", f"ddim:sr:{setting}", f"DDIM {setting}")
