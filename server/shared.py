"""What a server has in common with others: who publishes where, rooms that are heard everywhere, sessions that move.

Every server that has somebody in a room follows the room's stream, that of the publisher too, so that there is one way
from publisher to listener.  Of a session that moves, publishers go on with the units that are not in the room yet, and
listeners with the blocks they lack.  What a transcoder had sent and not heard yet was known to its server alone: it
goes on with the units that it still keeps, and is told of the gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

from redis.exceptions import RedisError

from semanticodec.wire.blocks import Block, Chunk
from semanticodec.wire.channel import AudioOut
from semanticodec.wire.closing import Code
from semanticodec.wire.link import Lost, Sender
from semanticodec.wire.messages import Hello, Resume, Tune, decode, encode

from .auth import Grant
from .backplane import Backplane, Entry, Feed, Place, Record
from .clients import Client, Link
from .connection import State
from .limits import SECOND, Limits
from .rooms import Room
from .service import Service
from .session import Offer, Session

log = logging.getLogger("semanticodec.server")

ATTEMPTS, WAIT = 20, 0.02
"""How often, and how many seconds apart, a room is looked at until what is kept fits what has been heard here."""
RENEW = 5
"""Seconds between renewals of what would run out."""
WATCH = 1
"""Seconds between looks at who publishes elsewhere."""
FARTHEST = 1 << 40
"""More units than a transcoder can have had; it is believed what it says of its numbers, up to here."""


class Shared:
    """The service's side of the backplane.

    Args:
        service: of this server.
        backplane: of all.
        limits: of sessions.
        clock: returns nanoseconds.
    """

    def __init__(self, service: Service, backplane: Backplane, limits: Limits, clock: Any) -> None:
        self._service, self._backplane, self._limits, self._clock = service, backplane, limits, clock
        self._name = secrets.token_hex(8)
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: set[bytes] = set()
        self._spawn(self._renew())
        self._spawn(self._watch())

    async def close(self) -> None:
        """Write what waits, and stop; rooms and sessions stay for the others."""
        feeds = [client.feed for client in self._service.clients.values() if client.feed is not None]
        await asyncio.gather(*(feed.flush() for feed in feeds))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._backplane.close()

    def ask(self, link: Link, request: Hello | Resume, grant: Grant) -> None:
        """Find out what the others know, then answer."""
        self._spawn(self._answer(link, request, grant))

    def left(self, room: str) -> None:
        """Note that nobody here is in a room any more."""
        self._backplane.unfollow(room)

    def settle(self, client: Client, then: Callable[[], None]) -> None:
        """Call ``then`` when all that a publisher has to say is written, and has been sent to everybody here."""
        self._spawn(self._written(client, then))

    def gone(self, client: Client) -> None:
        """Note that a session has ended."""
        room = client.session.hello.room
        if client.feed is not None:
            client.feed.close()
        self._leaving.add(client.session.id)
        self._spawn(self._forget(client.session.id, room))

    async def _written(self, client: Client, then: Callable[[], None]) -> None:
        feed, room, name = client.feed, client.room, client.session.hello.room
        assert feed is not None
        assert room is not None
        assert name is not None
        await feed.flush()
        with contextlib.suppress(RedisError, OSError):
            for _ in range(ATTEMPTS):
                if await self._backplane.caught_up(name):
                    break
                await asyncio.sleep(WAIT)
        room.settle(then)

    async def _answer(self, link: Link, request: Hello | Resume, grant: Grant) -> None:
        try:
            if isinstance(request, Resume):
                await self._resume(link, request, grant)
            else:
                await self._begin(link, request, grant)
        except (RedisError, OSError) as error:
            log.warning("backplane", extra={"reason": str(error)})
            if _waits(link):
                self._service.refuse(link, Code.FULL, "the backplane does not answer", 2)
        link.wake()

    async def _begin(self, link: Link, hello: Hello, grant: Grant) -> None:
        id_ = secrets.token_bytes(16)
        publishes = hello.room is not None and hello.role == "publish" and grant.refusal(hello) is None
        if publishes and hello.room is not None and not await self._backplane.claim(hello.room, id_):
            if _waits(link):
                self._service.refuse(link, Code.ROOM_TAKEN, "the room has a publisher", 5)
            return
        async with self._entering(hello.room) as place:
            client = self._service.begin(link, hello, grant, id_) if _waits(link) else None
            if client is not None:
                await self._settle(client, place, 0)
            elif publishes and hello.room is not None:
                await self._backplane.release(hello.room, id_)

    async def _resume(self, link: Link, request: Resume, grant: Grant) -> None:
        service, id_ = self._service, request.session
        record, local = await self._backplane.find(id_), service.clients.get(id_)
        if local is not None and (record is None or record.server == self._name):
            if _waits(link):
                service.resume(link, request, grant)
            return
        hello = None if record is None else decode(record.hello)
        if record is None or record.owner != grant.name or not isinstance(hello, Hello):
            if _waits(link):
                service.refuse(link, Code.UNKNOWN_SESSION, "no session has this id (any more); say hello")
            return
        if local is not None:
            # It has been elsewhere since, and what is here is out of date.
            local.session.end(self._clock())
            service.remove(local, "resumed elsewhere")
        if hello.room is None:
            await self._adopt_transcoder(link, request, grant, hello, record)
        else:
            await self._adopt_member(link, request, grant, hello, record, hello.room)

    async def _adopt_transcoder(self, link: Link, request: Resume, grant: Grant, hello: Hello, record: Record) -> None:
        service = self._service
        if not _waits(link):
            return
        if max(request.first, request.codes_next, request.audio_next) > FARTHEST:
            service.refuse(link, Code.UNKNOWN_SESSION, "no session can have had so many units; say hello")
            return
        offer = service.offer(link, hello, grant)
        if offer is None:
            return
        session = self._new(request, grant, hello, offer, record, received=request.first)
        if session.codes_out is not None:
            # Here, too, one number stands for all blocks that the other server may have made.
            session.send_lost("codes", 1, "window")
        client = service.enter(session, grant, link, request)
        log.info("adopted", extra={"session": client.name, "units": request.first})
        await self._keep(client)

    def _new(self, request: Resume, grant: Grant, hello: Hello, offer: Offer, record: Record, received: int) -> Session:
        """Make a session that goes on with numbers of another server's."""
        limits, now = self._limits, self._clock()
        session = Session(
            request.session, grant.name, hello, offer, limits, now, codes_first=request.codes_next, received=received
        )
        if hello.send == "audio" and record.rate in offer.geometry.rates:
            session.tune(Tune(rate=record.rate))
        # Until it is attached nothing counts as slow.
        session.detach(now)
        if session.audio_out is not None:
            sender = Sender[Chunk](limits.window, limits.window_bytes, request.audio_next, overflow="window")
            session.audio_out = AudioOut(sender)
            # How many chunks the other server has made since is not known here: one number stands for them all,
            # and the position of the next chunk tells how long they were.
            session.send_lost("audio", 1, "window")
        return session

    async def _adopt_member(
        self, link: Link, request: Resume, grant: Grant, hello: Hello, record: Record, name: str
    ) -> None:
        service, id_ = self._service, request.session
        if hello.role == "publish" and not await self._backplane.claim(name, id_):
            if _waits(link):
                service.refuse(link, Code.UNKNOWN_SESSION, "the room has another publisher by now; say hello")
            return
        units = max(record.units, await self._backplane.worked_off(name, id_)) if hello.role == "publish" else 0
        async with self._entering(name) as place:
            past = await self._past(name, request.codes_next) if "codes" in hello.receive else []
            offer = service.offer(link, hello, grant) if _waits(link) else None
            if offer is None:
                return
            session = self._new(request, grant, hello, offer, record, received=units)
            if session.codes_out is not None:
                self._catch_up(session, past, service.room(name).next)
            client = service.enter(session, grant, link, request)
            log.info("adopted", extra={"session": client.name, "units": units})
            await self._settle(client, place, units)

    def _catch_up(self, session: Session, past: list[Entry], stop: int) -> None:
        """Queue the blocks that a listener lacks, up to where the room stands here."""
        assert session.codes_out is not None
        for entry in past:
            if entry.place.next > stop:
                return
            unit, sender = entry.unit, session.codes_out.sender
            if entry.first > sender.next:
                session.send_lost("codes", entry.first - sender.next, "window")
            if isinstance(unit, Block):
                if entry.first == sender.next:
                    session.send_block(unit, self._clock())
            elif isinstance(unit, Lost):
                session.send_lost("codes", max(0, entry.place.next - sender.next), "source")
            else:
                session.mark("codes", flush=unit.flush, at=unit.at, tag=unit.tag)

    async def _past(self, room: str, first: int) -> list[Entry]:
        """Return what is kept from block ``first`` on, up to where the room stands here, which is not before it."""
        for _ in range(ATTEMPTS):
            past = await self._backplane.since(room, first)
            stop = self._service.room(room).next
            if first == stop or (first < stop and past and past[-1].place.next >= stop):
                return past
            await asyncio.sleep(WAIT)
        raise ConnectionError(f"the backplane has lost what it had of {room}")

    @contextlib.asynccontextmanager
    async def _entering(self, name: str | None) -> AsyncIterator[Place]:
        """Follow a room, keep it while somebody is about to enter, and give where its stream ends."""
        if name is None:
            yield Place()
            return
        last = await self._backplane.last(name)
        place = Place() if last is None else last.place
        room = self._service.room(name)
        if not self._backplane.follows(name):
            room.next = place.next
            self._backplane.follow(name, place, partial(self._deliver, name))
        room.coming += 1
        try:
            yield place
        finally:
            room.coming -= 1
            self._service.tidy(name)

    def _deliver(self, name: str, entry: Entry) -> None:
        """Pass on what was written to a room."""
        room = self._service.rooms.get(name)
        if room is None:
            return
        if entry.first > room.next:
            room.take(Lost(room.next, entry.first, "source"))
        room.take(entry.unit)

    async def _settle(self, client: Client, place: Place, units: int) -> None:
        """Let a session be found by the others, and a publisher write."""
        hello, id_ = client.session.hello, client.session.id
        if hello.role == "publish" and hello.room is not None:
            client.worked_off = units
            client.feed = Feed(self._backplane, hello.room, id_, place, units, partial(self._cut, client))
        elif hello.room is not None:
            await self._look(hello.room, self._service.room(hello.room))
        await self._keep(client)

    def _cut(self, client: Client, reason: str) -> None:
        client.failed = True
        self._service.dismiss(client, Code.INTERNAL, reason)

    async def _keep(self, client: Client) -> None:
        units = 0 if client.feed is None else client.feed.units
        session = client.session
        record = Record(client.grant.name, encode(session.standing), self._name, units, session.rate)
        await self._backplane.keep(client.session.id, record)

    async def _forget(self, session: bytes, room: str | None) -> None:
        try:
            record = await self._backplane.find(session)
            if record is not None and record.server == self._name:
                await self._backplane.forget(session)
                if room is not None:
                    await self._backplane.release(room, session)
        finally:
            self._leaving.discard(session)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(min(RENEW, self._limits.keep / SECOND / 3))
            for client in list(self._service.clients.values()):
                try:
                    await self._refresh(client)
                except (RedisError, OSError) as error:
                    log.warning("backplane", extra={"reason": str(error)})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            for name, room in list(self._service.rooms.items()):
                with contextlib.suppress(RedisError, OSError):
                    await self._look(name, room)

    async def _look(self, name: str, room: Room) -> None:
        """Tell those who listen here when somebody elsewhere begins or ceases to publish."""
        session = await self._backplane.publisher(name)
        elsewhere = session is not None and session not in self._service.clients and session not in self._leaving
        if elsewhere != room.elsewhere:
            room.elsewhere = elsewhere
            if elsewhere:
                room.announce()
            else:
                room.settle(room.announce)

    async def _refresh(self, client: Client) -> None:
        """Remember a session that is still here, and keep its room for it."""
        session, room = client.session, client.session.hello.room
        record = await self._backplane.find(session.id)
        if record is not None and record.server != self._name:
            session.end(self._clock())
            self._service.remove(client, "resumed elsewhere")
        elif client.link is not None:
            await self._keep(client)
            if client.feed is not None and room is not None:
                await self._backplane.claim(room, session.id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("shared", exc_info=task.exception())


def _waits(link: Link) -> bool:
    """Tell whether a client still waits for its answer."""
    return link.connection.state is State.ASKED
