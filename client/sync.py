"""The client without asyncio: the same session, run by a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from semanticodec.wire.messages import Ready, Stats, Tune

from .connection import Connection as AsyncConnection
from .connection import connect as connect_async
from .events import Event

T = TypeVar("T")


def connect(url: str, **options: Any) -> Connection:
    """Prepare a session, to be entered (``with ... as s``).

    Args:
        url: ws:// or wss:// address.
        options: as for :func:`semanticodec_client.connect`.

    Raises:
        WireError: the options do not fit together.
    """
    return Connection(url, options)


class Connection:
    """A session with a server; the methods wait, and may be called by several threads."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._inner: AsyncConnection = connect_async(url, **options)
        self._thread = threading.Thread(target=self._loop.run_forever, name="semanticodec-client", daemon=True)

    def __enter__(self) -> Self:
        """Connect, and wait until the session is open; see :meth:`AsyncConnection.__aenter__`."""
        self._thread.start()
        try:
            self._do(self._inner.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the session: without an error, after the server has received all that was pushed."""
        try:
            self._do(self._inner.__aexit__(kind, error, trace))
        finally:
            self._stop()

    @property
    def ready(self) -> Ready:
        """What the session is."""
        return self._inner.ready

    @property
    def stats(self) -> Stats:
        """What has been measured so far."""
        return self._do(self._measured())

    def push(self, data: np.ndarray[Any, Any], *, rate: int | None = None) -> None:
        """Send samples or codes; see :meth:`semanticodec_client.Connection.push`."""
        self._do(self._inner.push(data, rate=rate))

    def flush(self) -> None:
        """Have everything coded without waiting for more, and wait until the server has received it."""
        self._do(self._inner.flush())

    def finish(self) -> None:
        """Flush for the last time: iteration ends when the last of the results has come."""
        self._do(self._inner.finish())

    def tune(self, **wanted: int) -> Tune:
        """Change rate, latency, gross, copies or bundle; see :meth:`semanticodec_client.Connection.tune`."""
        return self._do(self._inner.tune(**wanted))

    def __iter__(self) -> Iterator[Event]:
        """Iterate over what is received and what happens, until the session ends."""
        while (item := self._do(self._next())) is not None:
            yield item

    async def _next(self) -> Event | None:
        return await anext(self._inner, None)

    async def _measured(self) -> Stats:
        return self._inner.stats

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
