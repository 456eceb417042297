"""Bit packing: codes <-> bytes without gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodesError, CorruptedError

Codes = NDArray[np.int64]

MAX_BITS = 24
"""Bits per code."""


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


def _check_bits(bits: Sequence[int]) -> None:
    if not bits or not all(1 <= width <= MAX_BITS for width in bits):
        raise CodesError(f"bits per code are {list(bits)}; wanted 1 to {MAX_BITS} for each stream")
