"""Audio in and out, resampling, and the two spectrograms: Kaldi filter bank (encoder) and log-mel (decoder)."""

from __future__ import annotations

import functools
import os
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional

from .config import HOP, MEL_BINS, SAMPLE_RATE
from .errors import AudioError

FBANK_BINS = 128
FBANK_FRAME = 400
"""Samples per filter-bank row; the next row starts ``HOP`` later."""
FBANK_LOOKAHEAD = FBANK_FRAME - HOP
FBANK_MEAN, FBANK_SCALE = -4.2677393, 2 * 4.5689974
"""AudioMAE's normalisation: ``(x - mean) / scale``."""
PADDING_ROW = -FBANK_MEAN / FBANK_SCALE
"""Value of a row that stands for no audio at all."""
LOG_FLOOR = 1.1920929e-07
MEL_FFT = 1024
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000
"""Sample rates in Hz that are resampled; a file whose header says otherwise is damaged, or meant to fill memory."""


def load(source: str | os.PathLike[str] | BinaryIO) -> tuple[Tensor, int]:
    """Read a sound file of any format libsndfile knows.

    Args:
        source: a path, or an open binary file.

    Returns:
        Samples in [-1, 1] as float32 ``[channels, samples]``, and the sample rate in Hz.

    Raises:
        AudioError: the file is not readable audio, or holds no samples.
    """
    try:
        data, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{source} is not audio that libsndfile can read: {error}") from error
    if not len(data):
        raise AudioError(f"{source} holds no samples")
    return torch.from_numpy(np.ascontiguousarray(data.T)), int(rate)


def save(target: str | os.PathLike[str] | BinaryIO, wave: Tensor, sample_rate: int, format: str | None = None) -> None:
    """Write samples as 16-bit PCM, clipped to [-1, 1].

    Args:
        target: a path whose ending names the format, or an open binary file together with ``format``.
        wave: ``[samples]`` or ``[channels, samples]``.
        sample_rate: in Hz.
        format: a libsndfile format name such as "WAV"; only needed for an open file.

    Raises:
        AudioError: libsndfile cannot write this.
    """
    data = wave.detach().to("cpu", torch.float32).clamp(-1, 1).numpy()
    try:
        soundfile.write(target, data.T, sample_rate, format=format)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise AudioError(f"cannot write {target}: {error}") from error


def resample(wave: Tensor, source: int, target: int) -> Tensor:
    """Change the sample rate with soxr's high-quality resampler.

    Args:
        wave: ``[..., samples]`` at ``source`` Hz, on the CPU.
        source: sample rate of ``wave`` in Hz.
        target: wanted sample rate in Hz.

    Returns:
        ``[..., ceil(samples * target / source)]`` in float32, the sound followed by silence: exactly what
        ``soxr.ResampleStream`` gives for pieces of any size.

    Raises:
        AudioError: a rate is outside 1 kHz to 1 MHz.
    """
    if not all(LOWEST_RATE <= rate <= HIGHEST_RATE for rate in (source, target)):
        raise AudioError(
            f"sample rates of {source} and {target} Hz were given; both must lie in {LOWEST_RATE}..{HIGHEST_RATE} Hz"
        )
    wave = wave.to(torch.float32)
    if source == target:
        return wave
    length = -(-wave.shape[-1] * target // source)
    # soxr rounds the number of samples; enough silence behind the sound makes it at least ``length``.
    rows = functional.pad(wave.reshape(-1, wave.shape[-1]), (0, source // target + 2)).T.contiguous().numpy()
    stream = soxr.ResampleStream(source, target, rows.shape[1])
    out = torch.from_numpy(stream.resample_chunk(rows, last=True))[:length]
    return out.T.contiguous().reshape(*wave.shape[:-1], length)


def checked(wave: Tensor) -> Tensor:
    """Return ``wave`` if every sample is finite.

    Raises:
        AudioError: there are NaN or infinite samples.
    """
    if not torch.isfinite(wave).all():
        bad = int((~torch.isfinite(wave)).sum())
        raise AudioError(f"{bad} of {wave.numel()} samples are NaN or infinite; repair the recording first")
    return wave


@functools.cache
def _kaldi_filters() -> Tensor:
    """Triangles in the mel domain, ``[256, 128]`` (the bin at the Nyquist frequency has no weight)."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(SAMPLE_RATE / 2), FBANK_BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(256) * (SAMPLE_RATE / 512))[:, None]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return torch.from_numpy(np.maximum(triangles, 0.0)).to(torch.float32)


@functools.cache
def _windows() -> tuple[Tensor, Tensor]:
    return torch.hann_window(FBANK_FRAME, periodic=False), torch.hann_window(MEL_FFT)


def fbank(wave: Tensor) -> Tensor:
    """Compute AudioMAE's normalised log filter bank over the complete 25 ms frames of ``wave``.

    Args:
        wave: ``[..., samples]`` at 16 kHz, samples in [-1, 1].

    Returns:
        ``[..., 1 + (samples - 400) // 160, 128]``.

    Source: behaves as Kaldi's ``compute-fbank-feats`` as AudioMAE calls it (spec 2.2).  The published front end also
    removes the mean of the whole file first; each frame's own mean is removed in any case, so only rounding differs,
    and leaving it out keeps a frame independent of the rest of the file.
    """
    frames = wave.unfold(-1, FBANK_FRAME, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    window = _windows()[0].to(wave)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    energy = power[..., :256] @ _kaldi_filters().to(wave)
    result: Tensor = (energy.clamp_min(LOG_FLOOR).log() - FBANK_MEAN) / FBANK_SCALE
    return result


@functools.cache
def slaney_filters() -> Tensor:
    """Return 64 Slaney-normalised mel filters from 0 to 8000 Hz over the bins of a 1024-point FFT, ``[513, 64]``."""
    result: Tensor = torchaudio.functional.melscale_fbanks(
        MEL_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, MEL_BINS, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return result


def stft_magnitude(wave: Tensor) -> Tensor:
    """Compute the magnitudes that :func:`log_mel` sums up.

    Args:
        wave: ``[batch, samples]`` at 16 kHz, at least 433 samples.

    Returns:
        ``[batch, samples // 160, 513]``; row t is centred on sample ``160 t + 80``.
    """
    margin = (MEL_FFT - HOP) // 2
    padded = functional.pad(wave[:, None], (margin, margin), mode="reflect")[:, 0]
    frames = padded.unfold(-1, MEL_FFT, HOP)[:, : wave.shape[-1] // HOP]
    spectrum = torch.fft.rfft(frames * _windows()[1].to(wave))
    result: Tensor = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
    return result


def log_mel(wave: Tensor) -> Tensor:
    """Compute the decoder's log-mel spectrogram.

    Args:
        wave: ``[batch, samples]`` at 16 kHz, at least 433 samples.

    Returns:
        ``[batch, samples // 160, 64]``: natural logarithm of Slaney-normalised mel magnitudes, at least ln(1e-5); row t
        is centred on sample ``160 t + 80``.

    Source: the mel of HiFi-GAN's training code (FFT and window 1024, hop 160, 0-8000 Hz), which AudioLDM inherited.
    """
    result: Tensor = (stft_magnitude(wave) @ slaney_filters().to(wave)).clamp_min(1e-5).log()
    return result
