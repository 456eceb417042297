"""Where sound comes from and goes to: files, pipes, the microphone, the loudspeaker."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from semanticodec.errors import AudioError
from semanticodec.wire.messages import Marker

from .events import AudioChunk, Restarted, Samples
from .jitter import JitterBuffer

PIECES = 50
"""Pieces per second that files and microphones are read in."""


async def paced(wave: Samples, sample_rate: int) -> AsyncIterator[Samples]:
    """Yield pieces as they would come if the sound were being made now."""
    size, begin = max(1, sample_rate // PIECES), time.monotonic()
    for first in range(0, len(wave), size):
        piece = wave[first : first + size]
        await asyncio.sleep(max(0.0, begin + (first + len(piece)) / sample_rate - time.monotonic()))
        yield piece


def read(path: str) -> tuple[Samples, int]:
    """Read a sound file; return the average of its channels in [-1, 1], and its sample rate.

    Raises:
        AudioError: it cannot be read, or its sample rate cannot be sent.
    """
    import soundfile

    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioError(f"{path} cannot be read: {error}") from error
    mono: Samples = wave.mean(1)
    return mono, int(rate)


async def piped(pipe: BinaryIO, sample_rate: int) -> AsyncIterator[Samples]:
    """Yield pieces of 16-bit little-endian mono samples as they come through a pipe."""
    size = 2 * max(1, sample_rate // PIECES)
    while data := await asyncio.to_thread(pipe.read, size):
        yield np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / np.float32(32768)


async def microphone(sample_rate: int) -> AsyncIterator[Samples]:
    """Yield what the microphone hears.

    Raises:
        AudioError: there is none, or no way to use it.
    """
    device, loop = _sounddevice(), asyncio.get_running_loop()
    # A user of the network who cannot keep up loses what is oldest, not his memory.
    heard: asyncio.Queue[Samples] = asyncio.Queue()

    def take(data: np.ndarray[Any, Any], *_: object) -> None:
        loop.call_soon_threadsafe(_offer, heard, data[:, 0].astype(np.float32))

    try:
        stream = device.InputStream(
            samplerate=sample_rate, channels=1, dtype="float32", blocksize=sample_rate // PIECES, callback=take
        )
    except device.PortAudioError as error:
        raise AudioError(f"the microphone cannot be used: {error}") from error
    with stream:
        while True:
            yield await heard.get()


def _offer(queue: asyncio.Queue[Samples], samples: Samples) -> None:
    if queue.qsize() >= 10 * PIECES:
        queue.get_nowait()
    queue.put_nowait(samples)


class Player:
    """A loudspeaker behind a jitter buffer; the sound card's thread takes what it plays.

    Attributes:
        begun: whether anything has come.
        buffer: the jitter buffer.
    """

    def __init__(self, sample_rate: int) -> None:
        self.begun = False
        self.buffer = JitterBuffer(sample_rate)
        self._lock = threading.Lock()

    def put(self, event: AudioChunk | Restarted) -> None:
        """Queue a chunk."""
        self.begun = True
        with self._lock:
            if isinstance(event, Restarted):
                self.buffer.restart()
            else:
                self.buffer.put(event.at, event.samples, time.monotonic_ns())

    def end(self) -> None:
        """Note that no more will come."""
        with self._lock:
            self.buffer.end()

    @property
    def level(self) -> int:
        """Samples that wait to be played."""
        return self.buffer.level

    def fill(self, out: np.ndarray[Any, Any], count: int, *_: object) -> None:
        """Fill the sound card's buffer ``[count, 1]``."""
        with self._lock:
            out[:, 0] = self.buffer.get(count, time.monotonic_ns())

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Play meanwhile.

        Raises:
            AudioError: there is no loudspeaker, or no way to use it.
        """
        device = _sounddevice()
        try:
            stream = device.OutputStream(
                samplerate=self.buffer.sample_rate, channels=1, dtype="float32", callback=self.fill
            )
        except device.PortAudioError as error:
            raise AudioError(f"the loudspeaker cannot be used: {error}") from error
        with stream:
            yield


class Recorder:
    """Write a stream to a file, or as 16-bit little-endian samples to the standard output, in its own time.

    What is missing becomes silence, so that the recording is as long as what was said.  What fills up the last block
    of a recording is known when a marker comes: a file's last second waits for it, a pipe's sound does not.

    Attributes:
        begun: whether anything has come.
    """

    def __init__(self, path: str, sample_rate: int) -> None:
        self.begun = False
        self._next: int | None = None
        self._held = np.zeros(0, np.float32)
        self._hold = 0 if path == "-" else sample_rate
        self._most = 60 * sample_rate
        self._file: Any = None
        if path != "-":
            import soundfile

            try:
                self._file = soundfile.SoundFile(path, "w", sample_rate, 1)
            except (OSError, TypeError, ValueError, soundfile.LibsndfileError) as error:
                raise AudioError(f"{path} cannot be written: {error}") from error

    def put(self, event: AudioChunk | Restarted | Marker) -> None:
        """Append a chunk, or take off what lies behind a marker."""
        if isinstance(event, Marker):
            if event.flush and event.at is not None and self._next is not None:
                surplus = self._next - event.at
                self._held = self._held[: max(0, len(self._held) - max(0, surplus))]
                self._next = event.at
            return
        self.begun = True
        if isinstance(event, Restarted):
            self._next = None
            return
        gap = 0 if self._next is None else event.at - self._next
        if 0 < gap <= self._most:
            self._write(np.zeros(gap, np.float32))
        self._write(event.samples)
        self._next = event.at + len(event.samples)

    def close(self) -> None:
        """Finish the file."""
        self._hold = 0
        self._write(self._held[:0])
        if self._file is not None:
            self._file.close()

    def _write(self, samples: Samples) -> None:
        whole = np.concatenate([self._held, samples])
        ready = max(0, len(whole) - self._hold)
        samples, self._held = whole[:ready], whole[ready:]
        if self._file is not None:
            self._file.write(samples)
            return
        pcm = np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2")
        sys.stdout.buffer.write(pcm.tobytes())
        sys.stdout.buffer.flush()


def _sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise AudioError("sounddevice is not installed; pip install 'semanticodec[mic]'") from error
    except OSError as error:
        raise AudioError(f"sounddevice finds no PortAudio ({error}); apt-get install libportaudio2") from error
    module: ModuleType = sounddevice
    return module
