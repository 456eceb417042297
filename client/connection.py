"""The asyncio client: push, and iterate over what comes back."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ssl import SSLContext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from semanticodec.errors import AudioError, CodesError, SemantiCodecError, StreamError
from semanticodec.wire.blocks import coding_features
from semanticodec.wire.closing import Code
from semanticodec.wire.messages import (
    Hello,
    Kind,
    Marker,
    Ready,
    Role,
    SampleFormat,
    Stats,
    Tune,
)

from .carrier import Carrier, Retry
from .events import (
    Drained,
    Ended,
    Event,
    Refusal,
)
from .inbox import Inbox
from .session import Session

if TYPE_CHECKING:
    from .local import Codec, Decoder, Encoder

T = TypeVar("T")

CHUNKS = 50
"""Chunks of audio per second."""


class ConnectionEnded(SemantiCodecError, ConnectionError):
    """The session is over, and not because both ends agreed; ``code`` is one of the protocol's close codes."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the session is over ({code}): {reason}")
        self.code = code


class Refused(SemantiCodecError, ValueError):
    """The server does not do what tune asked for; nothing has changed."""


def connect(
    url: str,
    *,
    role: Role,
    room: str | None = None,
    token: str | None = None,
    send: Kind = "audio",
    receive: Sequence[Kind] = ("audio",),
    preset: str | None = None,
    sample_rate: int = 16_000,
    sample_format: SampleFormat = "s16",
    latency: int | None = None,
    gross: int | None = None,
    copies: int = 0,
    features: Sequence[str] = ("room",),
    entropy: bool = False,
    codec: Codec | None = None,
    live: bool = True,
    retry: Retry | None = None,
    ssl: SSLContext | None = None,
) -> Connection:
    """Prepare a session, to be entered (``async with ... as s``).

    Args:
        url: ws:// or wss:// address.
        role: publish, subscribe or transcode.
        room: for publish and subscribe.
        token: bearer token.
        send: codes or audio; what is sent by publish and transcode.
        receive: codes, audio or both; what subscribe and transcode want.
        preset: wanted preset; None takes the server's.
        sample_rate: of this session's audio, both ways (Hz).
        sample_format: of this session's audio on the wire.
        latency: milliseconds that a block may be held back for bundling.
        gross: bits per second that codes may take, all framing.
        copies: redundant blocks in each codes message.
        features: optional abilities to ask for.
        entropy: ask for entropy-coded codes: fewer bits, more work at both ends; a server may decline.
        codec: codes here what is pushed as samples and sent as codes, and decodes here codes that are received;
            see :func:`semanticodec_client.local.load`.
        live: push never waits, and drops the oldest when the server cannot follow; otherwise push waits.
        retry: when to connect again.
        ssl: for wss.

    Raises:
        WireError: the arguments do not fit together.
    """
    sends, receives = role != "subscribe", role != "publish"
    hello = Hello(
        role=role,
        send=send if sends else None,
        receive=tuple(receive) if receives else (),
        room=room,
        preset=preset if preset or codec is None else codec.preset,
        weights=None if codec is None else codec.weights,
        sample_rate=sample_rate,
        sample_format=sample_format,
        latency=latency,
        gross=gross,
        copies=copies,
        features=(*features, *(coding_features() if entropy else ())),
    )
    return Connection(url, hello, token=token, codec=codec, live=live, retry=retry or Retry(), ssl=ssl)


class Connection:
    """A session with a server that survives broken connections; made by :func:`connect`."""

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        token: str | None,
        codec: Codec | None,
        live: bool,
        retry: Retry,
        ssl: SSLContext | None,
    ) -> None:
        self._live = live
        self._codec = codec
        self._session = Session(hello, time.monotonic_ns())
        self._carrier = Carrier(self._session, url, token, ssl, retry, self._deliver)
        self._inbox = Inbox()
        self._held = np.zeros(0, np.float32)
        self._pulse = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended: Ended | None = None
        self._drained = 0
        self._dirty = False  # something was pushed since the last flush
        self._settled: Tune | Refusal | None = None
        self._tuning, self._pushing = asyncio.Lock(), asyncio.Lock()
        self._last_tag: int | None = None
        self._markers: set[Kind] = set()
        self._encoder: Encoder | None = None
        self._decoder: Decoder | None = None
        self._decoded: deque[Event] = deque()
        self._worker: ThreadPoolExecutor | None = None

    # Life

    async def __aenter__(self) -> Self:
        """Connect, and wait until the session is open.

        Raises:
            ConnectionEnded: it was refused, or could not be reached before the deadline.
        """
        self._task = asyncio.create_task(self._carrier.run())
        try:
            await self._until(lambda: self._session.ready is not None)
            if self._codec is not None:
                await self._prepare(self._codec)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the session: without an error, after the server has received all that was pushed."""
        if kind is None:
            await self.close()
        else:
            await self._stop()

    async def close(self) -> None:
        """Flush, wait until the server has everything, and end the session.

        Raises:
            ConnectionEnded: the session is over already, and not because both ends agreed.
        """
        try:
            if self._ended is not None and self._ended.code != Code.DONE:
                raise ConnectionEnded(self._ended.code, self._ended.reason)
            if self._ended is None and self._dirty:
                await self.flush()
            self._deliver(self._session.bye(time.monotonic_ns()))
            self._carrier.wake()
            if self._task is not None and self._ended is None:
                await self._task
        finally:
            await self._stop()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    # Use

    @property
    def ready(self) -> Ready:
        """What the session is.

        Raises:
            StreamError: it was never open.
        """
        if self._session.ready is None:
            raise StreamError("the session has not been open yet; enter it first (async with)")
        return self._session.ready

    @property
    def stats(self) -> Stats:
        """What has been measured so far, at the socket and by the player; see also :attr:`dropped`."""
        return self._session.stats(time.monotonic_ns())

    @property
    def dropped(self) -> int:
        """Units that were dropped because they were not taken in time."""
        return self._inbox.dropped

    @property
    def reconnects(self) -> int:
        """How often it was connected again, or tried to be."""
        return self._carrier.reconnects

    @property
    def restarts(self) -> int:
        """How often the server had forgotten the session."""
        return self._session.restarts

    def report(self, *, underruns: int, delay: int) -> None:
        """Tell what the player has measured, for stats: under-runs in all, and its delay in milliseconds."""
        self._session.underruns, self._session.delay = underruns, max(0, delay)

    async def push(self, data: np.ndarray[Any, Any], *, rate: int | None = None) -> None:
        """Send samples or codes.

        Args:
            data: floating point ``[S]`` in [-1, 1] at the session's rate, any S; or integers ``[n_q, F]``, a whole
                number of blocks.
            rate: token rate of the codes; None takes the session's.

        Raises:
            ConnectionEnded: the session is over.
            StreamError: this session does not send such data.
            AudioError: samples of a wrong shape or dtype, or that are not finite.
            CodesError: codes of a wrong shape, dtype or range.
        """
        data = np.asarray(data)
        send = self._session.hello.send
        if send is None:
            raise StreamError("this session only listens; nothing can be pushed")
        whole = np.issubdtype(data.dtype, np.integer)
        if not whole and (data.ndim != 1 or not np.issubdtype(data.dtype, np.floating) or not np.isfinite(data).all()):
            raise AudioError(f"samples are {data.dtype} {list(data.shape)}; wanted finite floating point [samples]")
        async with self._pushing:
            if self._ended is not None:
                raise ConnectionEnded(self._ended.code, self._ended.reason)
            self._dirty = True
            if whole:
                await self._push_codes(data, rate)
            elif send == "codes":
                encoder = self._encoder
                if encoder is None:
                    raise StreamError("samples cannot be sent as codes without a codec; see local.load")
                for block in await self._locally(encoder.push, data, self._session.rate):
                    await self._push_block(block.codes, block.rate, block.copy)
            else:
                await self._push_samples(data.astype(np.float32))

    async def flush(self) -> None:
        """Have everything coded without waiting for more, and wait until the server has received it.

        A Marker with ``flush`` comes out behind the last of the results.

        Raises:
            ConnectionEnded: the session is over.
        """
        await self._flush(last=False)

    async def finish(self) -> None:
        """Flush for the last time: iteration ends when the last of the results has come.

        Raises:
            ConnectionEnded: the session is over.
        """
        await self._flush(last=True)
        self._beat()

    async def tune(
        self,
        *,
        rate: int | None = None,
        latency: int | None = None,
        gross: int | None = None,
        copies: int | None = None,
        bundle: int | None = None,
    ) -> Tune:
        """Change rate, bundling or redundancy in mid-stream.

        Args:
            rate: token rate to encode at.
            latency: milliseconds that a block may be held back for bundling.
            gross: bits per second that codes may take, all framing.
            copies: redundant blocks in each codes message; where codes are made here, from the next flush on.
            bundle: blocks per codes message; goes before latency and gross.

        Returns:
            What holds from now on.

        Raises:
            Refused: the server does not do that.
            ConnectionEnded: the session is over.
        """
        async with self._tuning:
            self._settled = None
            answer = self._session.tune(Tune(rate, latency, gross, copies, bundle))
            if answer is not None:
                if self._encoder is not None:
                    self._encoder.copies = bool(answer.copies)
                return answer
            self._carrier.wake()
            await self._until(lambda: self._settled is not None)
            settled: Tune | Refusal | None = self._settled
            if not isinstance(settled, Tune):
                raise Refused(settled.reason if settled else "no answer")
            return settled

    def __aiter__(self) -> AsyncIterator[Event]:
        """Iterate over what is received and what happens, until the session ends."""
        return self

    async def __anext__(self) -> Event:
        """Return the next item.

        Raises:
            ConnectionEnded: the session is over, and not because both ends agreed.
        """
        if self._decoder is None:
            return await self._take()
        while not self._decoded:
            try:
                self._decoded.extend(await self._locally(self._decoder.push, await self._take()))
            except StopAsyncIteration:
                self._decoded.extend(await self._locally(self._decoder.finish))
                if not self._decoded:
                    raise
        return self._decoded.popleft()

    async def _take(self) -> Event:
        while not self._inbox:
            if self._last_tag is not None and not self._markers and self._drained:
                raise StopAsyncIteration
            if self._ended is not None:
                if self._ended.code == Code.DONE:
                    raise StopAsyncIteration
                raise ConnectionEnded(self._ended.code, self._ended.reason)
            await self._pulse.wait()
        return self._inbox.get()

    # Sending

    async def _flush(self, *, last: bool) -> None:
        async with self._pushing:
            self._dirty = False
            padding = 0
            if self._encoder is not None:
                blocks, padding = await self._locally(self._encoder.flush)
                for block in blocks:
                    await self._push_block(block.codes, block.rate, block.copy)
            if len(self._held):
                rest, self._held = self._held, self._held[:0]
                await self._push_chunk(rest)
            if last:
                self._markers, self._last_tag = set(self._session.hello.receive), self._session.flushes + 1
            self._session.flush(padding=padding)
            number = self._session.drain()
        self._carrier.wake()
        await self._until(lambda: self._drained >= number)

    async def _push_samples(self, samples: np.ndarray[Any, Any]) -> None:
        size = max(1, self._session.hello.sample_rate // CHUNKS)
        samples = np.concatenate([self._held, samples])
        whole = len(samples) - len(samples) % size
        self._held = samples[whole:].copy()
        for begin in range(0, whole, size):
            await self._push_chunk(samples[begin : begin + size])

    async def _push_chunk(self, samples: np.ndarray[Any, Any]) -> None:
        await self._space()
        self._session.push_samples(samples, time.monotonic_ns())
        self._carrier.wake()

    async def _push_codes(self, codes: np.ndarray[Any, Any], rate: int | None) -> None:
        rate = rate or self._session.rate
        frames = self._session.geometry.frames(rate)
        if codes.ndim != 2 or codes.shape[1] % frames:
            raise CodesError(f"codes are {list(codes.shape)}; wanted [n_q, a multiple of {frames}]")
        for begin in range(0, codes.shape[1], frames):
            await self._push_block(codes[:, begin : begin + frames], rate, b"")

    async def _push_block(self, codes: np.ndarray[Any, Any], rate: int, copy: bytes) -> None:
        await self._space()
        self._session.push_codes(codes, time.monotonic_ns(), rate=rate, copy=copy)
        self._carrier.wake()

    async def _space(self) -> None:
        if not self._live:
            await self._until(lambda: self._session.room)

    # Coding here

    async def _prepare(self, codec: Codec) -> None:
        hello, ready = self._session.hello, self.ready
        if hello.send == "codes":
            self._encoder = await self._locally(codec.encoder, ready, hello.sample_rate, hello.copies > 0)
        if "codes" in hello.receive:
            self._decoder = await self._locally(codec.decoder, ready)

    async def _locally(self, work: Callable[..., T], *args: object) -> T:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "semanticodec")
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *args)

    # Events

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Drained):
                self._drained = event.number
            elif isinstance(event, Ended):
                self._ended = event
            elif isinstance(event, Refusal):
                self._settled = event
            else:
                self._inbox.put(event)
            if isinstance(event, Tune):
                self._settled = event
            elif isinstance(event, Marker) and event.tag == self._last_tag:
                self._markers.discard(event.kind)
        self._beat()

    def _beat(self) -> None:
        """Let everything that waits look again."""
        self._pulse.set()
        self._pulse = asyncio.Event()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            if self._ended is not None:
                raise ConnectionEnded(self._ended.code, self._ended.reason)
            await self._pulse.wait()
