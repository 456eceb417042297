"""The command line: ``semanticodec-client send | recv | loopback``.

Exit codes: 0 all is well; 1 something could not be done, and a line on the standard error says what and why; 2 the
command line makes no sense.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any

import numpy as np
import typer

from semanticodec.errors import SemantiCodecError
from semanticodec.wire.messages import Marker, Room

from .carrier import Retry
from .connection import Connection, connect
from .events import AudioChunk, CodesBlock, Gap, Left, Restarted, Samples
from .sound import Player, Recorder, microphone, paced, piped, read

app = typer.Typer(
    help="Talk, listen and measure through a semanticodec server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Url = Annotated[str, typer.Option(help="The server.", envvar="SEMANTICODEC_URL")]
Token = Annotated[str | None, typer.Option(help="Bearer token.", envvar="SEMANTICODEC_TOKEN")]
RoomName = Annotated[str, typer.Option(help="Who sends and who listens meet here.")]
Deadline = Annotated[float, typer.Option(min=0, help="Seconds to keep trying to connect.")]
SampleRate = Annotated[int, typer.Option(min=8000, max=192_000, help="Of pipes, microphone and loudspeaker (Hz).")]
Preset = Annotated[str | None, typer.Option(help="Wanted preset.  [default: the server's]")]
Local = Annotated[bool, typer.Option("--local", help="Code here, so that only codes are on the link (needs torch).")]
Latency = Annotated[int | None, typer.Option(min=0, help="Milliseconds that a block may wait for others.")]
Copies = Annotated[int, typer.Option(min=0, max=8, help="Redundant blocks in each message.")]
Entropy = Annotated[bool, typer.Option("--entropy", help="Ask for entropy-coded codes: fewer bits, more work.")]
Mic = Annotated[bool, typer.Option("--mic", help="Send what the microphone hears.")]

DEFAULT_URL = "ws://localhost:8765/"
GRACE, SETTLE = 10.0, 0.5
"""Seconds to wait for the end of a sound whose publisher has left: without flushing it, and having flushed it."""
CODEC_RATE = 16_000
"""Samples per second that blocks are counted in."""


@app.command()
def send(
    file: Annotated[str | None, typer.Argument(help="Sound file, or - for 16-bit mono samples on stdin.")] = None,
    mic: Mic = False,
    url: Url = DEFAULT_URL,
    room: RoomName = "main",
    token: Token = None,
    preset: Preset = None,
    local: Local = False,
    latency: Latency = None,
    copies: Copies = 0,
    entropy: Entropy = False,
    sample_rate: SampleRate = 16_000,
    deadline: Deadline = 30,
) -> None:
    """Publish a file, a pipe or the microphone in a room, at the speed of sound being made."""
    source, rate = _source(file, mic, sample_rate)

    async def run() -> None:
        codec = _codec(preset) if local else None
        options: dict[str, Any] = {"latency": latency, "copies": copies, "entropy": entropy} if local else {}
        async with connect(
            url,
            role="publish",
            room=room,
            token=token,
            preset=preset,
            send="codes" if local else "audio",
            sample_rate=rate,
            codec=codec,
            retry=Retry(deadline=deadline),
            **options,
        ) as s:
            async for piece in source:
                await s.push(piece)
            await s.flush()
            _say(_summary(s))

    _run(run())


@app.command()
def recv(
    out: Annotated[str | None, typer.Option("--out", "-o", help="Sound file, or - for 16-bit samples.")] = None,
    play: Annotated[bool, typer.Option("--play", help="Play it.")] = False,
    url: Url = DEFAULT_URL,
    room: RoomName = "main",
    token: Token = None,
    preset: Preset = None,
    local: Local = False,
    latency: Latency = None,
    copies: Copies = 0,
    entropy: Entropy = False,
    sample_rate: SampleRate = 16_000,
    deadline: Deadline = 30,
) -> None:
    """Listen in a room, until its publisher leaves."""
    if (out is None) != play:
        raise typer.BadParameter("say where the sound goes: --out FILE, --out - or --play")
    rate = 16_000 if local else sample_rate

    async def run() -> None:
        codec = _codec(preset) if local else None
        options: dict[str, Any] = {"latency": latency, "copies": copies, "entropy": entropy} if local else {}
        async with contextlib.AsyncExitStack() as stack:
            sink: Player | Recorder
            if out is None:
                sink = Player(rate)
                stack.enter_context(sink.playing())
            else:
                sink = Recorder(out, rate)
                stack.callback(sink.close)
            s = await stack.enter_async_context(
                connect(
                    url,
                    role="subscribe",
                    room=room,
                    token=token,
                    preset=preset,
                    receive=["codes" if local else "audio"],
                    sample_rate=rate,
                    codec=codec,
                    retry=Retry(deadline=deadline),
                    **options,
                )
            )
            await _listen(s, sink)
            if isinstance(sink, Player):
                sink.end()
                while sink.level:
                    await asyncio.sleep(0.05)
                _say(f"{s.stats.underruns} under-runs, played {s.stats.delay} ms after it came")
            _say(_summary(s))

    _run(run())


@app.command()
def loopback(
    file: Annotated[str | None, typer.Argument(help="Sound file, or - for 16-bit mono samples on stdin.")] = None,
    mic: Mic = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    preset: Preset = None,
    entropy: Entropy = False,
    sample_rate: SampleRate = 16_000,
    deadline: Deadline = 30,
) -> None:
    """Send sound through the server and back, and print how late it comes and how many bits it takes.

    The latency of a sample runs from when it was made to when it could be played: capture, network, coding, decoding.
    """
    source, rate = _source(file, mic, sample_rate)

    async def run() -> None:
        async with connect(
            url,
            role="transcode",
            token=token,
            preset=preset,
            receive=["codes", "audio"],
            sample_rate=rate,
            entropy=entropy,
            retry=Retry(deadline=deadline),
        ) as s:
            delays, gaps, codes = await _measure(s, source, rate)
            if not delays:
                raise SemantiCodecError("nothing came back")
            p50, p95, p99 = np.percentile(delays, [50, 95, 99])
            _say(f"latency {p50:.0f} / {p95:.0f} / {p99:.0f} ms (p50 / p95 / p99 of {len(delays)} chunks)")
            _say(f"codes {codes:.0f} bit/s net, {gaps} units lost")
            _say(_summary(s))

    _run(run())


def main() -> None:
    """Run the command line."""
    app()


async def _listen(s: Connection, sink: Player | Recorder) -> None:
    """Hand on what is heard, until the publisher has left and the last of its sound has come."""
    live = whole = False
    while True:
        try:
            # News of the room overtake sound that is still being decoded; what was flushed ends with a marker.
            async with asyncio.timeout(None if live or not sink.begun else SETTLE if whole else GRACE):
                item = await anext(s)
        except (StopAsyncIteration, TimeoutError):
            return
        if isinstance(item, AudioChunk | Restarted):
            whole = False
            sink.put(item)
            if isinstance(sink, Player):
                s.report(underruns=sink.buffer.underruns, delay=sink.buffer.delay // 1_000_000)
        elif isinstance(item, Marker):
            whole = item.flush
            if isinstance(sink, Recorder):
                sink.put(item)
        elif isinstance(item, Left):
            _say(f"connection lost ({item.reason}); trying again")
        elif isinstance(item, Room):
            live = item.live


async def _measure(s: Connection, source: AsyncIterator[Samples], rate: int) -> tuple[list[float], int, float]:
    """Return the delay of each chunk that comes back (ms), the units lost, and the net rate of the codes (bit/s)."""
    begin, made = math.inf, 0

    async def talk() -> None:
        nonlocal begin, made
        async for piece in source:
            made += len(piece)
            # The piece's last sample was made just now, or earlier if this task was kept waiting.
            begin = min(begin, time.monotonic() - made / rate)
            await s.push(piece)
        await s.finish()

    delays: list[float] = []
    gaps = bits = blocks = 0

    async def listen() -> None:
        nonlocal gaps, bits, blocks
        async for item in s:
            now = time.monotonic()
            if isinstance(item, AudioChunk):
                delays.append(1000 * (now - begin - item.at / rate))
            elif isinstance(item, Gap):
                gaps += item.stop - item.seq
            elif isinstance(item, CodesBlock):
                bits += item.codes.shape[1] * sum(s.ready.code_bits)
                blocks += 1

    await asyncio.gather(talk(), listen())
    return delays, gaps, bits * CODEC_RATE / max(1, blocks * s.ready.block)


def _source(file: str | None, mic: bool, sample_rate: int) -> tuple[AsyncIterator[Samples], int]:
    if (file is None) != mic:
        raise typer.BadParameter("say where the sound comes from: a file, - or --mic")
    if file is None:
        return microphone(sample_rate), sample_rate
    if file == "-":
        return piped(sys.stdin.buffer, sample_rate), sample_rate
    try:
        wave, rate = read(file)
    except SemantiCodecError as error:
        raise _failure(error) from error
    return paced(wave, rate), rate


def _summary(s: Connection) -> str:
    stats = s.stats
    return (
        f"gross {stats.gross_sent} bit/s sent, {stats.gross_received} received; {stats.sent} units sent, "
        f"{stats.received} received, {stats.lost} lost, {stats.recovered} recovered; {s.reconnects} reconnections"
    )


def _codec(preset: str | None) -> Any:
    from .local import load

    return load(preset) if preset else load()


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _failure(error: Exception) -> typer.Exit:
    _say(f"error: {error}")
    return typer.Exit(1)


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except SemantiCodecError as error:
        raise _failure(error) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


if __name__ == "__main__":
    main()
