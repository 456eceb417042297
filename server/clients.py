"""A session with its place in the server: its socket, its room, its streams in the engine."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from semanticodec.wire.blocks import Block, Chunk
from semanticodec.wire.link import Lost

from .auth import Grant
from .connection import Connection
from .engine import Stream
from .lanes import Mark, Tuned
from .limits import RATE
from .rooms import Room, Tap
from .session import Session

BEHIND = 4
"""Blocks that may wait to be decoded before those who send them are held back."""


class Link(Protocol):
    """A socket, as far as the service is concerned."""

    connection: Connection
    address: str
    token: str | None

    def wake(self) -> None:
        """Look at the connection: there may be something to send."""


class Feed(Protocol):
    """A publisher's way to listeners on all servers."""

    @property
    def units(self) -> int:
        """Units of the publisher's that are there."""

    def put(self, unit: Block | Lost | Mark, units: int) -> None:
        """Append something; so many units of the publisher's are worked off with it."""

    def close(self) -> None:
        """Write nothing more."""

    async def flush(self) -> None:
        """Write what waits, and nothing more."""


class Client:
    """A session with its place in the server."""

    def __init__(self, session: Session, grant: Grant, link: Link) -> None:
        self.session = session
        self.grant = grant
        self.link: Link | None = link
        self.address = link.address
        self.room: Room | None = None
        self.encode: Stream | None = None
        self.decode: Stream | None = None
        self.tap: Tap | None = None
        self.tuned: Tuned | None = None
        self.failed = False
        self.counted = 0
        self.feed: Feed | None = None
        self.bundle: list[Block] = []
        self.worked_off = 0
        self.until: int | None = None
        self._chunks: deque[tuple[int, int]] = deque()
        self._owed = [0, 0]

    @property
    def name(self) -> str:
        """What logs call it: the id itself is secret."""
        return self.session.id[:3].hex()

    def arrived(self, seq: int, unit: Block | Chunk) -> None:
        """Note what has come, so that it is known which units are in the room."""
        if isinstance(unit, Block):
            self.worked_off = seq + 1
            return
        hello = self.session.hello
        samples = len(unit.data) // (2 if hello.sample_format == "s16" else 4)
        self._chunks.append((seq, (unit.at + samples) * RATE // hello.sample_rate))

    def coded(self, end: int) -> None:
        """Note that what came before a position is coded."""
        while self._chunks and self._chunks[0][1] <= end:
            self.worked_off = self._chunks.popleft()[0] + 1

    def owe(self, units: int, octets: int) -> None:
        """Note that units are worked off but for what follows from them."""
        self._owed[0] += units
        self._owed[1] += octets
        self.wake()

    def wake(self) -> None:
        """Let the client go on if what follows from its units is not behind, and the socket send."""
        after = self.room.decoder if self.room is not None else self.decode
        if self._owed[0] and (after is None or after.queued <= BEHIND):
            self.session.done(*self._owed)
            self._owed = [0, 0]
        if self.link is not None:
            self.link.wake()
