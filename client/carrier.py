"""What keeps a session connected: sockets, the clock, and the will to connect again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ssl import SSLContext

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as dial
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from semanticodec.wire.closing import Code
from semanticodec.wire.messages import MAX_MESSAGE, SUBPROTOCOL

from .events import Ended, Event, Left
from .session import GIVE_UP, SECOND, Session, State

WRITE_LIMIT = 2048
"""Bytes that wait in the socket; what waits in the session instead can still be bundled, and is not stale."""
FINAL_STATUS = {401: Code.BAD_TOKEN, 403: Code.FORBIDDEN, 404: Code.BAD_REQUEST, 426: Code.BAD_VERSION}
"""HTTP answers that will not change, and what they mean."""


@dataclass(frozen=True)
class Retry:
    """When to connect again: after a random time up to ``base * 2 ** attempt`` seconds, at most ``cap``.

    Source: "full jitter", Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).

    Args:
        base: seconds.
        cap: seconds.
        deadline: seconds without a session after which to give up.
        random: where chance comes from.
    """

    base: float = 0.25
    cap: float = 8.0
    deadline: float = 30.0
    random: random.Random = field(default_factory=random.Random)

    def delay(self, attempt: int) -> float:
        """Return the seconds to wait before an attempt, counted from 0."""
        return self.random.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 32)))


class Carrier:
    """Connects a session, and again, until it is over.

    Args:
        session: to be connected.
        url: where to begin.
        token: bearer token.
        ssl: for wss.
        retry: when to connect again.
        deliver: takes what happens.

    Attributes:
        reconnects: connections after the first that were tried, in all.
    """

    def __init__(
        self,
        session: Session,
        url: str,
        token: str | None,
        ssl: SSLContext | None,
        retry: Retry,
        deliver: Callable[[Sequence[Event]], None],
    ) -> None:
        self.reconnects = 0
        self._session, self._url, self._ssl, self._retry, self._deliver = session, url, ssl, retry, deliver
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Look at the session: there may be something to send, or it may be over."""
        self._news.set()

    async def run(self) -> None:
        """Keep the session connected until it is over."""
        session, url, attempt, lost = self._session, self._url, 0, time.monotonic()
        try:
            while True:
                progress, openings = session.progress, session.openings
                left = await self._connection(url, lost + self._retry.deadline)
                now = time.monotonic()
                lost = now if session.openings > openings else lost
                attempt = 0 if session.progress > progress else attempt
                if left is None:
                    return
                url = self._next_url(left, url)
                wait = 0.0 if left.wait == 0 and not attempt else self._retry.delay(attempt) + (left.wait or 0) / 1000
                attempt += 1
                if now + wait > lost + self._retry.deadline:
                    reason = f"no session within {self._retry.deadline} s; the last attempt: {left.reason}"
                    self._deliver(session.abandon(Code.INTERNAL, reason))
                    return
                await self._rest(wait)
                if session.state is State.ENDED:
                    return
                self.reconnects += 1
        except Exception as error:
            # A fault of this client must wake its user instead of leaving him waiting for ever.
            self._deliver([Ended(Code.INTERNAL, f"the client failed: {error!r}")])
            raise

    async def _rest(self, seconds: float) -> None:
        """Wait, but no longer than the session lives."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._session.state is not State.ENDED:
                    self._news.clear()
                    await self._news.wait()

    def _next_url(self, left: Left, url: str) -> str:
        """Return where to connect next: a server may send its clients elsewhere, but not from TLS to plain text."""
        if left.url is not None and (left.url.startswith("wss:") or not self._url.startswith("wss:")):
            return left.url
        # Who was sent elsewhere and finds nobody there begins where he began.
        return self._url if left.code is None else url

    async def _connection(self, url: str, deadline: float) -> Left | None:
        """Connect once, and serve the connection until it is lost; return what to do then, None if all is over."""
        session = self._session
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                socket = await self._dial(url)
        except InvalidStatus as error:
            status = error.response.status_code
            if status in FINAL_STATUS:
                self._deliver(session.abandon(FINAL_STATUS[status], f"the server answers HTTP {status}"))
                return None
            return Left(None, f"the server answers HTTP {status}")
        except InvalidURI as error:
            self._deliver(session.abandon(Code.BAD_REQUEST, str(error)))
            return None
        except (OSError, InvalidHandshake, EOFError) as error:
            return Left(None, f"{url} cannot be reached: {error!r}")
        if session.state is State.ENDED:
            await socket.close()
            return None
        session.opened(time.monotonic_ns())
        if socket.subprotocol is None:
            # Such a server closes and says why; what else it may say is not for us.
            await socket.close(Code.BAD_VERSION)
            reason = socket.close_reason or f"the server does not speak {SUBPROTOCOL}"
            events = session.disconnected(Code.BAD_VERSION, reason, time.monotonic_ns())
        else:
            await self._serve(socket)
            reason = socket.close_reason or "the connection was lost"
            events = session.disconnected(socket.close_code, reason, time.monotonic_ns())
        self._deliver(events)
        return next((event for event in events if isinstance(event, Left)), None)

    async def _dial(self, url: str) -> ClientConnection:
        return await dial(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=self._headers,
            compression=None,
            ssl=self._ssl,
            max_size=MAX_MESSAGE,
            write_limit=WRITE_LIMIT,
            # The protocol has its own, which are counted.
            ping_interval=None,
            close_timeout=1,
        )

    async def _serve(self, socket: ClientConnection) -> None:
        """Move bytes between socket and session until either wants no more."""
        reader = asyncio.create_task(self._read(socket))
        try:
            await self._write(socket, reader)
        except (ConnectionClosed, TimeoutError):
            pass
        finally:
            code, reason = self._session.close or (Code.DONE, "")
            closing = asyncio.create_task(socket.close(code, reason))
            await asyncio.wait([closing], timeout=2)
            socket.transport.abort()
            reader.cancel()
            await asyncio.gather(reader, closing, return_exceptions=True)

    async def _read(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in socket:
                self._deliver(self._session.receive(data, time.monotonic_ns()))
                self.wake()
        self.wake()

    async def _write(self, socket: ClientConnection, reader: asyncio.Task[None]) -> None:
        session = self._session
        while not reader.done():
            self._news.clear()
            now = time.monotonic_ns()
            session.tick(now)
            while (data := session.pull(now)) is not None:
                # A peer that takes nothing for so long is gone, even if its kernel still answers.
                async with asyncio.timeout(GIVE_UP / SECOND):
                    await socket.send(data)
                now = time.monotonic_ns()
            if session.close is not None:
                return
            due = session.due()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(0, due - time.monotonic_ns()) / SECOND):
                    await self._news.wait()
