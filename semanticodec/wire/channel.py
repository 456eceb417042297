"""The two ends of one stream of a session: units in and messages out, messages in and units out.

Both ends of a connection are built from these: a publisher has an :class:`Outlet` where the server has an
:class:`Inlet`, a subscriber the other way round.  No sockets; time is passed in as nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import CorruptedError, WireError
from .blocks import Block, Chunk, Geometry, check_block
from .link import Lost, Receiver, Sender, Unit
from .messages import MAX_BUNDLE, MAX_COPIES, MAX_SEQ, Ack, Audio, Codes, Kind, Loss, Marker, Missing

Item = TypeVar("Item", Block, Chunk)


@dataclass(frozen=True)
class Arrived(Generic[Item]):
    """A unit came, or (``copy``) its redundant copy in its place."""

    seq: int
    item: Item
    copy: bool = False


class CodesOut:
    """Send blocks of codes.

    Args:
        geometry: of the session.
        rate: that of ready; blocks of other rates say so.
        sender: an empty one, with its bounds.
        bundle: blocks per message.
        copies: redundant blocks per message; they must come with the blocks.
    """

    kind: Kind = "codes"

    def __init__(
        self, geometry: Geometry, rate: int, sender: Sender[Block], *, bundle: int = 1, copies: int = 0
    ) -> None:
        self.sender = sender
        self.bundle = bundle
        self.copies = copies
        self._geometry = geometry
        self._rate = rate
        self._recent: dict[int, bytes] = {}
        self._markers = 0

    def push(self, block: Block, now: int) -> int:
        """Queue a block and return its number.

        Raises:
            CorruptedError: its bytes are not those of a block of its rate.
        """
        check_block(self._geometry, block)
        seq = self.sender.push(block, len(block.data), now)
        self._recent[seq] = block.copy
        # What can be sent again needs its copies again.
        while len(self._recent) > self.sender.window:
            del self._recent[next(iter(self._recent))]
        return seq

    def mark(self, *, flush: bool = False, at: int | None = None, tag: int = 0) -> Marker:
        """Queue a marker behind the last block."""
        self._markers += 1
        marker = Marker(id=self._markers, seq=self.sender.next, flush=flush, at=at, tag=tag)
        self.sender.mark(marker)
        return marker

    def due(self) -> int | None:
        """Return when :meth:`pull` will have a message if nothing else happens: a time, or None for never."""
        front = self.sender.front()
        if not isinstance(front, Unit):
            return None if front is None else 0
        count, whole = self.sender.ready(self.bundle, self._alike)
        if not count:
            return None
        return 0 if whole else front.since + self.bundle * self._geometry.block_ns

    def pull(self, now: int) -> Codes | Missing | Marker | None:
        """Return the next message, if one is due."""
        due = self.due()
        if due is None or due > now:
            return None
        front = self.sender.front()
        if isinstance(front, Marker):
            self.sender.take()
            return front
        if isinstance(front, Lost):
            return self._missing()
        count, _ = self.sender.ready(self.bundle, self._alike)
        return self._message(count)

    def _alike(self, before: Block, after: Block) -> bool:
        return before.rate == after.rate and after.at == before.at + self._geometry.block

    def _missing(self) -> Missing | Codes | Marker | None:
        """Announce what is lost, but for those that the copies in the next message will bring."""
        lost = self.sender.take()
        assert isinstance(lost, Lost)
        stop = lost.stop
        if self.sender.ready(1)[0]:
            stop -= len(self._copies_before(stop))
        if stop > lost.seq:
            return Missing(lost.seq, stop, lost.reason, self.kind, self.sender.lost)
        return self._message(self.sender.ready(self.bundle, self._alike)[0])

    def _copies_before(self, seq: int) -> list[bytes]:
        copies: list[bytes] = []
        while len(copies) < self.copies and (copy := self._recent.get(seq - 1 - len(copies))):
            copies.append(copy)
        return copies[::-1]

    def _message(self, count: int) -> Codes:
        units = [self.sender.take() for _ in range(count)]
        blocks = [unit.item for unit in units if isinstance(unit, Unit)]
        first, seq = blocks[0], units[0].seq
        copies = b"".join(self._copies_before(seq))
        return Codes(
            seq=seq,
            data=self._geometry.join([block.data for block in blocks], first.rate),
            rate=None if first.rate == self._rate else first.rate,
            at=None if first.at == seq * self._geometry.block else first.at,
            copies=copies,
            copy_rate=self._geometry.copy_rate if copies else None,
        )


class AudioOut:
    """Send chunks of audio, one per message."""

    kind: Kind = "audio"

    def __init__(self, sender: Sender[Chunk]) -> None:
        self.sender = sender
        self._markers = 0

    def push(self, chunk: Chunk, now: int) -> int:
        """Queue a chunk and return its number.

        Raises:
            WireError: it is too large for a message, or its position is out of range.
        """
        Audio(0, chunk.at, chunk.data)
        return self.sender.push(chunk, len(chunk.data), now)

    def mark(self, *, flush: bool = False, at: int | None = None, tag: int = 0) -> Marker:
        """Queue a marker behind the last chunk."""
        self._markers += 1
        marker = Marker(id=self._markers, seq=self.sender.next, flush=flush, at=at, tag=tag, kind=self.kind)
        self.sender.mark(marker)
        return marker

    def due(self) -> int | None:
        """Return when :meth:`pull` will have a message if nothing else happens: a time, or None for never."""
        front = self.sender.front()
        if front is None or (isinstance(front, Unit) and not self.sender.ready(1)[0]):
            return None
        return 0

    def pull(self, now: int) -> Audio | Missing | Marker | None:  # noqa: ARG002 - as CodesOut
        """Return the next message, if there is one."""
        if self.due() is None:
            return None
        entry = self.sender.take()
        if isinstance(entry, Marker):
            return entry
        if isinstance(entry, Lost):
            return Missing(entry.seq, entry.stop, entry.reason, self.kind, self.sender.lost)
        return Audio(entry.seq, entry.item.at, entry.item.data)


class Inlet:
    """Receive a stream: each unit once, or its copy, or the news that it is lost.

    Args:
        kind: codes or audio.
        geometry: of the session.
        rate: that of ready.
        window: of ready; a quarter of it may come before :attr:`ack_due`.
        first: number of the first unit that is wanted.
    """

    def __init__(self, kind: Kind, geometry: Geometry, rate: int, window: int, first: int = 0) -> None:
        self.kind = kind
        self.receiver = Receiver(kind, first)
        self._geometry = geometry
        self._rate = rate
        self._every = max(1, window // 4)

    def take(self, message: Audio | Codes | Missing | Marker) -> list[Arrived[Block] | Arrived[Chunk] | Lost | Marker]:
        """Take a message of this stream.

        Returns:
            What is new in it, in order.

        Raises:
            CorruptedError: codes that are not those of this session.
            WireError: too far ahead.
        """
        if isinstance(message, Codes):
            return self._take_codes(message)
        if isinstance(message, Audio):
            lost, new = self.receiver.take(message.seq)
            chunk = [Arrived(seq, Chunk(message.data, message.at)) for seq in new]
            return [*_losses(lost, "source"), *chunk]
        if isinstance(message, Missing):
            return [*_losses(self.receiver.missing(message), message.reason)]
        lost, new_marker = self.receiver.mark(message)
        return [*_losses(lost, "source"), *([message] if new_marker else [])]

    def units(self, message: Audio | Codes) -> int:
        """Return how many units a message carries.

        Raises:
            CorruptedError: it is no whole number of blocks.
        """
        if isinstance(message, Audio):
            return 1
        return self._geometry.units(message.data, self._rate if message.rate is None else message.rate)

    def _take_codes(self, message: Codes) -> list[Arrived[Block] | Arrived[Chunk] | Lost | Marker]:
        geometry = self._geometry
        rate = self._rate if message.rate is None else message.rate
        at = message.seq * geometry.block if message.at is None else message.at
        count = geometry.units(message.data, rate)
        # What has come already is not decoded again.
        blocks = geometry.part(message.data, rate) if message.seq + count > self.receiver.next else []
        copies: list[bytes] = []
        if message.copy_rate is not None:
            copies = geometry.split(message.copies, message.copy_rate)
            if message.copy_rate != geometry.copy_rate or len(copies) > MAX_COPIES:
                raise CorruptedError(
                    f"{len(copies)} copies at {message.copy_rate}; wanted at most {MAX_COPIES} at the lowest rate"
                )
        if at > MAX_SEQ - 2 * MAX_BUNDLE * geometry.block:
            raise WireError(f"codes.at is {at}, too near the last position")
        lost, new = self.receiver.take(message.seq, count)
        covered = range(max(lost.start, message.seq - len(copies)), lost.stop)
        self.receiver.recover(len(covered))
        found: list[Arrived[Block] | Arrived[Chunk] | Lost | Marker] = []
        found += _losses(range(lost.start, covered.start), "source")
        for seq in covered:
            place = max(0, at - (message.seq - seq) * geometry.block)
            copy = Block(copies[seq - message.seq], geometry.copy_rate, place)
            found.append(Arrived(seq, copy, copy=True))
        for seq in new:
            i = seq - message.seq
            found.append(Arrived(seq, Block(blocks[i], rate, at + i * geometry.block)))
        return found

    @property
    def ack_due(self) -> bool:
        """Whether so much has come that the sender should know."""
        return self.receiver.fresh >= self._every

    def ack(self, limit: int | None = None) -> Ack:
        """Say what has arrived."""
        self.receiver.fresh = 0
        return Ack(self.receiver.next, limit, self.kind, self.receiver.marker)


def _losses(lost: range, reason: Loss) -> list[Lost]:
    return [Lost(lost.start, lost.stop, reason)] if lost else []
