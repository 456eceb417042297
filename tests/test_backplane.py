"""Several servers and one Redis: rooms that are heard everywhere, sessions that move, a server that is killed."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_server import BLOCK, CONFIG, Peer, listen, models, peer, publish, run, serving, sound
from tiny import codec
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from semanticodec.wire.blocks import Block
from semanticodec.wire.closing import Code
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import SUBPROTOCOL, Audio, Bye, Codes, Hello, Marker, Missing, Resume, Room, Tune
from server.backplane import Backplane, Feed, Place
from server.config import Config
from server.lanes import Mark
from server.limits import SECOND, Limits
from server.shell import Server

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    port = free_port()
    quiet = ["--save", "", "--appendonly", "no", "--port", str(port), "--bind", "127.0.0.1"]
    with subprocess.Popen(["redis-server", *quiet], stdout=subprocess.DEVNULL) as process:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


@contextlib.asynccontextmanager
async def two(redis: str, config: Config = CONFIG) -> AsyncIterator[tuple[Server, Server]]:
    shared = replace(config, backplane=redis)
    async with serving(shared) as a, serving(shared) as b:
        yield a, b


def test_what_is_written_is_read(redis: str) -> None:
    async def test() -> None:
        one, other = Backplane(redis, 5), Backplane(redis, 5)
        seen, lost = [], []
        units = [
            Block(b"abc", 25, 7, b"d"),
            Lost(1, 4, "source"),
            Mark(True, None, 9),
            Mark(False, 3, 0),
            Block(b"e", 100, 0),
        ]
        other.follow("r", Place(), seen.append)
        feed = Feed(one, "r", b"session", Place(), 0, lost.append)
        for i, unit in enumerate(units):
            feed.put(unit, i)
        while len(seen) < len(units):
            await asyncio.sleep(0.01)
        assert [entry.unit for entry in seen] == units
        assert [entry.first for entry in seen] == [0, 1, 4, 4, 4]
        assert [entry.place.id for entry in seen] == ["1-0", "4-0", "4-1", "4-2", "5-0"]
        assert await one.worked_off("r", b"session") == 4
        assert await one.since("r", 4) == seen[2:]
        rival = Feed(other, "r", b"session", Place(2), 0, lost.append)
        rival.put(Block(b"x", 25, 0), 0)
        while not lost:
            await asyncio.sleep(0.01)
        assert "another server" in lost[0]
        assert len(await one.since("r", 0)) == len(units)
        assert await one.claim("r", b"session")
        assert await other.claim("r", b"session")
        assert not await other.claim("r", b"another")
        await one.release("r", b"another")
        assert not await other.claim("r", b"another")
        await one.release("r", b"session")
        assert await other.claim("r", b"another")
        feed.close()
        await one.close()
        await other.close()

    run(test)


def test_a_room_is_heard_on_another_server(redis: str) -> None:
    async def test() -> None:
        wave = sound(5 * BLOCK)
        async with (
            two(redis) as (a, b),
            peer(b, listen("codes", "audio", room="wide")) as far,
            peer(a, publish(room="wide")) as publisher,
            peer(b) as rival,
        ):
            await rival.say(publish(room="wide"))
            assert (await rival.closed())[0] == Code.ROOM_TAKEN
            await publisher.audio(wave[: 3 * BLOCK], flush=False)
            await far.until(lambda: len(far.blocks()) == 2)
            async with peer(b, listen("codes", room="wide")) as late:
                assert late.ready is not None
                assert late.ready.codes_next == 2
                await publisher.audio(wave[3 * BLOCK :], begin=3 * BLOCK)
                await far.until(lambda: len(far.of(Marker)) == 2)
                await late.until(lambda: bool(late.of(Marker)))
                assert late.blocks() == far.blocks()[2:]
            assert torch.equal(far.codes(), codec("mini", 100).encode(torch.from_numpy(wave), 16000))
            whole = codec("mini", 100).decode(far.codes(), seed=0)[0].numpy().clip(-1, 1)
            np.testing.assert_array_equal(far.heard(), whole)
            await publisher.say(Bye())
            await publisher.closed()
            for _ in range(100):
                async with peer(b) as next_:
                    with contextlib.suppress(ConnectionError):  # taken still
                        await next_.begin(publish(room="wide"))
                        return
                await asyncio.sleep(0.05)
            pytest.fail("the room was not given back")

    run(test)


def test_what_was_said_before_a_bye_is_heard_everywhere(redis: str) -> None:
    async def test() -> None:
        wave = sound(6 * BLOCK + 1000)
        async with (
            two(redis) as (a, b),
            peer(a, listen("audio", room="last", features=("room",))) as near,
            peer(b, listen("codes", room="last", features=("room",))) as far,
            peer(a, publish(room="last")) as publisher,
        ):
            await far.until(lambda: Room(True, 1) in far.of(Room))  # live, though the publisher is elsewhere
            await publisher.audio(wave)
            await publisher.say(Bye())
            await publisher.closed()
            await near.until(lambda: Room(True, 1) in near.of(Room) and not near.of(Room)[-1].live)
            assert len(near.heard()) == 7 * BLOCK
            assert [m.at for m in near.of(Marker)] == [len(wave)]
            assert isinstance(near.inbox[-1], Room)
            await far.until(lambda: bool(far.of(Marker)) and not far.of(Room)[-1].live)
            assert len(far.blocks()) == 7
            async with peer(b, publish(room="last")):
                await far.until(lambda: far.of(Room)[-1].live)
                await near.until(lambda: near.of(Room)[-1].live)
            await asyncio.sleep(1.2)  # a publisher without a connection keeps its room
            assert far.of(Room)[-1].live
            assert near.of(Room)[-1].live

    run(test)


def test_a_listener_moves_without_losing_or_doubling_a_block(redis: str) -> None:
    async def test() -> None:
        wave = sound(8 * BLOCK)
        async with (
            two(redis) as (a, b),
            peer(a, publish(room="moving")) as publisher,
            peer(a, listen("codes", room="moving")) as listener,
        ):
            await publisher.audio(wave[: 4 * BLOCK], flush=False)
            await listener.until(lambda: len(listener.blocks()) == 3)
            assert listener.ready is not None
            listener.ws.transport.abort()
            await publisher.audio(wave[4 * BLOCK : 6 * BLOCK], begin=4 * BLOCK, flush=False)
            async with peer(b, Resume(listener.ready.session, codes_next=2)) as again:
                await publisher.audio(wave[6 * BLOCK :], begin=6 * BLOCK)
                await again.until(lambda: bool(again.of(Marker)))
                blocks = listener.blocks()[:2] + again.blocks()
                assert [seq for seq, *_ in blocks] == list(range(8))
                codes = [models().geometry.unpack(data, rate) for _, rate, data in blocks]
                wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)[0].numpy()
                np.testing.assert_array_equal(np.concatenate(codes, 1), wanted)
                async with peer(a, Resume(listener.ready.session, codes_next=8)) as back:  # what is there is old
                    await back.say(Bye())
                    await back.closed()

    run(test)


def test_a_listener_to_sound_that_moves_is_told_of_what_it_lacks(redis: str) -> None:
    async def test() -> None:
        wave = sound(8 * BLOCK)
        async with (
            two(redis) as (a, b),
            peer(a, publish(room="heard")) as publisher,
            peer(a, listen("audio", room="heard")) as listener,
            peer(b, listen("codes", room="heard")) as witness,
        ):
            await publisher.audio(wave[: 4 * BLOCK], flush=False)
            await listener.until(lambda: len(listener.of(Audio)) >= 2)
            assert listener.ready is not None
            listener.ws.transport.abort()
            await publisher.audio(wave[4 * BLOCK : 6 * BLOCK], begin=4 * BLOCK, flush=False)
            await witness.until(lambda: len(witness.blocks()) == 5)
            last = listener.of(Audio)[-1]
            async with peer(b, Resume(listener.ready.session, audio_next=last.seq + 1)) as again:
                await again.until(lambda: bool(again.of(Missing)))
                assert again.of(Missing) == [Missing(last.seq + 1, last.seq + 2, "window", "audio", 1)]
                await publisher.audio(wave[6 * BLOCK :], begin=6 * BLOCK)
                await again.until(lambda: bool(again.of(Marker)))
                first = again.of(Audio)[0]
                assert (first.seq, first.at) == (last.seq + 2, 5 * BLOCK)
                assert again.of(Marker)[0].at == 8 * BLOCK

    run(test)


def test_a_transcoder_moves_and_is_told_of_the_gap(redis: str) -> None:
    async def test() -> None:
        wave = sound(8 * BLOCK)
        hello = Hello("transcode", "audio", ("codes", "audio"), sample_format="f32")
        async with two(redis) as (a, b), peer(a, hello) as one:
            await one.say(Tune(rate=50))
            await one.audio(wave[: 4 * BLOCK], flush=False)
            await one.until(lambda: len(one.blocks()) == 3 and bool(one.of(Audio)))
            assert one.ready is not None
            last, sent = one.of(Audio)[-1], one._sent
            await asyncio.sleep(0.1)  # so that what holds now is remembered
            drained = asyncio.create_task(a.drain())
            assert (await one.closed())[0] == Code.ELSEWHERE
            await drained
            request = Resume(one.ready.session, codes_next=3, audio_next=last.seq + 1, first=sent - 2)
            async with peer(b, request) as again:
                assert again.ready is not None
                assert (again.ready.resumed, again.ready.next) == (True, sent - 2)
                again._sent = sent - 2
                await again.audio(wave[4 * BLOCK - 2 * 1280 :], begin=4 * BLOCK - 2 * 1280)
                await again.until(lambda: len(again.of(Marker)) == 2)
                gaps = {gap.kind: (gap.first, gap.stop) for gap in again.of(Missing)}
                assert gaps == {"codes": (3, 4), "audio": (last.seq + 1, last.seq + 2)}
                assert [seq for seq, *_ in again.blocks()] == [4, 5, 6, 7, 8]
                heard = again.of(Audio)
                assert heard[0].seq == last.seq + 2
                assert heard[0].at == 4 * BLOCK - 2 * 1280
                assert sum(len(chunk.data) // 4 for chunk in heard) == 5 * BLOCK

    run(test)


def test_strangers_resume_nothing(redis: str) -> None:
    async def test() -> None:
        async with two(redis) as (a, b), peer(a, Hello("transcode", "audio", ("codes",))) as one:
            assert one.ready is not None
            for request in (Resume(bytes(16)), Resume(one.ready.session, first=1 << 47)):
                async with peer(b) as other:
                    await other.say(request)
                    assert (await other.closed())[0] == Code.UNKNOWN_SESSION

    run(test)


def test_without_redis_clients_are_told_to_wait() -> None:
    async def test() -> None:
        config = replace(CONFIG, backplane=f"redis://127.0.0.1:{free_port()}/0")
        async with serving(config) as server, peer(server) as one:
            await one.say(listen("codes"))
            assert (await one.closed())[0] == Code.FULL

    run(test)


SERVER = """
import asyncio, sys
sys.path[:0] = {paths!r}
from dataclasses import replace
from test_server import CONFIG, models
from server import shell
shell.load_models = lambda *_: models()
asyncio.run(shell.run(replace(CONFIG, port={port}, backplane={redis!r})))
"""


def test_a_publisher_goes_on_elsewhere_when_its_server_is_killed(redis: str) -> None:
    async def test() -> None:
        wave = sound(10 * BLOCK)
        here, port = Path(__file__).parent, free_port()
        code = SERVER.format(paths=[str(here), str(here.parent)], port=port, redis=redis)
        doomed = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.DEVNULL)
        hello = Hello("publish", "codes", room="doomed")
        wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)[0]
        packed = [models().geometry.pack(part.numpy(), 100) for part in wanted.split(16, 1)]
        async with serving(replace(CONFIG, backplane=redis)) as b, contextlib.AsyncExitStack() as stack:
            listener = await stack.enter_async_context(peer(b, listen("codes", room="doomed")))
            options = {"subprotocols": [Subprotocol(SUBPROTOCOL)], "compression": None, "proxy": None}
            while True:
                assert doomed.returncode is None, "the server did not start"
                with contextlib.suppress(OSError):
                    publisher = Peer(await connect(f"ws://127.0.0.1:{port}/", **options))
                    session = (await publisher.begin(hello)).session
                    break
                await asyncio.sleep(0.2)
            await publish_codes(publisher, packed, range(6))
            await listener.until(lambda: len(listener.blocks()) >= 4)
            doomed.send_signal(signal.SIGKILL)
            await doomed.wait()
            async with peer(b, Resume(session)) as again:
                assert again.ready is not None
                assert again.ready.resumed
                assert 4 <= again.ready.next <= 6
                await publish_codes(again, packed, range(again.ready.next, 10))
                await again.say(Marker(1, 10, flush=True, at=len(wave)))
                await listener.until(lambda: bool(listener.of(Marker)))
            assert [seq for seq, *_ in listener.blocks()] == list(range(10))
            assert [data for *_, data in listener.blocks()] == packed

    run(test, 300)


async def publish_codes(one: Peer, packed: list[bytes], numbers: range) -> None:
    for seq in numbers:
        await one.say(Codes(seq, packed[seq], rate=100))


def test_an_audio_publisher_goes_on_with_what_is_not_coded_yet(redis: str) -> None:
    async def test() -> None:
        wave = sound(6 * BLOCK)
        config = replace(CONFIG, limits=Limits(keep=60 * SECOND))
        async with (
            two(redis, config) as (a, b),
            peer(b, listen("codes", room="voice")) as listener,
            peer(a, publish(room="voice")) as publisher,
        ):
            await publisher.audio(wave[: 3 * BLOCK], flush=False)
            await listener.until(lambda: len(listener.blocks()) == 2)
            assert publisher.ready is not None
            drained = asyncio.create_task(a.drain())
            assert (await publisher.closed())[0] == Code.ELSEWHERE
            await drained
            async with peer(b, Resume(publisher.ready.session)) as again:
                assert again.ready is not None
                assert again.ready.next == 8  # chunks of a quarter of a block: two blocks are coded
                again._sent = 8
                await again.audio(wave[2 * BLOCK :], begin=2 * BLOCK)
                await listener.until(lambda: bool(listener.of(Marker)))
            assert [seq for seq, *_ in listener.blocks()] == list(range(6))
            first = codec("mini", 100).encode(torch.from_numpy(wave), 16000)[0, :, :32]
            rest = codec("mini", 100).encode(torch.from_numpy(wave[2 * BLOCK :]), 16000)[0]
            codes = [models().geometry.unpack(data, rate) for _, rate, data in listener.blocks()]
            np.testing.assert_array_equal(np.concatenate(codes, 1), torch.cat([first, rest], 1).numpy())

    run(test)
