"""A server without a codec: what comes in goes out after a fixed delay, with made-up codes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import defaultdict
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from semanticodec.wire.blocks import Block, Chunk, Geometry
from semanticodec.wire.channel import Arrived
from semanticodec.wire.closing import Code
from semanticodec.wire.messages import SUBPROTOCOL, Hello, Marker, Resume, Room, Tune
from server.config import Config
from server.connection import Asked, Connection, Event, Left
from server.limits import Limits
from server.pages import Pages, respond
from server.session import Offer, Session

BLOCK = 5120
RATES = (100, 50, 25)
GEOMETRY = Geometry(BLOCK, (12, 13), RATES)
OFFER = Offer(GEOMETRY, ("mini-100", "mini-50", "mini-25"), ("00000000",) * 3, 100)


class Peer:
    """One socket."""

    def __init__(self, ws: ServerConnection) -> None:
        self.ws = ws
        self.connection = Connection(Limits(), time.monotonic_ns())
        self.news = asyncio.Event()


class Echo:
    """Serve the page and an echo on localhost, in a thread of its own.

    Args:
        delay: seconds from the last sample of a block to its sound and codes.
        token: that clients must show.

    Attributes:
        tuned: rates and bundles that clients asked for.
        hellos: as they came.
        resumed: sessions that went on.
    """

    def __init__(self, delay: float = 0.15, token: str | None = None) -> None:
        self.delay, self.token = delay, token
        self.tuned: list[Tune] = []
        self.hellos: list[Hello] = []
        self.resumed = 0
        self._sessions: dict[bytes, Session] = {}
        self._sound: defaultdict[bytes, bytearray] = defaultdict(bytearray)
        self._blocks: defaultdict[bytes, int] = defaultdict(int)
        self._peers: set[Peer] = set()
        self._pages = Pages(Config().web)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def __enter__(self) -> Echo:
        self._thread.start()
        self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def drop(self) -> None:
        """Cut all connections, without a word."""
        self._loop.call_soon_threadsafe(lambda: [peer.ws.transport.abort() for peer in self._peers])

    def forget(self) -> None:
        """Lose all sessions, as a restarted server, and cut all connections."""
        self._loop.call_soon_threadsafe(self._sessions.clear)
        self.drop()

    def send_away(self, url: str) -> None:
        """Tell everybody to go on at another server."""

        def leave() -> None:
            for peer in self._peers:
                peer.connection.bye(Code.ELSEWHERE, "going away", time.monotonic_ns(), url=url)
            self._wake()

        self._loop.call_soon_threadsafe(leave)

    async def _run(self) -> None:
        async with serve(
            self._serve, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL], process_request=self._answer, compression=None
        ) as listening:
            self.url = f"http://localhost:{listening.sockets[0].getsockname()[1]}/"
            self._up.set()
            await self._stop.wait()

    def _answer(self, _: ServerConnection, request: Request) -> Response | None:
        if "Upgrade" in request.headers:
            return None
        if request.path == "/favicon.ico":
            return respond(HTTPStatus.NO_CONTENT, b"")
        return self._pages.find(request.path)

    async def _serve(self, ws: ServerConnection) -> None:
        peer = Peer(ws)
        self._peers.add(peer)
        reader = asyncio.create_task(self._read(peer))
        with contextlib.suppress(ConnectionClosed):
            while not reader.done():
                peer.news.clear()
                data = peer.connection.pull(time.monotonic_ns())
                if data is not None:
                    await ws.send(data)
                elif peer.connection.close is not None:
                    await ws.close(int(peer.connection.close[0]), peer.connection.close[1])
                else:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(peer.news.wait(), 0.05)
        self._peers.discard(peer)
        reader.cancel()
        self._take(peer, peer.connection.lost(time.monotonic_ns()))

    async def _read(self, peer: Peer) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in peer.ws:
                self._take(peer, peer.connection.receive(data, time.monotonic_ns()))
                peer.news.set()
        peer.news.set()

    def _take(self, peer: Peer, events: list[Event]) -> None:
        for event in events:
            session = peer.connection.session
            if isinstance(event, Asked):
                self._ask(peer, event.request)
            elif isinstance(event, Tune):
                self.tuned.append(event)
            elif isinstance(event, Left) and session is not None:
                self._tell_room(session)
            elif isinstance(event, Arrived) and isinstance(event.item, Chunk) and session is not None:
                session.done(1, len(event.item.data))
                self._sound[session.id] += event.item.data
                self._code(session, flush=False)
            elif isinstance(event, Marker) and session is not None:
                self._code(session, flush=True)

    def _ask(self, peer: Peer, request: Hello | Resume) -> None:
        now = time.monotonic_ns()
        if self.token is not None and request.token != self.token:
            peer.connection.refuse(Code.BAD_TOKEN, "the token is missing or unknown")
            return
        if isinstance(request, Resume):
            known = self._sessions.get(request.session)
            if known is None:
                peer.connection.refuse(Code.UNKNOWN_SESSION, "no session has this id")
                return
            self.resumed += 1
            peer.connection.accept(known, request, now)
            return
        self.hellos.append(request)
        session = Session(secrets.token_bytes(16), "me", request, OFFER, Limits(), now)
        self._sessions[session.id] = session
        peer.connection.accept(session, request, now)
        self._tell_room(session)

    def _room(self, name: str | None) -> list[Session]:
        return [s for s in self._sessions.values() if name is not None and s.hello.room == name and not s.expired(0)]

    def _tell_room(self, session: Session) -> None:
        here = [s for s in self._room(session.hello.room) if s.state.value == "attached"]
        listeners = sum(s.hello.role == "subscribe" for s in here)
        for one in here:
            one.tell(Room(live=len(here) > listeners, listeners=listeners))
        self._wake()

    def _code(self, session: Session, *, flush: bool) -> None:
        sound = self._sound[session.id]
        while len(sound) >= 2 * BLOCK or (flush and sound):
            block = bytes(sound[: 2 * BLOCK])
            del sound[: 2 * BLOCK]
            number = self._blocks[session.id]
            self._blocks[session.id] += 1
            self._loop.call_later(self.delay, self._send, session, number, block, session.rate)
        if flush:
            self._loop.call_later(self.delay, self._mark, session)

    def _hearers(self, session: Session) -> list[Session]:
        if session.hello.role == "transcode":
            return [session]
        return [s for s in self._room(session.hello.room) if s.hello.role == "subscribe"]

    def _send(self, session: Session, number: int, block: bytes, rate: int) -> None:
        now = time.monotonic_ns()
        rng = np.random.default_rng(number)
        frames = GEOMETRY.frames(rate)
        codes = np.stack([rng.integers(0, 1 << bits, frames) for bits in GEOMETRY.code_bits])
        for one in self._hearers(session):
            if one.codes_out is not None:
                one.send_block(Block(GEOMETRY.pack(codes, rate), rate, number * BLOCK), now)
            if one.audio_out is not None:
                one.send_audio(block, number * BLOCK, now)
        self._wake()

    def _mark(self, session: Session) -> None:
        for one in self._hearers(session):
            for kind in one.hello.receive:
                one.mark(kind, flush=True)
        self._wake()

    def _wake(self) -> None:
        for peer in self._peers:
            peer.news.set()


def log_mel(sound: np.ndarray[Any, Any], hop: int = 160) -> np.ndarray[Any, Any]:
    """Return a log-mel picture ``[T, 40]`` of sound at 16 kHz, each row without its mean."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, 512)[::hop] * np.hanning(512)
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1) / 8000 * 256
    bins = np.arange(257)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bank = np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None)
    picture = np.log10(power @ bank.T + 1e-6)
    return picture - picture.mean(axis=1, keepdims=True)
