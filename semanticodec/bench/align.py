"""Equal footing: a decode is shifted and scaled onto its original before anything is measured."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import SAMPLE_RATE

Samples = NDArray[np.float64]

SEARCH = SAMPLE_RATE
"""Largest delay in samples that is looked for."""
SURE = 0.5
"""Correlation from which a lag is believed."""
HOP, WINDOW = 16, 320
"""Samples between and under the points of the loudness envelope."""
NONE = WINDOW // 4
"""Samples up to which a lag of loudness envelopes is their noise, and no delay."""
NEAR = 8
"""Samples within which the waveforms of two clips tell the same delay: what a codec loses moves the peak a little."""
SHARED = 0.1
"""Share of the clips that has to tell a delay for it to be more than chance."""
LIMIT = 20.0
"""Largest gain in dB."""
BAND = 250
"""Hz per band in :func:`bandwidth`."""
UNHEARD = -90.0
"""dBFS (mean square 1 is 0) below which a band of an original counts as silent: rounding to 16 bits leaves -116."""


@dataclass(frozen=True)
class Aligned:
    """A decode made comparable, and what was done to it.

    Args:
        wave: ``[S]``, as long as the original.
        gain: dB that it was raised.
    """

    wave: Samples
    gain: float = 0.0


def align(original: Samples, decoded: Samples, *, delay: int = 0, level: bool = True) -> Aligned:
    """Undo delay and level of a decode, and give it the original's length.

    Args:
        original: ``[S]`` at 16 kHz.
        decoded: ``[S']`` at 16 kHz.
        delay: samples that it is late (negative: early).
        level: whether to match the ITU-R BS.1770 loudness.

    Returns:
        The decode, and by how much it was raised: not at all where one of them is silent, at most by 20 dB.
    """
    shifted = _fit(decoded[delay:] if delay >= 0 else np.pad(decoded, (-delay, 0)), len(original))
    if not level:
        return Aligned(shifted)
    gain = loudness(original) - loudness(shifted)
    gain = float(np.clip(gain, -LIMIT, LIMIT)) if np.isfinite(gain) else 0.0  # one of them is silent
    return Aligned(shifted * 10 ** (gain / 20), gain)


@dataclass(frozen=True)
class Delay:
    """By how many samples a decode is late, and whether the waveforms themselves say so, to the sample."""

    samples: int
    exact: bool = True


def delays_of(estimates: Iterable[Delay | None]) -> list[int]:
    """Return the delays that a codec has, the most common one first; nothing if no clip tells, or each something else.

    A codec has one delay, whatever it codes; but some programs cut their look-ahead off the beginning of some files and
    not of others (speexdec).  Where most waveforms correlate these are told apart, if two clips and a tenth of all tell
    the same: the best lag of a lone tone may be its next period.  Otherwise there is one, the median, if most clips are
    within 5 ms of it.

    Args:
        estimates: of several clips, None where it cannot be told.
    """
    known = [estimate for estimate in estimates if estimate]
    left = [estimate.samples for estimate in known if estimate.exact]
    # An envelope's 0 may be anything up to 5 ms, and speaks against nothing.
    heard = [estimate for estimate in known if not estimate.exact and estimate.samples]
    found = list[int]()
    while len(left) > len(heard):
        alike = max(([other for other in left if abs(other - delay) <= NEAR] for delay in left), key=len)
        if len(alike) < max(2, SHARED * len(known)):
            break
        found.append(statistics.median_low(alike))
        left = [delay for delay in left if delay not in alike]
    if found or not known:
        return found
    middle = statistics.median_low(estimate.samples for estimate in known)
    near = [estimate for estimate in known if abs(estimate.samples - middle) <= NONE]
    return [middle] if 2 * len(near) > len(known) else []


def chosen(delays: Sequence[int], estimate: Delay | None) -> int:
    """Return which of a codec's delays a clip has: the one that its own waveform tells, else the most common.

    Args:
        delays: as :func:`delays_of` returns them.
        estimate: of the clip.
    """
    if estimate and estimate.exact:
        own = [delay for delay in delays if abs(delay - estimate.samples) <= 2 * NEAR]
        if own:
            return min(own, key=lambda delay: abs(delay - estimate.samples))
    return delays[0] if delays else 0


def find_delay(original: Samples, decoded: Samples) -> Delay | None:
    """Return how late a decode is.

    Where the waveforms correlate it is their best lag; where they do not (vocoders make up their own phase), that of
    the loudness envelopes, in steps of 1 ms, of which 5 are nothing.  A lag at the edge of what is looked for is none:
    the best one may lie beyond.

    Args:
        original: ``[S]`` at 16 kHz.
        decoded: ``[S']`` at 16 kHz, of either polarity.

    Returns:
        samples, within 1 s (:data:`SEARCH`), negative where it is early; None where that cannot be told: one is shorter
        than 20 ms, or nothing correlates by :data:`SURE`.
    """
    if min(len(original), len(decoded)) < WINDOW:
        return None
    lag, best = _lag(original, decoded, SEARCH)
    if best >= SURE:
        return Delay(lag)
    lag, best = _lag(_envelope(original), _envelope(decoded), SEARCH // HOP)
    if best < SURE:
        return None
    return Delay(lag * HOP if abs(lag * HOP) > NONE else 0, exact=False)


def loudness(wave: Samples) -> float:
    """Return the integrated loudness.

    Args:
        wave: ``[S]`` at 16 kHz; what is shorter than a block of 0.4 s is padded with silence.

    Returns:
        LUFS; minus infinity for silence.

    Source: ITU-R BS.1770-4, by pyloudnorm.
    """
    import pyloudnorm

    block = 0.4
    padded = np.pad(wave, (0, max(0, round(block * SAMPLE_RATE) - len(wave))))
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # of clipping, and of silence
        value = float(pyloudnorm.Meter(SAMPLE_RATE, block_size=block).integrated_loudness(padded))
    return value if np.isfinite(value) else -np.inf


def bandwidth(original: Samples, decoded: Samples) -> float | None:
    """Return up to which frequency the decode has what the original has, to within 20 dB.

    Bands of 250 Hz that lie 60 dB below the original's loudest, or below -90 dBFS, say nothing and are left out.

    Args:
        original: ``[S]`` at 16 kHz.
        decoded: ``[S]`` at 16 kHz, delay and level undone.

    Returns:
        Hz, 0 to 8000 in steps of 250; None where no band of the original says anything, as in silence.
    """
    ours, theirs = _bands(original), _bands(decoded)
    audible = ours > max(ours.max() - 60, UNHEARD)
    if not audible.any():
        return None
    kept = np.flatnonzero(audible & (theirs > ours - 20))
    return float((kept[-1] + 1) * BAND) if len(kept) else 0.0


def _fit(wave: Samples, length: int) -> Samples:
    return np.pad(wave[:length], (0, max(0, length - len(wave))))


def _lag(a: Samples, b: Samples, limit: int) -> tuple[int, float]:
    """Return by how much ``b`` is later than ``a``, and their correlation at that lag, 0 at the edge of ``limit``."""
    limit = min(limit, len(a) - 1, len(b) - 1)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if not norm:
        return 0, 0.0
    size = 1 << (len(a) + len(b) - 1).bit_length()
    product = np.fft.irfft(np.fft.rfft(b, size) * np.fft.rfft(a, size).conj(), size)
    # A codec may turn the polarity round: nothing that is measured hears that.
    around = np.abs(np.concatenate([product[-limit:], product[: limit + 1]])) / norm
    best = int(around.argmax())
    return best - limit, float(around[best]) if 0 < best < 2 * limit else 0.0


def _envelope(wave: Samples) -> Samples:
    """Return the level in dB every millisecond, floored 50 dB below the loudest, without its mean."""
    power = np.convolve(wave**2, np.hanning(WINDOW) / WINDOW, "same")[::HOP]
    level = 10 * np.log10(np.maximum(power, 0) + 1e-12)
    level = np.maximum(level, level.max() - 50)
    result: Samples = level - level.mean()
    return result


def _bands(wave: Samples) -> Samples:
    """Return the mean square in each band of 250 Hz, in dB."""
    size = 2048
    window = np.hanning(size)
    padded = np.pad(wave, (0, max(0, size - len(wave))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2] * window
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(0) * 2 / (size * (window**2).sum())
    width = BAND * size // SAMPLE_RATE
    result: Samples = 10 * np.log10(power[:-1].reshape(-1, width).sum(1) + 1e-20)
    return result
