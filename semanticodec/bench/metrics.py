"""What is measured of a decode against its original, both 16 kHz mono and equally long, after :mod:`.align`.

Every metric is a value in :data:`METRICS`; its version and those of the packages that compute it are part of what
cached results are found by.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..audio import resample
from ..compiled import own_cache
from ..config import SAMPLE_RATE
from ..demo import mel_l1
from .align import Samples
from .sounds import Sound

SPEECH = ("speech",)
TONAL = ("speech", "music")
ALL = ("speech", "music", "sound")

SPAN = 6144
"""Samples below which STOI's 30 frames cannot fit."""

APOSTROPHES = str.maketrans("\u2019\u02bc", "''")
"""What else is written for an apostrophe."""

Value = tuple[float, float]
"""A value and its weight in the mean: 1, or the number of words or frames that it is of."""


@dataclass(frozen=True)
class Metric:
    """One measure.

    Args:
        name: in results.
        label: for readers.
        unit: of the value, or "".
        better: whether high or low values are good.
        kinds: of clips that it makes sense for.
        needs: modules that it is computed with.
        compute: from original and decode to a value, or None where it is undefined (silence, no transcript).
        worst: what a decode gets for which it is undefined though the original has a value: silence is no way out.
        costly: whether a run may take it on every n-th clip alone (``costly_every``).
        version: goes up when values change.
    """

    name: str
    label: str
    unit: str
    better: Literal["high", "low"]
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    compute: Callable[[Sound, Sound], Value | float | None]
    worst: float | None = None
    costly: bool = False
    version: int = 1

    def missing(self) -> str | None:
        """Say which package is not installed; None where all are."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install 'semanticodec[bench]'"
        return None

    @property
    def made_by(self) -> str:
        """Its version, and those of the packages: values of other versions are not used again."""
        return "+".join((str(self.version), *map(release, self.needs)))

    def value(self, original: Sound, decoded: Sound) -> Value | None:
        """Measure one decode.

        Args:
            original: any length.
            decoded: as long.

        Returns:
            value in :attr:`unit` and weight in the mean; None where the metric is undefined.
        """
        found = self._taken(original, decoded)
        if found is None and self.worst is not None and self._taken(original, original):
            return self.worst, 1.0
        return found

    def _taken(self, original: Sound, decoded: Sound) -> Value | None:
        found = self.compute(original, decoded)
        if found is None:
            return None
        value, weight = found if isinstance(found, tuple) else (float(found), 1.0)
        return (float(value), float(weight)) if np.isfinite(value) else None


def pesq(original: Sound, decoded: Sound, *, band: Literal["wb", "nb"]) -> float | None:
    """Return the PESQ score.

    Args:
        original: at least 250 ms.
        decoded: as long.
        band: wide-band at 16 kHz, or narrow-band with both resampled to 8 kHz.

    Returns:
        MOS-LQO, mapped onto 0.999 to 4.999; None where no utterance is found (silence) or the clip is too short.

    Source: ITU-T P.862.2 (wide-band) and P.862.1 (narrow-band), by PyPI's pesq.
    """
    import pesq as module

    if not decoded.wave.any():
        return None
    rate = SAMPLE_RATE if band == "wb" else 8000
    try:
        return float(module.pesq(rate, _at(original.wave, rate), _at(decoded.wave, rate), band))
    except (module.NoUtterancesError, module.BufferTooShortError):  # the latter below 250 ms
        return None


def stoi(original: Sound, decoded: Sound, *, extended: bool) -> float | None:
    """Return the short-time objective intelligibility.

    Args:
        original: at least :data:`SPAN` samples.
        decoded: as long.
        extended: whether to take ESTOI.

    Returns:
        a correlation, -1 to 1; None where fewer than 30 frames of the original are loud enough.

    Source: Taal et al. (2011); extended: Jensen and Taal (2016); by PyPI's pystoi.
    """
    import warnings

    import pystoi

    if not original.wave.any() or len(original.wave) < SPAN:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(original.wave, decoded.wave, SAMPLE_RATE, extended=extended))
        except RuntimeWarning:  # fewer than 30 frames are loud enough
            return None


def visqol(original: Sound, decoded: Sound, *, mode: Literal["audio", "speech"]) -> float | None:
    """Return the ViSQOL score.

    Args:
        original: any length.
        decoded: as long.
        mode: audio with both resampled to 48 kHz, or speech at 16 kHz with the lattice mapping.

    Returns:
        MOS-LQO, 1 to 5; None where one is silent, or no patch of the original is loud or long enough.

    Source: ViSQOL v3, Chinen et al. (2020), by PyPI's visqol-python.  It hears what a resampler leaves above 8 kHz: by
    up to 0.1 other scores come out with another one than SciPy's polyphase filter, which the recorded ones were made
    with.
    """
    from scipy.signal import resample_poly

    if not (original.wave.any() and decoded.wave.any()):
        return None
    rate = 48_000 if mode == "audio" else SAMPLE_RATE
    ours, theirs = (resample_poly(sound.wave, rate // SAMPLE_RATE, 1) for sound in (original, decoded))
    try:
        return float(_visqol(mode).measure_from_arrays(ours, theirs, rate).moslqo)
    except (ValueError, RuntimeError, IndexError):  # no patch of the original is loud enough, or it is too short
        return None


def multi_stft(original: Sound, decoded: Sound) -> float | None:
    """Return spectral convergence plus L1 of log magnitudes, averaged over the three resolutions of a sound.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        from 0 (alike) upwards; the logarithms are natural, of magnitudes from 1e-5.  None where the original is silent:
        convergence is relative to its magnitudes.

    Source: the loss of Yamamoto et al. (2020, Parallel WaveGAN), at FFT 512, 1024 and 2048, hop a quarter, Hann.
    """
    if not original.wave.any():
        return None
    losses = []
    for ours, theirs in zip(original.spectra, decoded.spectra, strict=True):
        convergence = float(np.linalg.norm(ours - theirs)) / float(np.linalg.norm(ours))
        losses.append(convergence + float(np.abs(np.log(ours) - np.log(theirs)).mean()))
    return float(np.mean(losses))


def lsd(original: Sound, decoded: Sound) -> float:
    """Return the log-spectral distance: root mean square over bins of log10 powers' difference, averaged over frames.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        from 0 (alike) upwards; 1 is 10 dB.

    Source: Gray and Markel (1976), at FFT 2048, hop 512, Hann, of magnitudes from 1e-5.
    """
    ours, theirs = original.spectra[2], decoded.spectra[2]
    return float(np.sqrt(((2 * np.log10(ours / theirs)) ** 2).mean(1)).mean())


def log_mel(original: Sound, decoded: Sound) -> float:
    """Return the L1 distance of log-mels.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        from 0 (alike) upwards; the logarithms are natural.

    Source: :func:`..demo.mel_l1`, as the published codecs were scored.
    """
    return mel_l1(torch.from_numpy(original.wave).float(), torch.from_numpy(decoded.wave).float())


def f0_error(original: Sound, decoded: Sound) -> Value | None:
    """Return the median error of F0 over frames that are voiced in both.

    It says nothing about frames that the decode has no pitch in: :func:`f0_share` tells how many those are.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        cents, from 0 upwards, weighted by the number of frames; None where there are fewer than 5.

    Source: pitch by :attr:`Sound.pitch`, whose steps are 20 cents.
    """
    (ours, _), (theirs, _) = original.pitch, decoded.pitch
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < 5:
        return None
    return float(np.median(np.abs(1200 * np.log2(theirs[both] / ours[both])))), float(both.sum())


def f0_share(original: Sound, decoded: Sound) -> Value | None:
    """Return how many of the original's voiced frames are voiced in the decode: those that F0 error is taken of.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        percent, 0 to 100, weighted by the original's voiced frames; None where it has none.

    Source: recall of the voicing decision, by :attr:`Sound.pitch`.
    """
    ours, theirs = original.pitch[1], decoded.pitch[1]
    if not ours.any():
        return None
    return float(100 * theirs[ours].mean()), float(ours.sum())


def voicing_error(original: Sound, decoded: Sound) -> float:
    """Return the share of frames that are voiced in one and not in the other.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        percent, 0 to 100.

    Source: the voicing decision error of Nakatani et al. (2008), by :attr:`Sound.pitch`.
    """
    return float(100 * (original.pitch[1] != decoded.pitch[1]).mean())


def wer(original: Sound, decoded: Sound) -> Value | None:
    """Return the word error rate against the transcript.

    Args:
        original: with its text.
        decoded: as long.

    Returns:
        percent, from 0 upwards (words that are put in count: over 100 is possible), weighted by the transcript's words;
        None where it has none.

    Source: words changed, left out or put in, at least, per word of the transcript (Levenshtein), by PyPI's jiwer; of
    both texts without case and punctuation; heard by :attr:`Sound.words`.
    """
    return _word_errors(original.text or "", decoded.words)


def dwer(original: Sound, decoded: Sound) -> Value | None:
    """Return the word error rate against what the recogniser hears in the original.

    Args:
        original: any length; its text is not looked at.
        decoded: as long.

    Returns:
        percent, from 0 upwards, weighted by the words heard in the original; None where there are none.

    Source: as :func:`wer`.
    """
    return _word_errors(original.words, decoded.words)


def speaker(original: Sound, decoded: Sound) -> float:
    """Return the cosine of the speaker embeddings.

    Args:
        original: any length.
        decoded: as long.

    Returns:
        0 to 1 (no part of an embedding is negative); 1 is one voice.

    Source: Wan et al. (2018, GE2E), by PyPI's resemblyzer.
    """
    return float(original.voice @ decoded.voice)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "pesq_wb",
            "PESQ-WB",
            "",
            "high",
            TONAL,
            ("pesq",),
            functools.partial(pesq, band="wb"),
            worst=0.999,
            version=2,
        ),
        Metric(
            "pesq_nb",
            "PESQ-NB",
            "",
            "high",
            SPEECH,
            ("pesq", "soxr"),
            functools.partial(pesq, band="nb"),
            worst=0.999,
            version=2,
        ),
        Metric("stoi", "STOI", "", "high", ALL, ("pystoi",), functools.partial(stoi, extended=False)),
        Metric("estoi", "ESTOI", "", "high", ALL, ("pystoi",), functools.partial(stoi, extended=True)),
        Metric(
            "visqol",
            "ViSQOL audio",
            "",
            "high",
            ALL,
            ("visqol", "scipy"),
            functools.partial(visqol, mode="audio"),
            worst=1.0,
            version=3,
        ),
        Metric(
            "visqol_speech",
            "ViSQOL speech",
            "",
            "high",
            SPEECH,
            ("visqol", "scipy"),
            functools.partial(visqol, mode="speech"),
            worst=1.0,
            version=2,
        ),
        Metric("mel_l1", "log-mel L1", "", "low", ALL, ("torch",), log_mel, version=2),
        Metric("stft", "multi-res. STFT", "", "low", ALL, ("torch", "numpy"), multi_stft, version=3),
        Metric("lsd", "LSD", "", "low", ALL, ("torch", "numpy"), lsd, version=2),
        Metric("f0", "F0 error", "cents", "low", SPEECH, ("librosa",), f0_error),
        Metric("f0_share", "frames of F0 error", "%", "high", SPEECH, ("librosa",), f0_share),
        Metric("voicing", "voicing error", "%", "low", SPEECH, ("librosa",), voicing_error),
        Metric("wer", "WER", "%", "low", SPEECH, ("pocketsphinx", "jiwer"), wer, costly=True, version=3),
        Metric("dwer", "dWER", "%", "low", SPEECH, ("pocketsphinx", "jiwer"), dwer, costly=True, version=3),
        Metric("speaker", "speaker similarity", "", "high", SPEECH, ("resemblyzer",), speaker),
    )
}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@functools.cache
def release(module: str) -> str:
    """Return name and version of the package that a module is of; the name alone where it is not installed."""
    return "-".join((module, *map(importlib.metadata.version, _distributions().get(module, ())[:1])))


def _at(wave: Samples, rate: int) -> Samples:
    return resample(torch.from_numpy(wave), SAMPLE_RATE, rate).double().numpy()


def _word_errors(truth: str, heard: str) -> Value | None:
    import jiwer

    if not (words := _spoken(truth)):
        return None
    return 100 * float(jiwer.wer(" ".join(words), " ".join(_spoken(heard)))), float(len(words))


def _spoken(text: str) -> list[str]:
    """Return the words of a text in lower case, without what is not spoken: all punctuation but O'Neil's."""
    plain = unicodedata.normalize("NFC", text.lower()).translate(APOSTROPHES)
    plain = "".join(sign for sign in plain if unicodedata.category(sign) != "Cf")  # joiners within words are not seen
    # Marks are letters' parts: many scripts write vowels with them.
    letter = [unicodedata.category(sign)[0] in "LMN" for sign in f" {plain} "]
    within = zip(plain, letter, letter[1:], letter[2:], strict=False)
    kept = (sign if it or (sign == "'" and left and right) else " " for sign, left, it, right in within)
    return "".join(kept).split()


@functools.cache
def _visqol(mode: str) -> Any:
    own_cache()
    import visqol as module

    logging.getLogger("visqol").setLevel(logging.ERROR)  # it reports every clip
    api = module.VisqolApi()
    api.create(mode=mode)
    return api
