"""The published systems of the latent-diffusion family: what each is made of, where its weights are, how it is used.

A system is a row of :data:`SYSTEMS`: the configuration of the one core, the name of its conditioners, its file, and the
published dials.  Source: the family's spec, sections 2.1 to 2.5 and 10.1; sizes as published, or counted.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .config import HiFiGANConfig, LatentConfig, MelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .diffusion import SamplerOptions
from .errors import ConfigError

Task = Literal["text to sound", "text to music", "text to speech", "super-resolution"]

MEL_48K = MelConfig(sample_rate=48_000, n_fft=2048, hop=480, bins=256, fmin=20.0, fmax=24_000.0)
VAE_48K = VAEConfig(mults=(1, 2, 4, 8), latent_channels=16)
VOCODER_48K = HiFiGANConfig(base=1536, rates=(6, 5, 4, 2, 2), kernels=(12, 10, 8, 4, 4), stack_kernels=(3, 7, 11, 15))
CLAP_WIDTH, T5_WIDTH, SEQUENCE_WIDTH = 512, 1024, 768
"""Channels of CLAP's vector, of FLAN-T5's states, and of the generated AudioMAE sequence."""

NONCOMMERCIAL = "CC-BY-NC-SA-4.0"


@dataclass(frozen=True)
class Weights:
    """The one file that holds a system.

    Args:
        file: its name.
        source: the page to fetch it from.
        licence: of the weights; where only the code has one, that is said.
        commercial: whether the licence allows commercial use.
        gigabytes: of 10**9 bytes.
        hub: repository on the Hugging Face hub that has it, or None.
        average: whether the published code samples with the moving average of the U-Net's weights or the raw ones.
    """

    file: str
    source: str
    licence: str
    commercial: bool
    gigabytes: float
    hub: str | None = None
    average: bool = False


@dataclass(frozen=True)
class SystemConfig:
    """One published system.

    Args:
        name: of the preset.
        task: what it is for.
        latent: networks, front end, schedule, and our dials.
        prompts: name of its conditioners in :data:`semanticodec.conditioners.config.PROMPTS`; None for AudioSR, whose
            condition is the low band's latent.
        weights: where they are.
        samples: length of what it was made to generate, at its own rate.
        published_steps: the published solver steps (DDIM, eta 1); the guidance is ``latent.guidance``.
        candidates: how many results the published code generates, to keep the one CLAP likes best.
    """

    name: str
    task: Task
    latent: LatentConfig
    prompts: str | None
    weights: Weights
    samples: int = 1024 * 160
    published_steps: int = 200
    candidates: int = 3

    @property
    def sample_rate(self) -> int:
        """In Hz."""
        return self.latent.mel.sample_rate

    @property
    def published(self) -> SamplerOptions:
        """The dials of the published code."""
        guidance = self.latent.guidance
        return SamplerOptions("ddim", self.published_steps, guidance, eta=1.0, path="published")


def _latent(unet: UNetConfig, guidance: float) -> LatentConfig:
    return LatentConfig(unet=unet, prediction="eps", steps=25, guidance=guidance)


def _zenodo(record: int, file: str, gigabytes: float) -> Weights:
    return Weights(file, f"https://zenodo.org/records/{record}", NONCOMMERCIAL, False, gigabytes, average=True)


def _hub(repository: str, file: str, gigabytes: float, licence: str = NONCOMMERCIAL) -> Weights:
    commercial = licence != NONCOMMERCIAL
    return Weights(file, f"https://huggingface.co/{repository}", licence, commercial, gigabytes, hub=repository)


def _audioldm(name: str, size: Literal["s", "m", "l"], weights: Weights) -> SystemConfig:
    unet = UNetConfig(
        base={"s": 128, "m": 192, "l": 256}[size], head_dim=64 if size == "l" else 32, film_dim=CLAP_WIDTH
    )
    return SystemConfig(name, "text to sound", _latent(unet, 2.5), f"audioldm-{size}", weights)


def _audioldm2(
    name: str, task: Task, prompts: str, contexts: tuple[int | None, ...], gigabytes: float, *, depth: int = 1
) -> SystemConfig:
    repository = f"haoheliu/{'audioldm2-speech' if task == 'text to speech' else name}"
    unet = UNetConfig(base=128, contexts=(None, *contexts), depth=depth)
    return SystemConfig(name, task, _latent(unet, 3.5), prompts, _hub(repository, f"{name}.pth", gigabytes))


def _audiosr(kind: str) -> SystemConfig:
    unet = UNetConfig(in_channels=32, out_channels=16, base=128, contexts=(None, None))
    schedule = ScheduleConfig(kind="cosine")
    latent = LatentConfig(unet, VAE_48K, VOCODER_48K, MEL_48K, schedule, "v", steps=50, guidance=3.5, eta=1.0)
    weights = _hub(f"haoheliu/audiosr_{kind}", "pytorch_model.bin", 6.2, "MIT (the code's; the weights name none)")
    return SystemConfig(
        f"audiosr-{kind}", "super-resolution", latent, None, weights, 1024 * 480, published_steps=50, candidates=1
    )


_UNET_48K = UNetConfig(in_channels=16, out_channels=16, base=128, contexts=(None, None), film_dim=CLAP_WIDTH)
_MUSICLDM = "https://github.com/RetroCirce/MusicLDM"

SYSTEMS: dict[str, SystemConfig] = {
    system.name: system
    for system in (
        _audioldm("audioldm-s-full", "s", _zenodo(7600541, "audioldm-s-full", 2.6)),
        _audioldm("audioldm-s-full-v2", "s", _zenodo(7698295, "audioldm-full-s-v2.ckpt", 2.6)),
        _audioldm("audioldm-m-full", "m", _zenodo(7813012, "audioldm-m-full.ckpt", 4.6)),
        _audioldm("audioldm-l-full", "l", _zenodo(7698295, "audioldm-full-l.ckpt", 7.0)),
        _audioldm("audioldm-m-text-ft", "m", _zenodo(7813012, "audioldm-m-text-ft.ckpt", 4.6)),
        _audioldm("audioldm-s-text-ft", "s", _zenodo(7813012, "audioldm-s-text-ft.ckpt", 2.6)),
        _audioldm2("audioldm2-full", "text to sound", "audioldm2", (SEQUENCE_WIDTH, T5_WIDTH), 8.5),
        _audioldm2("audioldm2-music-665k", "text to music", "audioldm2", (SEQUENCE_WIDTH, T5_WIDTH), 8.5),
        _audioldm2(
            "audioldm2-full-large-1150k",
            "text to sound",
            "audioldm2",
            (SEQUENCE_WIDTH, T5_WIDTH, None),
            11.5,
            depth=2,
        ),
        _audioldm2("audioldm2-speech-gigaspeech", "text to speech", "audioldm2-speech", (SEQUENCE_WIDTH,), 5.1),
        _audioldm2("audioldm2-speech-ljspeech", "text to speech", "audioldm2-speech", (SEQUENCE_WIDTH,), 5.1),
        SystemConfig(
            "audioldm_48k",
            "text to sound",
            dataclasses.replace(_latent(_UNET_48K, 3.5), vae=VAE_48K, vocoder=VOCODER_48K, mel=MEL_48K),
            "audioldm_48k",
            _hub("haoheliu/audioldm_48k", "audioldm_48k.pth", 5.4),
            samples=1024 * 480,
        ),
        _audioldm2("audioldm_16k_crossattn_t5", "text to sound", "audioldm_16k_crossattn_t5", (T5_WIDTH,), 4.9),
        SystemConfig(
            "musicldm",
            "text to music",
            _latent(UNetConfig(base=128, film_dim=CLAP_WIDTH), 2.0),
            "musicldm",
            Weights("musicldm.ckpt", _MUSICLDM, NONCOMMERCIAL, False, 2.8, average=True),
            candidates=5,
        ),
        _audiosr("basic"),
        _audiosr("speech"),
    )
}
"""Every published preset.  Ours differ from the published dials in the solver: 25 steps of DPM-Solver++(2M)."""


def system(name: str) -> SystemConfig:
    """Return the system called ``name``.

    Raises:
        ConfigError: no system has that name.
    """
    found = SYSTEMS.get(name)
    if found is None:
        raise ConfigError(f"no system is called {name!r}; known systems: {', '.join(SYSTEMS)}")
    return found
