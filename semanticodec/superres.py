"""Super-resolution: a recording's missing upper band, generated from what is there.

A recording is cut into windows of mel rows; each is low-passed at one cutoff and encoded, and this latent is joined to
the noisy latent of the whole band (AudioSR's conditioning).  The low band of the result is the recording's own.
C channels of one recording, S samples, M mel rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import checkpoints
from .audio import STFT_FLOOR, log_mel, recording, resample, slaney_filters, stft_magnitude
from .bandlimit import BINS, STEP, crossfade, edge, joined, level, lowpass, stft
from .config import LatentConfig, MelConfig, UNetConfig, VAEConfig, VocosConfig
from .devices import usable_device, usable_dtype
from .diffusion import SamplerOptions, noise
from .errors import AudioError, CheckpointError, ConfigError
from .family import load_latent
from .latent import Conditioning, LatentDiffusion
from .loading import fill, matched
from .offload import Offload
from .systems import SYSTEMS, system
from .values import from_json

LOWEST_RATE = 4_000
LOWEST_CUTOFF = 1_000
"""Hz; a recording whose band ends below is taken to end here: there is nothing to learn from so little."""
UNKNOWN = -11.4981
"""Fills the unconditional latent (before scaling), as published: the weights were trained with this number."""
POSTERIOR = 1 << 21
"""The step whose noise picks the condition's latent from its distribution."""
SETTLING = 32
"""Mel rows on either side of a window that the low-pass needs to settle."""
PEAK = 0.5
BLOCK = 1 << 20
"""Samples whose spectra are held at once."""
BLOCK_MARGIN = 4096


@dataclass(frozen=True)
class SuperResConfig:
    """One model of super-resolution.

    Windows of ``rows`` mel rows share ``overlap`` of them with the next; a recording shorter than that is filled up
    with silence to a multiple of ``unit`` rows.  The band ends where ``share`` of the magnitude lies below.
    """

    name: str
    latent: LatentConfig
    rows: int
    unit: int
    overlap: int
    share: float


MINI_SR = SuperResConfig(
    "mini-sr",
    LatentConfig(
        unet=UNetConfig(
            in_channels=16, base=32, mults=(1, 2, 4), res_blocks=1, attention_levels=(2,), head_dim=16, groups=16
        ),
        vae=VAEConfig(base=8, res_blocks=1, groups=4),
        vocoder=VocosConfig(dim=192, hidden=512, layers=5, right=(1, 1, 1, 0, 0, 0), iterations=32),
        mel=MelConfig(sample_rate=24_000, hop=240, bins=80, fmax=12_000.0),
        steps=4,
        guidance=1.0,
    ),
    rows=128,
    unit=128,
    overlap=16,
    share=0.999,
)
SUPERRES_PRESETS = {
    MINI_SR.name: MINI_SR,
    **{
        name: SuperResConfig(name, row.latent, rows=1024, unit=512, overlap=64, share=0.985)
        for name, row in SYSTEMS.items()
        if row.task == "super-resolution"
    },
}
"""Published: recordings filled up to multiples of 5.12 s, and the band's end at 98.5 % of the magnitude."""


class SuperResolution:
    """Generate what a recording lacks above its cutoff.

    Source: AudioSR (Liu et al. 2023).  Deliberate differences, all tested: any duration (windows are faded into each
    other), channels and level are kept, one cutoff per recording, one kind of filter, the seed decides everything, and
    recordings whose band ends below 1 kHz, silence included, are no error.
    """

    def __init__(self, config: SuperResConfig, latent: LatentDiffusion) -> None:
        """Put together what :meth:`from_pretrained` loads; ``latent`` has its autoencoder's encoder."""
        self.config = config
        self.latent = latent.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str] = MINI_SR.name,
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> SuperResolution:
        """Load a model of super-resolution.

        Args:
            name_or_folder: a preset ("mini-sr", "audiosr-basic", "audiosr-speech"), or a folder with
                ``model.safetensors`` (ours) or ``pytorch_model.bin`` (AudioSR's).
            weights: AudioSR's file, or the folder that holds it; None looks where ``semanticodec models`` says.
            device: where to compute.
            dtype: of the weights, floating point; half precision is for GPUs.
            offload: keep everything in main memory but the part that is running.

        Raises:
            CheckpointError: weights are missing, damaged or of another architecture.
            ConfigError: ``weights`` are given to another than a published system, there is no such device here, or
                nothing computes in the dtype.
        """
        device, dtype = usable_device(device), usable_dtype(dtype)
        if offload:
            own = cls.from_pretrained(name_or_folder, weights=weights, dtype=dtype)
            own.latent.offload(Offload(device))
            return own
        name = str(name_or_folder)
        if name in SUPERRES_PRESETS and name != MINI_SR.name:
            config = SUPERRES_PRESETS[name]
            return cls(config, load_latent(system(name), weights, device=device, dtype=dtype))
        if weights is not None:
            raise ConfigError(
                f"weights {weights} are for a published system, {name} is none: give its folder as the name"
            )
        folder = checkpoints.WEIGHTS / name if name == MINI_SR.name else Path(name_or_folder)
        published = system("audiosr-basic")
        if (folder / published.weights.file).is_file():
            latent = load_latent(published, folder, device=device, dtype=dtype)
            return cls(SUPERRES_PRESETS[published.name], latent)
        if name == MINI_SR.name and not (folder / checkpoints.MODEL).is_file():
            raise CheckpointError(
                f"{folder / checkpoints.MODEL} is missing; make it with `python -m semanticodec.training all --model "
                f"{name}`, or name another model: {', '.join(sorted(set(SUPERRES_PRESETS) - {name}))}"
            )
        if not (folder / checkpoints.MODEL).is_file():
            raise CheckpointError(
                f"{name} is neither a preset nor a folder with weights ({checkpoints.MODEL} or "
                f"{published.weights.file}); known presets: {', '.join(SUPERRES_PRESETS)}"
            )
        text, found = checkpoints.read_model(folder)
        config = from_json(SuperResConfig, text)
        with torch.device("meta"):
            latent = LatentDiffusion(config.latent, vae_encoder=True)
        found = matched(found, [], latent.state_dict(), str(folder))
        fill(latent, found, device=device, dtype=dtype)
        return cls(config, latent)

    @property
    def sample_rate(self) -> int:
        """Of what comes out, in Hz."""
        return self.config.latent.mel.sample_rate

    def upsample(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        *,
        cutoff: float | None = None,
        seed: int = 0,
        options: SamplerOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Bring a recording to :attr:`sample_rate` and fill its upper band.

        Args:
            wave: samples in [-1, 1]: ``[S]``, or ``[C, S]``, the channels of one recording, which share cutoff, level
                and noise (so that equal channels stay equal).
            sample_rate: of ``wave`` in Hz, 4000 or more.
            cutoff: Hz from which on is generated; None finds where the recording's band ends.
            seed: of the noise; the same seed, samples, weights and options give the same result.
            options: solver, steps, guidance; None takes the preset's.
            progress: called with the share done, 0 to 1, after each window.

        Returns:
            float32 ``[..., ceil(S * self.sample_rate / sample_rate)]`` on the CPU, at the level of the recording; below
            the cutoff its own samples' spectrum.

        Raises:
            AudioError: no samples, NaN, infinite or huge samples, another shape, or a rate below 4 kHz.
            ConfigError: the cutoff is not above 0 Hz, or an option is out of range.
        """
        wave = recording(wave)
        if sample_rate < LOWEST_RATE:
            raise AudioError(
                f"the sample rate {sample_rate!r} Hz was given; super-resolution needs {LOWEST_RATE} or more"
            )
        if cutoff is not None and not 0 < cutoff < math.inf:
            raise ConfigError(f"the cutoff is {cutoff!r} Hz; give a frequency above 0, or None to find it")
        source = resample(wave, sample_rate, self.sample_rate)
        whole = source.reshape(-1, source.shape[-1])
        offset = whole.mean(1, keepdim=True)
        centred = whole - offset
        peak = float(centred.abs().max())
        if not peak:
            return source
        centred = centred * (PEAK / peak)
        hertz = self.cutoff(centred) if cutoff is None else float(cutoff)
        if 2 * int(hertz) >= self.sample_rate:
            return source
        generated = self._generate(centred, hertz, seed, options or SamplerOptions(), progress)
        result = _join(centred, generated, int(hertz / self.sample_rate * 2 * (BINS - 1)))
        return (result * (peak / PEAK) + offset).reshape(source.shape)

    def cutoff(self, wave: Tensor) -> float:
        """Return the frequency in Hz at which the band of ``wave`` ``[C, S]``, at :attr:`sample_rate`, ends.

        That is where ``config.share`` of the magnitude lies below, and at least 1 kHz.
        """
        mel = self.config.latent.mel
        size = self.config.rows * mel.hop
        padded = functional.pad(wave, (0, -wave.shape[1] % (self.config.unit * mel.hop)))
        bins = mel.n_fft // 2
        total = torch.zeros(bins, dtype=torch.float64)
        for part in padded.split(size, 1):
            # Without the floor, so that a long pause does not count; and without the last bin, as published.
            magnitude = stft_magnitude(part, mel)[..., :bins].double() - 1.001 * math.sqrt(STFT_FLOOR)
            total += magnitude.clamp_min(0).sum((0, 1))
        return max(float(LOWEST_CUTOFF), edge(total, self.config.share) / bins * self.sample_rate / 2)

    def _generate(
        self,
        wave: Tensor,
        hertz: float,
        seed: int,
        options: SamplerOptions,
        progress: Callable[[float], None] | None,
    ) -> Tensor:
        """Generate the whole band of ``[C, S]`` window by window, each faded into the next; the same shape."""
        hop, overlap = self.config.latent.mel.hop, self.config.overlap
        plan = list(_windows(-(-wave.shape[1] // hop), self.config))
        end = plan[-1][1] * hop
        padded = functional.pad(wave, (0, end - wave.shape[1]))
        result = torch.zeros_like(padded)
        fade = overlap * hop
        bins = int(hertz / self.sample_rate * fade)
        for index, (first, last) in enumerate(plan):
            mel = self._low_mel(padded, hertz, first, last)
            piece = self._window(
                mel, hertz, _draw(seed, index, self._shape(last - first), self.latent.scale.device), options
            )
            start = first * hop
            if index:
                faded = crossfade(result[:, start : start + fade], piece[:, :fade], bins)
                piece = torch.cat([faded, piece[:, fade:]], 1)
            result[:, start : last * hop] = piece
            if progress:
                progress((index + 1) / len(plan))
        return result[:, : wave.shape[1]]

    def _low_mel(self, wave: Tensor, hertz: float, first: int, last: int) -> Tensor:
        """Return the log-mel ``[C, last - first, bins]`` of rows of ``wave`` below ``hertz``."""
        mel = self.config.latent.mel
        begin = max(0, first - SETTLING)
        piece = lowpass(wave[:, begin * mel.hop : (last + SETTLING) * mel.hop], mel.sample_rate, hertz)
        return log_mel(piece, mel)[:, first - begin : last - begin]

    def _shape(self, rows: int) -> tuple[int, int, int]:
        """Return the shape of the latents of one channel."""
        config = self.config.latent
        return config.vae.latent_channels, rows // config.vae.factor, config.cells

    def _window(self, low: Tensor, hertz: float, draw: Callable[[int], Tensor], options: SamplerOptions) -> Tensor:
        """Turn the log-mel ``[C, M, bins]`` of a window's low band into samples ``[C, hop * M]`` of the whole band."""
        with torch.inference_mode():
            mel = self.latent.mel(self.latents(low, draw, options)).float()
            kept = mel_edge(self.config.latent.mel, hertz)
            mel[:, :, :kept] = low[:, :, :kept].to(mel)
            return self.latent.wave(mel.to(self.latent.dtype)).cpu()

    def latents(self, low: Tensor, draw: Callable[[int], Tensor], options: SamplerOptions) -> Tensor:
        """Sample the latents of the whole band.

        Args:
            low: log-mel of the low band ``[C, M, bins]``.
            draw: noise by step, and by :data:`POSTERIOR`, each ``[latent_channels, T, F]`` or one per channel.
            options: solver, steps, guidance.

        Returns:
            float32 ``[C, latent_channels, T, F]``, on the scale of the denoiser.
        """
        shape = (len(low), *self._shape(low.shape[1]))
        condition = self.latent.encode(low.to(self.latent.scale.device)).sample(draw(POSTERIOR).expand(shape))
        unknown = torch.full_like(condition, UNKNOWN) * self.latent.scale
        return self.latent.generate(
            Conditioning(concat=condition),
            Conditioning(concat=unknown),
            lambda step: draw(step).expand(shape),
            options,
        )


def _windows(rows: int, config: SuperResConfig) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the windows that cover ``rows`` mel rows."""
    if rows <= config.rows:
        yield 0, -(-rows // config.unit) * config.unit
        return
    first = 0
    while True:
        yield first, first + config.rows
        if first + config.rows >= rows:
            return
        first += config.rows - config.overlap


def _draw(seed: int, window: int, shape: tuple[int, ...], device: torch.device) -> Callable[[int], Tensor]:
    return lambda step: noise(seed, window, step, shape).to(device)


def mel_edge(mel: MelConfig, hertz: float) -> int:
    """Return how many mel filters have their peak below ``hertz``."""
    return int((slaney_filters(mel).argmax(0) * (mel.sample_rate / mel.n_fft) < hertz).sum())


def _join(low: Tensor, high: Tensor, edge: int) -> Tensor:
    """Join ``[C, S]`` below and above a bin, block by block, which gives what the whole would at once."""
    sums = [torch.zeros(BINS, dtype=torch.float64) for _ in range(2)]
    for reach, own in _blocks(low.shape[1]):
        frames = slice(own.start // STEP, None if own.stop is None else own.stop // STEP)
        for total, wave in zip(sums, (low, high), strict=True):
            total += stft(wave[:, reach])[:, :, frames].abs().double().sum((0, 2))
    gain = level(sums[0], sums[1], edge)
    pieces = [joined(low[:, reach], high[:, reach], edge, gain)[:, own] for reach, own in _blocks(low.shape[1])]
    return torch.cat(pieces, 1)


def _blocks(samples: int) -> Iterator[tuple[slice, slice]]:
    """Yield (samples that a block looks at, which of these are its own); the last block's own part has no end."""
    for first in range(0, samples, BLOCK):
        begin, last = max(0, first - BLOCK_MARGIN), first + BLOCK
        end = None if last >= samples else last - begin
        yield slice(begin, last + BLOCK_MARGIN), slice(first - begin, end)


@lru_cache(maxsize=2)
def shared(name_or_folder: str, device: str, dtype: torch.dtype) -> SuperResolution:
    """Load a model, or return the one that was loaded before: weights never change, so any number of users share it."""
    return SuperResolution.from_pretrained(name_or_folder, device=device, dtype=dtype)
