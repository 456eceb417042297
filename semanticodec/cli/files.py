"""Code files and sound files of any length, read and written in constant memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from .. import audio, wire
from ..codec import SemantiCodec
from ..config import SAMPLE_RATE
from ..diffusion import SamplerOptions
from ..errors import AudioError
from .jobs import Job


@dataclass(frozen=True)
class Stored:
    """A ``.scodec`` file that has been read through once, to know what it holds; :meth:`pieces` reads its codes again.

    Args:
        file: open for reading; can be seeked.
        salvage: skip what is damaged.
        header: what the file says about itself.
        frames: of codes, lost ones included.
        samples: per channel, of the recording.
        gaps: what is lost.
    """

    file: BinaryIO
    salvage: bool
    header: wire.Header
    frames: int
    samples: int
    gaps: tuple[wire.Gap, ...]

    @classmethod
    def survey(cls, file: BinaryIO, *, salvage: bool) -> Stored:
        """Read a file through.

        Raises:
            WireError: as :class:`wire.Reader` does.
        """
        reader = wire.Reader(file, salvage=salvage)
        frames = 0
        for segment in reader:
            frames = segment.stop
        capacity = reader.header.capacity(frames)
        samples = capacity if reader.samples is None else reader.samples
        samples = min(samples, capacity) if salvage else samples
        return cls(file, salvage, reader.header, frames, samples, tuple(reader.gaps))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.seek(0, io.SEEK_END)

    def pieces(self, step: int) -> Iterator[np.ndarray]:
        """Read the codes, ``[channels, 2, step]`` at a time and fewer at the end; -1 where they were lost."""
        held = np.empty((self.header.channels, 2, 0), np.int64)
        for part in self._parts(step):
            held = np.concatenate([held, part], 2)
            whole = held.shape[2] // step * step
            yield from (held[..., at : at + step] for at in range(0, whole, step))
            held = held[..., whole:]
        if held.shape[2]:
            yield held

    def _parts(self, step: int) -> Iterator[np.ndarray]:
        self.file.seek(0)
        stop = 0
        for segment in wire.Reader(self.file, salvage=self.salvage):
            for start in range(stop, segment.start, step):
                yield np.full((self.header.channels, 2, min(step, segment.start - start)), -1)
            yield segment.codes
            stop = segment.stop


def encode_stream(
    codec: SemantiCodec,
    job: Job,
    sound: soundfile.SoundFile,
    *,
    per_channel: bool,
    entropy: bool,
    advance: Callable[[float], None],
) -> None:
    """Encode a sound file of any length.

    Args:
        codec: with its encoder half.
        job: says where to write.
        sound: from :func:`audio.open_sound`.
        per_channel: code each channel, not their average.
        entropy: code the codes by the prior of their preset.
        advance: is told which part of the file each step was.

    Raises:
        AudioError: the file is damaged, holds no samples, or such as cannot be coded.
        WireError: more channels than a code file can have, or there is no prior.
    """
    samples = 0

    def pieces() -> Iterator[Tensor]:
        nonlocal samples
        for wave in audio.pieces(sound):
            samples += wave.shape[1]
            yield wave if per_channel else wave[None]
            advance(wave.shape[1] / max(1, sound.frames))

    channels = sound.channels if per_channel else 1
    header = wire.Header.of(codec.config, codec.weights_hash, sound.samplerate, channels, None, entropy=entropy)
    # The head says how many samples there are, and only the end of the sound is a proof of it.
    with tempfile.TemporaryFile() as draft:
        with wire.Writer(draft, dataclasses.replace(header, prior=None)) as writer:
            for codes in codec.iter_encode(pieces(), sound.samplerate):
                writer.write(codes.cpu().numpy())
            writer.close(samples)
        draft.seek(0)
        known = dataclasses.replace(header, samples=samples)
        with job.open_target() as file, wire.Writer(file, known) as final:
            for segment in wire.Reader(draft):
                final.write(segment.codes)


@dataclass(frozen=True)
class Loaded:
    """A short recording: rows ``[B, S]`` at 16 kHz of one that had ``samples`` samples per channel at ``rate`` Hz."""

    job: Job
    rows: Tensor
    rate: int
    samples: int

    @classmethod
    def read(cls, job: Job, sound: soundfile.SoundFile, *, per_channel: bool) -> Loaded:
        """Read a file whole.

        Raises:
            AudioError: the file is damaged, holds no samples, or such as cannot be coded.
        """
        wave = torch.cat(list(audio.pieces(sound)), 1)
        rows = audio.mono(wave if per_channel else wave[None])
        return cls(job, audio.resample(rows, sound.samplerate, SAMPLE_RATE), sound.samplerate, wave.shape[1])


def encode_pooled(
    codec: SemantiCodec, recordings: Sequence[Loaded], *, entropy: bool
) -> Iterator[tuple[Job, wire.Header, np.ndarray]]:
    """Encode recordings together; yield what to write for each.

    Raises:
        WireError: ``entropy`` asks for entropy coding, and there is no prior.
    """
    if not recordings:
        return
    coded = iter(codec.encode([row for one in recordings for row in one.rows], SAMPLE_RATE))
    for one in recordings:
        codes = np.concatenate([next(coded).cpu().numpy() for _ in one.rows])
        header = wire.Header.of(codec.config, codec.weights_hash, one.rate, len(one.rows), one.samples, entropy=entropy)
        yield one.job, header, codes


def decode_alike(
    codec: SemantiCodec, files: Sequence[tuple[Job, Stored]], seed: int, options: SamplerOptions
) -> Iterator[float]:
    """Decode files of one number of channels and frames into sound files; yield the fraction done by each step."""
    first = files[0][1]
    channels, step = first.header.channels, 64 * codec.config.group
    pieces = (np.concatenate(some) for some in zip(*(stored.pieces(step) for _, stored in files), strict=True))
    with contextlib.ExitStack() as stack:
        sounds = [
            stack.enter_context(SoundWriter(stack.enter_context(job.open_target()), stored, job.sound_format))
            for job, stored in files
        ]
        for wave in codec.iter_decode(pieces, seed=seed, options=options):
            for sound, rows in zip(sounds, wave.float().cpu().split(channels), strict=True):
                sound.write(rows)
            yield wave.shape[1] / codec.config.samples(first.frames)


class SoundWriter:
    """A sound file of a recording's sample rate and length, written from pieces at 16 kHz.

    The format must have such files (:func:`audio.check_format`).
    """

    def __init__(self, file: BinaryIO, stored: Stored, form: str) -> None:
        rate, self._channels = stored.header.sample_rate, stored.header.channels
        self._left = stored.samples
        self._resampler = audio.Resampler(SAMPLE_RATE, rate, self._channels)
        self._disk = _Callbacks(file)
        with self._disk.errors():
            self._file = soundfile.SoundFile(self._disk, "w", rate, self._channels, format=form)

    def __enter__(self) -> SoundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._append(self._resampler.flush())
                # The last frame may stand for less than the recording has left.
                self._append(torch.zeros(self._channels, self._left))
        finally:
            with self._disk.errors():
                self._file.close()

    def write(self, wave: Tensor) -> None:
        """Append float32 samples ``[channels, samples]``; what the recording did not have is cut off."""
        self._append(self._resampler.push(wave))

    def _append(self, wave: Tensor) -> None:
        wave = wave[:, : self._left].clamp(-1, 1)
        self._left -= wave.shape[1]
        with self._disk.errors():
            self._file.write(wave.T.contiguous().numpy())


class _Callbacks:
    """A file as libsndfile uses it: called back from C, where nothing can be raised, it keeps the error for later."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        return self._attempt(lambda: self._file.write(data))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._attempt(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._attempt(self._file.tell)

    def _attempt(self, call: Callable[[], int]) -> int:
        try:
            return call()
        except OSError as error:
            self._error = self._error or error
            return 0

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what went wrong meanwhile."""
        try:
            yield
        except (soundfile.LibsndfileError, AssertionError) as error:
            # soundfile asserts that all samples were written.
            raise self._error or AudioError(f"libsndfile cannot write this sound file: {error}") from error
        if self._error is not None:
            raise self._error
