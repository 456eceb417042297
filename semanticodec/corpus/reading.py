"""From items to samples: open whatever holds them, decode, mix, resample, cut into spans of windows.

Everything is read piece by piece, so that hours take no more memory than seconds.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.nn import functional

from ..audio import FBANK_LOOKAHEAD, PIECE, Resampler, mono, open_sound, pieces
from ..config import COLUMN, SAMPLE_RATE, CodecConfig
from ..errors import AudioError
from .cuts import load_cut
from .manifests import beside
from .records import Event, Item, ItemDone, ItemFailed, RowFacts, Span, failure_of, irregular, is_local, locate

if TYPE_CHECKING:
    from typing_extensions import Buffer

Channels = Literal["downmix", "split"]
SPAN_SECONDS = 60
"""About how much sound one span holds."""
BUFFER = 1 << 20
"""Bytes that are read of an archive's member at once."""
PAUSES = (1.0, 5.0, 25.0)
"""Seconds before a file is read again whose server did not answer well."""
PASSING = frozenset({errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EBUSY})
SLACK = 0.1
"""Seconds by which a segment may end behind its recording: manifests round."""
LONGEST_FEATURES = 3600
"""Seconds of sound whose features one row holds at most: a list in Arrow has less than 2**31 entries."""
STREAMED = 0x7FFF0000
"""A chunk size from here on was written by a program that did not know the size yet."""
_HOLES = re.compile(r"^Ogg : (?:Skipped|Warning, libogg reports a hole).*", re.MULTILINE)
_NO_END = re.compile(r"^Ogg ?: (?:Last page lacks an end-of-stream bit|File ended unexpectedly)", re.MULTILINE)
_SIZES = re.compile(r"^\s*(?:data|SSND|riff|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """How items become spans.

    Args:
        config: whose windows are cut.
        channels: average them, or make a row of each.
        vad: make a row of every stretch of speech.
        keep_features: features are wanted, which limits how long a row may be.
    """

    config: CodecConfig
    channels: Channels = "downmix"
    vad: bool = False
    keep_features: bool = False


def read(index: int, item: Item, how: Reading) -> Iterator[Event]:
    """Read one item.

    Args:
        index: of the item in its chunk.
        item: what to read.
        how: to read it.

    Yields:
        Spans and, per row, its facts; last of all that the item is done, or has failed, which voids what came before.
    """
    if how.vad:
        from . import vad  # noqa: F401 - a missing package is no fault of the items
    for pause in (*PAUSES, None):
        try:
            yield from _read(index, item, how)
        except MemoryError:
            yield ItemFailed(index, "MemoryError", "there is not enough memory to read it")
        except Exception as error:
            # Whatever strangers' files make the decoders, file systems and plugins below raise, one item must not end
            # a run of millions, nor end it again at the same place when it is resumed.
            if pause is not None and _may_pass(item, error):
                time.sleep(pause)
                continue  # what was read before comes again, and takes its own place
            yield failure_of(index, error)
        return


def _read(index: int, item: Item, how: Reading) -> Iterator[Event]:
    rows = 0
    for first, count in _segments(item, how):
        for event in _read_segment(index, rows, item, how, first, count):
            rows += isinstance(event, RowFacts)
            yield event
    if not rows:
        raise AudioError("nobody speaks in this recording")
    yield ItemDone(index, rows)


def _may_pass(item: Item, error: Exception) -> bool:
    """Tell whether an error may be the network's, or a file server's, and not the file's."""
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, AudioError, ValueError, ImportError)
    return "://" in item.source and not isinstance(error, lasting)


@dataclass(frozen=True)
class Sound:
    """An open recording, or a segment of one.

    Args:
        rate: in Hz.
        first: its first sample in the recording.
        pieces: consecutive samples ``[channels, samples]``.
    """

    rate: int
    first: int
    pieces: Iterator[Tensor]


@contextlib.contextmanager
def open_item(item: Item, first: int | None = None, count: int | None = None) -> Iterator[Sound]:
    """Open what an item stands for.

    Args:
        item: what to read.
        first: sample to begin with instead of the item's start.
        count: samples to read from there; None: to the end of the recording.

    Raises:
        AudioError: it is no audio, is cut short, or has no such segment.
        OSError: it cannot be read.
    """
    if item.kind == "bad":
        raise AudioError(item.extra)
    if item.kind == "cut":
        cut, rate, start = load_cut(item.extra)
        yield Sound(rate, round(start * rate), iter(torch.from_numpy(cut).split(PIECE, 1)))
        return
    with open_file(item) as file, open_sound(file) as sound:
        if first is None:
            first, count = _segment(item, sound)
        if first:
            try:
                sound.seek(first)
            except soundfile.LibsndfileError as error:
                raise AudioError(f"damaged: sample {first} cannot be reached: {error.error_string}") from error
        part = _whole(sound) if count is None else _some(sound, count)
        yield Sound(sound.samplerate, first, _channel(part, item.channel))


@contextlib.contextmanager
def open_file(item: Item) -> Iterator[BinaryIO]:
    """Open the bytes of a sound file, wherever they lie."""
    if item.kind in ("parquet", "arrow"):
        yield io.BytesIO(_cell(item))
        return
    file_system, path = locate(item.source)
    if isinstance(file_system, LocalFileSystem) and irregular(path):
        raise AudioError("this is no regular file")
    if item.kind == "tar":
        assert item.place is not None
        offset, size = item.place
        with file_system.open(path, "rb", cache_type="none") as file:
            if is_local(file_system):
                missing = offset + size - file.seek(0, os.SEEK_END)
                part: BinaryIO = io.BufferedReader(Part(file, offset, size), BUFFER)
            else:  # one request, not hundreds
                file.seek(offset)
                part = io.BytesIO(file.read(size))
                missing = size - len(part.getbuffer())
            if missing > 0:
                raise AudioError(f"the archive ends {missing} bytes before the file does")
            yield part
        return
    with file_system.open(path, "rb") as file:
        yield file


class Part(io.RawIOBase):
    """A stretch of an open file, as a file: members of archives take no memory, however long they are."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self._place = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the stretch."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        """Read up to the end of the stretch."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._place)]
        self._file.seek(self._offset + self._place)
        data = self._file.read(len(view))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _cell(item: Item) -> bytes:
    assert item.place is not None
    group, row = item.place
    column = _group(item.source, item.kind, item.extra, group)
    value = column[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return data
    path = value.get("path") if isinstance(value, dict) else None
    if path:
        with open_file(Item(item.id, "file", beside(item.source, path))) as file:
            return file.read()
    raise AudioError(f"row {item.member} has no bytes in its column {item.extra!r}")


@functools.lru_cache(maxsize=2)
def _group(source: str, kind: str, column: str, group: int) -> pa.ChunkedArray:
    """Read the sound column of a row group; its rows follow each other, so few are kept."""
    file_system, path = locate(source)
    with file_system.open(path, "rb") as file:
        if kind == "parquet":
            return pq.ParquetFile(file).read_row_group(group, [column]).column(0)
        for number, batch in enumerate(pa.ipc.open_stream(file)):
            if number == group:
                return pa.chunked_array([batch.column(column)])
    raise AudioError(f"{source} has no record batch {group}")


def _segment(item: Item, sound: soundfile.SoundFile) -> tuple[int, int | None]:
    """Return the first sample of an item's segment and how many samples it has."""
    if not item.start and item.duration is None:
        return 0, None
    rate, frames = sound.samplerate, sound.frames
    first = round(item.start * rate)
    if not 0 <= first < frames:
        raise AudioError(f"the segment begins at {item.start} s, the recording has {frames / rate:.3f} s")
    if item.duration is None:
        return first, None
    count = round(item.duration * rate)
    if count <= 0:
        raise AudioError(f"the segment lasts {item.duration} s")
    if first + count > frames + round(SLACK * rate):
        end = item.start + item.duration
        raise AudioError(f"the segment ends at {end:.3f} s, the recording has {frames / rate:.3f} s")
    return first, min(count, frames - first)


def _whole(sound: soundfile.SoundFile) -> Iterator[Tensor]:
    """Read to the end, and make sure that it is where the header says.

    libsndfile ends quietly where a file is cut short, and mends the size that it reports, but says so in its log.
    """
    for stated, seen in _SIZES.findall(sound.extra_info):
        if int(seen) < int(stated) < STREAMED:
            raise AudioError(f"cut short: the header promises {stated} bytes and {seen} follow")
    start, samples = sound.tell(), 0
    for piece in pieces(sound):
        samples += piece.shape[1]
        yield piece
    _check_holes(sound)
    if _NO_END.search(sound.extra_info):
        raise AudioError("cut short: the last page of the Ogg file does not say that it is the end")
    if start + samples < sound.frames < STREAMED:
        raise AudioError(f"cut short: the header promises {sound.frames} samples and {start + samples} can be read")


def _some(sound: soundfile.SoundFile, count: int) -> Iterator[Tensor]:
    """Read so many samples."""
    left = count
    for piece in pieces(sound):
        yield piece[:, :left]
        left -= piece.shape[1]
        if left <= 0:
            _check_holes(sound)
            return
    raise AudioError(f"cut short: {left} of the segment's {count} samples are missing")


def _check_holes(sound: soundfile.SoundFile) -> None:
    """Raise if libsndfile has read past damage: it goes on behind it, and tells only its log."""
    if hole := _HOLES.search(sound.extra_info):
        raise AudioError(f"damaged: {hole[0].removeprefix('Ogg : ')}")


def _channel(parts: Iterator[Tensor], channel: int | None) -> Iterator[Tensor]:
    for piece in parts:
        if channel is None:
            yield piece
        elif channel < len(piece):
            yield piece[channel : channel + 1]
        else:
            raise AudioError(f"channel {channel} is wanted, and the recording has {len(piece)}")


def _segments(item: Item, how: Reading) -> Iterator[tuple[int | None, int | None]]:
    """Yield the segments of an item that become rows: first sample and number of samples, None for the item's own."""
    if not how.vad:
        yield None, None
        return
    if item.kind == "cut":
        raise AudioError("cuts that only Lhotse can load are not searched for speech; trim them there")
    from .vad import speech

    with open_item(item) as sound:
        for first, stop in speech(sound.pieces, sound.rate):
            yield sound.first + first, stop - first


def _read_segment(
    index: int, row: int, item: Item, how: Reading, first: int | None, count: int | None
) -> Iterator[Event]:
    """Read one segment into one row, or one per channel from ``row`` on."""
    with open_item(item, first, count) as sound:
        digest = hashlib.sha256()
        samples = channels = 0

        def rows() -> Iterator[Tensor]:
            nonlocal samples, channels
            resampler: Resampler | None = None
            for piece in sound.pieces:
                digest.update(piece.T.contiguous().numpy().tobytes())
                samples, channels = samples + piece.shape[1], len(piece)
                if how.keep_features and samples > LONGEST_FEATURES * sound.rate:
                    raise AudioError(
                        f"longer than {LONGEST_FEATURES} s, too long to keep features; cut it into segments"
                    )
                wave = mono(piece if how.channels == "split" else piece[None])
                resampler = resampler or Resampler(sound.rate, SAMPLE_RATE, len(wave))
                yield resampler.push(wave)
            if resampler is not None:
                yield resampler.flush()

        spans = 0
        for wave, end in cut_spans(rows(), how.config):
            for number, part in enumerate(wave):
                yield Span(index, row + number, spans, part.numpy(), end)
            spans += 1
        split = how.channels == "split" and channels > 1
        where = f"@{sound.first}" if first is not None else ""
        for number in range(channels if split else 1):
            channel = item.channel if item.channel is not None else number if split else 0 if channels == 1 else None
            suffix = where + (f"#{number}" if split else "")
            facts = (sound.rate, samples, sound.first, channel, suffix, digest.hexdigest())
            yield RowFacts(index, row + number, spans, *facts)


def cut_spans(waves: Iterator[Tensor], config: CodecConfig) -> Iterator[tuple[Tensor, bool]]:
    """Cut consecutive samples into runs of whole windows.

    Args:
        waves: consecutive samples ``[B, S]`` at 16 kHz.
        config: whose windows are meant.

    Yields:
        ``[B, context + windows * block + lookahead]``, silence before the first and after the last sample, and whether
        it is the last; the windows are those of :func:`semanticodec.audio.fbank_windows`.
    """
    context, block = config.encoder.context * COLUMN, config.block
    size = context + max(1, SPAN_SECONDS * SAMPLE_RATE // block) * block + FBANK_LOOKAHEAD
    held: Tensor | None = None
    for wave in waves:
        held = torch.cat([wave.new_zeros(len(wave), context) if held is None else held, wave], 1)
        while held.shape[1] >= size:
            yield held[:, :size], False
            held = held[:, size - context - FBANK_LOOKAHEAD :]
    if held is None or held.shape[1] == context:
        raise AudioError("there are no samples")
    windows = -(-(held.shape[1] - context) // block)
    whole = context + windows * block + FBANK_LOOKAHEAD
    yield functional.pad(held[:, :whole], (0, max(0, whole - held.shape[1]))), True
