"""The server over real sockets on this machine, with small random models."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import codec, noise
from typer.testing import CliRunner
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import chunk_of, samples_of
from semanticodec.wire.closing import Code
from semanticodec.wire.messages import (
    SUBPROTOCOL,
    Ack,
    Audio,
    Bye,
    Codes,
    Error,
    Hello,
    Marker,
    Missing,
    Ping,
    Pong,
    Ready,
    Resume,
    Room,
    Tune,
    decode,
    encode,
)
from server import shell
from server.__main__ import app
from server.auth import Grant, Tokens, hash_token
from server.config import Config
from server.engine import Work
from server.gate import AddressLimits
from server.limits import SECOND, Limits
from server.models import Models
from server.shell import Server

RATES = (100, 25)
BLOCK = 5120
CONFIG = Config(port=0, work=Work(batch=4, threads=1, load=100.0), drain=5.0)


def models() -> Models:
    return Models({rate: codec("mini", rate) for rate in RATES}, {100: "0123abcd", 25: "4567abcd"})


@contextlib.asynccontextmanager
async def serving(
    config: Config = CONFIG, load: Callable[[], Models] = models, clock: Callable[[], int] = time.monotonic_ns
) -> AsyncIterator[Server]:
    torch.set_num_threads(1)
    server = Server(config, load, clock)
    await server.start()
    assert await server.wait_ready()
    try:
        yield server
    finally:
        if not server.service.leaving:
            await server.drain()


def run(test: Callable[[], Awaitable[None]], seconds: float = 120) -> None:
    async def limited() -> None:
        async with asyncio.timeout(seconds):
            await test()

    asyncio.run(limited())


class Peer:
    """A client that notes every message."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.mute = False
        self.inbox: list[Any] = []
        self.ready: Ready | None = None
        self._sent = 0
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for data in self.ws:
                assert isinstance(data, bytes)
                self.inbox.append(decode(data))
                if isinstance(self.inbox[-1], Ping) and not self.mute:
                    await self.say(Pong(self.inbox[-1].nonce))
                self._news.set()
        self._news.set()

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.inbox if isinstance(message, kind)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._reader.done():
                raise ConnectionError(f"closed with {self.ws.close_code} {self.ws.close_reason}")
            self._news.clear()
            await self._news.wait()

    async def closed(self) -> tuple[int | None, str | None]:
        await self._reader
        return self.ws.close_code, self.ws.close_reason

    async def say(self, *messages: Any) -> None:
        for message in messages:
            await self.ws.send(encode(message))

    async def begin(self, request: Hello | Resume) -> Ready:
        await self.say(request)
        await self.until(lambda: bool(self.of(Ready)))
        self.ready = self.of(Ready)[-1]
        assert self.ready is not None
        return self.ready

    async def audio(self, wave: np.ndarray, begin: int = 0, size: int = 1280, *, flush: bool = True) -> None:
        """Send samples as f32 chunks, as fast as the server takes them, and a flush behind them."""
        for at in range(0, len(wave), size):
            await self.until(lambda: self._sent < max([self.of(Ready)[-1].limit, *(a.limit for a in self.of(Ack))]))
            await self.say(Audio(self._sent, begin + at, chunk_of(wave[at : at + size], "f32")))
            self._sent += 1
        if flush:
            kind = "audio"
            await self.say(Marker(1, self._sent, flush=True, kind=kind))

    def blocks(self) -> list[tuple[int, int, bytes]]:
        """Return (number, rate, bytes) of every block that came."""
        assert self.ready is not None
        geometry, found = models().geometry, []
        for message in self.of(Codes):
            rate = message.rate or self.ready.rate
            parts = geometry.split(message.data, rate)
            found += [(message.seq + i, rate, part) for i, part in enumerate(parts)]
        return found

    def codes(self) -> torch.Tensor:
        """Return the codes that came, at one rate."""
        parts = [torch.from_numpy(models().geometry.unpack(data, rate)) for _, rate, data in self.blocks()]
        return torch.cat(parts, 1)[None]

    def heard(self, form: str = "f32") -> np.ndarray:
        """Return the samples that came; their positions have no gaps."""
        samples, place = [], None
        for message in self.of(Audio):
            assert place in (None, message.at)
            samples.append(samples_of(message.data, form))
            place = message.at + len(samples[-1])
        return np.concatenate(samples)


@contextlib.asynccontextmanager
async def peer(server: Server, request: Hello | Resume | None = None, **options: Any) -> AsyncIterator[Peer]:
    options.setdefault("subprotocols", [Subprotocol(SUBPROTOCOL)])
    async with connect(f"ws://127.0.0.1:{server.port}/", compression=None, proxy=None, **options) as ws:
        one = Peer(ws)
        if request is not None:
            await one.begin(request)
        yield one


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return noise(samples, seed=seed, scale=0.2).clamp(-1, 1).numpy()


def publish(**options: Any) -> Hello:
    return Hello(**{"role": "publish", "send": "audio", "room": "den", "sample_format": "f32", **options})


def listen(*kinds: str, **options: Any) -> Hello:
    return Hello(**{"role": "subscribe", "receive": kinds, "room": "den", "sample_format": "f32", **options})


def test_a_room_hears_what_the_codec_makes_of_the_whole() -> None:
    async def test() -> None:
        wave = sound(4 * BLOCK + 1000)
        async with (
            serving() as server,
            peer(server, listen("codes")) as codes,
            peer(server, listen("audio", "codes")) as both,
            peer(server, publish()) as publisher,
        ):
            await publisher.audio(wave)
            for one in (codes, both):
                await one.until(lambda one=one: len(one.of(Marker)) >= len(one.of(Codes)) // 5)
                await one.until(lambda one=one: any(m.kind == "codes" for m in one.of(Marker)))
            await both.until(lambda: any(m.kind == "audio" for m in both.of(Marker)))
            wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)
            for one in (codes, both):
                assert torch.equal(one.codes()[:, :, : wanted.shape[2]], wanted)
                assert [seq for seq, *_ in one.blocks()] == list(range(5))
                assert [m.at for m in one.of(Marker) if m.kind == "codes"] == [len(wave)]
            whole = codec("mini", 100).decode(both.codes(), seed=0)[0].numpy()
            np.testing.assert_array_equal(both.heard(), whole.clip(-1, 1))
            assert [m.at for m in both.of(Marker) if m.kind == "audio"] == [len(wave)]  # padding from here on

    run(test)


def test_transcode_both_ways() -> None:
    async def test() -> None:
        wave = sound(3 * BLOCK)
        there = Hello("transcode", "audio", ("codes", "audio"), sample_format="f32")
        back = Hello("transcode", "codes", ("audio",), sample_format="f32")
        async with serving() as server, peer(server, there) as a, peer(server, back) as b:
            await a.audio(wave)
            await a.until(lambda: len(a.of(Marker)) == 2)
            assert torch.equal(a.codes(), codec("mini", 100).encode(torch.from_numpy(wave), 16000))
            for seq, rate, data in a.blocks():
                await b.say(Codes(seq, data, rate=rate))
            await b.say(Marker(1, 3, flush=True, at=len(wave)))
            await b.until(lambda: bool(b.of(Marker)))
            whole = codec("mini", 100).decode(a.codes(), seed=0)[0].numpy().clip(-1, 1)
            for one in (a, b):
                np.testing.assert_array_equal(one.heard(), whole)

    run(test)


def test_a_transcoder_hears_itself_when_a_listener_would() -> None:
    async def test() -> None:
        wave = sound(5 * BLOCK)
        hello = Hello("transcode", "audio", ("codes", "audio"), sample_format="f32")
        async with serving() as server, peer(server, hello) as one:
            await one.say(Tune(bundle=2))
            await one.audio(wave[: 3 * BLOCK + 320], flush=False)
            await one.until(lambda: len(one.blocks()) == 2 and bool(one.of(Audio)))
            # The third block is coded, and waits for the fourth to share its message.
            client = next(iter(server.service.clients.values()))
            while not client.bundle:
                await asyncio.sleep(0.01)
            codes, audio = (next(i for i, m in enumerate(one.inbox) if isinstance(m, kind)) for kind in (Codes, Audio))
            assert codes < audio
            await asyncio.sleep(0.2)
            assert len(one.heard()) < 2 * BLOCK
            await one.audio(wave[3 * BLOCK + 320 :], begin=3 * BLOCK + 320)
            await one.until(lambda: len(one.of(Marker)) == 2)
            size = len(one.blocks()[0][2])
            assert [len(m.data) // size for m in one.of(Codes)] == [2, 2, 1]
            whole = codec("mini", 100).decode(one.codes(), seed=0)[0].numpy().clip(-1, 1)
            np.testing.assert_array_equal(one.heard(), whole)

    run(test)


@pytest.mark.parametrize("receive", [("audio",), ("codes",), ("codes", "audio")])
def test_a_bye_behind_a_flush_is_answered_behind_all_that_comes_back(receive: tuple[str, ...]) -> None:
    async def test() -> None:
        wave = sound(4 * BLOCK + 1000)
        async with serving() as server, peer(server, Hello("transcode", "audio", receive, sample_format="f32")) as a:
            await a.audio(wave)
            await a.say(Bye())
            assert (await a.closed())[0] == Code.DONE
            assert a.inbox[-1] == Bye()
            assert len(a.of(Marker)) == len(receive)
            assert "audio" not in receive or len(a.heard()) == 5 * BLOCK
            assert "codes" not in receive or len(a.blocks()) == 5
            assert not server.service.clients

    run(test)


def test_a_bye_is_not_waited_for_without_end() -> None:
    async def test() -> None:
        now = [0]
        hello = Hello("transcode", "audio", ("audio",), sample_format="f32")
        async with serving(clock=lambda: now[0]) as server, peer(server, publish()) as a, peer(server, hello) as b:
            clients = list(server.service.clients.values())
            for client in clients:
                client.encode.put = lambda _: None  # an engine that gets nowhere
            for one in (a, b):
                await one.say(Bye())
            assert (await a.closed())[0] == Code.DONE
            while any(client.until is None for client in clients):
                await asyncio.sleep(0.01)
            server.service.sweep()
            assert len(server.service.clients) == 2
            now[0] = CONFIG.limits.finish
            server.service.sweep()
            assert not server.service.clients
            assert not server.service.rooms
            assert (await b.closed())[0] == Code.DONE

    run(test)


def test_sixteen_bit_audio_at_48_khz() -> None:
    async def test() -> None:
        wave = (sound(48000) * 32768).round().clip(-32768, 32767).astype(np.float32) / 32768
        hello = Hello("transcode", "audio", ("codes", "audio"), sample_rate=48000)
        async with serving() as server, peer(server, hello) as a:
            for i in range(0, 48000, 960):
                await a.say(Audio(i // 960, i, chunk_of(wave[i : i + 960], "s16")))
            await a.say(Marker(1, 50, flush=True, kind="audio"))
            await a.until(lambda: len(a.of(Marker)) == 2)
            wanted = codec("mini", 100).encode(torch.from_numpy(wave), 48000)
            assert torch.equal(a.codes()[:, :, : wanted.shape[2]], wanted)
            assert len(a.heard("s16")) == 3 * len(a.blocks()) * BLOCK
            assert {m.at for m in a.of(Marker)} == {16000, 48000}

    run(test)


def test_a_late_joiner_starts_at_the_next_block() -> None:
    async def test() -> None:
        wave = sound(5 * BLOCK)
        async with serving() as server, peer(server, listen("codes")) as early, peer(server, publish()) as publisher:
            await publisher.audio(wave[: 3 * BLOCK], flush=False)
            await early.until(lambda: len(early.blocks()) == 2)
            async with peer(server, listen("codes", "audio")) as late:
                assert late.ready is not None
                assert late.ready.codes_next == 2
                await publisher.audio(wave[3 * BLOCK :], begin=3 * BLOCK)
                await late.until(lambda: len(late.of(Marker)) == 2)
                await early.until(lambda: bool(early.of(Marker)))
                assert late.blocks() == early.blocks()[2:]
                assert late.of(Codes)[0].at is None  # it is number x block
                assert late.of(Audio)[0].at == 2 * BLOCK

    run(test)


def test_the_rate_switches_in_mid_stream() -> None:
    async def test() -> None:
        wave = sound(6 * BLOCK)
        hello = Hello("transcode", "audio", ("codes", "audio"), sample_format="f32")
        async with serving() as server, peer(server, hello) as a:
            await a.audio(wave[: 3 * BLOCK], flush=False, size=BLOCK)
            await a.until(lambda: len(a.blocks()) == 2)
            await a.say(Tune(rate=25))
            await a.until(lambda: bool(a.of(Tune)))
            await a.say(Tune(rate=50))
            await a.until(lambda: bool(a.of(Error)))
            assert a.of(Error)[0].code == Code.BAD_REQUEST
            await a.audio(wave[3 * BLOCK :], begin=3 * BLOCK, size=BLOCK)
            await a.until(lambda: len(a.of(Marker)) == 2)
            rates = [rate for _, rate, _ in a.blocks()]
            assert rates in ([100] * 2 + [25] * 4, [100] * 3 + [25] * 3)
            switch = rates.index(25)
            for rate, begin, end in ((100, 0, switch), (25, switch, 6)):
                whole = codec("mini", rate).encode(torch.from_numpy(wave), 16000)
                frames = BLOCK * rate // 32000
                for seq, _, data in a.blocks()[begin:end]:
                    codes = models().geometry.unpack(data, rate)
                    np.testing.assert_array_equal(codes, whole[0, :, seq * frames : (seq + 1) * frames].numpy())
            assert len(a.heard()) == 6 * BLOCK

    run(test)


def test_copies_reach_those_who_want_them() -> None:
    async def test() -> None:
        wave = sound(4 * BLOCK)
        async with serving() as server, peer(server, publish()) as publisher:
            async with peer(server, listen("codes", copies=2)) as listener:
                await publisher.audio(wave)
                await listener.until(lambda: bool(listener.of(Marker)))
                low = codec("mini", 25).encode(torch.from_numpy(wave), 16000)
                geometry = models().geometry
                assert [bool(m.copies) for m in listener.of(Codes)] == [False, True, True, True]
                for message in listener.of(Codes)[1:]:
                    copies = geometry.split(message.copies, 25)
                    for i, copy in enumerate(copies):
                        at = 4 * (message.seq - len(copies) + i)
                        np.testing.assert_array_equal(geometry.unpack(copy, 25), low[0, :, at : at + 4].numpy())
                    assert len(copies) == min(2, message.seq)
                await listener.say(Bye())
                await listener.closed()
            tuned = next(iter(server.service.clients.values())).tuned
            while tuned is not None and tuned.copies:  # nobody wants them any more
                await asyncio.sleep(0.01)
                tuned = next(iter(server.service.clients.values())).tuned

    run(test)


@pytest.mark.parametrize("side", ["publisher", "listener"])
def test_a_session_goes_on_after_its_connection_was_cut(side: str) -> None:
    async def test() -> None:
        wave = sound(6 * BLOCK)
        async with (
            serving() as server,
            peer(server, listen("codes")) as listener,
            peer(server, publish()) as publisher,
        ):
            await publisher.audio(wave[: 3 * BLOCK], flush=False)
            await listener.until(lambda: len(listener.blocks()) == 2)
            victim = publisher if side == "publisher" else listener
            assert victim.ready is not None
            got = len(listener.blocks()) - 1  # as if the last one had been lost on the way
            victim.ws.transport.abort()
            await victim._reader
            next_ = dict(codes_next=got) if side == "listener" else {}
            async with peer(server, Resume(victim.ready.session, **next_)) as again:
                assert again.ready is not None
                assert again.ready.resumed
                source = again if side == "publisher" else publisher
                source._sent = again.ready.next if side == "publisher" else publisher._sent
                assert source._sent <= 12
                await source.audio(wave[source._sent * 1280 :], begin=source._sent * 1280)
                sink = again if side == "listener" else listener
                await sink.until(lambda: bool(sink.of(Marker)))
                blocks = listener.blocks()[:got] + again.blocks() if side == "listener" else listener.blocks()
                assert [seq for seq, *_ in blocks] == list(range(6))
                codes = [models().geometry.unpack(data, rate) for _, rate, data in blocks]
                wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)[0].numpy()
                np.testing.assert_array_equal(np.concatenate(codes, 1), wanted)

    run(test)


def test_a_resume_takes_over_from_a_half_open_connection() -> None:
    async def test() -> None:
        async with serving() as server, peer(server, listen("codes")) as old:
            assert old.ready is not None
            async with peer(server, Resume(old.ready.session)):
                code, _ = await old.closed()
                assert code == Code.REPLACED
            async with peer(server) as stranger:
                await stranger.say(Resume(bytes(16)))
                assert (await stranger.closed())[0] == Code.UNKNOWN_SESSION

    run(test)


def test_sessions_that_are_not_resumed_end() -> None:
    async def test() -> None:
        config = replace(CONFIG, limits=Limits(keep=SECOND // 5))
        async with serving(config) as server, peer(server, publish()) as gone:
            gone.ws.transport.abort()
            while server.service.clients:
                await asyncio.sleep(0.05)
            async with peer(server, publish()):
                assert len(server.service.clients) == 1

    run(test)


def test_a_full_server_says_when_to_come_back() -> None:
    async def test() -> None:
        async with serving(replace(CONFIG, work=Work(batch=2, slots=2, threads=1, load=100.0))) as server:
            hello = Hello("transcode", "audio", ("audio",))
            async with peer(server, hello) as first, peer(server) as second:
                await second.say(hello)
                code, _ = await second.closed()
                assert code == Code.FULL
                assert 1000 <= second.of(Error)[0].retry <= 60_000
                await first.say(Bye())
                await first.closed()
                async with peer(server, hello):
                    pass

    run(test)


SECRET = "a long secret"
TOKENS = Tokens(
    [
        Grant("speaker", hash_token(SECRET), ("publish",), "team-", 1),
        Grant("hearer", hash_token("another"), ("subscribe",)),
    ]
)


def test_tokens_allow_what_they_say() -> None:
    async def test() -> None:
        config = replace(CONFIG, tokens=TOKENS, addresses=AddressLimits(failures=1000))
        header = {"Authorization": f"Bearer {SECRET}"}

        async def outcome(request: Hello | Resume, **options: Any) -> int | None:
            async with peer(server, **options) as one:
                await one.say(request)
                await one.until(lambda: bool(one.inbox))
                return None if one.of(Ready) else (await one.closed())[0]

        async with serving(config) as server:
            room = publish(room="team-a")
            assert await outcome(room) == Code.BAD_TOKEN
            assert await outcome(replace(room, token="wrong")) == Code.BAD_TOKEN
            assert await outcome(replace(room, token="another")) == Code.FORBIDDEN
            assert await outcome(publish(token=SECRET)) == Code.FORBIDDEN
            async with peer(server, room, additional_headers=header) as one:
                assert one.ready is not None
                assert await outcome(publish(room="team-b", token=SECRET)) == Code.TOO_MANY
                assert await outcome(Resume(one.ready.session, token="another")) == Code.UNKNOWN_SESSION
                assert await outcome(Resume(one.ready.session, token=SECRET)) is None

    run(test)


@pytest.mark.parametrize("guesses", [30, pytest.param(3000, marks=pytest.mark.slow)])
def test_bad_tokens_are_soon_turned_away_unread(guesses: int) -> None:
    async def test() -> None:
        limits = AddressLimits(connections=10_000, opens=10_000, messages=100_000)
        # The clock stands still, so that no time is too short for all of them.
        async with serving(replace(CONFIG, tokens=TOKENS, addresses=limits), clock=lambda: 1) as server:
            codes = []
            for _ in range(guesses):
                async with peer(server) as one:
                    await one.say(publish(room="team-a", token="guess"))
                    codes.append((await one.closed())[0])
            assert codes == [Code.BAD_TOKEN] * 9 + [Code.TOO_MANY] * (guesses - 9)
            async with peer(server) as one:  # not even a good one, for a while
                await one.say(publish(room="team-a", token=SECRET))
                assert (await one.closed())[0] == Code.TOO_MANY

    run(test)


def test_strange_pages_and_versions_are_refused() -> None:
    async def test() -> None:
        async with serving(replace(CONFIG, origins=("https://friend.example",))) as server:
            for origin, code in (("https://evil.example", Code.BAD_ORIGIN), ("null", Code.BAD_ORIGIN)):
                async with peer(server, origin=Origin(origin)) as one:
                    assert (await one.closed())[0] == code
            for origin in ("https://friend.example", f"http://127.0.0.1:{server.port}"):
                async with peer(server, listen("codes"), origin=Origin(origin)):
                    pass
            async with peer(server, subprotocols=None) as one:
                code, reason = await one.closed()
                assert code == Code.BAD_VERSION
                assert SUBPROTOCOL in str(reason)

    run(test)


async def http(server: Server, path: str) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def test_plain_http(tmp_path: Path) -> None:
    web = tmp_path / "web"
    (web / "sub").mkdir(parents=True)
    (web / "index.html").write_text("<p>hello")
    (web / "sub" / "app.js").write_text("1")
    (web / "notes.txt").write_text("not for you")
    (web / ".hidden.js").write_text("not for you")
    (tmp_path / "secret.js").write_text("not for you")

    async def test() -> None:
        async with serving(replace(CONFIG, web=web)) as server, peer(server, publish()) as one:
            assert (await http(server, "/healthz"))[0] == 200
            assert (await http(server, "/readyz"))[0] == 200
            status, headers, body = await http(server, "/?room=den")
            assert (status, body) == (200, b"<p>hello")
            assert headers["content-type"].startswith("text/html")
            assert "default-src 'self'" in headers["content-security-policy"]
            assert (await http(server, "/sub/app.js"))[1]["content-type"].startswith("text/javascript")
            for path in ("/notes.txt", "/.hidden.js", "/../secret.js", "/%2e%2e/secret.js", "//etc/passwd", "/sub"):
                status, _, body = await http(server, path)
                assert (status, b"not for you" in body) == (404, False)
            await one.audio(sound(2 * BLOCK))
            await asyncio.sleep(0.2)
            text = (await http(server, "/metrics"))[2].decode()
            for line in ("semanticodec_connections 1.0", "semanticodec_sessions 1.0", "semanticodec_ready 1.0"):
                assert line in text
            assert 'semanticodec_engine_streams{side="encode"} 1.0' in text

    run(test)


def test_not_ready_until_the_models_are_warm() -> None:
    async def test() -> None:
        def slow() -> Models:
            time.sleep(0.5)
            return models()

        server = Server(CONFIG, slow)
        await server.start()
        assert (await http(server, "/healthz"))[0] == 200
        assert (await http(server, "/readyz"))[0] == 503
        async with peer(server) as early:
            await early.say(publish())
            assert (await early.closed())[0] == Code.FULL
            assert early.of(Error)[0].retry
        assert await server.wait_ready()
        assert (await http(server, "/readyz"))[0] == 200
        await server.drain()

    run(test)


def test_drain_sends_everybody_elsewhere() -> None:
    async def test() -> None:
        async with serving(replace(CONFIG, elsewhere="ws://b.example/")) as server:
            async with peer(server, publish()) as one, peer(server) as silent:
                drained = asyncio.create_task(server.drain())
                assert (await one.closed())[0] == Code.ELSEWHERE
                bye = one.of(Bye)[0]
                assert (bye.code, bye.url) == (Code.ELSEWHERE, "ws://b.example/")
                assert (await silent.closed())[0] == Code.ELSEWHERE
                await drained
            with pytest.raises(OSError, match=r"[Cc]onnect"):
                await http(server, "/healthz")

    run(test)


def test_the_silent_and_the_slow_are_closed() -> None:
    async def test() -> None:
        limits = Limits(handshake=SECOND // 2, idle=SECOND, ping=SECOND // 2)
        async with serving(replace(CONFIG, limits=limits)) as server:
            async with peer(server) as mute, peer(server, listen("codes")) as idle:
                idle.mute = True
                assert (await mute.closed())[0] == Code.SLOW_HANDSHAKE
                assert (await idle.closed())[0] == Code.IDLE
                assert idle.of(Ping)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websoc")  # and no more
            assert await asyncio.wait_for(reader.read(), 10) is not None
            writer.close()

    run(test)


def test_a_reader_that_stops_is_dropped_to_live_and_memory_does_not_grow() -> None:
    async def test() -> None:
        wave = sound(30 * BLOCK)
        hello = listen("audio", sample_rate=192_000)
        config = replace(CONFIG, limits=Limits(slow_high=4, slow_low=2, idle=600 * SECOND))
        async with (
            serving(config) as server,
            peer(server, publish()) as publisher,
            peer(server, listen("codes")) as live,
            peer(server, hello) as slow,
        ):
            transport: Any = slow.ws.transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            transport.pause_reading()
            for n in range(30):  # no faster than this machine lets the other listener follow
                await publisher.audio(wave[n * BLOCK :][:BLOCK], n * BLOCK, flush=n == 29)
                await live.until(lambda n=n: len(live.blocks()) >= n)
            await live.until(lambda: bool(live.of(Marker)))
            assert [seq for seq, *_ in live.blocks()] == list(range(30))
            for client in server.service.clients.values():
                if client.session.audio_out is not None:
                    sender = client.session.audio_out.sender
                    while not client.session.dropped:
                        await asyncio.sleep(0.01)
                    assert sender.kept_bytes <= client.session.limits.window_bytes
            transport.resume_reading()
            await slow.until(lambda: any(m.reason == "slow" for m in slow.of(Missing)))
            await slow.until(lambda: bool(slow.of(Marker)))
            missing = sum(m.stop - m.first for m in slow.of(Missing))
            server.service.sweep()
            assert f"semanticodec_dropped_units_total {missing}.0" in server.metrics.text().decode()
            assert missing + len(slow.of(Audio)) == slow.of(Audio)[-1].seq + 1

    run(test)


def test_noise_from_strangers_does_not_disturb_the_others() -> None:
    async def test() -> None:
        rng = np.random.default_rng(0)
        wave = sound(4 * BLOCK)
        limits = AddressLimits(opens=10_000, connections=1000)
        async with (
            serving(replace(CONFIG, addresses=limits)) as server,
            peer(server, listen("codes")) as listener,
            peer(server, publish()) as publisher,
        ):
            task = asyncio.create_task(publisher.audio(wave))
            good = encode(publish(room="other"))
            seen = set()
            for i in range(60):
                async with peer(server) as one:
                    data = bytearray(good if i % 2 else rng.bytes(rng.integers(1, 300)))
                    data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
                    with contextlib.suppress(ConnectionClosed):
                        await one.ws.send(bytes(data))
                        await one.ws.send("text" if i % 3 else bytes(600_000))
                    seen.add((await one.closed())[0])
            assert seen <= {int(code) for code in Code} | {1009}
            assert Code.BAD_MESSAGE in seen
            await task
            await listener.until(lambda: bool(listener.of(Marker)))
            assert torch.equal(listener.codes(), codec("mini", 100).encode(torch.from_numpy(wave), 16000))

    run(test)


def test_codes_beyond_the_codebook_are_the_publishers_fault() -> None:
    async def test() -> None:
        hello = Hello("publish", "codes", room="den")
        async with serving() as server, peer(server, listen("audio")) as listener, peer(server, hello) as publisher:
            good = models().geometry.pack(np.full((2, 16), 3), 100)
            bad = models().geometry.pack(np.full((2, 16), 63), 100)
            await publisher.say(Codes(0, good), Codes(1, bad))
            assert (await publisher.closed())[0] == Code.BAD_MESSAGE
            await listener.until(lambda: bool(listener.of(Audio)))

    run(test)


def test_rooms_tell_who_is_there() -> None:
    async def test() -> None:
        async with serving() as server, peer(server, listen("codes", features=("room",))) as first:
            await first.until(lambda: first.of(Room) == [Room(False, 1)])
            async with peer(server, publish()) as publisher:
                await first.until(lambda: first.of(Room)[-1] == Room(True, 1))
                async with peer(server) as second:
                    await second.say(publish())
                    assert (await second.closed())[0] == Code.ROOM_TAKEN
                await publisher.say(Bye())
                await publisher.closed()
            await first.until(lambda: first.of(Room)[-1] == Room(False, 1))
            await first.say(Ping(5))
            await first.until(lambda: first.of(Pong) == [Pong(5)])

    run(test)


def test_addresses_are_limited_and_proxies_believed() -> None:
    async def test() -> None:
        config = replace(CONFIG, addresses=AddressLimits(connections=2, sessions=1), proxies=("127.0.0.1",))
        async with serving(config) as server:
            a, b = ({"X-Forwarded-For": f"6.6.6.6, {name}"} for name in ("10.0.0.1", "10.0.0.2"))
            async with (
                peer(server, listen("codes"), additional_headers=a),
                peer(server, listen("codes"), additional_headers=b),
                peer(server, additional_headers=a) as second,
                peer(server, additional_headers=a) as third,
            ):
                assert (await third.closed())[0] == Code.TOO_MANY
                await second.say(listen("codes"))
                assert (await second.closed())[0] == Code.TOO_MANY

    run(test)


async def idle_connections(count: int) -> float:
    """Hold so many idle connections, and return the worst delay (s) of 20 blocks of a healthy pair meanwhile."""
    limits = AddressLimits(connections=10_000, opens=10_000, sessions=10_000)
    config = replace(CONFIG, addresses=limits, limits=Limits(handshake=600 * SECOND), connections=10_000)
    async with serving(config) as server, contextlib.AsyncExitStack() as stack:
        sockets = []
        for _ in range(count):
            url = f"ws://127.0.0.1:{server.port}/"
            options: Any = {"subprotocols": [SUBPROTOCOL], "compression": None, "ping_interval": None, "proxy": None}
            sockets.append(await stack.enter_async_context(connect(url, **options)))
        listener = await stack.enter_async_context(peer(server, listen("codes")))
        publisher = await stack.enter_async_context(peer(server, publish()))
        delays = []
        wave = sound(20 * BLOCK + 240)
        await publisher.audio(wave[:240], flush=False)
        for n in range(20):
            begin = time.monotonic()
            await publisher.audio(
                wave[240 + n * BLOCK : 240 + (n + 1) * BLOCK], begin=240 + n * BLOCK, size=BLOCK, flush=False
            )
            await listener.until(lambda n=n: len(listener.blocks()) == n + 1)
            delays.append(time.monotonic() - begin)
        assert len(server._sockets) == count + 2
        return max(delays)


def test_two_hundred_idle_connections() -> None:
    async def test() -> None:
        assert await idle_connections(200) < 5

    run(test)


@pytest.mark.slow
def test_two_thousand_idle_connections() -> None:
    async def test() -> None:
        assert await idle_connections(2000) < 5

    run(test, 600)


def test_the_hash_is_sha_256(tmp_path: Path) -> None:
    assert hash_token(SECRET) == hashlib.sha256(SECRET.encode()).hexdigest()
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": [{"name": "a", "sha256": hash_token(SECRET)}]}))
    grant = Tokens.read(path).check(SECRET)
    assert grant is not None
    assert grant.name == "a"


def test_flags_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    async def run_(config: Config) -> bool:
        seen.append(config)
        return len(seen) < 3

    monkeypatch.setattr("server.__main__.run", run_)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"tokens": [{"name": "a", "sha256": hash_token(SECRET)}]}))
    call = CliRunner().invoke
    environment = {"SEMANTICODEC_PORT": "7", "SEMANTICODEC_ORIGINS": "https://a, https://b", "SEMANTICODEC_KEEP": "2.5"}
    assert call(app, [], env=environment).exit_code == 0
    assert (seen[0].port, seen[0].origins, seen[0].limits.keep) == (7, ("https://a", "https://b"), 5 * SECOND // 2)
    flags = ["--tokens", str(path), "--batch", "3", "--per-address", "9", "--presets", "mini-25"]
    assert call(app, [*flags, "--port", "8"], env=environment).exit_code == 0
    assert (seen[1].port, seen[1].work.batch, seen[1].presets) == (8, 3, ("mini-25",))
    assert (seen[1].addresses.connections, seen[1].addresses.sessions) == (9, 9)
    # An address may send as much as its sessions need: 50 chunks of 20 ms a second each.
    assert seen[0].addresses.messages >= 50 * seen[0].addresses.sessions
    assert seen[1].addresses.messages >= 50 * 9
    assert seen[1].tokens.check("wrong") is None
    assert call(app, []).exit_code == 1  # the models could not be loaded
    assert call(app, ["--cert", "x"]).exit_code == 2
    missing = call(app, ["--tokens", str(tmp_path / "none.json")])
    assert missing.exit_code == 1
    assert "none.json" in missing.output


def test_sigterm_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "load_models", lambda *_: models())
    torch.set_num_threads(1)

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        task = asyncio.create_task(shell.run(replace(CONFIG, port=port)))
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = await reader.read()
                writer.close()
                if b" 200 " in answer:
                    break
            await asyncio.sleep(0.05)
        url = f"ws://127.0.0.1:{port}/ws"
        async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, proxy=None) as ws:
            one = Peer(ws)
            await one.begin(publish())
            os.kill(os.getpid(), signal.SIGTERM)
            assert (await one.closed())[0] == Code.ELSEWHERE
        assert await task

    run(test)


def test_logs_are_json(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "semanticodec.server")

    async def test() -> None:
        async with serving() as server, peer(server, publish(token="not to be seen")):
            pass

    run(test)
    lines = [json.loads(shell.JsonFormatter().format(record)) for record in caplog.records]
    begun = next(line for line in lines if line["event"] == "begun")
    assert (begun["level"], begun["role"], begun["address"]) == ("info", "publish", "127.0.0.1")
    assert "not to be seen" not in json.dumps(lines)


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *subject, "-keyout", key, "-out", cert], check=True, capture_output=True)
    with pytest.raises(ConfigError, match="not usable"):
        replace(CONFIG, certificate=(key, cert)).tls()

    async def test() -> None:
        context = ssl.create_default_context(cafile=cert)
        async with serving(replace(CONFIG, certificate=(cert, key), host="localhost")) as server:
            url = f"wss://localhost:{server.port}/"
            options: Any = {"subprotocols": [SUBPROTOCOL], "compression": None, "proxy": None}
            async with connect(url, ssl=context, **options) as ws:
                assert (await Peer(ws).begin(listen("codes"))).presets == ("mini-100", "mini-25")

    run(test)


@pytest.mark.slow
def test_memory_is_flat_over_thirty_minutes() -> None:
    def resident() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    async def test() -> None:
        hello = Hello("transcode", "audio", ("codes", "audio"), sample_format="f32")
        minute = sound(60 * 16000)
        async with serving() as server, peer(server, hello) as one:
            sizes = []
            for n in range(30):
                await one.audio(minute, begin=n * len(minute), size=BLOCK, flush=False)
                one.inbox[:] = [m for m in one.inbox if isinstance(m, Ready | Ack)][-2:]
                assert one.ready is not None
                one.inbox.insert(0, one.ready)
                sizes.append(resident())
                await one.say(Ack(0))
            assert sizes[-1] - sizes[4] < 8 * 1024, sizes  # kB

    run(test, 850)
