"""The server behind bad links: connections that are cut, bytes that are delayed, split, joined and doubled."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from test_server import BLOCK, CONFIG, listen, models, run, serving
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from semanticodec.errors import WireError
from semanticodec.wire.blocks import Block
from semanticodec.wire.channel import Arrived, CodesOut, Inlet
from semanticodec.wire.closing import Code
from semanticodec.wire.link import Lost, Sender
from semanticodec.wire.messages import (
    SUBPROTOCOL,
    Ack,
    Codes,
    Error,
    Hello,
    Marker,
    Missing,
    Ping,
    Pong,
    Ready,
    Resume,
    decode,
    encode,
)
from server.gate import AddressLimits
from server.limits import Limits
from server.shell import Server

GEOMETRY = models().geometry
LIMITS = Limits(messages=10_000)
CALM = 4096
"""Bytes of each direction that pass before a proxy doubles any."""


@dataclass(frozen=True)
class Weather:
    """What a proxy does to each piece of bytes: chances of a cut and of doubling it, longest and least delay (s)."""

    cut: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    least: float = 0.0


class Proxy:
    """TCP through bad weather; ``cuts`` counts the connections that it broke."""

    def __init__(self, port: int, weather: Weather, seed: int) -> None:
        self.cuts = self.doubles = 0
        self.clear = True
        self._port, self._weather, self._rng = port, weather, np.random.default_rng(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            to, back = await asyncio.open_connection("127.0.0.1", self._port)
            both = (writer, back)
            pumps = [asyncio.create_task(self._pump(*ends)) for ends in ((reader, back), (to, writer))]
            self._tasks |= set(pumps)
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in both:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rng, weather, passed = self._rng, self._weather, 0
        with contextlib.suppress(OSError):
            while data := await reader.read(int(rng.integers(1, 2000))):
                if weather.delay:
                    await asyncio.sleep(rng.uniform(weather.least, weather.delay))
                if rng.random() < weather.cut and not self.clear:
                    self.cuts += 1
                    return
                passed += len(data)
                if rng.random() < weather.double and passed > CALM and not self.clear:
                    self.doubles += 1
                    data *= 2
                half = int(rng.integers(len(data) + 1))
                for part in (data[:half], data[half:]):
                    writer.write(part)
                    await writer.drain()


@contextlib.asynccontextmanager
async def through(server: Server, weather: Weather, seed: int) -> AsyncIterator[tuple[Proxy, int]]:
    proxy = Proxy(server.port, weather, seed)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", 0) as listening:
        yield proxy, listening.sockets[0].getsockname()[1]


class Sturdy(abc.ABC):
    """A client that comes back until it is told to stop."""

    def __init__(self, port: int, hello: Hello) -> None:
        self.ready: Ready | None = None
        self.connections = 0
        self._port, self._hello = port, hello
        self._ws: Any = None

    @abc.abstractmethod
    def resume(self) -> Resume:
        """Say where to go on."""

    @abc.abstractmethod
    def take(self, message: Any) -> None:
        """Do what a message asks for."""

    async def say(self, message: Any) -> None:
        if self._ws is not None:
            with contextlib.suppress(WebSocketException):
                await self._ws.send(encode(message))

    async def live(self) -> None:
        """Connect again and again."""
        options: Any = {"subprotocols": [SUBPROTOCOL], "compression": None, "proxy": None, "ping_interval": None}
        while True:
            with contextlib.suppress(OSError, EOFError, WebSocketException, TimeoutError, WireError):
                async with connect(f"ws://127.0.0.1:{self._port}/", open_timeout=5, **options) as ws:
                    self.connections += 1
                    await ws.send(encode(self._hello if self.ready is None else self.resume()))
                    await self._read(ws)
            self._ws = None
            await asyncio.sleep(0.01)

    async def _read(self, ws: Any) -> None:
        async for data in ws:
            message = decode(data)
            if isinstance(message, Ready):
                self.ready, self._ws = message, ws
            elif isinstance(message, Ping):
                await self.say(Pong(message.nonce))
            elif isinstance(message, Error):
                assert message.code not in (Code.UNKNOWN_SESSION, Code.WRONG_ORDER), message
            self.take(message)


class Publisher(Sturdy):
    """Sends blocks of codes, and again what was not acknowledged."""

    def __init__(self, port: int) -> None:
        super().__init__(port, Hello("publish", "codes", room="den"))
        self.out = CodesOut(GEOMETRY, 100, Sender[Block](256, 1 << 20, limit=0))

    def resume(self) -> Resume:
        assert self.ready is not None
        return Resume(self.ready.session)

    def take(self, message: Any) -> None:
        sender = self.out.sender
        if isinstance(message, Ready):
            if message.resumed:
                sender.rewind(message.next)
            assert sender.limit is not None
            sender.limit = max(sender.limit, message.limit)
        elif isinstance(message, Ack):
            sender.ack(message.next, message.marker, message.limit)

    async def pump(self) -> None:
        """Send what is due."""
        while self._ws is not None and (message := self.out.pull(1 << 62)):
            await self.say(message)


class Listener(Sturdy):
    """Takes each block once, or the news that it is gone."""

    def __init__(self, port: int) -> None:
        super().__init__(port, listen("codes"))
        self.inlet: Inlet | None = None
        self.first = 0
        self.found: list[Any] = []

    def resume(self) -> Resume:
        assert self.ready is not None
        assert self.inlet is not None
        return Resume(self.ready.session, codes_next=self.inlet.receiver.next)

    def take(self, message: Any) -> None:
        if isinstance(message, Ready) and self.inlet is None:
            self.inlet = Inlet("codes", GEOMETRY, message.rate, message.window, message.codes_next)
            self.first = message.codes_next
        elif isinstance(message, Codes | Missing | Marker) and self.inlet is not None:
            self.found += self.inlet.take(message)

    async def acknowledge(self) -> None:
        """Say what has come."""
        if self.inlet is not None and self.inlet.ack_due:
            await self.say(self.inlet.ack())


async def storm(
    weather: Weather, enough: Callable[[Proxy, Listener], bool], limits: Limits, ahead: int
) -> tuple[int, int]:
    """Stream through a storm until it was enough, at most ``ahead`` blocks that have not come; check every block.

    Returns:
        Connections, and blocks lost.
    """
    addresses = AddressLimits(opens=10_000, connections=1000)
    rng = np.random.default_rng(0)
    sent: list[bytes] = []
    config = replace(CONFIG, addresses=addresses, limits=limits)
    async with serving(config) as server, through(server, weather, 0) as (proxy, port):
        listener, publisher = Listener(port), Publisher(port)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(listener.live())]
            while listener.inlet is None:
                await asyncio.sleep(0.01)
            tasks.append(group.create_task(publisher.live()))
            while publisher.ready is None:
                await asyncio.sleep(0.01)
            # From here on: what was never answered cannot be resumed.
            proxy.clear = False
            while not enough(proxy, listener):
                if len(sent) < listener.inlet.receiver.next + ahead:
                    sent.append(GEOMETRY.pack(rng.integers(0, 50, (2, 16)), 100))
                    publisher.out.push(Block(sent[-1], 100, BLOCK * (len(sent) - 1)), 0)
                await publisher.pump()
                await listener.acknowledge()
                await asyncio.sleep(0.005)
            proxy.clear = True
            while listener.inlet.receiver.next < len(sent):
                await publisher.pump()
                await listener.acknowledge()
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
    place = listener.first
    lost = 0
    for part in listener.found:
        if isinstance(part, Lost):
            assert part.seq == place
            lost += part.stop - part.seq
            place = part.stop
        elif isinstance(part, Arrived):
            assert part.seq == place
            assert part.item.data == sent[place]
            place += 1
    assert place == len(sent)
    return listener.connections + publisher.connections, lost


def test_connections_cut_forty_times() -> None:
    async def test() -> None:
        connections, lost = await storm(Weather(cut=0.02), lambda proxy, _: proxy.cuts >= 40, LIMITS, 100)
        assert connections >= 30  # some were cut before they were open
        assert lost == 0

    run(test, 200)


@pytest.mark.slow
def test_connections_cut_five_hundred_times() -> None:
    async def test() -> None:
        connections, lost = await storm(Weather(cut=0.02), lambda proxy, _: proxy.cuts >= 500, LIMITS, 100)
        assert connections >= 400  # some were cut before they were open
        assert lost == 0

    run(test, 850)


def test_bytes_late_in_pieces_and_twice() -> None:
    async def test() -> None:
        weather = Weather(cut=0.002, double=0.01, delay=0.01)
        connections, lost = await storm(weather, lambda proxy, _: proxy.doubles >= 20 and proxy.cuts >= 4, LIMITS, 100)
        assert connections > 2
        assert lost == 0

    run(test, 200)


def test_what_the_window_does_not_hold_is_reported() -> None:
    async def test() -> None:
        limits = replace(LIMITS, window=8, slow_high=6, high=8, low=2)

        def enough(proxy: Proxy, listener: Listener) -> bool:  # a slow machine sends less while it is cut off
            lost = any(isinstance(part, Lost) for part in listener.found)
            return proxy.cuts >= (30 if lost else 300)

        _, lost = await storm(Weather(cut=0.03), enough, limits, 200)
        assert lost > 0  # and every one of them was announced, or storm would have noticed

    run(test, 200)
