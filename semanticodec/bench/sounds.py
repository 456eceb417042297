"""What is derived from a sound before anything is compared: pitch, words, voice, spectra."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..compiled import import_librosa
from ..config import SAMPLE_RATE
from .align import Samples


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
        """F0 in Hz (65 to 400; NaN where there is none) and whether it is voiced, of each frame of 20 ms, by pYIN.

        Source: Mauch and Dixon (2014), as in librosa.
        """
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


def _magnitudes(wave: Samples, size: int) -> Samples:
    window = torch.hann_window(size, dtype=torch.float64)
    padded = torch.from_numpy(np.pad(wave, size // 2))
    spectrum = torch.stft(padded, size, size // 4, window=window, center=False, return_complex=True)
    result: Samples = spectrum.abs().mT.clamp_min(1e-5).numpy()
    return result


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
