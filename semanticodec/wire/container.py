"""Codes <-> bytes: bit packing and the ``.scodec`` container.

A file is a head, any number of segments, and a tail; every part can be written and read without seeking.

    head     3   "SCD"
             1   format version: 1, or 2 for entropy-coded files
             1   n, size of the fields
             n   msgpack array: preset (its place in ``PRESET_NUMBERS``, or a name), first 4 bytes of the codebooks'
                 SHA-256 as a big-endian integer, token rate, sample rate of the recording, channels, bits per semantic
                 code, bits per acoustic code, samples per channel or nil; in version 2 also the prior's identity
             2   CRC-16 of all the above
    segment  2   sync, F5 5A
             1+  first frame, LEB128
             1+  frames, LEB128; in version 1 they give, with the head, the size of the payload
            (1+) version 2: size of the payload in bytes, LEB128
             4   CRC-32 of first frame, frames, size if there is one, and payload
             ... payload, see :func:`pack`; in version 2, where it is shorter than that, :func:`.entropy.encode`
    tail     2   sync, F5 A5
             1   n, size of the fields
             n   msgpack array: samples per channel (nil: the head has it); the index, a flat array of (segments,
                 frames in each) pairs; and, when there is more than one segment, a copy of the head
             2   CRC-16 of all the above
             1   n + 6, the size of the tail, to find it from the end of the file

CRC-16 is CCITT's (``binascii.crc_hqx``, start 0), CRC-32 is zlib's; both are stored big-endian.  In version 1 the size
of a segment follows from its first frame and its number of frames, so the index turns into byte offsets by adding up;
in version 2 a reader hops from segment to segment.

Files are written as version 1 unless their codes are entropy-coded, so that older packages read all that they can and
say "format version 2" to the others.  A coded segment stands for itself: its rows x frames are at most
``MAX_CODED_FRAMES``, and zeros fill it up to an eighth of its packed size, so that few bytes never mean much work.

10 s of mono at ``semanticodec-25-32768`` are 448 bytes of payload in a file of 495.
"""

from __future__ import annotations

import binascii
import re
import zlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from ..config import CodecConfig
from ..errors import CodesError, CorruptedError, WireError
from . import entropy
from .entropy import MAX_CODED_FRAMES, MIN_CODED_SHARE
from .packing import MAX_BITS, Codes, pack, packed_size
from .prior import Prior, current, load

MAGIC = b"SCD"
PACKED, CODED = 1, 2
VERSION = CODED
"""The newest format version that this package knows."""
SEGMENT_SYNC = b"\xf5\x5a"
TAIL_SYNC = b"\xf5\xa5"

PRESET_NUMBERS = (
    *(f"mini-{rate}" for rate in (100, 50, 25)),
    *(f"semanticodec-{rate}-{size}" for rate in (100, 50, 25) for size in (4096, 8192, 16384, 32768)),
)
"""Names that are stored as their place in this list; append to it, never reorder it."""

MAX_CHANNELS = 64
MAX_RATE = 1 << 20
"""Samples per second of a recording; tokens per second."""
MAX_SAMPLES = 1 << 48
"""Samples per channel."""
MAX_SEGMENT_FRAMES = 1 << 16
MAX_SEGMENT_BYTES = 1 << 18


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its first code.

    Args:
        preset: name of the preset or model.
        weights: first 8 hexadecimal digits of the codebooks' SHA-256.
        token_rate: codes per second, both streams together; a second has ``token_rate / 2`` frames.
        sample_rate: samples per second of the recording that was encoded.
        channels: rows of codes, one per coded channel.
        code_bits: bits per (semantic, acoustic) code.
        samples: samples per channel of the recording; None while nobody knows.
        prior: identity of the prior that entropy coding follows; None packs the codes.

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
    prior: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or not 0 < len(self.preset.encode()) <= 128:
            raise WireError(f"preset {self.preset!r} is not a name of 1 to 128 bytes")
        if not isinstance(self.weights, str) or not re.fullmatch("[0-9a-f]{8}", self.weights):
            raise WireError(f"weights hash {self.weights!r} is not 8 hexadecimal digits")
        limits = {"token_rate": MAX_RATE, "sample_rate": MAX_RATE, "channels": MAX_CHANNELS}
        for name, limit in limits.items():
            check_range(name, getattr(self, name), 1, limit)
        if len(self.code_bits) != 2:
            raise WireError(f"code_bits {self.code_bits!r} are not one width per stream, semantic and acoustic")
        for width in self.code_bits:
            check_range("code_bits", width, 1, MAX_BITS)
        if self.samples is not None:
            check_range("samples", self.samples, 0, MAX_SAMPLES)
        if self.prior is not None:
            check_range("prior", self.prior, 0, 0xFFFFFFFF)

    @classmethod
    def of(
        cls,
        config: CodecConfig,
        weights_hash: str,
        sample_rate: int,
        channels: int,
        samples: int | None,
        *,
        entropy: bool = False,
    ) -> Header:
        """Return the header of a recording that is coded with these weights of a preset.

        Raises:
            WireError: ``entropy`` asks for entropy coding, and there is no prior for the preset.
        """
        return cls(
            preset=config.name,
            weights=weights_hash[:8],
            token_rate=config.token_rate,
            sample_rate=sample_rate,
            channels=channels,
            code_bits=config.code_bits,
            samples=samples,
            prior=current(config.name).id if entropy else None,
        )

    @property
    def segment_frames(self) -> int:
        """Frames of a usual segment in a file: about 10.24 s, less where so many cannot be coded at once."""
        usual = max(1, self.token_rate * 512 // 100)
        return usual if self.prior is None else min(usual, MAX_CODED_FRAMES // self.channels)

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


@dataclass(frozen=True)
class Tail:
    """What stands at the end of a file: samples per channel, (segments, frames in each) runs, a copy of the head."""

    samples: int | None
    runs: tuple[tuple[int, int], ...]
    head: bytes | None

    @property
    def frames(self) -> int:
        """Frames of all segments."""
        return sum(count * frames for count, frames in self.runs)


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
        check_range("segment_frames", self._frames, 1, MAX_SEGMENT_FRAMES)
        size = packed_size(self._frames, header.code_bits, header.channels)
        if size > MAX_SEGMENT_BYTES:
            raise WireError(f"a segment of {self._frames} frames takes {size} bytes, over {MAX_SEGMENT_BYTES}")
        if header.prior is not None and self._frames * header.channels > MAX_CODED_FRAMES:
            raise WireError(
                f"a segment of {header.channels} x {self._frames} frames is too long for entropy coding; at most "
                f"{MAX_CODED_FRAMES} in all"
            )
        self._prior = prior_of(header)
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
        check_range("samples", samples, 0, MAX_SAMPLES)
        frames = self._start + self._pending.shape[2]
        if not fits(self.header, samples, frames):
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
        tail = seal(TAIL_SYNC + bytes([len(body)]) + body)
        self._file.write(tail + bytes([len(tail) + 1]))
        self._file.flush()

    def _write_segment(self, codes: Codes) -> None:
        place = varint(self._start) + varint(codes.shape[2])
        payload = pack(codes, self.header.code_bits)
        if self._prior is not None:
            coded = entropy.encode(self._prior, codes, self._start)
            coded = coded.ljust(-(-len(payload) // MIN_CODED_SHARE), b"\0")
            payload = coded if len(coded) < len(payload) else payload
            place += varint(len(payload))
        check = zlib.crc32(payload, zlib.crc32(place))
        self._file.write(SEGMENT_SYNC + place + check.to_bytes(4, "big") + payload)
        self._start += codes.shape[2]


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


def varint(value: int) -> bytes:
    """Return a number as LEB128."""
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def seal(data: bytes) -> bytes:
    """Append the CRC-16."""
    return data + binascii.crc_hqx(data, 0).to_bytes(2, "big")


def unseal(raw: bytes, fields_at: int, what: str) -> list[Any]:
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
    fields = [preset, int(header.weights, 16), *rates, header.channels, *header.code_bits, header.samples]
    version = PACKED if header.prior is None else CODED
    body = msgpack.packb(fields if header.prior is None else [*fields, header.prior])
    return seal(MAGIC + bytes([version, len(body)]) + body)


def prior_of(header: Header) -> Prior | None:
    """Return the prior that a file's codes follow, or None where they are packed.

    Raises:
        VersionError: this package does not have it.
        WireError: it is for codes of other sizes.
    """
    if header.prior is None:
        return None
    prior = load(header.preset, header.prior)
    if tuple((size - 1).bit_length() for size in prior.sizes) != header.code_bits:
        raise WireError(f"codes of {header.code_bits} bits cannot follow a prior over {prior.sizes} codes")
    return prior


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Refuse with a WireError what is not an integer from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"{name} is {value!r}; wanted an integer from {low} to {high}")


def fits(header: Header, samples: int, frames: int) -> bool:
    """Tell whether the frames can stand for so many samples; one frame of slack is the resampler's rounding."""
    return samples <= header.capacity(frames + 1)
