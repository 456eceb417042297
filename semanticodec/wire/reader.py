"""Reading and salvaging ``.scodec`` files; :mod:`.container` describes their bytes."""

from __future__ import annotations

import bisect
import contextlib
import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from ..errors import CorruptedError, TruncatedError, VersionError, WireError
from . import entropy
from .container import (
    CODED,
    MAGIC,
    MAX_SAMPLES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENT_FRAMES,
    PACKED,
    PRESET_NUMBERS,
    SEGMENT_SYNC,
    TAIL_SYNC,
    VERSION,
    Gap,
    Header,
    IndexEntry,
    Recording,
    Segment,
    Tail,
    check_range,
    fits,
    prior_of,
    unseal,
    varint,
)
from .entropy import MIN_CODED_SHARE
from .packing import packed_size, unpack

MAX_LOST_FRAMES = 1 << 16
"""Frames that may have been cut out of a damaged file, beyond those that its damaged bytes could hold."""
MAX_RESYNC_BYTES = 1 << 28
"""Bytes that salvaging may check in vain while it looks for the next good segment."""

_MAX_VARINT = 6
_CHUNK = 1 << 16
_SYNC = re.compile(b"\xf5[\x5a\xa5]")


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
        self._tail: Tail | None = None
        try:
            self.header, self._head_size = _parse_head(self._source)
            self._source.skip(self._head_size)
        except WireError:
            copy = self._spare_head() if salvage and file.seekable() else None
            if copy is None:
                raise
            self.header, self._head_size = _parse_head(_Source(io.BytesIO(copy)))
            self._rewind(0)
        self._prior = prior_of(self.header)

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
                offset += self._segment_size(start, frames, offset)
                start += frames
        if offset != begin:
            raise CorruptedError(f"the index puts the tail at byte {offset}, but it is at {begin}")
        return tuple(entries)

    def _segment_size(self, start: int, frames: int, offset: int) -> int:
        """Return the bytes of a segment that the index lists, and that lies at ``offset``."""
        place = SEGMENT_SYNC + varint(start) + varint(frames)
        size = packed_size(frames, self.header.code_bits, self.header.channels)
        if self._prior is None:
            return len(place) + 4 + size
        position = self._file.tell()
        try:
            self._file.seek(self._base + offset)
            source = _Source(self._file, offset)
            if source.peek(len(place)) != place:
                raise CorruptedError(f"the index lists a segment at byte {offset}, but there is none")
            size, at = source.varint(len(place))
        finally:
            self._file.seek(position)
        return at + 4 + size

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
            if isinstance(part, Tail):
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

    def _parse_part(self) -> Segment | Tail:
        """Take the segment or the tail that begins here; on an error nothing is taken that another could be in."""
        source = self._source
        sync = source.peek(2)
        if sync == SEGMENT_SYNC:
            return self._parse_segment()
        if sync == TAIL_SYNC:
            tail, size = _parse_tail(source)
            self._check_place("the tail", tail.frames)
            samples = tail.samples if self.header.samples is None else self.header.samples
            if not self._salvage and not fits(self.header, samples or 0, tail.frames):
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
        size = packed = packed_size(frames, header.code_bits, header.channels)
        if not 0 < frames <= MAX_SEGMENT_FRAMES or size > MAX_SEGMENT_BYTES:
            raise CorruptedError(
                f"{where} claims {frames} frames ({size} bytes); "
                f"1 to {MAX_SEGMENT_FRAMES} (at most {MAX_SEGMENT_BYTES} bytes) are allowed"
            )
        if self._prior is not None:
            size, at = source.varint(at)
            if not -(-packed // MIN_CODED_SHARE) <= size <= packed:
                raise CorruptedError(f"{where} claims {size} bytes for {frames} frames that take {packed} packed")
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
        if self._prior is None or size == packed:
            codes = unpack(payload, header.code_bits, frames, header.channels)
        else:
            try:
                codes = entropy.decode(self._prior, payload, frames, header.channels, start)
            except CorruptedError:
                # Its checksum holds, so no other part begins inside it: looking for one would decode time and again.
                source.skip(len(raw) - 1)
                raise
        segment = Segment(start, codes)
        source.skip(len(raw))
        return segment

    def _check_place(self, where: str, frame: int) -> None:
        """Refuse a part that does not go on where the last one ended or, salvaging, that cannot belong here."""
        if not self._salvage and frame != self._next:
            raise CorruptedError(f"{where} goes on at frame {frame}; wanted frame {self._next}")
        bits = self.header.channels * sum(self.header.code_bits)
        share = 1 if self._prior is None else MIN_CODED_SHARE
        latest = self._source.offset * 8 * share // bits + MAX_LOST_FRAMES
        if not self._next <= frame <= latest:
            raise CorruptedError(f"{where} goes on at frame {frame}; wanted {self._next} to {latest}")

    def _spare_head(self) -> bytes | None:
        with contextlib.suppress(WireError):
            return self._find_tail()[0].head
        return None

    def _find_tail(self) -> tuple[Tail, int]:
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


def _parse_head(source: _Source) -> tuple[Header, int]:
    """Return the header ahead and its size in bytes."""
    lead = source.peek(len(MAGIC) + 2)
    if not lead.startswith(MAGIC[: len(lead)]):
        raise WireError(f"this is no .scodec file: it begins with {lead!r}, wanted {MAGIC!r}")
    version = lead[len(MAGIC)] if len(lead) > len(MAGIC) else PACKED
    if not PACKED <= version <= VERSION:
        raise VersionError(f"format version {version}; this package knows {PACKED} to {VERSION}: install a newer one")
    size = len(lead) + lead[-1] + 2 if len(lead) == len(MAGIC) + 2 else len(lead) + 1
    raw = source.peek(size)
    if len(raw) < size:
        raise TruncatedError(f"the file ends after {len(raw)} bytes, inside its head of at least {size}")
    fields = unseal(raw, len(lead), "the head")
    wanted = 9 if version == CODED else 8
    if len(fields) != wanted:
        raise CorruptedError(f"the head has {len(fields)} fields; wanted {wanted}")
    preset, weights, token_rate, sample_rate, channels, semantic, acoustic, samples, prior = [*fields, None][:9]
    if type(preset) is int:
        if not 0 <= preset < len(PRESET_NUMBERS):
            raise VersionError(f"preset number {preset}; this package knows {len(PRESET_NUMBERS)}: install a newer one")
        preset = PRESET_NUMBERS[preset]
    try:
        check_range("weights", weights, 0, 0xFFFFFFFF)
        if version == CODED:
            check_range("prior", prior, 0, 0xFFFFFFFF)
        bits = semantic, acoustic
        header = Header(preset, f"{weights:08x}", token_rate, sample_rate, channels, bits, samples, prior)
    except WireError as error:
        raise CorruptedError(f"the head makes no sense: {error}") from error
    return header, size


def _parse_tail(source: _Source) -> tuple[Tail, int]:
    """Return the tail ahead and its size in bytes."""
    lead = source.peek(len(TAIL_SYNC) + 1)
    size = len(lead) + lead[-1] + 3 if len(lead) > len(TAIL_SYNC) else len(lead) + 1
    raw = source.peek(size)
    if len(raw) < size:
        raise TruncatedError(f"the tail at byte {source.offset} takes at least {size} bytes; {len(raw)} are there")
    fields = unseal(raw[:-1], len(lead), f"the tail at byte {source.offset}")
    if raw[-1] != size & 0xFF or len(fields) not in (2, 3):
        raise CorruptedError(f"the tail at byte {source.offset} does not end as it should")
    samples, runs, head = (*fields, None)[:3]
    numbers = [*runs, 0 if samples is None else samples] if isinstance(runs, list) else [None]
    sane = all(type(number) is int and 0 <= number <= MAX_SAMPLES for number in numbers)
    if not sane or len(runs) % 2 or 0 in runs or not isinstance(head, bytes | None):
        raise CorruptedError(f"the tail at byte {source.offset} has fields that make no sense")
    return Tail(samples, tuple(zip(runs[::2], runs[1::2], strict=True)), head), size
