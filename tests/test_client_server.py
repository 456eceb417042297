"""The client's own coding against the codec, and the client against the real server, with small random models."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import codec, noise

from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import Geometry
from semanticodec.wire.messages import Marker, Ready, Room
from semanticodec_client import AudioChunk, CodesBlock, ConnectionEnded, Gap, Restarted, Retry, connect
from semanticodec_client.local import CONCEAL, Codec, Coded, Decoder, Encoder
from server.auth import Grant, Tokens, hash_token
from server.config import Config
from server.engine import Models, Work
from server.shell import Server

RATES = (100, 50, 25)
BLOCK = 5120
GEOMETRY = Geometry(BLOCK, codec("mini", 100).config.code_bits, RATES)
READY = Ready(
    session=bytes(16),
    presets=tuple(f"mini-{rate}" for rate in RATES),
    weights=("00000000",) * 3,
    rates=RATES,
    rate=100,
    block=BLOCK,
    code_bits=GEOMETRY.code_bits,
    window=64,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights() -> Codec:
    return Codec("mini-100", "00000000", {f"mini-{rate}": codec("mini", rate) for rate in RATES})


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return np.clip(noise(samples, seed=seed, scale=0.2).numpy(), -0.99, 0.99)


def whole(sound: np.ndarray, rate: int, sample_rate: int = 16_000) -> np.ndarray:
    return codec("mini", rate).encode(sound, sample_rate).numpy()[0]


def joined(blocks: list[Coded]) -> np.ndarray:
    return np.concatenate([block.codes for block in blocks], 1)


# Coding here

SOUNDS = [(16_000, 20_000), (16_000, 4 * BLOCK), (48_000, 50_001), (8_000, 9_000)]


@pytest.mark.parametrize(
    ("sample_rate", "length"), [(16_000, 20_000), (16_000, 4 * BLOCK), (48_000, 50_001), (8_000, 9_000)]
)
def test_pieces_of_any_size_give_the_codes_of_the_whole_in_whole_blocks(sample_rate: int, length: int):
    sound = wave(length)
    encoder = Encoder(weights(), READY, sample_rate, copies=False)
    blocks = [block for piece in np.split(sound, [1, 700, 700, 9000]) for block in encoder.push(piece, 100)]
    rest, padding = encoder.flush()
    heard = length * 16_000 // sample_rate
    assert len(blocks + rest) == -(-heard // BLOCK)
    assert padding == len(blocks + rest) * BLOCK - heard
    found, wanted = joined(blocks + rest), whole(sound, 100, sample_rate)
    if sample_rate == 16_000:
        # Up to the last block, which is followed by silence instead of nothing.
        sure = heard // BLOCK * GEOMETRY.frames(100) if padding else found.shape[1]
        np.testing.assert_array_equal(found[:, :sure], wanted[:, :sure])
    assert encoder.flush() == ([], 0)
    again = [*encoder.push(sound, 100), *encoder.flush()[0]]
    np.testing.assert_array_equal(joined(again), found)


def test_the_rate_may_change_between_blocks_and_copies_go_along():
    sound = wave(6 * BLOCK)
    encoder = Encoder(weights(), READY, 16_000, copies=True)
    blocks = encoder.push(sound[: 3 * BLOCK], 100)
    turn = len(blocks)
    assert turn > 0
    blocks += encoder.push(sound[3 * BLOCK :], 50)
    blocks += encoder.flush()[0]
    assert len(blocks) == 6
    for i, block in enumerate(blocks):
        rate = 100 if i < turn else 50
        frames, few = GEOMETRY.frames(rate), GEOMETRY.frames(25)
        assert block.rate == rate
        np.testing.assert_array_equal(block.codes, whole(sound, rate)[:, i * frames : (i + 1) * frames])
        low = whole(sound, 25)[:, i * few : (i + 1) * few]
        np.testing.assert_array_equal(GEOMETRY.unpack(block.copy, 25), low)
    with pytest.raises(ConfigError, match="rate 99"):
        encoder.push(sound, 99)


def blocks_of(codes: np.ndarray, rate: int = 100) -> list[CodesBlock]:
    frames = GEOMETRY.frames(rate)
    return [
        CodesBlock(i, i * BLOCK, rate, codes[:, i * frames : (i + 1) * frames]) for i in range(codes.shape[1] // frames)
    ]


def sound_of(events: list) -> np.ndarray:
    chunks = [event for event in events if isinstance(event, AudioChunk)]
    for before, after in pairwise(chunks):
        assert after.at == before.at + len(before.samples)
    return np.concatenate([chunk.samples for chunk in chunks])


def test_blocks_are_decoded_to_the_sound_of_the_whole():
    codes = whole(wave(5 * BLOCK), 100)
    decoder = Decoder(weights(), READY)
    events = [event for block in blocks_of(codes) for event in decoder.push(block)]
    mark = Marker(id=1, seq=5, flush=True, at=5 * BLOCK - 1000)
    events += decoder.push(mark)
    assert events[-1] is mark
    wanted = codec("mini", 100).decode(codes[None]).numpy()[0].reshape(-1)
    # What had been decoded before the marker came is out already.
    assert 5 * BLOCK - 1000 <= len(sound_of(events)) < 5 * BLOCK
    np.testing.assert_array_equal(sound_of(events), wanted[: len(sound_of(events))])


def test_lost_blocks_keep_their_time_and_a_long_loss_begins_anew():
    blocks = blocks_of(whole(wave(8 * BLOCK), 100))
    decoder = Decoder(weights(), READY)
    gap = Gap("codes", 2, 4, "source")
    given = [*blocks[:2], gap, *blocks[4:], Marker(id=1, seq=8, flush=True, at=8 * BLOCK)]
    events = [event for item in given for event in decoder.push(item)]
    assert gap in events
    assert len(sound_of(events)) == 8 * BLOCK
    long = Gap("codes", 1, 2 + CONCEAL, "source")
    assert decoder.push(long) == [long]
    events = decoder.push(blocks[0])
    events += decoder.push(long)
    assert len(sound_of(events)) == BLOCK
    sound = [*decoder.push(blocks[0]), *decoder.finish()]
    assert len(sound_of(sound)) == BLOCK
    assert decoder.finish() == []
    restart = Restarted(READY, 0)
    events = [*decoder.push(blocks[0]), *decoder.push(restart)]
    assert events[-1] is restart


def test_another_rate_goes_on_at_the_right_place():
    sound = wave(6 * BLOCK)
    high, low = blocks_of(whole(sound, 100)), blocks_of(whole(sound, 25), 25)
    decoder = Decoder(weights(), READY)
    given = [*high[:3], *low[3:], Marker(id=1, seq=6, flush=True, at=6 * BLOCK)]
    events = [event for item in given for event in decoder.push(item)]
    assert len(sound_of(events)) == 6 * BLOCK


# The real server

QUICK = Retry(base=0.005, cap=0.05, deadline=60, random=random.Random(0))


@dataclass
class Running:
    """A server in another thread."""

    server: Server
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}/"

    def do(self, work: Callable[[], object]) -> None:
        async def call() -> None:
            work()

        asyncio.run_coroutine_threadsafe(call(), self.loop).result(20)

    def cut(self) -> None:
        for one in list(self.server._sockets):
            one._ws.transport.abort()

    def forget(self) -> None:
        """Be as if killed and started again."""
        for client in list(self.server.service.clients.values()):
            client.session.end(self.server.clock())
        self.cut()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    def models() -> Models:
        return Models({rate: codec("mini", rate) for rate in RATES}, dict.fromkeys(RATES, "00000000"))

    tokens = Tokens((Grant("one", hash_token("right")),))
    config = Config(port=0, work=Work(batch=4, threads=1, load=100.0), drain=5.0, tokens=tokens)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(config, models)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    assert asyncio.run_coroutine_threadsafe(server.wait_ready(), loop).result(120)
    yield Running(server, loop)
    asyncio.run_coroutine_threadsafe(server.drain(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("cuts", [False, True])
def test_what_the_server_codes_and_decodes_is_what_the_codec_does(running: Running, cuts: bool):
    sound = (np.rint(wave(10 * BLOCK + 77) * 32767) / 32768).astype(np.float32)
    heard: list = []

    async def cutter() -> None:
        while cuts:
            await asyncio.sleep(0.2)
            running.do(running.cut)

    async def run() -> None:
        options = {"role": "transcode", "receive": ["codes", "audio"], "live": False, "token": "right"}
        async with connect(running.url, retry=QUICK, **options) as s:

            async def listen() -> None:
                heard.extend([item async for item in s])

            listener, cutting = asyncio.create_task(listen()), asyncio.create_task(cutter())
            for begin in range(0, len(sound), 1600):
                await s.push(sound[begin : begin + 1600])
                await asyncio.sleep(0.02)
            await s.finish()
            await listener
            cutting.cancel()
            assert not cuts or s.reconnects >= 2
            assert s.stats.lost == s.restarts == 0

    asyncio.run(run())
    codes = np.concatenate([item.codes for item in heard if isinstance(item, CodesBlock)], 1)
    wanted = whole(np.pad(sound, (0, -len(sound) % BLOCK)), 100)
    np.testing.assert_array_equal(codes, wanted)
    decoded = codec("mini", 100).decode(wanted[None]).numpy().reshape(-1)[: len(sound)]
    np.testing.assert_allclose(sound_of(heard)[: len(sound)], np.clip(decoded, -1, 1), atol=2 / 32768)


def test_a_room_of_clients_that_code_themselves(running: Running):
    sound = wave(6 * BLOCK)

    async def run() -> None:
        options = {"room": "den", "codec": weights(), "retry": QUICK, "token": "right"}
        async with connect(running.url, role="subscribe", receive=["codes"], **options) as ear:
            async with connect(running.url, role="publish", send="codes", live=False, **options) as mouth:
                await mouth.push(sound)
                assert (await mouth.tune(rate=25, copies=1)).rate == 25
                await mouth.push(sound)
                await mouth.flush()
                assert mouth._encoder.copies
            heard = []
            async for item in ear:
                heard.append(item)
                if isinstance(item, Marker):
                    break
        assert len(sound_of(heard)) == 12 * BLOCK
        assert ear.stats.lost == 0

    asyncio.run(run())


def test_a_server_that_was_killed_is_found_again(running: Running):
    async def run() -> None:
        async with connect(running.url, role="transcode", token="right", retry=QUICK) as s:
            await s.push(wave(BLOCK))
            running.do(running.forget)
            await s._until(lambda: s.restarts == 1)
            await s.push(wave(2 * BLOCK))
            await s.finish()
            heard = [item async for item in s]
        after = heard[next(i for i, item in enumerate(heard) if isinstance(item, Restarted)) :]
        assert sound_of(after).shape[0] >= 2 * BLOCK

    asyncio.run(run())


def test_a_wrong_token_is_told(running: Running):
    async def run() -> None:
        with pytest.raises(ConnectionEnded) as caught:
            await connect(running.url, role="transcode", token="wrong", retry=QUICK).__aenter__()
        assert caught.value.code == 4401

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["audio", "codes"])
def test_what_was_said_before_a_bye_is_heard_before_the_room_is_told(running: Running, kind: str):
    sound = wave(8 * BLOCK + 77)

    async def run() -> None:
        options = {"room": "hall", "retry": QUICK, "token": "right"}
        async with connect(running.url, role="subscribe", receive=[kind], **options) as ear:
            async with connect(running.url, role="publish", live=False, **options) as mouth:
                await mouth.push(sound)
            heard = []
            async with asyncio.timeout(60):
                async for item in ear:
                    heard.append(item)
                    if (
                        isinstance(item, Room)
                        and not item.live
                        and any(isinstance(one, Room) and one.live for one in heard)
                    ):
                        break
        assert [item.at for item in heard if isinstance(item, Marker)] == [len(sound)]
        if kind == "audio":
            assert len(sound_of(heard)) == 9 * BLOCK
        else:
            assert [item.at for item in heard if isinstance(item, CodesBlock)] == [i * BLOCK for i in range(9)]

    asyncio.run(run())
