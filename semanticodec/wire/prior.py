"""A causal prior over codes, in integers: how likely each code is after those that came before it.

Codes lie on a grid of time steps and bands.  A step is coded semantic codes first, from the lowest band up, then
acoustic ones; each is predicted from a few neighbours that are known by then (:data:`SLOTS`) by a network of two hidden
layers whose weights and activations are small integers.  Every matrix product is one of integers whose sums stay below
2 ** 24, which float32 holds exactly in whatever order a library adds them up: all machines see the same frequencies, to
the bit.

The files are ``weights/prior/PRESET-ID.npz``; ``current.json`` says which one new codes use.  They are made by
``python -m semanticodec.training prior``.  One that was ever released stays, for the codes that were made with it.
"""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import VersionError, WireError
from .fields import short
from .packing import Codes

Stream = Literal[0, 1]
STREAMS: tuple[Stream, Stream] = (0, 1)
"""Semantic and acoustic."""
Floats = NDArray[np.float32]

FOLDER = Path(__file__).parent.parent / "weights" / "prior"

SLOTS: tuple[tuple[tuple[Stream, int, int], ...], ...] = (
    ((0, -1, 0), (0, -1, -1), (0, -1, 1), (0, -2, 0), (0, 0, -1), (0, 0, -2), (1, -1, 0), (1, -1, 1)),
    ((0, 0, 0), (0, 0, -1), (0, 0, 1), (1, -1, 0), (1, -2, 0), (1, 0, -1), (1, 0, -2), (0, -1, 0)),
)
"""Per stream, what a code is predicted from: (stream, steps, bands) relative to its own place."""

MARGIN = 2
"""Steps and bands around a grid that hold no code."""
FRACTION = 5
"""Binary places of vectors and activations."""
WEIGHT = 6
"""Binary places of the hidden layers' weights."""
LOGIT = 6
"""Binary places of logarithms of frequencies (base e)."""
BIAS = 4
"""Binary places of the bias of a code in a band."""
HIDDEN_MAX = 255
OUTPUT_MAX = 127
TENSORS = ("embedding", "first", "first_bias", "second", "second_bias", "output", "bias")


def _powers() -> NDArray[np.float64]:
    """Return 2 ** 24 x exp(-k / 64), rounded, by integer arithmetic; 0 from where it is less than a half."""
    step = 4_228_380_000  # exp(-1 / 64) x 2 ** 32
    value, table = 1 << 56, []
    while value >> 31:
        table.append((value + (1 << 31)) >> 32)
        value = value * step >> 32
    return np.array([*table, 0], np.float64)


POWERS = _powers()


@dataclass(frozen=True, eq=False)
class Layers:
    """The network of one stream, as integers held in float32.

    Args:
        embedding: vectors of this stream's codes ``[size + 1, width]``, the last one for "no code".
        first: ``[slots * width, hidden]``.
        first_bias: ``[bands, hidden]``.
        second: ``[hidden, output width]``.
        second_bias: ``[bands, output width]``.
        output: ``[size, output width]``.
        bias: ``[bands, size]``.
    """

    embedding: Floats
    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats
    output: Floats
    bias: Floats


@dataclass(frozen=True, eq=False)
class Prior:
    """The networks of both streams, and four bytes that tell this prior from others."""

    streams: tuple[Layers, Layers]
    id: int

    @property
    def bands(self) -> int:
        """Frames per time step."""
        return len(self.streams[0].bias)

    @property
    def sizes(self) -> tuple[int, int]:
        """Codes of each stream."""
        semantic, acoustic = (len(layers.output) for layers in self.streams)
        return semantic, acoustic

    def grid(self, rows: int, steps: int) -> tuple[Codes, Codes]:
        """Return grids ``[rows, steps + MARGIN, bands + 2 * MARGIN]`` that hold no codes yet."""
        shape = rows, steps + MARGIN, self.bands + 2 * MARGIN
        semantic, acoustic = (np.full(shape, size, np.int64) for size in self.sizes)
        return semantic, acoustic

    def frequencies(
        self, stream: Stream, grids: tuple[Codes, Codes], row: NDArray[np.intp], step: int, band: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        """Return whole numbers ``[N, size]`` that say how likely each code is at N places.

        Args:
            stream: which one.
            grids: the codes that are known.
            row: of each place, ``[N]``.
            step: of all of them, without the margin.
            band: of each place, ``[N]``.
        """
        layers = self.streams[stream]
        seen = [
            self.streams[q].embedding[grids[q][row, step + MARGIN + dt, band + MARGIN + db]]
            for q, dt, db in SLOTS[stream]
        ]
        hidden = np.concatenate(seen, 1) @ layers.first + layers.first_bias[band]
        hidden = np.clip(np.floor(hidden / (1 << WEIGHT)), 0, HIDDEN_MAX)
        hidden = hidden @ layers.second + layers.second_bias[band]
        hidden = np.clip(np.floor(hidden / (1 << WEIGHT)), -OUTPUT_MAX, OUTPUT_MAX)
        logits = hidden @ layers.output.T
        logits += layers.bias[band] * (1 << 2 * FRACTION - BIAS)
        logits -= logits.max(1, keepdims=True)
        logits *= -1 / (1 << 2 * FRACTION - LOGIT)
        np.minimum(logits, len(POWERS) - 1, out=logits)
        return POWERS[logits.astype(np.int32)]


def parse(tensors: dict[str, NDArray[Any]]) -> Prior:
    """Return the prior that integer tensors ("0.first" for the semantic stream, "1.first" ...) make up."""
    check = 0
    for name in sorted(tensors):
        check = zlib.crc32(np.ascontiguousarray(tensors[name]).astype("<i4").tobytes(), check)
    semantic, acoustic = (
        Layers(**{name: tensors[f"{q}.{name}"].astype(np.float32) for name in TENSORS}) for q in (0, 1)
    )
    return Prior((semantic, acoustic), check)


def presets() -> dict[str, int]:
    """Return which presets have priors, and the identity of the current one of each."""
    index = FOLDER / "current.json"
    return {name: int(id, 16) for name, id in json.loads(index.read_text()).items()} if index.exists() else {}


def current(preset: str) -> Prior:
    """Return the prior that new codes of a preset use.

    Raises:
        WireError: there is none.
    """
    ids = presets()
    if preset not in ids:
        raise WireError(f"there is no prior for the codes of {preset!r}, only for {', '.join(ids)}; pack them instead")
    return load(preset, ids[preset])


@functools.cache
def load(preset: str, id: int) -> Prior:
    """Read a shipped prior.

    Raises:
        VersionError: this package does not have it.
    """
    path = FOLDER / f"{preset}-{id:08x}.npz"
    # The name may be a stranger's: it must not choose which file is read.
    if path.parent != FOLDER or path not in set(FOLDER.glob("*.npz")):
        raise VersionError(
            f"the codes follow the prior {id:08x} of {short(preset)}, which this package does not have: install the "
            "version that wrote them"
        )
    with np.load(path, allow_pickle=False) as file:
        return parse({name: file[name] for name in file.files if name != "weights"})


def save(tensors: dict[str, NDArray[Any]], preset: str, weights_hash: str, folder: Path = FOLDER) -> Path:
    """Write a prior as the current one of its preset, beside those that are there.

    Args:
        tensors: as :func:`parse` takes them.
        preset: whose codes it is for.
        weights_hash: of the codebooks that made the codes it was fitted to.
        folder: where.

    Returns:
        The file written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "current.json"
    ids = json.loads(index.read_text()) if index.exists() else {}
    ids[preset] = f"{parse(tensors).id:08x}"
    path = folder / f"{preset}-{ids[preset]}.npz"
    np.savez_compressed(path, weights=np.array(weights_hash), **tensors)  # type: ignore[arg-type]
    index.write_text(json.dumps(ids, indent=2) + "\n")
    return path
