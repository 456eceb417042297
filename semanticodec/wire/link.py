"""What keeps a stream of units whole over a broken link: what was sent and is not acknowledged, what has arrived.

A unit is a block of codes or a chunk of audio.  Both ends use the same two halves, :class:`Sender` and
:class:`Receiver`; neither knows sockets, messages on them, or the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import WireError
from .messages import MAX_GAP, MAX_SEQ, Kind, Loss, Marker, Missing

MAX_MARKERS = 16
"""Markers kept at a time, on their way and until they are acknowledged."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Unit(Generic[Item]):
    """A unit with its number, its size in bytes, and when it was pushed."""

    seq: int
    item: Item
    size: int
    since: int

    @property
    def stop(self) -> int:
        """The number after it."""
        return self.seq + 1


@dataclass(frozen=True)
class Lost:
    """Units ``seq`` to ``stop - 1`` are gone."""

    seq: int
    stop: int
    reason: Loss


class Sender(Generic[Item]):
    """Number units, keep them until they are acknowledged, and say which are gone.

    Nothing grows without bound: beyond ``window`` units or ``octets`` bytes the oldest are forgotten, those already
    sent first; what is forgotten before it was sent (or must be sent again) is announced as lost.

    Args:
        window: units kept, waiting and unacknowledged together.
        octets: bytes of units kept; one unit is always kept.
        first: number of the first unit; there was none before it.
        limit: see below.
        overflow: why units are lost that were forgotten before they were sent.

    Attributes:
        window: units kept at most.
        next: number that the next unit will get.
        cursor: number of the first unit that has not been taken.
        limit: units from here on may not be taken yet; None for no limit.
        lost: units that were lost, in all.
    """

    def __init__(
        self, window: int, octets: int, first: int = 0, limit: int | None = None, overflow: Loss = "overload"
    ) -> None:
        self.first = self.next = self.cursor = first
        self.limit = limit
        self.lost = 0
        self.window = window
        self._octets = octets
        self._overflow: Loss = overflow
        self._sent: deque[Unit[Item] | Lost | Marker] = deque()
        self._queue: deque[Unit[Item] | Lost | Marker] = deque()
        self._units = 0
        self._bytes = 0
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Units that have not been taken."""
        return self._waiting

    @property
    def oldest(self) -> int:
        """Number of the first unit, or announced loss, in memory; ``next`` if there is none."""
        entries = (entry for entry in (*self._sent, *self._queue) if not isinstance(entry, Marker))
        return next((entry.seq for entry in entries), self.next)

    @property
    def kept(self) -> int:
        """Units in memory."""
        return self._units

    @property
    def kept_bytes(self) -> int:
        """Bytes of units in memory."""
        return self._bytes

    @property
    def entries(self) -> int:
        """Units, markers and announcements in memory; at most ``2 * window + 4 * MAX_MARKERS + 4``."""
        return len(self._sent) + len(self._queue)

    def push(self, item: Item, size: int, now: int) -> int:
        """Append a unit of ``size`` bytes at time ``now`` and return its number."""
        seq = self.next
        self._queue.append(Unit(seq, item, size, now))
        self.next += 1
        self._units += 1
        self._waiting += 1
        self._bytes += size
        while self._units > 1 and (self._units > self.window or self._bytes > self._octets):
            if self._units > self._waiting:
                self._forget(self._sent.popleft())
            else:
                self.drop(self._waiting - 1, self._overflow)
        return seq

    def lose(self, count: int, reason: Loss) -> None:
        """Leave out the next ``count`` numbers: their units will never come."""
        if count:
            self._queue.append(self._joined(self._queue, Lost(self.next, self.next + count, reason)))
            self.next += count
            self.lost += count

    def mark(self, marker: Marker) -> None:
        """Put a marker behind the last unit; its ``seq`` must be ``next``."""
        self._queue.append(marker)
        self._spare(self._queue)

    def drop(self, keep: int, reason: Loss) -> Lost | None:
        """Lose the oldest waiting units so that ``keep`` are left; markers stay."""
        markers = []
        lost: Lost | None = None
        while self._waiting > keep:
            entry = self._queue.popleft()
            if isinstance(entry, Marker):
                markers.append(entry)
                continue
            if isinstance(entry, Unit):
                self.lost += 1
            self._waiting -= self._forget(entry)
            lost = Lost(entry.seq if lost is None else lost.seq, entry.stop, reason)
        self._queue.extendleft(reversed(markers))
        if lost is not None:
            self._queue.appendleft(lost)
        return lost

    def ready(self, most: int, alike: Callable[[Item, Item], bool] | None = None) -> tuple[int, bool]:
        """Count the units at the front that one message may carry.

        Args:
            most: units per message.
            alike: tells whether a unit may follow another in one message; None for always.

        Returns:
            How many, at most ``most``, and whether it is certain that no more will join them: because there are
            ``most``, or something else stands behind them.
        """
        last: Unit[Item] | None = None
        count = 0
        for entry in self._queue:
            if not isinstance(entry, Unit):
                return count, True
            if count == most or (last is not None and alike is not None and not alike(last.item, entry.item)):
                return count, True
            if self.limit is not None and entry.seq >= self.limit:
                return count, False
            last = entry
            count += 1
        return count, count == most

    def front(self) -> Unit[Item] | Lost | Marker | None:
        """Return what must be taken next."""
        return self._queue[0] if self._queue else None

    def take(self) -> Unit[Item] | Lost | Marker:
        """Take what is next: it counts as sent.  Whether ``limit`` allows it is for the caller to ask."""
        entry = self._queue.popleft()
        if isinstance(entry, Lost):
            while self._queue and isinstance(self._queue[0], Lost):
                later = self._queue.popleft()
                assert isinstance(later, Lost)
                entry = Lost(entry.seq, later.stop, entry.reason)
        self._waiting -= isinstance(entry, Unit)
        if not isinstance(entry, Marker):
            self.cursor = entry.stop
        self._sent.append(self._joined(self._sent, entry) if isinstance(entry, Lost) else entry)
        if isinstance(entry, Marker):
            self._spare(self._sent)
        return entry

    def ack(self, next: int, marker: int = 0, limit: int | None = None) -> None:
        """Forget what has arrived: units before ``next`` and markers up to ``marker``; never lower ``limit``.

        Raises:
            WireError: ``next`` was never sent.
        """
        if next > self.cursor:
            raise WireError(f"unit {next - 1} is acknowledged; only those before {self.cursor} were sent")
        while self._sent and self._arrived(self._sent[0], next, marker):
            self._forget(self._sent.popleft())
        if limit is not None and self.limit is not None:
            self.limit = max(self.limit, limit)

    def rewind(self, next: int) -> None:
        """Go on sending from ``next``, where the other end says it is, and announce as lost what is gone by then.

        Args:
            next: often before ``cursor``; beyond it if another server has sent the same stream to this client.

        Raises:
            WireError: there is no such unit yet.
        """
        if next > self.next:
            raise WireError(f"unit {next - 1} is claimed; only those before {self.next} exist")
        next = max(next, self.first)
        while self.cursor < next:
            self.take()
        self.ack(next)
        self._waiting += sum(isinstance(entry, Unit) for entry in self._sent)
        self._queue.extendleft(reversed(self._sent))
        self._sent.clear()
        self._spare(self._queue)
        self.cursor = next
        first = self._queue[0] if self._queue else None
        if isinstance(first, Lost) and first.seq < next:
            self._queue[0] = Lost(next, first.stop, first.reason)
        begin = min((entry.seq for entry in self._queue if not isinstance(entry, Marker)), default=self.next)
        if begin > next:
            self._queue.appendleft(Lost(next, begin, "window"))
            self.lost += begin - next

    def _arrived(self, entry: Unit[Item] | Lost | Marker, next: int, marker: int) -> bool:
        if isinstance(entry, Marker):
            return entry.id <= marker or entry.seq < next
        return entry.stop <= next

    def _forget(self, entry: Unit[Item] | Lost | Marker) -> bool:
        """Release the memory of an entry; tell whether it was a unit."""
        if not isinstance(entry, Unit):
            return False
        self._units -= 1
        self._bytes -= entry.size
        return True

    def _joined(self, entries: deque[Unit[Item] | Lost | Marker], lost: Lost) -> Lost:
        """Take the loss at the end of ``entries``, if there is one, and make one out of both."""
        if entries and isinstance(entries[-1], Lost):
            earlier = entries.pop()
            return Lost(earlier.seq, lost.stop, lost.reason)
        return lost

    def _spare(self, entries: deque[Unit[Item] | Lost | Marker]) -> None:
        """Keep the newest markers only, and make one loss out of those that stood around the others."""
        surplus = sum(isinstance(entry, Marker) for entry in entries) - MAX_MARKERS
        if surplus <= 0:
            return
        for _ in range(len(entries)):
            entry = entries.popleft()
            if isinstance(entry, Marker) and surplus > 0:
                surplus -= 1
            elif (
                isinstance(entry, Lost) and entries and isinstance(entries[-1], Lost) and entries[-1].stop == entry.seq
            ):
                entries.append(self._joined(entries, entry))
            else:
                entries.append(entry)


class Receiver:
    """Take each unit of a stream once, in order, and notice what is gone.

    Args:
        kind: which stream.
        first: number of the first unit that is wanted.

    Attributes:
        next: everything before it has been taken or is lost.
        marker: the last marker.
        received: units taken, in all.
        lost: units lost, in all, and not recovered.
        recovered: units recovered from copies, in all.
        repeated: units ignored because they had come before, in all.
        fresh: units and markers since the last acknowledgement.
    """

    def __init__(self, kind: Kind, first: int = 0) -> None:
        self.kind = kind
        self.next = first
        self.marker = 0
        self.received = self.lost = self.recovered = self.repeated = self.fresh = 0

    def take(self, seq: int, count: int = 1) -> tuple[range, range]:
        """Take units ``seq`` to ``seq + count - 1``.

        Returns:
            The numbers that turn out to be lost, and the numbers that are new.

        Raises:
            WireError: they are further ahead than ``MAX_GAP``.
        """
        stop = seq + count
        if stop > MAX_SEQ:
            raise WireError(f"unit {stop} of {self.kind} is beyond the last number")
        lost = self._skip(seq)
        new = range(max(seq, self.next), max(stop, self.next))
        self.next = new.stop
        self.received += len(new)
        self.repeated += count - len(new)
        self.fresh += len(new)
        return lost, new

    def recover(self, count: int) -> None:
        """Count lost units as recovered."""
        self.lost -= count
        self.recovered += count

    def missing(self, message: Missing) -> range:
        """Note a loss that the sender announces; return the numbers that had not been taken or lost before."""
        return self._skip(message.stop)

    def mark(self, marker: Marker) -> tuple[range, bool]:
        """Take a marker; return the numbers lost before it, and whether it is new."""
        lost = self._skip(marker.seq)
        new = marker.id > self.marker
        self.marker = max(self.marker, marker.id)
        self.fresh += new
        return lost, new

    def _skip(self, seq: int) -> range:
        if not self.next <= seq <= min(self.next + MAX_GAP, MAX_SEQ):
            if seq < self.next:
                return range(self.next, self.next)
            raise WireError(f"unit {seq} of {self.kind} comes after unit {self.next - 1}, more than {MAX_GAP} ahead")
        lost = range(self.next, seq)
        self.next = seq
        self.lost += len(lost)
        self.fresh += len(lost)
        return lost
