"""Who is here and what they get: sessions, rooms, and their streams in the engine.  No sockets."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from semanticodec.errors import CodesError
from semanticodec.wire.blocks import Block, Chunk
from semanticodec.wire.channel import Arrived
from semanticodec.wire.closing import Code
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import Bye, Hello, Marker, Resume, Tune

from .auth import Grant, Tokens
from .clients import Client, Link
from .connection import Asked, Left
from .connection import Event as Happening
from .engine import Engine
from .gate import Gate
from .lanes import Done, Event, Failed, Fence, Mark, Sound, Tuned, unpacked
from .limits import Limits
from .metrics import Metrics
from .models import Models
from .rooms import Room, Tap
from .session import Offer, Session

log = logging.getLogger("semanticodec.server")


class Others(Protocol):
    """What this server has in common with others."""

    def ask(self, link: Link, request: Hello | Resume, grant: Grant) -> None:
        """Find out what the others know, then answer."""

    def left(self, room: str) -> None:
        """Note that nobody here is in a room any more."""

    def settle(self, client: Client, then: Callable[[], None]) -> None:
        """Call ``then`` when all that a publisher has to say has been sent to everybody."""

    def gone(self, client: Client) -> None:
        """Note that a session has ended."""

    async def close(self) -> None:
        """Stop; rooms and sessions stay for the others."""


class Service:
    """All sessions and rooms of a server.

    Args:
        engine: to encode and decode.
        tokens: who may do what.
        gate: what addresses may take.
        limits: of each session.
        metrics: where to count.
        clock: returns nanoseconds.

    Attributes:
        clients: by session id.
        rooms: by name.
        leaving: whether the server is going away and lets nobody in.
        shared: what this server has in common with others, if anything.
    """

    def __init__(
        self, engine: Engine, tokens: Tokens, gate: Gate, limits: Limits, metrics: Metrics, clock: Callable[[], int]
    ) -> None:
        self.clients: dict[bytes, Client] = {}
        self.rooms: dict[str, Room] = {}
        self.leaving = False
        self.shared: Others | None = None
        self._engine, self._tokens, self._gate, self._limits = engine, tokens, gate, limits
        self._metrics, self._clock = metrics, clock
        self._by_token: Counter[str] = Counter()

    def handle(self, link: Link, happenings: Sequence[Happening]) -> None:
        """Do what follows from what a connection has made of a message, or of the time."""
        for happening in happenings:
            if isinstance(happening, Asked):
                self._ask(link, happening.request)
                continue
            session = link.connection.session
            client = None if session is None else self.clients.get(session.id)
            if client is None:
                continue
            if isinstance(happening, Left):
                self._left(client, link, happening)
            elif isinstance(happening, Bye):
                self._finish(client, partial(self._answered, link))
            elif isinstance(happening, Tune):
                self._retune(client)
            elif isinstance(happening, Arrived | Lost | Marker):
                self._take(client, happening)
        link.wake()

    def sweep(self) -> None:
        """End the sessions that were not resumed, or not worked off, in time, and count."""
        now = self._clock()
        for client in list(self.clients.values()):
            self._count(client)
            if client.session.expired(now):
                client.session.end(now)
                self.remove(client, "not resumed in time")
            elif client.until is not None and now >= client.until:
                if client.link is not None:
                    self.handle(client.link, client.link.connection.bye(Code.DONE, "not worked off in time", now))
                self.remove(client, "not worked off in time")
        if self._engine.models is not None:
            self._metrics.load.set(self._engine.load())

    def _count(self, client: Client) -> None:
        """Count what a slow client has missed since the last time."""
        self._metrics.dropped.inc(client.session.dropped - client.counted)
        client.counted = client.session.dropped

    # Beginning and going on

    def _ask(self, link: Link, request: Hello | Resume) -> None:
        now = self._clock()
        if not self._gate.guess(link.address, now):
            self.refuse(link, Code.TOO_MANY, "too many bad tokens from this address", 10)
            return
        grant = self._tokens.check(link.token or request.token)
        if grant is None:
            self._gate.failed(link.address, now)
            self.refuse(link, Code.BAD_TOKEN, "the token is missing or unknown")
        elif self.leaving:
            self.refuse(link, Code.ELSEWHERE, "this server is going away", 1)
        elif self._engine.models is None:
            self.refuse(link, Code.FULL, "the models are not loaded yet", 2)
        elif self.shared is not None:
            self.shared.ask(link, request, grant)
        elif isinstance(request, Resume):
            self.resume(link, request, grant)
        else:
            self.begin(link, request, grant, secrets.token_bytes(16))

    def refuse(self, link: Link, code: Code, reason: str, retry: int | None = None) -> None:
        """Answer what was asked: no."""
        link.connection.refuse(code, reason, None if retry is None else 1000 * retry)
        log.info("refused", extra={"address": link.address, "code": int(code), "reason": reason})

    def resume(self, link: Link, request: Resume, grant: Grant) -> None:
        """Let a session that is here go on."""
        now = self._clock()
        client = self.clients.get(request.session)
        if client is None or not client.session.belongs_to(grant.name) or client.failed:
            self.refuse(link, Code.UNKNOWN_SESSION, "no session has this id (any more); say hello")
            return
        before = client.link
        link.connection.accept(client.session, request, now)
        if link.connection.session is not client.session:
            return
        client.link, client.until = link, None
        self._metrics.resumed.inc()
        log.info("resumed", extra={"address": link.address, "session": client.name})
        if before is not None and before is not link:
            before.connection.bye(Code.REPLACED, "the session was resumed on another connection", now)
            before.wake()

    def begin(self, link: Link, hello: Hello, grant: Grant, id_: bytes) -> Client | None:
        """Let a session begin, if it may."""
        offer = self.offer(link, hello, grant)
        if offer is None:
            return None
        room = None if hello.room is None else self.rooms.get(hello.room)
        first = 0 if room is None else room.next
        session = Session(id_, grant.name, hello, offer, self._limits, self._clock(), codes_first=first)
        return self.enter(session, grant, link, hello)

    def offer(self, link: Link, hello: Hello, grant: Grant) -> Offer | None:
        """Return what a client gets, or refuse it."""
        models = self._engine.models
        assert models is not None
        room = None if hello.room is None else self.rooms.get(hello.room)
        refusal, offer = grant.refusal(hello), _offer(models, hello)
        if refusal is not None:
            self.refuse(link, Code.FORBIDDEN, refusal)
        elif offer is None:
            self.refuse(link, Code.BAD_PRESET, f"{', '.join(models.presets)} are served, {models.offered}")
        elif room is not None and hello.role == "publish" and room.publisher is not None:
            self.refuse(link, Code.ROOM_TAKEN, "the room has a publisher", 5)
        elif self._by_token[grant.name] >= grant.sessions:
            self.refuse(link, Code.TOO_MANY, f"this token allows {grant.sessions} sessions at a time", 5)
        elif (retry := self._engine.admit(*_streams(hello, room))) is not None:
            self.refuse(link, Code.FULL, "the server is full", retry)
        elif not self._gate.begin(link.address, self._clock()):
            self.refuse(link, Code.TOO_MANY, "too many sessions from this address", 5)
        else:
            return offer
        return None

    def enter(self, session: Session, grant: Grant, link: Link, request: Hello | Resume) -> Client:
        """Give a session its place, and its client the answer."""
        client, hello, rate = Client(session, grant, link), session.hello, session.rate
        self.clients[session.id] = client
        self._by_token[grant.name] += 1
        self._metrics.sessions.set(len(self.clients))
        link.connection.accept(session, request, self._clock())
        log.info("begun", extra={"address": link.address, "session": client.name, "role": hello.role})
        if hello.send == "audio":
            client.encode = self._engine.encode(
                hello.sample_rate, hello.sample_format, rate, lambda event: self._coded(client, event)
            )
        if hello.role == "transcode" and "audio" in hello.receive:
            client.tap = Tap(hello.sample_rate, hello.sample_format)
            client.tap.listeners[client] = None
            client.decode = self._engine.decode(rate, lambda event: self._sounded(client, event))
        if hello.room is not None:
            client.room = self.room(hello.room)
            if hello.role == "publish":
                client.room.publisher = client
                client.room.announce()
            else:
                client.room.join(client)
        self._retune(client)
        return client

    def room(self, name: str) -> Room:
        """Return a room, which begins with this."""
        if name not in self.rooms:
            models = self._engine.models
            assert models is not None
            rate = models.geometry.rates[0]
            self.rooms[name] = Room(lambda deliver: self._engine.decode(rate, deliver), self._clock)
            self._metrics.rooms.set(len(self.rooms))
        return self.rooms[name]

    def tidy(self, name: str) -> None:
        """Let a room end where nobody is."""
        if name in self.rooms and self.rooms[name].empty:
            del self.rooms[name]
            if self.shared is not None:
                self.shared.left(name)
            self._metrics.rooms.set(len(self.rooms))

    # Streams

    def _take(self, client: Client, item: Arrived[Block] | Arrived[Chunk] | Lost | Marker) -> None:
        """Pass what a client sends to the engine or to its room."""
        unit = item.item if isinstance(item, Arrived) else item
        if isinstance(item, Arrived) and client.feed is not None:
            client.arrived(item.seq, item.item)
        if client.encode is not None:
            if not isinstance(unit, Block | Lost):
                client.encode.put(unit)
            # What is lost shows in the positions of what follows.
            return
        if isinstance(unit, Chunk):
            return
        if isinstance(unit, Block) and not self._in_range(client, unit):
            return
        if client.decode is not None:
            client.decode.put(unit)
        elif client.room is not None:
            self._publish(client, Mark(unit.flush, unit.at, unit.tag) if isinstance(unit, Marker) else unit)
            if isinstance(unit, Block):
                client.owe(1, len(unit.data))

    def _publish(self, client: Client, unit: Block | Lost | Mark) -> None:
        """Send what a publisher has to say to its room, here or everywhere."""
        if isinstance(unit, Block):
            client.coded(unit.at + self._block)
        if client.feed is not None:
            client.feed.put(unit, client.worked_off)
        elif client.room is not None:
            client.room.take(unit)

    @property
    def _block(self) -> int:
        return 0 if self._engine.models is None else self._engine.models.geometry.block

    def _in_range(self, client: Client, block: Block) -> bool:
        models = self._engine.models
        try:
            if models is not None:
                unpacked(block, models.geometry, models.sizes)
        except CodesError as error:
            client.session.done(1, len(block.data))
            self.dismiss(client, Code.BAD_MESSAGE, str(error))
            return False
        return True

    def _coded(self, client: Client, event: Event) -> None:
        """Pass on what the engine has made of a client's audio."""
        if isinstance(event, Done):
            client.owe(event.units, event.octets)
        elif isinstance(event, Failed):
            self._fail(client, event)
        elif isinstance(event, Block):
            self._publish(client, event)
            if client.session.codes_out is not None:
                client.session.send_block(event, self._clock())
            if client.decode is not None:
                self._hear(client, event)
        elif isinstance(event, Mark):
            self._marked(client, event)
        elif isinstance(event, Fence):
            self._hear(client, None)
            event.then()
        client.wake()

    def _hear(self, client: Client, block: Block | None) -> None:
        """Decode a transcoder's blocks when they would reach a listener: whole bundles, or (None) what there is."""
        out = client.session.codes_out
        client.bundle += [] if block is None else [block]
        if client.decode is not None and (block is None or out is None or len(client.bundle) >= out.bundle):
            for one in client.bundle:
                client.decode.put(one)
            client.bundle.clear()

    def _marked(self, client: Client, mark: Mark) -> None:
        self._hear(client, None)
        self._publish(client, mark)
        if client.session.codes_out is not None:
            client.session.mark("codes", flush=mark.flush, at=mark.at, tag=mark.tag)
        if client.decode is not None:
            client.decode.put(Marker(1, 0, mark.flush, mark.at, "codes", mark.tag))

    def _sounded(self, client: Client, event: Event) -> None:
        """Pass on what the engine has made of a transcoder's codes."""
        if isinstance(event, Done) and client.encode is None:
            client.session.done(event.units, event.octets)
        elif isinstance(event, Failed):
            self._fail(client, event)
        elif isinstance(event, Sound) and client.tap is not None:
            client.tap.push(event, self._clock())
        elif isinstance(event, Mark) and client.tap is not None:
            client.tap.mark(event, self._clock())
        elif isinstance(event, Fence):
            event.then()
        client.wake()

    def _retune(self, client: Client) -> None:
        """Let the encoder behind a client know what is wanted now."""
        source = client if client.encode is not None else None
        if client.room is not None and isinstance(client.room.publisher, Client):
            source = client.room.publisher
        if source is None or source.encode is None:
            return
        out = source.session.codes_out
        copies = bool(out is not None and out.copies) or bool(source.room is not None and source.room.copies)
        wanted = Tuned(source.session.rate, copies)
        if wanted != source.tuned:
            source.tuned = wanted
            source.encode.put(wanted)

    # Ending

    def _fail(self, client: Client, event: Failed) -> None:
        # What it was given is lost, so that there is nothing to resume.
        client.failed = True
        self.dismiss(client, Code.INTERNAL, event.reason)

    def dismiss(self, client: Client, code: Code, reason: str) -> None:
        """Send a client away; when it has failed, its session too."""
        log.warning("dismissed", extra={"session": client.name, "code": int(code), "reason": reason})
        link = client.link
        if link is not None:
            self.handle(link, link.connection.bye(code, reason, self._clock()))
        if client.failed:
            client.session.end(self._clock())
            self.remove(client, reason)

    def _left(self, client: Client, link: Link, left: Left) -> None:
        if client.link is link:
            client.link = None
        extra = {"session": client.name, "reason": left.reason, "resumable": left.resumable}
        log.info("left", extra={**extra, "code": left.code if left.code is None else int(left.code)})
        if left.code is Code.DONE and client.session.hello.role == "publish":
            self._finish(client, partial(self.remove, client, left.reason))
        elif not left.resumable:
            self.remove(client, left.reason)

    def _finish(self, client: Client, then: Callable[[], None]) -> None:
        """Call ``then`` when what a client has sent before its bye is coded, decoded and queued for those who listen.

        If that takes too long, :meth:`sweep` ends the session.
        """
        client.until = self._clock() + self._limits.finish
        if client.encode is None:
            self._settle(client, then)
        else:
            client.encode.put(Fence(partial(self._settle, client, then)))

    def _settle(self, client: Client, then: Callable[[], None]) -> None:
        if self.shared is not None and client.feed is not None:
            self.shared.settle(client, then)
        elif client.room is not None:
            client.room.settle(then)
        elif client.decode is not None:
            client.decode.put(Fence(then))
        else:
            then()

    def _answered(self, link: Link) -> None:
        link.connection.finish()
        link.wake()

    def remove(self, client: Client, reason: str) -> None:
        """Let a session go, with all that it has here."""
        if self.clients.pop(client.session.id, None) is None:
            return
        for stream in (client.encode, client.decode):
            if stream is not None:
                stream.close()
        room, hello = client.room, client.session.hello
        if room is not None and hello.room is not None:
            room.leave(client)
            if self.shared is not None:
                self.shared.gone(client)
            self._retune(client)
            self.tidy(hello.room)
        self._by_token[client.grant.name] -= 1
        self._gate.end(client.address)
        self._metrics.sessions.set(len(self.clients))
        self._count(client)
        log.info("ended", extra={"session": client.name, "reason": reason})


def _offer(models: Models, hello: Hello) -> Offer | None:
    """Return what is served to a client, or None if it wants something else."""
    presets, weights, rates = models.presets, models.offered, models.geometry.rates
    if hello.preset is not None and hello.preset not in presets:
        return None
    index = 0 if hello.preset is None else presets.index(hello.preset)
    if hello.weights is not None and hello.weights != weights[index]:
        return None
    return Offer(models.geometry, presets, weights, rates[index])


def _streams(hello: Hello, room: Room | None) -> tuple[int, int]:
    """Return how many streams to encode and to decode a session would add."""
    sounds = "audio" in hello.receive and (room is None or room.decoder is None)
    return int(hello.send == "audio"), int(sounds)
