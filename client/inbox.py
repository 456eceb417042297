"""What was received and waits for the user."""

from __future__ import annotations

from collections import deque

from semanticodec.wire.messages import Kind

from .events import AudioChunk, CodesBlock, Event, Gap

MAX_ITEMS = 1024
MAX_OCTETS = 1 << 25


class Inbox:
    """A bounded queue of events; when it is full the oldest goes, and a :class:`Gap` in its place says so.

    Args:
        items: events kept.
        octets: bytes of sound and codes kept.

    Attributes:
        dropped: units that had to go, in all.
    """

    def __init__(self, items: int = MAX_ITEMS, octets: int = MAX_OCTETS) -> None:
        self.dropped = 0
        self._items: deque[Event] = deque()
        self._gaps: dict[Kind, Gap] = {}
        self._most = items, octets
        self._octets = 0

    def __len__(self) -> int:
        return len(self._items) + len(self._gaps)

    def put(self, item: Event) -> None:
        """Append an event."""
        self._items.append(item)
        self._octets += _size(item)
        while len(self._items) > self._most[0] or self._octets > self._most[1]:
            self._drop()

    def get(self) -> Event:
        """Take the oldest event."""
        if self._gaps:
            return self._gaps.pop(next(iter(self._gaps)))
        item = self._items.popleft()
        self._octets -= _size(item)
        return item

    def _drop(self) -> None:
        item = self._items.popleft()
        self._octets -= _size(item)
        if isinstance(item, CodesBlock | AudioChunk):
            self.dropped += 1
            item = Gap("codes" if isinstance(item, CodesBlock) else "audio", item.seq, item.seq + 1, "slow")
        if isinstance(item, Gap):
            first = self._gaps.get(item.kind, item).seq
            self._gaps[item.kind] = Gap(item.kind, min(first, item.seq), item.stop, "slow")


def _size(item: Event) -> int:
    if isinstance(item, AudioChunk):
        return item.samples.nbytes
    return item.codes.nbytes if isinstance(item, CodesBlock) else 64
