"""Where a recording's band ends, and how to make it end somewhere: what super-resolution starts from."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from scipy import signal
from torch import Tensor

from .errors import ConfigError

Filter = Literal["butter", "cheby1", "ellip", "bessel"]
FILTERS: tuple[Filter, ...] = get_args(Filter)
ORDER = 8
FFT = 2048
STEP = FFT // 4
BINS = FFT // 2 + 1


def edge(magnitude: Tensor, share: float) -> int:
    """Return the highest bin below which less than ``share`` of all magnitude lies; 0 for silence.

    Args:
        magnitude: ``[..., bins]``, not negative; everything but the last axis is summed over.
        share: 0 < share < 1.
    """
    total = magnitude.double().reshape(-1, magnitude.shape[-1]).sum(0).cumsum(0)
    return max(0, int((total < share * total[-1]).sum()) - 1)


def lowpass(wave: Tensor, sample_rate: int, cutoff: float, kind: Filter = "butter") -> Tensor:
    """Take away what lies above ``cutoff``, without delay.

    A filter of order 8 run both ways, the sample rate reduced to twice the cutoff and back, and the filter once more.

    Args:
        wave: ``[..., samples]`` on the CPU.
        sample_rate: of ``wave`` in Hz.
        cutoff: in Hz, at least 1; at or above half the sample rate nothing is taken away.
        kind: of the filter; ripples of 0.1 dB (cheby1, ellip) and 60 dB (ellip).

    Returns:
        float32, of the same shape.

    Raises:
        ConfigError: there is no such filter, or the cutoff is below 1 Hz.

    Source: AudioSR's low-pass (spec section 6.2), with the filter chosen by the caller instead of at random.
    """
    if kind not in FILTERS:
        raise ConfigError(f"no filter is called {kind!r}; choose one of {', '.join(FILTERS)}")
    if not cutoff >= 1:
        raise ConfigError(f"the cutoff is {cutoff!r} Hz; at least 1 is needed")
    hertz = int(cutoff)
    if 2 * hertz >= sample_rate:
        return wave.to(torch.float32)
    design = _design(kind, 2 * hertz / sample_rate)
    samples = wave.shape[-1]
    rows = wave.detach().reshape(-1, samples).double().numpy()
    # A filter that runs both ways needs some samples to settle in.
    padded = np.pad(rows, ((0, 0), (0, max(0, 100 - samples))))
    y = signal.sosfiltfilt(design, padded)
    y = _resample(_resample(y, sample_rate, 2 * hertz), 2 * hertz, sample_rate)
    y = np.pad(y, ((0, 0), (0, max(0, padded.shape[1] - y.shape[1]))))[:, : padded.shape[1]]
    y = signal.sosfiltfilt(design, y)[:, :samples]
    return torch.from_numpy(y.astype(np.float32)).reshape(wave.shape)


def _design(kind: Filter, edge: float) -> np.ndarray:
    """Return second-order sections for an edge relative to half the sample rate."""
    sections: np.ndarray = {
        "butter": lambda: signal.butter(ORDER, edge, output="sos"),
        "cheby1": lambda: signal.cheby1(ORDER, 0.1, edge, output="sos"),
        "ellip": lambda: signal.ellip(ORDER, 0.1, 60, edge, output="sos"),
        "bessel": lambda: signal.bessel(ORDER, edge, output="sos"),
    }[kind]()
    return sections


def _resample(rows: np.ndarray, source: int, target: int) -> np.ndarray:
    common = math.gcd(source, target)
    result: np.ndarray = signal.resample_poly(rows, target // common, source // common, axis=1)
    return result


def stft(wave: Tensor) -> Tensor:
    """Return the complex spectrum ``[..., bins, frames]`` that :func:`level` and :func:`joined` work on."""
    window = torch.hann_window(FFT, device=wave.device, dtype=wave.dtype)
    spectrum: Tensor = torch.stft(wave, FFT, STEP, window=window, pad_mode="constant", return_complex=True)
    return spectrum


def level(low: Tensor, high: Tensor, edge: int) -> float:
    """Return the gain that lets ``high`` go on at bin ``edge`` as loud as ``low``, 0.8 to 1.2.

    Args:
        low: sum of magnitudes of the recording at every bin, ``[bins]``.
        high: the same of what was generated.
        edge: first bin that is generated.
    """
    if not float(high[edge]):
        return 1.0
    return min(max(float(low[edge] / high[edge]), 0.8), 1.2)


def joined(low: Tensor, high: Tensor, edge: int, gain: float) -> Tensor:
    """Return the signal whose spectrum is that of ``low`` below bin ``edge`` and ``gain`` times ``high`` from it on.

    Args:
        low: ``[..., samples]``, more than 1024 samples.
        high: of the same shape.
        edge: a bin of :func:`stft`.
        gain: see :func:`level`.

    Source: AudioSR's output (spec section 6.4), which instead divides the low band by the gain and then sets the peak
    to 0.5, so that both are the same up to a factor.  Here the low band is the recording's.
    """
    spectrum = gain * stft(high)
    spectrum[..., :edge, :] = stft(low)[..., :edge, :]
    window = torch.hann_window(FFT, device=low.device, dtype=low.dtype)
    result: Tensor = torch.istft(spectrum, FFT, STEP, window=window, length=low.shape[-1])
    return result


def crossfade(old: Tensor, new: Tensor, edge: int) -> Tensor:
    """Fade ``[C, N]`` from old to new at constant power above the ``edge``-th bin of the N samples.

    Two windows' upper bands are more or less alike; how much decides whether amplitudes or powers must add up to one.
    """
    a, b = (torch.fft.rfft(part)[:, edge:] for part in (old, new))
    both = (a.abs().square().sum(1) * b.abs().square().sum(1)).sqrt().clamp_min(1e-12)
    alike = ((a * b.conj()).real.sum(1) / both).clamp(0, 1)[:, None]
    rise = (torch.arange(old.shape[1]) + 0.5) / old.shape[1]
    fall = 1 - rise
    power = fall.square() + rise.square() + 2 * alike * fall * rise
    result: Tensor = (fall * old + rise * new) / power.sqrt()
    return result
