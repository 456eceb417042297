"""What a session tells its user: what it received, and what happens to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from semanticodec.wire.messages import Kind, Loss, Marker, Ready, Room, Stats, Tune
from semanticodec.wire.packing import Codes

Samples = np.ndarray[tuple[int], np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class CodesBlock:
    """A block of codes int64 ``[n_q, frames]``; ``at`` is the position of its first sample at 16 kHz.

    ``copy``: it was lost, and this is its redundant copy at a lower rate.
    """

    seq: int
    at: int
    rate: int
    codes: Codes
    copy: bool = False


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """Samples in [-1, 1]; ``at`` is the position of the first one, both at the session's rate."""

    seq: int
    at: int
    samples: Samples


@dataclass(frozen=True)
class Gap:
    """Units ``seq`` to ``stop - 1`` of a stream that is received will never come."""

    kind: Kind
    seq: int
    stop: int
    reason: Loss


@dataclass(frozen=True)
class Opened:
    """The session is open: begun, or ``resumed`` where it broke."""

    ready: Ready
    resumed: bool


@dataclass(frozen=True)
class Restarted:
    """The old session is gone and a new one took its place: numbers and positions begin anew.

    ``unsure``: units that were sent, may or may not have arrived, and are not sent again.
    """

    ready: Ready
    unsure: int


@dataclass(frozen=True)
class Refusal:
    """The server does not do what was asked for with tune."""

    code: int
    reason: str


@dataclass(frozen=True)
class Drained:
    """The server has received all that had been queued when this was asked for."""

    number: int


@dataclass(frozen=True)
class Left:
    """The connection is lost; connect again in ``wait`` milliseconds (None: as you think best), at ``url`` if given."""

    code: int | None
    reason: str
    wait: int | None = None
    url: str | None = None


@dataclass(frozen=True)
class Ended:
    """The session is over."""

    code: int
    reason: str


Unit = CodesBlock | AudioChunk
Event = Unit | Gap | Marker | Opened | Restarted | Refusal | Drained | Left | Ended | Tune | Room | Stats
