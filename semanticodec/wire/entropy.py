"""Entropy coding: codes <-> bytes by a range coder that follows a :class:`.prior.Prior`.

What is coded stands for itself: nothing is remembered from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CodesError, CorruptedError
from .packing import Codes
from .prior import MARGIN, STREAMS, Prior

MAX_CODED_FRAMES = 1 << 13
"""Rows x frames of one call: a bound on the work that a few bytes can ask for."""
MIN_CODED_SHARE = 8
"""In files and messages coded codes take at least this part of their packed size: likewise."""
_WORD = 4


def encode(prior: Prior, codes: NDArray[np.integer[Any]], first: int = 0) -> bytes:
    """Code a piece of a recording.

    Args:
        prior: of these codes.
        codes: integers ``[rows, 2, F]`` within the prior's sizes, rows x F at most ``MAX_CODED_FRAMES``.
        first: place of the first frame in the recording, which tells its band.

    Returns:
        The fewest bytes that single out these codes; zeros that follow them do not matter.

    Raises:
        CodesError: wrong shape, dtype or range.
    """
    from constriction import stream as coding

    _check(prior, codes)
    rows, _, frames = codes.shape
    skipped = first % prior.bands
    grids = prior.grid(rows, _steps(prior, skipped + frames))
    for q, size in enumerate(prior.sizes):
        cells = np.full((rows, _steps(prior, skipped + frames) * prior.bands), size, np.int64)
        cells[:, skipped : skipped + frames] = codes[:, q]
        grids[q][:, MARGIN:, MARGIN:-MARGIN] = cells.reshape(rows, -1, prior.bands)
    encoder, family = coding.queue.RangeEncoder(), coding.model.Categorical(perfect=False)
    for step, bands in _places(prior, skipped, frames):
        band, row = np.repeat(bands, rows), np.tile(np.arange(rows), len(bands))
        for stream in STREAMS:
            values = grids[stream][row, step + MARGIN, band + MARGIN].astype(np.int32)
            encoder.encode(values, family, prior.frequencies(stream, grids, row, step, band))
    return _shortest(encoder)


def decode(prior: Prior, data: bytes, frames: int, rows: int = 1, first: int = 0) -> Codes:
    """Undo :func:`encode`.

    Args:
        prior: the one that encoded.
        data: what :func:`encode` returned, or anything.
        frames: F.
        rows: of codes.
        first: as in :func:`encode`.

    Returns:
        int64 codes ``[rows, 2, F]``.

    Raises:
        CorruptedError: the bytes stand for no codes, or for more than may be asked for.
    """
    from constriction import stream as coding

    if not 0 < rows * frames <= MAX_CODED_FRAMES:
        raise CorruptedError(f"{rows} x {frames} coded frames; 1 to {MAX_CODED_FRAMES} are allowed")
    skipped = first % prior.bands
    grids = prior.grid(rows, _steps(prior, skipped + frames))
    words = np.frombuffer(data + bytes(-len(data) % _WORD + 2 * _WORD), ">u4").astype(np.uint32)
    decoder, family = coding.queue.RangeDecoder(words), coding.model.Categorical(perfect=False)
    row = np.arange(rows)
    try:
        for step, bands in _places(prior, skipped, frames):
            for stream in STREAMS:
                for band in bands:
                    table = prior.frequencies(stream, grids, row, step, np.full(rows, band))
                    grids[stream][:, step + MARGIN, band + MARGIN] = decoder.decode(family, table)
    except AssertionError as error:
        raise CorruptedError(f"{len(data)} bytes that stand for no codes: {error}") from None
    cells = [grid[:, MARGIN:, MARGIN:-MARGIN].reshape(rows, -1)[:, skipped : skipped + frames] for grid in grids]
    return np.stack(cells, 1)


def _check(prior: Prior, codes: NDArray[np.integer[Any]]) -> None:
    if codes.ndim != 3 or codes.shape[1] != len(STREAMS) or not np.issubdtype(codes.dtype, np.integer):
        raise CodesError(f"codes are {codes.dtype} {list(codes.shape)}; wanted integers [rows, 2, frames]")
    if not 0 < codes.shape[0] * codes.shape[2] <= MAX_CODED_FRAMES:
        raise CodesError(f"codes are {list(codes.shape)}; rows x frames can be 1 to {MAX_CODED_FRAMES}")
    for q, size in enumerate(prior.sizes):
        low, high = int(codes[:, q].min()), int(codes[:, q].max())
        if low < 0 or high >= size:
            raise CodesError(f"codes of stream {q} are {low}..{high}; the prior knows 0..{size - 1}")


def _steps(prior: Prior, frames: int) -> int:
    return -(-frames // prior.bands)


def _places(prior: Prior, skipped: int, frames: int) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Yield every time step and those of its bands that are coded."""
    stop = skipped + frames
    for step in range(_steps(prior, stop)):
        begin = step * prior.bands
        yield step, np.arange(max(skipped - begin, 0), min(stop - begin, prior.bands))


def _shortest(encoder: Any) -> bytes:
    """Return the fewest bytes that lie, zeros following, in the interval that the encoder has come to.

    The library gives whole words of 32 bits; in a message of 50 bytes those that say nothing would eat the gain.
    """
    words = encoder.get_compressed()
    position, (low, span) = encoder.pos()
    octets = _WORD * (position + 2)
    point: int = int.from_bytes(words.astype(">u4").tobytes().ljust(octets, b"\0"), "big")
    begin: int = point - (point - low) % (1 << 8 * 2 * _WORD)
    # The interval is narrower than two words: a point of fewer bytes is one of these, with zeros at its end.
    for size in range(octets - 2 * _WORD, octets + 1):
        unit = 1 << 8 * (octets - size)
        found: int = -(-begin // unit)
        if found * unit < begin + span:
            return found.to_bytes(size, "big").rstrip(b"\0")
    raise AssertionError("an interval holds its own beginning")  # pragma: no cover
