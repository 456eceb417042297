"""What units are made of, how many go into a message, and what they cost on the wire."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from ..config import SAMPLE_RATE
from ..errors import CodesError, CorruptedError, WireError
from . import entropy, prior
from .entropy import MIN_CODED_SHARE
from .messages import MAX_BUNDLE, MAX_CODES_BYTES, MAX_SEQ, Codes, encode
from .packing import Codes as CodesArray
from .packing import pack, packed_size, unpack
from .prior import Prior

_SECOND = 1_000_000_000
_BUCKET = _SECOND // 2
_BUCKETS = 8


@dataclass(frozen=True)
class Block:
    """One packed block of codes, the position of its first sample at 16 kHz, and its copy at a lower rate."""

    data: bytes
    rate: int
    at: int
    copy: bytes = b""


@dataclass(frozen=True)
class Chunk:
    """Samples in the session's format, and the position of the first one at the session's rate."""

    data: bytes
    at: int


@dataclass(frozen=True)
class Geometry:
    """What the codes of a session look like.

    Args:
        block: samples at 16 kHz in a block.
        code_bits: bits per code of each stream.
        rates: token rates that share this block; the lowest is that of redundant copies.
        priors: per rate, what messages may be entropy-coded by; empty where the two ends have not agreed on any.

    Raises:
        WireError: a block is not a whole number of frames at each rate, or is too large for a message.
    """

    block: int
    code_bits: tuple[int, ...]
    rates: tuple[int, ...]
    priors: tuple[Prior | None, ...] = ()

    def __post_init__(self) -> None:
        for rate in self.rates:
            if self.block * rate % (2 * SAMPLE_RATE) or not 0 < self.block_bytes(rate) <= MAX_CODES_BYTES:
                raise WireError(f"blocks of {self.block} samples at {rate} codes per second cannot be sent")

    @property
    def copy_rate(self) -> int:
        """Token rate of redundant copies."""
        return min(self.rates)

    @property
    def block_ns(self) -> int:
        """Nanoseconds that a block stands for."""
        return self.block * _SECOND // SAMPLE_RATE

    def frames(self, rate: int) -> int:
        """Return the frames of one block."""
        return self.block * rate // (2 * SAMPLE_RATE)

    def block_bytes(self, rate: int) -> int:
        """Return the bytes of one packed block."""
        return packed_size(self.frames(rate), self.code_bits)

    def pack(self, codes: CodesArray, rate: int) -> bytes:
        """Pack one block of codes ``[n_q, frames]``.

        Raises:
            CodesError: wrong shape, dtype or range.
        """
        if codes.ndim != 2 or codes.shape[1] != self.frames(rate):
            raise CodesError(f"a block of codes is {list(codes.shape)}; wanted [n_q, {self.frames(rate)}]")
        return pack(codes[None], self.code_bits)

    def unpack(self, data: bytes, rate: int) -> CodesArray:
        """Undo :meth:`pack`: int64 codes ``[n_q, frames]``.

        Raises:
            CorruptedError: another number of bytes, or the bits that fill up the last byte are not zero.
        """
        codes: CodesArray = unpack(data, self.code_bits, self.frames(rate))[0]
        return codes

    def join(self, blocks: Sequence[bytes], rate: int) -> bytes:
        """Put consecutive packed blocks into one message.

        Where a prior was agreed on, a byte goes first: how many blocks are entropy-coded together in what follows, or 0
        where they are packed because that is shorter.
        """
        packed, own = b"".join(blocks), self._prior(rate)
        if own is None:
            return packed
        return _coded(own, packed, len(blocks), self.frames(rate), self.code_bits)

    def part(self, data: bytes, rate: int) -> list[bytes]:
        """Undo :meth:`join`: packed blocks, each of which will unpack.

        Raises:
            CorruptedError: as :meth:`split`, or bytes that stand for no codes.
        """
        count, own = self.units(data, rate), self._prior(rate)
        if own is None:
            return self.split(data, rate)
        if not data[0]:
            return self.split(data[1:], rate)
        codes = entropy.decode(own, data[1:], count * self.frames(rate))[0]
        return [self.pack(block, rate) for block in np.split(codes, count, 1)]

    def units(self, data: bytes, rate: int) -> int:
        """Return how many blocks :meth:`join` put into a message, without decoding them.

        Raises:
            CorruptedError: as :meth:`count`, or fewer or more bytes than so many coded blocks can take.
        """
        self._check_rate(rate)
        if self._prior(rate) is None:
            return self.count(len(data), rate)
        count, octets = data[:1], max(0, len(data) - 1)
        if count in (b"", b"\0"):
            return self.count(octets, rate)
        packed = count[0] * self.block_bytes(rate)
        if count[0] > MAX_BUNDLE or not -(-packed // MIN_CODED_SHARE) <= octets < packed:
            raise CorruptedError(f"{octets} bytes for {count[0]} coded blocks; {packed} are what they take packed")
        return count[0]

    def count(self, octets: int, rate: int) -> int:
        """Return how many packed blocks are so many bytes.

        Raises:
            CorruptedError: an unknown rate, no whole number of blocks, or more than a message may carry.
        """
        self._check_rate(rate)
        count, rest = divmod(octets, self.block_bytes(rate))
        if rest or not 0 < count <= MAX_BUNDLE:
            raise CorruptedError(f"{octets} bytes of codes; wanted 1..{MAX_BUNDLE} blocks of {self.block_bytes(rate)}")
        return count

    def split(self, data: bytes, rate: int) -> list[bytes]:
        """Cut packed blocks apart, so that each will unpack.

        Raises:
            CorruptedError: as :meth:`count`, or bits set where there are no codes.
        """
        count, size = self.count(len(data), rate), self.block_bytes(rate)
        spare = 8 * size - self.frames(rate) * sum(self.code_bits)
        blocks = [data[i * size : (i + 1) * size] for i in range(count)]
        if any(block[-1] & ((1 << spare) - 1) for block in blocks):
            raise CorruptedError("the bits after the last packed code of a block are not zero")
        return blocks

    def _check_rate(self, rate: int) -> None:
        if rate not in self.rates:
            raise CorruptedError(f"codes at {rate} per second; this session has {list(self.rates)}")

    def _prior(self, rate: int) -> Prior | None:
        return self.priors[self.rates.index(rate)] if self.priors else None


@functools.lru_cache(256)
def _coded(own: Prior, packed: bytes, count: int, frames: int, code_bits: tuple[int, ...]) -> bytes:
    """Return the message of ``count`` packed blocks; of a room's listeners only the first takes the time to code it."""
    size = len(packed) // count
    blocks = (packed[i * size : (i + 1) * size] for i in range(count))
    codes = np.concatenate([unpack(block, code_bits, frames)[0] for block in blocks], 1)
    coded = entropy.encode(own, codes[None]).ljust(-(-len(packed) // MIN_CODED_SHARE), b"\0")
    return bytes([count]) + coded if len(coded) < len(packed) else b"\0" + packed


def coding_features(presets: Iterable[str] | None = None) -> tuple[str, ...]:
    """Return the features that stand for entropy coding of presets (None: of all that have a prior)."""
    ids = prior.presets()
    return tuple(f"entropy-{ids[name]:08x}" for name in (ids if presets is None else presets) if name in ids)


def agreed(geometry: Geometry, presets: Sequence[str], features: Iterable[str]) -> Geometry:
    """Return the geometry of a session whose ends have agreed on features.

    Args:
        geometry: of the codes.
        presets: of its rates.
        features: those in ready.

    Returns:
        The same with the priors that both ends know.
    """
    chosen = set(features)
    priors = tuple(prior.current(name) if chosen.intersection(coding_features([name])) else None for name in presets)
    return replace(geometry, priors=priors if any(priors) else ())


def frame_bytes(message: int, *, masked: bool) -> int:
    """Return the bytes at the socket of a message of ``message`` bytes; clients mask their frames.

    Source: RFC 6455, section 5.2.
    """
    return message + (2 if message < 126 else 4 if message < 1 << 16 else 10) + 4 * masked


def gross_rate(geometry: Geometry, rate: int, bundle: int, copies: int, *, masked: bool) -> Fraction:
    """Return the bits per second at the socket of a stream of codes, counted with long sequence numbers.

    Where a prior was agreed on, of codes that nothing could be saved of.
    """
    message = Codes(
        seq=1 << 16,
        data=bytes(bundle * geometry.block_bytes(rate) + any(geometry.priors)),
        rate=rate,
        copies=bytes(copies * geometry.block_bytes(geometry.copy_rate)),
        copy_rate=geometry.copy_rate if copies else None,
    )
    octets = frame_bytes(len(encode(message)), masked=masked)
    return Fraction(8 * octets * SAMPLE_RATE, bundle * geometry.block)


def choose_bundle(
    geometry: Geometry, rate: int, *, latency: int | None, gross: int | None, copies: int, masked: bool
) -> int:
    """Return how many blocks a message should carry.

    Args:
        geometry: of the session.
        rate: token rate.
        latency: milliseconds that the first block of a message may be held back; goes before ``gross``.
        gross: bits per second that the stream may take at the socket.
        copies: redundant blocks per message.
        masked: whether a client sends.

    Returns:
        As many as ``latency`` allows; with ``gross`` no more than it takes to stay within; one if neither is given.
    """
    most = min(MAX_BUNDLE, MAX_CODES_BYTES // geometry.block_bytes(rate))
    if latency is not None:
        most = min(most, 1 + latency * SAMPLE_RATE // (1000 * geometry.block))
    if gross is None:
        return most if latency is not None else 1
    fitting = (n for n in range(1, most) if gross_rate(geometry, rate, n, copies, masked=masked) <= gross)
    return next(fitting, most)


class Meter:
    """Count bytes, and say how many bits per second there were in the last few seconds.

    Attributes:
        total: bytes, in all.
    """

    def __init__(self) -> None:
        self.total = 0
        self._buckets: deque[tuple[int, int]] = deque(maxlen=_BUCKETS)
        self._begin: int | None = None
        self._now = 0

    def add(self, octets: int, now: int) -> None:
        """Count bytes at time ``now`` (ns); a clock that goes back stands still."""
        self._now = now = max(now, self._now)
        self._begin = now if self._begin is None else self._begin
        self.total += octets
        bucket = now // _BUCKET
        if self._buckets and self._buckets[-1][0] == bucket:
            octets += self._buckets.pop()[1]
        self._buckets.append((bucket, octets))

    def rate(self, now: int) -> int:
        """Return bits per second over the last 4 seconds, or since the first byte."""
        if self._begin is None:
            return 0
        self._now = now = max(now, self._now)
        first = now // _BUCKET - _BUCKETS + 1
        octets = sum(count for bucket, count in self._buckets if bucket >= first)
        span = now - max(self._begin, first * _BUCKET)
        return 8 * octets * _SECOND // max(span, _BUCKET)


def check_block(geometry: Geometry, block: Block) -> None:
    """Refuse a block that the other end would refuse.

    Raises:
        CorruptedError: as :meth:`Geometry.split`.
        WireError: its position is out of range.
    """
    if not 0 <= block.at <= MAX_SEQ - MAX_BUNDLE * geometry.block:
        raise WireError(f"a block at sample {block.at}; wanted a position from 0 to about {MAX_SEQ}")
    copy = [(block.copy, geometry.copy_rate)] if block.copy else []
    for data, rate in ((block.data, block.rate), *copy):
        if len(geometry.split(data, rate)) > 1:
            raise CorruptedError(f"{len(data)} bytes are more than one block")


def samples_of(chunk: bytes, form: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return samples in [-1, 1] of a chunk of audio; what is not a number is silence.

    Raises:
        WireError: half a sample.
    """
    dtype = np.dtype("<i2" if form == "s16" else "<f4")
    if len(chunk) % dtype.itemsize:
        raise WireError(f"{len(chunk)} bytes of {form} samples; wanted a multiple of {dtype.itemsize}")
    pcm = np.frombuffer(chunk, dtype)
    if form == "s16":
        return pcm.astype(np.float32) / np.float32(32768)
    return np.clip(np.nan_to_num(pcm.astype(np.float32), nan=0.0), -1, 1)


def chunk_of(samples: np.ndarray[tuple[int], np.dtype[np.float32]], form: str) -> bytes:
    """Undo :func:`samples_of`; samples beyond [-1, 1] are clipped."""
    clipped = np.clip(samples, -1, 1)
    if form == "s16":
        return np.clip(np.rint(clipped * 32768), -32768, 32767).astype("<i2").tobytes()
    return clipped.astype("<f4").tobytes()
