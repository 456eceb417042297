"""Rooms and sessions that several servers share, through Redis.

A room is a Redis stream.  The id of an entry says where it stands: ``n-0`` is what ends before block n, ``n-k`` the
k-th marker there.  Redis takes ids in rising order only, so that of two servers that both believe to have a room's
publisher one is turned away, and no block stands there twice.  What is in Redis is trusted as the servers are.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from semanticodec.wire.blocks import Block
from semanticodec.wire.link import Lost

from .lanes import Mark

log = logging.getLogger("semanticodec.server")

WINDOW = 256
"""Entries of a room that are kept."""
BEHIND = 1024
"""Entries that may wait to be written before a publisher is given up."""
BLOCKING = 50
"""Milliseconds that a read waits, and so that a room which is new here may have to wait once."""
PAUSE = 0.5
"""Seconds between attempts when Redis does not answer."""
CLAIM = 15
"""Seconds for which a room belongs to a publisher whose server is gone."""

# Take a room if nobody has it, or the same session: ARGV session, seconds.
_CLAIM = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


@dataclass(frozen=True, order=True)
class Place:
    """Where a room's stream ends: number of the next block, and markers since the last one."""

    next: int = 0
    markers: int = 0

    @property
    def id(self) -> str:
        """The id of the entry that ends here."""
        return f"{self.next}-{self.markers}"

    def after(self, unit: Block | Lost | Mark) -> Place:
        """Return where it ends after one more."""
        if isinstance(unit, Mark):
            return Place(self.next, self.markers + 1)
        return Place(self.next + (unit.stop - unit.seq if isinstance(unit, Lost) else 1))


@dataclass(frozen=True)
class Entry:
    """Something in a room.

    Args:
        place: where the stream ends with it.
        unit: what it is.
        session: of the publisher.
        units: of the publisher's own stream that are worked off with it.
        writer: which feed has written it.
    """

    place: Place
    unit: Block | Lost | Mark
    session: bytes
    units: int
    writer: bytes

    @property
    def first(self) -> int:
        """Number of the first block that it is about."""
        unit = self.unit
        return self.place.next - (
            0 if isinstance(unit, Mark) else unit.stop - unit.seq if isinstance(unit, Lost) else 1
        )


@dataclass(frozen=True)
class Record:
    """What every server may know of a session: whose it is, what it asked for, where it is, what it has sent how."""

    owner: str
    hello: bytes
    server: str
    units: int = 0
    rate: int = 0


Deliver = Callable[[Entry], None]


class Feed:
    """A publisher's way into its room: entries are written in order, by one task.

    Args:
        units: of the publisher's own stream that are in the room already.
        lost: called once when entries cannot be written any more.

    Attributes:
        units: of the publisher's own stream that are in the room.
    """

    def __init__(
        self, backplane: Backplane, room: str, session: bytes, place: Place, units: int, lost: Callable[[str], None]
    ) -> None:
        self._backplane, self._room, self._session, self._lost = backplane, room, session, lost
        self.units = units
        self._place, self._name = place, secrets.token_bytes(8)
        self._closed = False
        self._waiting: deque[Entry] = deque()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def put(self, unit: Block | Lost | Mark, units: int) -> None:
        """Append something."""
        if self._closed:
            return
        self._place = self._place.after(unit)
        self._waiting.append(Entry(self._place, unit, self._session, units, self._name))
        self._news.set()

    def close(self) -> None:
        """Write nothing more."""
        self._closed = True
        self._task.cancel()

    async def flush(self) -> None:
        """Write what waits, if that takes no longer than a moment, and nothing more."""
        self._closed = True
        end = time.monotonic() + 2 * PAUSE
        while self._waiting and not self._task.done() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self._task.cancel()

    async def _run(self) -> None:
        while len(self._waiting) <= BEHIND:
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
            some = list(self._waiting)[:64]
            try:
                await self._backplane.write(self._room, some)
                end = some[-1].place
            except ResponseError:
                # Perhaps only the answer to an earlier attempt was lost.
                last = await self._backplane.last(self._room)
                if last is None or last.writer != self._name:
                    self._lost("another server publishes in this room")
                    return
                end = last.place
            except (RedisError, OSError) as error:
                log.warning("backplane", extra={"reason": str(error)})
                await asyncio.sleep(PAUSE)
                continue
            while self._waiting and self._waiting[0].place <= end:
                self.units = self._waiting.popleft().units
        self._lost("the backplane does not keep up")


class Backplane:
    """The servers' common memory.

    Args:
        url: of Redis.
        keep: seconds for which a session can be resumed.
    """

    def __init__(self, url: str, keep: float) -> None:
        self._redis: Any = Redis.from_url(url)
        self._keep = max(1, round(keep))
        self._followed: dict[str, tuple[str, Deliver]] = {}
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Let go of Redis."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._redis.aclose()

    # Rooms

    async def claim(self, room: str, session: bytes) -> bool:
        """Make a session a room's publisher, or let it stay so; tell whether it is."""
        return bool(await self._redis.eval(_CLAIM, 1, f"sc:publisher:{room}", session, CLAIM))

    async def release(self, room: str, session: bytes) -> None:
        """Let others publish."""
        await self._redis.eval(_RELEASE, 1, f"sc:publisher:{room}", session)

    async def publisher(self, room: str) -> bytes | None:
        """Return the session that publishes in a room, on whichever server."""
        found: bytes | None = await self._redis.get(f"sc:publisher:{room}")
        return found

    async def last(self, room: str) -> Entry | None:
        """Return the last entry of a room's stream."""
        found = await self._redis.xrevrange(f"sc:room:{room}", count=1)
        return _entry(*found[0]) if found else None

    async def caught_up(self, room: str) -> bool:
        """Tell whether all that is in a room's stream has been handed over here."""
        last = await self.last(room)
        return last is None or room not in self._followed or _place(self._followed[room][0].encode()) >= last.place

    async def since(self, room: str, first: int) -> list[Entry]:
        """Return what is kept of a room from block ``first`` on, and what stands just before it."""
        found = await self._redis.xrange(f"sc:room:{room}", min=f"{first}-1")
        return [_entry(*one) for one in found]

    async def worked_off(self, room: str, session: bytes) -> int:
        """Return how many units of a publisher are in its room, as far as is remembered."""
        for one in await self._redis.xrevrange(f"sc:room:{room}"):
            entry = _entry(*one)
            if entry.session == session:
                return entry.units
        return 0

    async def write(self, room: str, entries: list[Entry]) -> None:
        """Append to a room's stream, all or up to the first that does not fit.

        Raises:
            ResponseError: the stream has gone on without us.
            RedisError: Redis does not answer.
        """
        key = f"sc:room:{room}"
        async with self._redis.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.xadd(key, {"e": _packed(entry)}, id=entry.place.id, maxlen=WINDOW, approximate=True)
            pipe.expire(key, 60 + self._keep)
            await pipe.execute()

    def follow(self, room: str, place: Place, deliver: Deliver) -> None:
        """From now on hand over what is written to a room behind ``place``."""
        self._followed[room] = place.id, deliver
        self._news.set()

    def unfollow(self, room: str) -> None:
        """Do not do so any more."""
        self._followed.pop(room, None)

    def follows(self, room: str) -> bool:
        """Tell whether a room is followed."""
        return room in self._followed

    async def _read(self) -> None:
        while True:
            if not self._followed:
                self._news.clear()
                await self._news.wait()
            keys = {f"sc:room:{room}": last for room, (last, _) in self._followed.items()}
            try:
                found = await self._redis.xread(keys, count=64, block=BLOCKING)
            except (RedisError, OSError) as error:
                log.warning("backplane", extra={"reason": str(error)})
                await asyncio.sleep(PAUSE)
                continue
            for key, entries in found:
                room = key.decode().removeprefix("sc:room:")
                for id_, fields in entries:
                    self._hand_over(room, id_, fields)

    def _hand_over(self, room: str, id_: bytes, fields: dict[bytes, bytes]) -> None:
        followed = self._followed.get(room)
        if followed is None:
            return
        self._followed[room] = id_.decode(), followed[1]
        try:
            followed[1](_entry(id_, fields))
        except Exception:
            log.exception("deliver")

    # Sessions

    async def keep(self, session: bytes, record: Record) -> None:
        """Remember a session for another while."""
        value = msgpack.packb([record.owner, record.hello, record.server, record.units, record.rate])
        await self._redis.set(f"sc:session:{session.hex()}", value, ex=self._keep + CLAIM)

    async def find(self, session: bytes) -> Record | None:
        """Return what is known of a session."""
        value = await self._redis.get(f"sc:session:{session.hex()}")
        return None if value is None else Record(*msgpack.unpackb(value))

    async def forget(self, session: bytes) -> None:
        """Forget a session."""
        await self._redis.delete(f"sc:session:{session.hex()}")


def _place(id_: bytes) -> Place:
    seq, _, markers = id_.decode().partition("-")
    return Place(int(seq), int(markers))


def _packed(entry: Entry) -> bytes:
    unit = entry.unit
    if isinstance(unit, Block):
        fields: list[Any] = ["b", unit.data, unit.rate, unit.at, unit.copy]
    elif isinstance(unit, Lost):
        fields = ["l", unit.stop - unit.seq, unit.reason]
    else:
        fields = ["m", unit.flush, unit.at, unit.tag]
    return bytes(msgpack.packb([entry.session, entry.units, entry.writer, *fields]))


def _entry(id_: bytes, fields: dict[bytes, bytes]) -> Entry:
    place = _place(id_)
    session, units, writer, kind, *rest = msgpack.unpackb(fields[b"e"])
    unit: Block | Lost | Mark
    if kind == "b":
        unit = Block(*rest)
    elif kind == "l":
        unit = Lost(place.next - rest[0], place.next, rest[1])
    else:
        unit = Mark(*rest)
    return Entry(place, unit, session, units, writer)
