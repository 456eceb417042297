"""Where somebody speaks: WebRTC's voice activity detector (the ``webrtcvad`` package) with smoothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import webrtcvad
from torch import Tensor

from ..audio import Resampler, mono
from ..config import SAMPLE_RATE

MODE = 2
"""How hard the detector is to convince, 0 to 3."""
FRAME = 480
"""Samples at 16 kHz per decision (30 ms)."""
PAD = 8
"""Frames that are kept on either side of speech; pauses of up to twice as many are kept whole."""
SHORTEST = 8
"""Frames of speech that make a segment."""


def speech(pieces: Iterable[Tensor], rate: int) -> Iterator[tuple[int, int]]:
    """Find the stretches of speech in constant memory.

    Args:
        pieces: consecutive samples ``[channels, samples]`` in [-1, 1]; channels are averaged.
        rate: of the pieces, in Hz.

    Yields:
        First sample and the one after the last, at ``rate``.
    """
    seen = 0
    begin, last, voiced = -1, -1, 0
    for index, active in enumerate(_decisions(counted := _Counted(pieces), rate)):
        seen = index
        if active:
            begin = index if begin < 0 else begin
            last, voiced = index, voiced + 1
        elif begin >= 0 and index - last > 2 * PAD:
            if voiced >= SHORTEST:
                yield _bounds(begin, last, rate, counted.samples)
            begin, voiced = -1, 0
    if begin >= 0 and voiced >= SHORTEST and seen >= last:
        yield _bounds(begin, last, rate, counted.samples)


class _Counted:
    """Pieces that are counted as they pass."""

    def __init__(self, pieces: Iterable[Tensor]) -> None:
        self._pieces = pieces
        self.samples = 0

    def __iter__(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            self.samples += piece.shape[1]
            yield piece


def _bounds(begin: int, last: int, rate: int, samples: int) -> tuple[int, int]:
    first, stop = (begin - PAD) * FRAME, (last + 1 + PAD) * FRAME
    return max(0, first * rate // SAMPLE_RATE), min(samples, stop * rate // SAMPLE_RATE)


def _decisions(pieces: Iterable[Tensor], rate: int) -> Iterator[bool]:
    """Say of every complete frame whether somebody speaks."""
    detector = webrtcvad.Vad(MODE)
    resampler = Resampler(rate, SAMPLE_RATE)
    held = np.empty(0, np.int16)
    for piece in pieces:
        wave = resampler.push(mono(piece[None]))[0].numpy()
        held = np.concatenate([held, (wave.clip(-1, 1) * 32767).astype(np.int16)])
        for at in range(0, len(held) - FRAME + 1, FRAME):
            yield detector.is_speech(held[at : at + FRAME].tobytes(), SAMPLE_RATE)
        held = held[len(held) // FRAME * FRAME :]
