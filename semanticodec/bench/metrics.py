"""What is measured of a decode against its original, both 16 kHz mono, after :mod:`.align`.

Every metric is a value in :data:`METRICS`; its version and those of the packages that compute it are part of what
cached results are found by.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..audio import resample
from ..compiled import import_librosa, own_cache
from ..config import SAMPLE_RATE
from ..demo import mel_l1
from .align import Samples

SPEECH = ("speech",)
TONAL = ("speech", "music")
ALL = ("speech", "music", "sound")

SPAN = 6144
"""Samples below which STOI's 30 frames cannot fit."""

Value = tuple[float, float]
"""A value and its weight in the mean: 1, or the number of words."""


@dataclass(frozen=True, eq=False)
class Sound:
    """One signal and what is derived from it, each thing once.

    Args:
        wave: ``[S]`` at 16 kHz.
        text: what is said, if known.
    """

    wave: Samples = field(repr=False)
    text: str | None = None

    @functools.cached_property
    def pitch(self) -> tuple[Samples, NDArray[np.bool_]]:
        """F0 in Hz (NaN where there is none) and whether a frame of 20 ms is voiced, by pYIN."""
        f0, voiced, _ = import_librosa().pyin(
            self.wave, fmin=65, fmax=400, sr=SAMPLE_RATE, frame_length=1024, hop_length=320, resolution=0.2
        )
        return f0, voiced

    @functools.cached_property
    def words(self) -> str:
        """What pocketsphinx hears with the English models in its wheel."""
        recogniser = _recogniser()
        recogniser.reinit()  # what it heard before would change what it hears now
        recogniser.start_utt()
        pcm = (np.clip(self.wave, -1, 1) * 32767).astype(np.int16)
        recogniser.process_raw(pcm.tobytes(), full_utt=True)
        recogniser.end_utt()
        heard = recogniser.hyp()
        return heard.hypstr if heard else ""

    @functools.cached_property
    def voice(self) -> NDArray[np.float32]:
        """Resemblyzer's embedding of the speaker, of unit length."""
        result: NDArray[np.float32] = _speakers().embed_utterance(self.wave.astype(np.float32))
        return result

    @functools.cached_property
    def spectra(self) -> list[Samples]:
        """Magnitudes at three resolutions (FFT 512, 1024, 2048, hop a quarter), ``[frames, bins]``."""
        return [_magnitudes(self.wave, size) for size in (512, 1024, 2048)]


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
        costly: whether the default run takes it only on part of the clips.
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
        """Say which package is not installed."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install 'semanticodec[bench]'"
        return None

    @property
    def made_by(self) -> str:
        """Its version, and those of the packages: values of other versions are not used again."""
        return "+".join((str(self.version), *map(release, self.needs)))

    def value(self, original: Sound, decoded: Sound) -> Value | None:
        """Measure; None where the metric is undefined."""
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
    """ITU-T P.862.2 (wide-band, 16 kHz) or P.862.1 (narrow-band, both resampled to 8 kHz).

    Both map onto 0.999 to 4.999.
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
    """Short-time objective intelligibility (Taal et al., 2011), or extended (Jensen and Taal, 2016)."""
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
    """ViSQOL v3 (Chinen et al., 2020): audio mode at 48 kHz, or speech mode at 16 kHz with the lattice mapping."""
    if not (original.wave.any() and decoded.wave.any()):
        return None
    rate = 48_000 if mode == "audio" else SAMPLE_RATE
    try:
        return float(_visqol(mode).measure_from_arrays(_at(original.wave, rate), _at(decoded.wave, rate), rate).moslqo)
    except (ValueError, RuntimeError, IndexError):  # no patch of the original is loud enough, or it is too short
        return None


def multi_stft(original: Sound, decoded: Sound) -> float:
    """Spectral convergence plus log-magnitude L1, averaged over three resolutions (Yamamoto et al., 2020)."""
    losses = []
    for ours, theirs in zip(original.spectra, decoded.spectra, strict=True):
        convergence = float(np.linalg.norm(ours - theirs)) / max(float(np.linalg.norm(ours)), 1e-9)
        losses.append(convergence + float(np.abs(np.log(ours) - np.log(theirs)).mean()))
    return float(np.mean(losses))


def lsd(original: Sound, decoded: Sound) -> float:
    """Log-spectral distance: root of the mean squared difference of log10 powers over bins, averaged over frames."""
    ours, theirs = original.spectra[2], decoded.spectra[2]
    return float(np.sqrt(((2 * np.log10(ours / theirs)) ** 2).mean(1)).mean())


def log_mel(original: Sound, decoded: Sound) -> float:
    """Log-mel L1, as the published codecs were scored."""
    return mel_l1(torch.from_numpy(original.wave).float(), torch.from_numpy(decoded.wave).float())


def f0_error(original: Sound, decoded: Sound) -> Value | None:
    """Median error of F0 in cents over frames that are voiced in both; weighted by their number."""
    (ours, _), (theirs, _) = original.pitch, decoded.pitch
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < 5:
        return None
    return float(np.median(np.abs(1200 * np.log2(theirs[both] / ours[both])))), float(both.sum())


def voicing_error(original: Sound, decoded: Sound) -> float:
    """Share of frames that are voiced in one and not in the other, in percent."""
    return float(100 * (original.pitch[1] != decoded.pitch[1]).mean())


def wer(original: Sound, decoded: Sound) -> Value | None:
    """Word error rate against the transcript in percent, weighted by its words."""
    return _word_errors(original.text or "", decoded.words)


def dwer(original: Sound, decoded: Sound) -> Value | None:
    """Word error rate against what the recogniser hears in the original, in percent, weighted by its words."""
    return _word_errors(original.words, decoded.words)


def speaker(original: Sound, decoded: Sound) -> float:
    """Cosine of the speaker embeddings."""
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
            ("pesq",),
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
            ("visqol",),
            functools.partial(visqol, mode="audio"),
            worst=1.0,
            version=2,
        ),
        Metric(
            "visqol_speech",
            "ViSQOL speech",
            "",
            "high",
            SPEECH,
            ("visqol",),
            functools.partial(visqol, mode="speech"),
            worst=1.0,
            version=2,
        ),
        Metric("mel_l1", "log-mel L1", "", "low", ALL, ("torch",), log_mel, version=2),
        Metric("stft", "multi-res. STFT", "", "low", ALL, ("torch", "numpy"), multi_stft, version=2),
        Metric("lsd", "LSD", "", "low", ALL, ("torch", "numpy"), lsd, version=2),
        Metric("f0", "F0 error", "cents", "low", SPEECH, ("librosa",), f0_error),
        Metric("voicing", "voicing error", "%", "low", SPEECH, ("librosa",), voicing_error),
        Metric("wer", "WER", "%", "low", SPEECH, ("pocketsphinx", "jiwer"), wer, costly=True, version=2),
        Metric("dwer", "dWER", "%", "low", SPEECH, ("pocketsphinx", "jiwer"), dwer, costly=True, version=2),
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


def _magnitudes(wave: Samples, size: int) -> Samples:
    window = torch.hann_window(size, dtype=torch.float64)
    padded = torch.from_numpy(np.pad(wave, size // 2))
    spectrum = torch.stft(padded, size, size // 4, window=window, center=False, return_complex=True)
    result: Samples = spectrum.abs().mT.clamp_min(1e-5).numpy()
    return result


def _word_errors(truth: str, heard: str) -> Value | None:
    import jiwer

    if not (words := truth.lower().split()):
        return None
    return 100 * float(jiwer.wer(" ".join(words), heard.lower())), float(len(words))


@functools.cache
def _recogniser() -> Any:
    import pocketsphinx

    return pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")


@functools.cache
def _speakers() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies use what setuptools gives up
        import_librosa()  # which it imports
        import resemblyzer

        return resemblyzer.VoiceEncoder("cpu", verbose=False)


@functools.cache
def _visqol(mode: str) -> Any:
    own_cache()
    import visqol as module

    logging.getLogger("visqol").setLevel(logging.ERROR)  # it reports every clip
    api = module.VisqolApi()
    api.create(mode=mode)
    return api
