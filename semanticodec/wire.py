"""Codes <-> bytes: bit packing and the ``.scodec`` container.

A file is a head, any number of segments, and a tail; every part can be written and read without seeking.

    head     3   "SCD"
             1   format version, now 1
             1   n, size of the fields
             n   msgpack array: preset (its place in ``PRESET_NUMBERS``, or a name), first 4 bytes of the weights' hash
                 as a big-endian integer, token rate, sample rate of the recording, channels, bits per semantic code,
                 bits per acoustic code, samples per channel or nil
             2   CRC-16 of all the above
    segment  2   sync, F5 5A
             1+  first frame, LEB128
             1+  frames, LEB128; with the head they give the size of the payload
             4   CRC-32 of first frame, frames and payload
             ... payload, see :func:`pack`
    tail     2   sync, F5 A5
             1   n, size of the fields
             n   msgpack array: samples per channel (nil: the head has it); the index, a flat array of (segments,
                 frames in each) pairs; and, when there is more than one segment, a copy of the head
             2   CRC-16 of all the above
             1   n + 6, the size of the tail, to find it from the end of the file

CRC-16 is CCITT's (``binascii.crc_hqx``, start 0), CRC-32 is zlib's; both are stored big-endian.  The size of a segment
follows from its first frame and its number of frames, so the index turns into byte offsets by adding up.

10 s of mono at ``semanticodec-25-32768`` are 448 bytes of payload in a file of 495.
"""

from __future__ import annotations

import binascii
import bisect
import contextlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from .config import CodecConfig
from .errors import CodesError, CorruptedError, TruncatedError, VersionError, WireError

Codes = NDArray[np.int64]

MAGIC = b"SCD"
VERSION = 1
SEGMENT_SYNC = b"\xf5\x5a"
TAIL_SYNC = b"\xf5\xa5"

PRESET_NUMBERS = (
    *(f"mini-{rate}" for rate in (100, 50, 25)),
    *(f"semanticodec-{rate}-{size}" for rate in (100, 50, 25) for size in (4096, 8192, 16384, 32768)),
)
"""Names that are stored as their place in this list; append to it, never reorder it."""

MAX_BITS = 24
"""Bits per code."""
MAX_CHANNELS = 64
MAX_RATE = 1 << 20
"""Samples per second of a recording; tokens per second."""
MAX_SAMPLES = 1 << 48
"""Samples per channel."""
MAX_SEGMENT_FRAMES = 1 << 16
MAX_SEGMENT_BYTES = 1 << 18
MAX_LOST_FRAMES = 1 << 16
"""Frames that may have been cut out of a damaged file, beyond those that its damaged bytes could hold."""
MAX_RESYNC_BYTES = 1 << 28
"""Bytes that salvaging may check in vain while it looks for the next good segment."""

_MAX_VARINT = 6
_CHUNK = 1 << 16
_SYNC = re.compile(b"\xf5[\x5a\xa5]")


def packed_size(frames: int, bits: Sequence[int], rows: int = 1) -> int:
    """Return how many bytes ``rows`` x ``frames`` columns of codes of ``bits`` bits each take."""
    return -(-rows * frames * sum(bits) // 8)


def pack(codes: NDArray[np.integer[Any]], bits: Sequence[int]) -> bytes:
    """Pack codes into bytes, most significant bit first, without gaps.

    Args:
        codes: integers ``[rows, n_q, F]``; stream q holds values in [0, 2 ** bits[q]).
        bits: bits per code of each of the n_q streams, 1 to 24.

    Returns:
        For each row all codes of stream 0, then all of stream 1 and so on; zeros fill up the last byte.

    Raises:
        CodesError: wrong shape, dtype or range.
    """
    _check_bits(bits)
    codes = np.asarray(codes)
    if codes.ndim != 3 or codes.shape[1] != len(bits) or not np.issubdtype(codes.dtype, np.integer):
        raise CodesError(f"codes are {codes.dtype} {list(codes.shape)}; wanted integers [rows, {len(bits)}, frames]")
    for q, width in enumerate(bits):
        stream = codes[:, q]
        if stream.size and (stream.min() < 0 or stream.max() >= 1 << width):
            seen = f"{stream.min()}..{stream.max()}"
            raise CodesError(f"codes of stream {q} are {seen}; {width} bits hold 0..{(1 << width) - 1}")
    octets = np.ascontiguousarray(codes.astype(">u4")).view(np.uint8).reshape(*codes.shape, 4)
    planes = np.unpackbits(octets, axis=-1)
    kept = [planes[:, q, :, 32 - width :].reshape(len(codes), -1) for q, width in enumerate(bits)]
    return np.packbits(np.concatenate(kept, axis=1)).tobytes()


def unpack(data: bytes, bits: Sequence[int], frames: int, rows: int = 1) -> Codes:
    """Undo :func:`pack`.

    Args:
        data: exactly ``packed_size(frames, bits, rows)`` bytes.
        bits: bits per code of each stream, 1 to 24.
        frames: columns of codes.
        rows: rows of codes.

    Returns:
        int64 codes ``[rows, len(bits), frames]``.

    Raises:
        CorruptedError: another number of bytes, or the bits that fill up the last byte are not zero.
    """
    _check_bits(bits)
    want = packed_size(frames, bits, rows)
    if len(data) != want:
        raise CorruptedError(f"{len(data)} bytes of packed codes; {rows} x {frames} frames take {want} bytes")
    flat = np.unpackbits(np.frombuffer(data, np.uint8))
    used = rows * frames * sum(bits)
    if flat[used:].any():
        raise CorruptedError("the bits after the last packed code are not zero")
    lines = flat[:used].reshape(rows, frames * sum(bits))
    codes = np.empty((rows, len(bits), frames), np.int64)
    begin = 0
    for q, width in enumerate(bits):
        planes = np.zeros((rows, frames, 32), np.uint8)
        planes[..., 32 - width :] = lines[:, begin : begin + frames * width].reshape(rows, frames, width)
        codes[:, q] = np.packbits(planes, axis=-1).view(">u4")[..., 0]
        begin += frames * width
    return codes


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its first code.

    Args:
        preset: name of the preset or model.
        weights: first 8 hexadecimal digits of the weights' hash.
        token_rate: codes per second, both streams together; a second has ``token_rate / 2`` frames.
        sample_rate: samples per second of the recording that was encoded.
        channels: rows of codes, one per coded channel.
        code_bits: bits per (semantic, acoustic) code.
        samples: samples per channel of the recording; None while nobody knows.

    Raises:
        WireError: a value out of range.
    """

    preset: str
    weights: str
    token_rate: int
    sample_rate: int
    channels: int
    code_bits: tuple[int, int]
    samples: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or not 0 < len(self.preset.encode()) <= 128:
            raise WireError(f"preset {self.preset!r} is not a name of 1 to 128 bytes")
        if not isinstance(self.weights, str) or not re.fullmatch("[0-9a-f]{8}", self.weights):
            raise WireError(f"weights hash {self.weights!r} is not 8 hexadecimal digits")
        limits = {"token_rate": MAX_RATE, "sample_rate": MAX_RATE, "channels": MAX_CHANNELS}
        for name, limit in limits.items():
            _check_range(name, getattr(self, name), 1, limit)
        if len(self.code_bits) != 2:
            raise WireError(f"code_bits {self.code_bits!r} are not one width per stream, semantic and acoustic")
        for width in self.code_bits:
            _check_range("code_bits", width, 1, MAX_BITS)
        if self.samples is not None:
            _check_range("samples", self.samples, 0, MAX_SAMPLES)

    @classmethod
    def of(cls, config: CodecConfig, weights_hash: str, sample_rate: int, channels: int, samples: int | None) -> Header:
        """Return the header of a recording that is coded with these weights of a preset."""
        return cls(
            preset=config.name,
            weights=weights_hash[:8],
            token_rate=config.token_rate,
            sample_rate=sample_rate,
            channels=channels,
            code_bits=config.code_bits,
            samples=samples,
        )

    @property
    def segment_frames(self) -> int:
        """Frames of about 10.24 s, the usual length of a segment in a file."""
        return max(1, self.token_rate * 512 // 100)

    def capacity(self, frames: int) -> int:
        """Return how many samples of the recording ``frames`` frames can stand for."""
        return 2 * frames * self.sample_rate // self.token_rate


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of frames: int64 ``codes`` ``[channels, 2, F]`` from frame ``start`` on."""

    start: int
    codes: Codes

    @property
    def stop(self) -> int:
        """The frame after the last one."""
        return self.start + int(self.codes.shape[-1])


@dataclass(frozen=True)
class Gap:
    """Frames ``start`` to ``stop`` are lost; a ``stop`` of None means that nobody knows how many there were."""

    start: int
    stop: int | None
    reason: str


class IndexEntry(NamedTuple):
    """Where a segment lies: its first frame, its number of frames, its offset in bytes."""

    start: int
    frames: int
    offset: int


@dataclass(frozen=True, eq=False)
class Recording:
    """A whole file: int64 ``codes`` ``[channels, 2, F]`` (-1 where lost), ``samples`` per channel, and the ``gaps``."""

    header: Header
    codes: Codes
    samples: int
    gaps: tuple[Gap, ...] = ()


class Writer:
    """Write codes to a binary file, pipe or socket file as they come.

    Writes the head at once, a segment whenever enough frames have come, and the tail on :meth:`close`.  Left by an
    exception as a context manager it writes no tail, so that readers see that the end is missing.

    Args:
        file: open for writing; never seeked, never closed.
        header: its ``samples`` may be None, then :meth:`close` must be told.
        segment_frames: frames per segment; None for about 10.24 s.

    Raises:
        WireError: segments of that many frames are not allowed.
    """

    def __init__(self, file: BinaryIO, header: Header, segment_frames: int | None = None) -> None:
        self.header = header
        self._file = file
        self._frames = header.segment_frames if segment_frames is None else segment_frames
        _check_range("segment_frames", self._frames, 1, MAX_SEGMENT_FRAMES)
        size = packed_size(self._frames, header.code_bits, header.channels)
        if size > MAX_SEGMENT_BYTES:
            raise WireError(f"a segment of {self._frames} frames takes {size} bytes, over {MAX_SEGMENT_BYTES}")
        self._pending: Codes = np.empty((header.channels, 2, 0), np.int64)
        self._start = 0
        self._closed = False
        self._head = _head_bytes(header)
        file.write(self._head)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._closed:
            self.close()

    def write(self, codes: NDArray[np.integer[Any]]) -> None:
        """Append codes ``[channels, 2, F]``, any F.

        Raises:
            CodesError: wrong shape, dtype or range.
            WireError: the writer is closed.
        """
        if self._closed:
            raise WireError("this writer is closed; open another one")
        if codes.ndim != 3 or codes.shape[:2] != (self.header.channels, 2):
            raise CodesError(f"codes are {list(codes.shape)}; wanted [{self.header.channels}, 2, frames]")
        if not np.issubdtype(codes.dtype, np.integer):
            raise CodesError(f"codes are {codes.dtype}; wanted integers")
        self._pending = np.concatenate([self._pending, codes.astype(np.int64)], axis=2)
        whole = self._pending.shape[2] // self._frames * self._frames
        for begin in range(0, whole, self._frames):
            self._write_segment(self._pending[..., begin : begin + self._frames])
        self._pending = self._pending[..., whole:]

    def close(self, samples: int | None = None) -> None:
        """Write what is pending, and the tail.

        Args:
            samples: samples per channel of the recording; needed if the header does not have them.

        Raises:
            WireError: the number of samples is unknown, contradicts the header or does not fit the frames written.
        """
        if samples is None:
            samples = self.header.samples
        elif self.header.samples not in (None, samples):
            raise WireError(f"close(samples={samples}) contradicts the header's {self.header.samples}")
        if samples is None:
            raise WireError("the header has no number of samples, so close(samples=...) must say it")
        _check_range("samples", samples, 0, MAX_SAMPLES)
        frames = self._start + self._pending.shape[2]
        if not _fits(self.header, samples, frames):
            raise WireError(f"{frames} frames cannot stand for {samples} samples; write all codes before closing")
        full = self._start // self._frames
        runs = [full, self._frames] if full else []
        if self._pending.shape[2]:
            runs += [1, self._pending.shape[2]]
            self._write_segment(self._pending)
        self._closed = True
        fields: list[Any] = [None if self.header.samples is not None else samples, runs]
        if sum(runs[::2]) > 1:
            fields.append(self._head)
        body = msgpack.packb(fields)
        tail = _seal(TAIL_SYNC + bytes([len(body)]) + body)
        self._file.write(tail + bytes([len(tail) + 1]))
        self._file.flush()

    def _write_segment(self, codes: Codes) -> None:
        place = _varint(self._start) + _varint(codes.shape[2])
        payload = pack(codes, self.header.code_bits)
        check = zlib.crc32(payload, zlib.crc32(place))
        self._file.write(SEGMENT_SYNC + place + check.to_bytes(4, "big") + payload)
        self._start += codes.shape[2]


class Reader:
    """Read codes from a binary file, pipe or socket file, segment by segment, in bounded memory.

    Iterate over it for :class:`Segment` values in order.

    Args:
        file: open for reading; seeked only by :attr:`index`, :meth:`seek`, and to find the copy of a damaged head.
        salvage: skip what is damaged and list it in ``gaps`` instead of raising.

    Attributes:
        header: what the file says about itself.
        gaps: what has been found damaged so far; grows while iterating.

    Raises:
        TruncatedError: the bytes end too early.
        CorruptedError: a checksum or a length does not hold.
        VersionError: the file was written by a newer version.
        WireError: the bytes are something else.
    """

    def __init__(self, file: BinaryIO, *, salvage: bool = False) -> None:
        self.gaps: list[Gap] = []
        self._file = file
        self._salvage = salvage
        self._base = file.tell() if file.seekable() else 0
        self._source = _Source(file)
        self._next = 0
        self._wasted = 0
        self._tail: _Tail | None = None
        try:
            self.header, self._head_size = _parse_head(self._source)
            self._source.skip(self._head_size)
        except WireError:
            copy = self._spare_head() if salvage and file.seekable() else None
            if copy is None:
                raise
            self.header, self._head_size = _parse_head(_Source(io.BytesIO(copy)))
            self._rewind(0)

    @property
    def samples(self) -> int | None:
        """Samples per channel of the recording; None until the tail is read if the head does not have them."""
        if self.header.samples is not None:
            return self.header.samples
        return None if self._tail is None else self._tail.samples

    @property
    def index(self) -> tuple[IndexEntry, ...]:
        """Where every segment lies, from the tail of a seekable file; reading goes on where it was."""
        if not self._file.seekable():
            raise WireError("the index is at the end, and this file cannot be seeked; read the segments in order")
        position = self._file.tell()
        try:
            tail, begin = self._find_tail()
        finally:
            self._file.seek(position)
        self._tail = tail
        # A segment takes at least 9 bytes: hostile counts are refused before anything is allocated for them.
        if sum(count for count, _ in tail.runs) * 9 > begin:
            raise CorruptedError(f"the index lists more segments than {begin} bytes can hold")
        entries = []
        start, offset = 0, self._head_size
        for count, frames in tail.runs:
            for _ in range(count):
                entries.append(IndexEntry(start, frames, offset))
                payload = packed_size(frames, self.header.code_bits, self.header.channels)
                offset += len(SEGMENT_SYNC) + len(_varint(start)) + len(_varint(frames)) + 4 + payload
                start += frames
        if offset != begin:
            raise CorruptedError(f"the index puts the tail at byte {offset}, but it is at {begin}")
        return tuple(entries)

    def seek(self, frame: int) -> None:
        """Go on reading at the segment that holds ``frame``; the file must be seekable.

        Raises:
            WireError: the recording has no such frame, or the index is missing or damaged.
        """
        entries = self.index
        total = entries[-1].start + entries[-1].frames if entries else 0
        if not 0 <= frame < total:
            raise WireError(f"there is no frame {frame} in a recording of {total}")
        entry = entries[bisect.bisect_right([e.start for e in entries], frame) - 1]
        self._rewind(entry.offset)
        self._next = entry.start

    def __iter__(self) -> Iterator[Segment]:
        lost: WireError | None = None
        while True:
            try:
                part = self._parse_part()
            except WireError as error:
                if not self._salvage:
                    raise
                lost = lost or error
                self._source.skip(1)
                if self._wasted > MAX_RESYNC_BYTES or not self._source.find_sync():
                    self._note(lost, None)
                    return
                continue
            begin = part.start if isinstance(part, Segment) else part.frames
            if lost is not None or begin != self._next:
                self._note(lost or CorruptedError("frames are missing"), begin)
                lost = None
            self._next = begin
            if isinstance(part, _Tail):
                self._tail = part
                return
            self._next = part.stop
            yield part

    def _note(self, error: WireError, stop: int | None) -> None:
        if stop is None and self.header.samples is not None:
            wanted = -(-self.header.samples * self.header.token_rate // (2 * self.header.sample_rate))
            stop = wanted if wanted > self._next else None
        self.gaps.append(Gap(self._next, stop, str(error)))

    def _rewind(self, offset: int) -> None:
        self._file.seek(self._base + offset)
        self._source = _Source(self._file, offset)

    def _parse_part(self) -> Segment | _Tail:
        """Take the segment or the tail that begins here; on an error nothing is taken."""
        source = self._source
        sync = source.peek(2)
        if sync == SEGMENT_SYNC:
            return self._parse_segment()
        if sync == TAIL_SYNC:
            tail, size = _parse_tail(source)
            self._check_place("the tail", tail.frames)
            samples = tail.samples if self.header.samples is None else self.header.samples
            if not self._salvage and not _fits(self.header, samples or 0, tail.frames):
                raise CorruptedError(f"{samples} samples are claimed, more than {tail.frames} frames can stand for")
            if not self._salvage and len(source.peek(size + 1)) > size:
                raise CorruptedError(f"there are bytes after the tail, at byte {source.offset + size}")
            source.skip(size)
            return tail
        if len(sync) < 2 and SEGMENT_SYNC.startswith(sync[:1]):
            raise TruncatedError(f"the file ends at byte {source.offset + len(sync)} without its tail")
        raise CorruptedError(f"byte {source.offset} should begin a segment or the tail; seen {sync.hex(' ')}")

    def _parse_segment(self) -> Segment:
        source, header = self._source, self.header
        start, at = source.varint(len(SEGMENT_SYNC))
        frames, at = source.varint(at)
        where = f"the segment at byte {source.offset}"
        size = packed_size(frames, header.code_bits, header.channels)
        if not 0 < frames <= MAX_SEGMENT_FRAMES or size > MAX_SEGMENT_BYTES:
            raise CorruptedError(
                f"{where} claims {frames} frames ({size} bytes); "
                f"1 to {MAX_SEGMENT_FRAMES} (at most {MAX_SEGMENT_BYTES} bytes) are allowed"
            )
        raw = source.peek(at + 4 + size)
        if len(raw) < at + 4 + size:
            self._wasted += len(raw)
            raise TruncatedError(f"{where} (frame {start}) takes {at + 4 + size} bytes; {len(raw)} are there")
        payload = raw[at + 4 :]
        check = zlib.crc32(payload, zlib.crc32(raw[len(SEGMENT_SYNC) : at]))
        stored = int.from_bytes(raw[at : at + 4], "big")
        if check != stored:
            self._wasted += len(raw)
            raise CorruptedError(f"{where} has CRC {check:08x}; {stored:08x} is stored")
        self._check_place(where, start)
        segment = Segment(start, unpack(payload, header.code_bits, frames, header.channels))
        source.skip(len(raw))
        return segment

    def _check_place(self, where: str, frame: int) -> None:
        """Refuse a part that does not go on where the last one ended or, salvaging, that cannot belong here."""
        if not self._salvage and frame != self._next:
            raise CorruptedError(f"{where} goes on at frame {frame}; wanted frame {self._next}")
        bits = self.header.channels * sum(self.header.code_bits)
        latest = self._source.offset * 8 // bits + MAX_LOST_FRAMES
        if not self._next <= frame <= latest:
            raise CorruptedError(f"{where} goes on at frame {frame}; wanted {self._next} to {latest}")

    def _spare_head(self) -> bytes | None:
        with contextlib.suppress(WireError):
            return self._find_tail()[0].head
        return None

    def _find_tail(self) -> tuple[_Tail, int]:
        """Read the tail from the end of a seekable file: itself and its offset."""
        end = self._file.seek(0, io.SEEK_END) - self._base
        self._file.seek(self._base + max(0, end - 1))
        begin = end - (self._file.read(1) or b"\0")[0]
        if not 0 <= begin < end:
            raise TruncatedError(f"a file of {end} bytes does not end with a tail")
        self._file.seek(self._base + begin)
        source = _Source(self._file, begin)
        if source.peek(2) != TAIL_SYNC:
            raise TruncatedError(f"a file of {end} bytes does not end with a tail")
        return _parse_tail(source)[0], begin


def read_codes(file: BinaryIO | bytes, *, salvage: bool = False) -> Recording:
    """Read a whole recording.

    Args:
        file: bytes, or a file open for reading.
        salvage: keep what is undamaged; lost frames before the last good one become -1.

    Returns:
        Header, codes, samples per channel (never more than the codes can stand for) and gaps.

    Raises:
        WireError: as :class:`Reader` does.
    """
    reader = Reader(io.BytesIO(file) if isinstance(file, bytes) else file, salvage=salvage)
    header = reader.header
    segments = list(reader)
    codes = np.full((header.channels, 2, segments[-1].stop if segments else 0), -1, np.int64)
    for segment in segments:
        codes[..., segment.start : segment.stop] = segment.codes
    capacity = header.capacity(codes.shape[2])
    samples = capacity if reader.samples is None else reader.samples
    return Recording(header, codes, min(samples, capacity) if salvage else samples, tuple(reader.gaps))


def write_codes(
    file: BinaryIO, header: Header, codes: NDArray[np.integer[Any]], segment_frames: int | None = None
) -> None:
    """Write a whole recording: codes ``[channels, 2, F]``; the header must have its number of samples.

    Raises:
        CodesError: wrong shape, dtype or range.
        WireError: the header contradicts the codes.
    """
    with Writer(file, header, segment_frames) as writer:
        writer.write(codes)


@dataclass(frozen=True)
class _Tail:
    samples: int | None
    runs: tuple[tuple[int, int], ...]
    head: bytes | None

    @property
    def frames(self) -> int:
        return sum(count * frames for count, frames in self.runs)


class _Source:
    """Look ahead in a file that cannot be seeked; holds no more than was asked for."""

    def __init__(self, file: BinaryIO, offset: int = 0) -> None:
        self.offset = offset
        self._file = file
        self._data = bytearray()
        self._at = 0

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end of the file, without taking them."""
        while (missing := self._at + size - len(self._data)) > 0 and self._read(missing):
            pass
        return bytes(memoryview(self._data)[self._at : self._at + size])

    def skip(self, size: int) -> None:
        size = min(size, len(self._data) - self._at)
        self._at += size
        self.offset += size
        if self._at >= _CHUNK or self._at == len(self._data):
            del self._data[: self._at]
            self._at = 0

    def find_sync(self) -> bool:
        """Skip to the next bytes that may begin a segment or the tail; False if there are none."""
        while True:
            found = _SYNC.search(self._data, self._at)
            if found:
                self.skip(found.start() - self._at)
                return True
            # The last byte may be the first half of a sync.
            self.skip(max(0, len(self._data) - self._at - 1))
            if not self._read(_CHUNK):
                return False

    def varint(self, at: int) -> tuple[int, int]:
        """Read a LEB128 number ``at`` bytes ahead: its value and where it ends."""
        value = 0
        for i in range(_MAX_VARINT):
            octets = self.peek(at + i + 1)
            if len(octets) <= at + i:
                raise TruncatedError(f"the file ends at byte {self.offset + len(octets)}, inside a segment's lengths")
            value |= (octets[-1] & 0x7F) << (7 * i)
            if octets[-1] < 0x80:
                return value, at + i + 1
        raise CorruptedError(f"the segment at byte {self.offset} has a length of more than {_MAX_VARINT} bytes")

    def _read(self, size: int) -> bool:
        # Piece by piece: a buffered file sets aside all the memory that it is asked for, however little is there.
        piece = self._file.read(min(size, _CHUNK))
        self._data += piece or b""
        return bool(piece)


def _varint(value: int) -> bytes:
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _seal(data: bytes) -> bytes:
    return data + binascii.crc_hqx(data, 0).to_bytes(2, "big")


def _unseal(raw: bytes, fields_at: int, what: str) -> list[Any]:
    """Check the CRC-16 at the end of ``raw`` and return the msgpack array before it."""
    check, stored = binascii.crc_hqx(raw[:-2], 0), int.from_bytes(raw[-2:], "big")
    if check != stored:
        raise CorruptedError(f"{what} has CRC {check:04x}; {stored:04x} is stored")
    try:
        fields = msgpack.unpackb(raw[fields_at:-2])
    except ValueError as error:
        raise CorruptedError(f"the fields of {what} are not msgpack: {error}") from error
    if not isinstance(fields, list):
        raise CorruptedError(f"the fields of {what} are a {type(fields).__name__}; wanted an array")
    return fields


def _head_bytes(header: Header) -> bytes:
    known = header.preset in PRESET_NUMBERS
    preset = PRESET_NUMBERS.index(header.preset) if known else header.preset
    rates = header.token_rate, header.sample_rate
    body = msgpack.packb([preset, int(header.weights, 16), *rates, header.channels, *header.code_bits, header.samples])
    return _seal(MAGIC + bytes([VERSION, len(body)]) + body)


def _parse_head(source: _Source) -> tuple[Header, int]:
    """Return the header ahead and its size in bytes."""
    lead = source.peek(len(MAGIC) + 2)
    if not lead.startswith(MAGIC[: len(lead)]):
        raise WireError(f"this is no .scodec file: it begins with {lead!r}, wanted {MAGIC!r}")
    if len(lead) > len(MAGIC) and lead[len(MAGIC)] != VERSION:
        raise VersionError(f"format version {lead[len(MAGIC)]}; this package knows {VERSION}: install a newer one")
    size = len(lead) + lead[-1] + 2 if len(lead) == len(MAGIC) + 2 else len(lead) + 1
    raw = source.peek(size)
    if len(raw) < size:
        raise TruncatedError(f"the file ends after {len(raw)} bytes, inside its head of at least {size}")
    fields = _unseal(raw, len(lead), "the head")
    if len(fields) != 8:
        raise CorruptedError(f"the head has {len(fields)} fields; wanted 8")
    preset, weights, token_rate, sample_rate, channels, semantic, acoustic, samples = fields
    if type(preset) is int:
        if not 0 <= preset < len(PRESET_NUMBERS):
            raise VersionError(f"preset number {preset}; this package knows {len(PRESET_NUMBERS)}: install a newer one")
        preset = PRESET_NUMBERS[preset]
    try:
        _check_range("weights", weights, 0, 0xFFFFFFFF)
        header = Header(preset, f"{weights:08x}", token_rate, sample_rate, channels, (semantic, acoustic), samples)
    except WireError as error:
        raise CorruptedError(f"the head makes no sense: {error}") from error
    return header, size


def _parse_tail(source: _Source) -> tuple[_Tail, int]:
    """Return the tail ahead and its size in bytes."""
    lead = source.peek(len(TAIL_SYNC) + 1)
    size = len(lead) + lead[-1] + 3 if len(lead) > len(TAIL_SYNC) else len(lead) + 1
    raw = source.peek(size)
    if len(raw) < size:
        raise TruncatedError(f"the tail at byte {source.offset} takes at least {size} bytes; {len(raw)} are there")
    fields = _unseal(raw[:-1], len(lead), f"the tail at byte {source.offset}")
    if raw[-1] != size & 0xFF or len(fields) not in (2, 3):
        raise CorruptedError(f"the tail at byte {source.offset} does not end as it should")
    samples, runs, head = (*fields, None)[:3]
    numbers = [*runs, 0 if samples is None else samples] if isinstance(runs, list) else [None]
    sane = all(type(number) is int and 0 <= number <= MAX_SAMPLES for number in numbers)
    if not sane or len(runs) % 2 or 0 in runs or not isinstance(head, bytes | None):
        raise CorruptedError(f"the tail at byte {source.offset} has fields that make no sense")
    return _Tail(samples, tuple(zip(runs[::2], runs[1::2], strict=True)), head), size


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"{name} is {value!r}; wanted an integer from {low} to {high}")


def _check_bits(bits: Sequence[int]) -> None:
    if not bits or not all(1 <= width <= MAX_BITS for width in bits):
        raise CodesError(f"bits per code are {list(bits)}; wanted 1 to {MAX_BITS} for each stream")


def _fits(header: Header, samples: int, frames: int) -> bool:
    """Tell whether the frames can stand for so many samples; one frame of slack is the resampler's rounding."""
    return samples <= header.capacity(frames + 1)
