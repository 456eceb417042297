"""Sockets: WebSockets and plain HTTP around the service, its engine and its clock."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import urlsplit

from websockets.asyncio.server import Server as Listening
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CTRL_OPCODES, Frame
from websockets.http11 import Request, Response
from websockets.protocol import Event
from websockets.typing import Subprotocol

from semanticodec.wire.closing import Code
from semanticodec.wire.messages import MAX_MESSAGE, SUBPROTOCOL

from .auth import bearer
from .config import Config
from .connection import Connection, clip
from .engine import Engine
from .gate import Gate
from .limits import SECOND
from .metrics import Metrics
from .models import Models, load_models
from .pages import Pages, respond
from .service import Service

log = logging.getLogger("semanticodec.server")

SEND_BUFFER = 1 << 14
"""Bytes that the kernel and the library may each hold for a peer that does not read: what is old there is not live."""
BACKLOG = SEND_BUFFER + 2 * MAX_MESSAGE
"""Bytes that may wait for a peer in all; the library answers pings without asking whether there is room."""
PATHS = ("/", "/ws")
"""Where WebSockets are accepted."""
PROBES = ("/healthz", "/readyz", "/metrics")
"""What this machine may ask for as often as it likes."""
LOOPBACK = ("127.0.0.1", "::1")
ONCE = {"Host": Code.BAD_ORIGIN, "Authorization": Code.BAD_TOKEN}
"""Headers that come once, and how a request is refused where they do not; the library sees to Origin itself."""


class Wire(ServerConnection):
    """One TCP connection, from its first byte on, and what the library does with it unasked.

    Args:
        shell: whose connection it is.
        arguments: of the library's own class.
        options: of the library's own class.
    """

    def __init__(self, shell: Server, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shell = shell

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hang up when there are too many from this address."""
        super().connection_made(transport)
        self._peer = self._shell.peer(self)
        # A proxy of ours carries many people, whom their WebSockets tell apart.
        allowed = self._shell.gate.connect(self._peer, self._shell.clock())
        if not allowed and self._peer not in self._shell.config.proxies:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that it is gone."""
        super().connection_lost(exc)
        self._shell.gate.disconnect(self._peer)

    def data_received(self, data: bytes) -> None:
        """Hang up on a peer that makes the library write, and does not read."""
        super().data_received(data)
        if self.transport.get_write_buffer_size() > BACKLOG:
            self.transport.abort()

    def process_event(self, event: Event) -> None:
        """Count WebSocket's own pings and pongs as messages; the others are counted when they are read."""
        super().process_event(event)
        if isinstance(event, Frame) and event.opcode in CTRL_OPCODES:
            shell = self._shell
            if not shell.gate.message(shell.address(self), len(event.data), shell.clock()):
                self.transport.abort()


class Socket:
    """One WebSocket and its connection; a :class:`~.service.Link`."""

    def __init__(self, ws: ServerConnection, server: Server, address: str) -> None:
        self.address = address
        self.token = None if ws.request is None else bearer(ws.request.headers.get("Authorization"))
        self.connection = Connection(server.config.limits, server.clock())
        self._ws, self._server = ws, server
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Look at the connection: there may be something to send."""
        self._news.set()

    async def run(self) -> None:
        """Carry messages both ways until the socket is closed."""
        reader = asyncio.create_task(self._read())
        try:
            await self._write(reader)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._server.service.handle(self, self.connection.lost(self._server.clock()))
            self._server.metrics.ignored.inc(self.connection.ignored)

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in self._ws:
                try:
                    self._take(data)
                except Exception:
                    # A fault of ours must not take others along.
                    log.exception("internal", extra={"address": self.address})
                    lost = self.connection.bye(Code.INTERNAL, "the server failed", self._server.clock())
                    self._server.service.handle(self, lost)
        self.wake()

    def _take(self, data: bytes | str) -> None:
        server, now = self._server, self._server.clock()
        server.metrics.messages.labels("in").inc()
        server.metrics.octets.labels("in").inc(len(data))
        if server.gate.message(self.address, len(data), now):
            happenings = self.connection.receive(data, now)
        else:
            happenings = self.connection.bye(Code.TOO_MANY, "too many messages from this address", now)
        server.service.handle(self, happenings)

    async def _write(self, reader: asyncio.Task[None]) -> None:
        server = self._server
        while not reader.done():
            now = server.clock()
            server.service.handle(self, self.connection.tick(now))
            self._news.clear()
            data = self.connection.pull(now)
            if data is not None:
                if not await self._send(data):
                    return
            elif self.connection.close is not None:
                code, reason = self.connection.close
                server.metrics.closed.labels(str(int(code))).inc()
                await self._ws.close(int(code), reason)
                return
            else:
                due = self.connection.due()
                wait = None if due is None else max(0.001, (due - now) / SECOND)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), wait)

    async def _send(self, data: bytes) -> bool:
        """Send a message, waiting while the peer does not read; give up one that does not for too long."""
        try:
            async with asyncio.timeout(self._server.config.limits.idle / SECOND):
                await self._ws.send(data)
        except ConnectionClosed:
            return False
        except TimeoutError:
            self._ws.transport.abort()
            return False
        self._server.metrics.messages.labels("out").inc()
        self._server.metrics.octets.labels("out").inc(len(data))
        return True


class Server:
    """A server, from :meth:`start` to :meth:`drain`.

    Args:
        config: how to serve.
        load: loads the models; None takes the configured ones.
        clock: returns nanoseconds.

    Attributes:
        port: where it listens.
        broken: set when the engine has failed for good.
    """

    def __init__(
        self, config: Config, load: Callable[[], Models] | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.config = config
        self.clock = clock
        self.metrics = Metrics()
        self.gate = Gate(config.addresses)
        self.port = config.port
        self._load = load or partial(load_models, config.presets, config.device)
        self._pages = Pages(config.web)
        self.broken = asyncio.Event()
        self._sockets: set[Socket] = set()

    async def start(self) -> None:
        """Listen at once, and let clients in when the models are warm.

        Raises:
            ConfigError: the certificate is not usable.
            OSError: the port is taken.
        """
        config, loop = self.config, asyncio.get_running_loop()
        self.engine = Engine(self._load, config.work, self.metrics, loop.call_soon_threadsafe, self._break)
        self.service = Service(self.engine, config.tokens, self.gate, config.limits, self.metrics, self.clock)
        if config.backplane is not None:
            # Redis is an extra: only those who share need it.
            from .backplane import Backplane
            from .shared import Shared

            common = Backplane(config.backplane, config.limits.keep / SECOND)
            self.service.shared = Shared(self.service, common, config.limits, self.clock)
        tls, handshake = config.tls(), config.limits.handshake / SECOND
        self._listening: Listening = await serve(
            self._serve,
            config.host,
            config.port,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else handshake,
            select_subprotocol=_choose,
            process_request=self._answer,
            compression=None,
            server_header="semanticodec",
            open_timeout=handshake,
            # The protocol has its own pings, which also tell whether the client is still willing.
            ping_interval=None,
            close_timeout=2,
            # So that a message a little too large is refused by our own table.
            max_size=2 * MAX_MESSAGE,
            max_queue=4,
            write_limit=SEND_BUFFER,
            create_connection=cast("type[ServerConnection]", partial(Wire, self)),
            logger=logging.getLogger("semanticodec.websockets"),
        )
        self.port = next(iter(self._listening.sockets)).getsockname()[1]
        self.engine.start()
        self._sweeper = asyncio.create_task(self._sweep())
        log.info("listening", extra={"host": config.host, "port": self.port})

    async def wait_ready(self) -> bool:
        """Wait until clients are let in; return whether they ever will be."""
        while self.engine.models is None and self.engine.failure is None:
            await asyncio.sleep(0.02)
        if self.engine.models is None:
            log.error("failed", extra={"reason": self.engine.failure})
            return False
        self.metrics.ready.set(1)
        log.info("ready", extra={"presets": list(self.engine.models.presets), "device": self.config.device})
        return True

    def _break(self) -> None:
        """Note that nothing can be coded here any more."""
        self.metrics.ready.set(0)
        self.broken.set()

    async def drain(self) -> None:
        """Send everybody elsewhere, accept nobody, and end when all are gone or ``config.drain`` has passed."""
        config = self.config
        log.info("draining", extra={"connections": len(self._sockets)})
        self.service.leaving = True
        self.metrics.ready.set(0)
        self._listening.close(close_connections=False)
        for one in list(self._sockets):
            bye = one.connection.bye(
                Code.ELSEWHERE, "this server is going away", self.clock(), retry=1000, url=config.elsewhere
            )
            self.service.handle(one, bye)
            one.wake()
        end = time.monotonic() + config.drain
        while self._sockets and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await self.stop()
        log.info("drained", extra={"left": len(self._sockets)})

    async def stop(self) -> None:
        """End at once."""
        self._sweeper.cancel()
        self._listening.close()
        await self._listening.wait_closed()
        if self.service.shared is not None:
            await self.service.shared.close()
        await asyncio.to_thread(self.engine.stop)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.service.sweep()

    async def _serve(self, ws: ServerConnection) -> None:
        """Take a WebSocket, if address, origin and version may."""
        address = self.address(ws)
        self.metrics.connections.inc()
        try:
            refusal = self._refusal(ws, allowed=self.gate.enter(address, self.clock()))
            if refusal is not None:
                code, reason = refusal
                self.metrics.closed.labels(str(int(code))).inc()
                log.info("refused", extra={"address": address, "code": int(code), "reason": reason})
                await ws.close(int(code), clip(reason, 123))
                return
            raw = ws.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            one = Socket(ws, self, address)
            self._sockets.add(one)
            try:
                await one.run()
            finally:
                self._sockets.discard(one)
        finally:
            self.gate.leave(address)
            self.metrics.connections.dec()

    def _refusal(self, ws: ServerConnection, *, allowed: bool) -> tuple[Code, str] | None:
        assert ws.request is not None
        headers = ws.request.headers
        if not allowed:
            return Code.TOO_MANY, "too many connections from this address"
        for name, code in ONCE.items():
            if len(headers.get_all(name)) > 1:
                return code, f"more than one {name} header"
        origin = headers.get("Origin")
        if origin is not None and origin not in self.config.origins and not self._ours(origin, headers.get("Host", "")):
            return Code.BAD_ORIGIN, f"pages of {origin} may not connect"
        if ws.subprotocol is None:
            offered = ", ".join(headers.get_all("Sec-WebSocket-Protocol")) or "none"
            return Code.BAD_VERSION, f"{SUBPROTOCOL} is spoken here; offered was {offered}"
        return None

    def _ours(self, origin: str, host: str) -> bool:
        """Tell whether a page is ours: not by a name that others could let point to this machine (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name not in ("localhost", self.config.host):
            try:
                ipaddress.ip_address(name)
            except ValueError:
                return False
        return origin in (f"http://{host}", f"https://{host}")

    def peer(self, ws: ServerConnection) -> str:
        """Return the address at the other end of the TCP connection."""
        return str((ws.remote_address or ["?"])[0])

    def address(self, ws: ServerConnection) -> str:
        """Return whose connection it is; a proxy of ours says so itself, in the last of all lines."""
        peer = self.peer(ws)
        if peer in self.config.proxies and ws.request is not None:
            hops = [hop.strip() for hop in ",".join(ws.request.headers.get_all("X-Forwarded-For")).split(",")]
            strangers = [hop for hop in hops if hop and hop not in self.config.proxies]
            return strangers[-1][:64] if strangers else peer
        return peer

    def _answer(self, ws: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and let WebSockets through."""
        if "Upgrade" in request.headers:
            if request.path.partition("?")[0] not in PATHS:
                return respond(HTTPStatus.NOT_FOUND, b"no WebSockets here\n")
            if len(self._sockets) >= self.config.connections:
                return respond(HTTPStatus.SERVICE_UNAVAILABLE, b"too many connections\n", retry=5)
            return None
        address = self.address(ws)
        probe = request.path in PROBES and address in LOOPBACK
        if not probe and not self.gate.request(address, self.clock()):
            return respond(HTTPStatus.TOO_MANY_REQUESTS, b"too many requests from this address\n", retry=1)
        if request.path == "/healthz":
            broken = self.engine.failure
            status = HTTPStatus.OK if broken is None else HTTPStatus.INTERNAL_SERVER_ERROR
            return respond(status, b"ok\n" if broken is None else b"the engine failed\n")
        if request.path == "/readyz":
            ready = self.engine.models is not None and not self.service.leaving
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return respond(status, b"ready\n" if ready else b"not ready\n")
        if request.path == "/metrics":
            return respond(HTTPStatus.OK, self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")
        return self._pages.find(request.path)


def _choose(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None


async def run(config: Config) -> bool:
    """Serve until SIGTERM or SIGINT, or until the engine fails; return whether it did not.

    Whoever watches over the process may start another one; those who were here are sent there.
    """
    server, stop = Server(config), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    ends = [asyncio.create_task(event.wait()) for event in (stop, server.broken)]
    try:
        if await server.wait_ready():
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
        await server.drain()
    return server.engine.failure is None


class JsonFormatter(logging.Formatter):
    """Log records as one JSON object per line."""

    _usual = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in self._usual},
        }
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
