"""What the server holds: batching's gain, concurrent live sessions with their block delay, memory over a long stream.

    python -m benchmarks.serving batching            # streams stepped together and one at a time, in one run
    python -m benchmarks.serving live --seconds 20   # more and more live sessions until p95 of the delay is a block
    python -m benchmarks.serving memory --minutes 30 # resident memory of the server over an accelerated stream
    python -m benchmarks.serving hostile             # live sessions beside idle, guessing and damaged ones

The delay of a block is the time from sending the last sample that it needs to the arrival of what was made of it.
"""

import argparse
import asyncio
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from semanticodec.audio import load, resample
from semanticodec.wire.blocks import Block, Chunk, chunk_of
from semanticodec.wire.messages import SUBPROTOCOL, Ack, Audio, Codes, Hello, Kind, Ping, Pong, Ready, decode, encode
from server.auth import hash_token
from server.engine import Engine, Work
from server.lanes import Event, Sound
from server.metrics import Metrics
from server.models import Models, load_models

from .measure import Timing, company, machine

RESULTS = Path(__file__).parent / "results"
VOICE = Path(__file__).parent.parent / "semanticodec" / "assets" / "demo.flac"
RATE = 16_000
CHUNK = 320
"""Samples per message of a live session (20 ms)."""
LOOKAHEAD = 240
"""Samples after a block that the encoder waits for."""

Mode = Literal["publish", "transcode"]


def voice() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the shipped recording at 16 kHz."""
    wave, rate = load(VOICE)
    samples: np.ndarray[tuple[int], np.dtype[np.float32]] = resample(wave.mean(0)[None], rate, RATE)[0].numpy()
    return samples


# --- batching -----------------------------------------------------------------------------------------------------


class Pump:
    """An engine that is given all its work at once, and timed."""

    def __init__(self, models: Models, batch: int, threads: int) -> None:
        self._left = 0
        self._done = threading.Event()
        self._models = models
        # What comes out is counted in the engine's own thread: there is no event loop to wait for.
        self.engine = Engine(lambda: models, Work(batch, threads=threads, load=1e9), Metrics(), lambda hand: hand())
        self.engine.start()
        while self.engine.models is None:
            if self.engine.failure:
                raise RuntimeError(self.engine.failure)
            time.sleep(0.01)

    def _count(self, event: Event) -> None:
        self._left -= isinstance(event, Block | Sound)
        if not self._left:
            self._done.set()

    def run(self, side: Literal["encode", "decode"], streams: int, blocks: int) -> Timing:
        """Work off ``blocks`` blocks of each of ``streams`` streams; return the time that took."""
        geometry = self._models.geometry
        rate = geometry.rates[0]
        if side == "encode":
            sound = np.resize(voice(), blocks * geometry.block + LOOKAHEAD)
            items: list[Any] = [Chunk(chunk_of(sound, "f32"), 0)]
            handles = [self.engine.encode(RATE, "f32", rate, self._count) for _ in range(streams)]
        else:
            codes = self._models.codecs[rate].encode(np.resize(voice(), blocks * geometry.block), RATE)
            parts = codes[0].split(geometry.frames(rate), 1)
            items = [Block(geometry.pack(p.numpy(), rate), rate, i * geometry.block) for i, p in enumerate(parts)]
            handles = [self.engine.decode(rate, self._count) for _ in range(streams)]
        self._left = streams * blocks
        self._done.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        for item in items:
            for handle in handles:
                handle.put(item)
        self._done.wait()
        took = Timing(time.perf_counter() - wall, time.process_time() - cpu)
        for handle in handles:
            handle.close()
        return took


@dataclass(frozen=True)
class Gain:
    """Milliseconds per block, one at a time and batched (smallest of the rounds), and how many times faster that is."""

    side: str
    streams: int
    alone: Timing
    batched: Timing

    @property
    def wall(self) -> float:
        """Gain in elapsed time."""
        return self.alone.wall / self.batched.wall

    @property
    def cpu(self) -> float:
        """Gain in processor time, which hardly feels other programs."""
        return self.alone.cpu / self.batched.cpu


def batching(models: Models, streams: int, blocks: int, rounds: int, threads: int) -> list[Gain]:
    """Take turns with engines of batch 1 and ``streams``."""
    pumps = {batch: Pump(models, batch, threads) for batch in (1, streams)}
    gains = []
    sides: tuple[Literal["encode", "decode"], ...] = ("encode", "decode")
    for side in sides:
        times: dict[int, list[Timing]] = {batch: [] for batch in pumps}
        for _ in range(rounds):
            for batch, pump in pumps.items():
                times[batch].append(pump.run(side, streams, blocks))
        best = {b: Timing(min(t.wall for t in some), min(t.cpu for t in some)) for b, some in times.items()}
        count = streams * blocks
        alone, batched = (Timing(1e3 * best[b].wall / count, 1e3 * best[b].cpu / count) for b in (1, streams))
        gains.append(Gain(side, streams, alone, batched))
    for pump in pumps.values():
        pump.engine.stop()
    return gains


# --- sockets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """A server in a process of its own."""

    url: str
    pid: int

    def resident(self) -> int:
        """Return its resident memory in kB."""
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[0])


@contextlib.asynccontextmanager
async def serving(options: Sequence[str]) -> AsyncIterator[Serving]:
    """Start a server and wait until it is ready."""
    usual = ["--port", "0", "--per-address", "10000", "--load", "1000", "--log-level", "info"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "server", *usual, *options, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    port, event = 0, ""
    while event != "ready":
        line = await process.stderr.readline()
        if not line:
            raise RuntimeError("the server ended before it was ready")
        entry = json.loads(line)
        event = entry["event"]
        port = entry.get("port", port)
    drain = asyncio.create_task(_drained(process.stderr))
    try:
        yield Serving(f"ws://127.0.0.1:{port}/", process.pid)
    finally:
        process.terminate()
        await process.wait()
        await drain


async def _drained(reader: asyncio.StreamReader) -> None:
    while await reader.readline():
        pass


class Session:
    """One client that sends a voice and notes when what was made of it arrives."""

    def __init__(self, ws: ClientConnection, mode: Mode) -> None:
        self._ws = ws
        self._kind: Kind = "codes" if mode == "publish" else "audio"
        self.arrived: list[float] = []
        self.limit = 0
        self.block = 0
        self.ready = asyncio.Event()
        self.news = asyncio.Event()
        self._gone = False

    async def read(self) -> None:
        """Take what comes, and acknowledge it."""
        try:
            await self._read()
        finally:
            self._gone = True
            self.news.set()

    async def wait(self) -> None:
        """Wait until something has come.

        Raises:
            ConnectionError: nothing more will.
        """
        if self._gone:
            raise ConnectionError(f"the server has closed the session: {self._ws.close_code} {self._ws.close_reason}")
        self.news.clear()
        await self.news.wait()

    async def _read(self) -> None:
        async for data in self._ws:
            assert isinstance(data, bytes)
            message = decode(data)
            if isinstance(message, Ready):
                self.limit, self.block = message.limit, message.block
                self.ready.set()
            elif isinstance(message, Ack) and message.limit is not None:
                self.limit = max(self.limit, message.limit)
            elif isinstance(message, Ping):
                await self._ws.send(encode(Pong(message.nonce)))
            elif isinstance(message, Codes if self._kind == "codes" else Audio):
                self.arrived.append(time.monotonic())
                if len(self.arrived) % 16 == 0:
                    await self._ws.send(encode(Ack(len(self.arrived), kind=self._kind)))
            self.news.set()

    async def send(self, seq: int, at: int, samples: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Send a chunk, when the server takes it."""
        while seq >= self.limit:
            await self.wait()
        await self._ws.send(encode(Audio(seq, at, chunk_of(samples, "s16"))))


@contextlib.asynccontextmanager
async def session(url: str, mode: Mode, token: str | None = None) -> AsyncIterator[Session]:
    """Begin a session: a transcoder that hears itself, or one that gets only its codes."""
    receive: tuple[Kind, ...] = ("audio",) if mode == "transcode" else ("codes",)
    subprotocols = [Subprotocol(SUBPROTOCOL)]
    async with connect(url, subprotocols=subprotocols, compression=None, proxy=None, ping_interval=None) as ws:
        one = Session(ws, mode)
        reader = asyncio.create_task(one.read())
        await ws.send(encode(Hello("transcode", "audio", receive, token=token)))
        await one.ready.wait()
        try:
            yield one
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)


async def talk(url: str, mode: Mode, seconds: float, begin: float, token: str | None = None) -> list[float]:
    """Send a voice in real time and return the delay of each block."""
    sound = np.resize(voice(), int(seconds * RATE))
    sent: list[float] = []
    async with session(url, mode, token) as one:
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        first = time.monotonic()
        for seq, at in enumerate(range(0, len(sound), CHUNK)):
            due = first + (at + CHUNK) / RATE
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await one.send(seq, at, sound[at : at + CHUNK])
            while at + CHUNK >= (len(sent) + 1) * one.block + LOOKAHEAD:
                sent.append(time.monotonic())
        async with asyncio.timeout(30):
            while len(one.arrived) < len(sent):
                await one.wait()
        return [after - before for before, after in zip(sent, one.arrived, strict=False)]


@dataclass(frozen=True)
class Held:
    """Delay of blocks (s) with so many live sessions at once."""

    mode: str
    sessions: int
    p50: float
    p95: float
    worst: float


async def noise(url: str, seed: int) -> None:
    """Annoy the server: open connections, send nonsense, and begin again when it closes them."""
    rng = np.random.default_rng(seed)
    while True:
        with contextlib.suppress(WebSocketException, OSError):
            async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, proxy=None) as ws:
                await ws.send(rng.bytes(int(rng.integers(1, 2000))))
                await ws.wait_closed()
        await asyncio.sleep(0.05)


async def live(mode: Mode, seconds: float, least: int, most: int, strangers: int, options: Sequence[str]) -> list[Held]:
    """Hold more and more live sessions, among strangers, until the 95th percentile of their delay is a block."""
    rows: list[Held] = []
    count = least
    async with serving(options) as server, asyncio.TaskGroup() as group:
        annoying = [group.create_task(noise(server.url, seed)) for seed in range(strangers)]
        while count <= most:
            begin = time.monotonic() + 0.5 + 0.05 * count
            # Spread over a block, as people who do not know of each other are.
            starts = [begin + 0.32 * i / count for i in range(count)]
            try:
                parts = await asyncio.gather(*(talk(server.url, mode, seconds, start) for start in starts))
            except (TimeoutError, ConnectionError, WebSocketException) as error:
                print(f"{mode:<10} {count:>4} sessions: {error}")
                rows.append(Held(mode, count, *[float("inf")] * 3))
                break
            delays = np.concatenate(parts)
            p50, p95, worst = (float(v) for v in np.percentile(delays, (50, 95, 100)))
            rows.append(Held(mode, count, p50, p95, worst))
            print(f"{mode:<10} {count:>4} sessions: p50 {1e3 * p50:.0f}, p95 {1e3 * p95:.0f}, {1e3 * worst:.0f} ms")
            if p95 >= 0.32:
                break
            count = max(count + 1, count * 5 // 4)
        for task in annoying:
            task.cancel()
    return rows


# --- hostile ------------------------------------------------------------------------------------------------------

STRANGERS, GUESSERS = "127.0.0.2", "127.0.0.3"
"""They come from other addresses than the healthy sessions: an address that guesses is soon not heard any more."""
SECRET, GUESS = "benchmark", "guess"


def stranger(url: str, address: str) -> Any:
    """Connect from an address of ours."""
    options: dict[str, Any] = {"subprotocols": [Subprotocol(SUBPROTOCOL)], "compression": None, "proxy": None}
    return connect(url, local_addr=(address, 0), ping_interval=None, **options)


async def idle(url: str, ready: asyncio.Semaphore) -> None:
    """Listen in a room where nobody speaks, without end."""
    async with stranger(url, STRANGERS) as ws:
        await ws.send(encode(Hello("subscribe", receive=("codes",), room="silent", token=SECRET)))
        async for data in ws:
            message = decode(data)
            if isinstance(message, Ping):
                await ws.send(encode(Pong(message.nonce)))
            elif isinstance(message, Ready):
                ready.release()


async def harass(url: str, seed: int, counts: dict[str, int]) -> None:
    """Guess tokens, damage messages of a session, and leave without a word, in turns and without end."""
    rng = np.random.default_rng(seed)
    good = [encode(Audio(i, 320 * i, bytes(640))) for i in range(8)] + [encode(Ack(0)), encode(Ping(1))]
    while True:
        for kind in ("guesses", "damaged", "left"):
            token, address = (GUESS, GUESSERS) if kind == "guesses" else (SECRET, STRANGERS)
            counts[kind] += 1
            with contextlib.suppress(WebSocketException, OSError):
                async with stranger(url, address) as ws:
                    await ws.send(encode(Hello("transcode", "audio", ("codes",), token=token)))
                    while kind == "damaged":
                        data = bytearray(good[rng.integers(len(good))])
                        data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
                        await ws.send(bytes(data))
                        counts["messages"] += 1
                        await asyncio.sleep(0.005)
                    if kind == "guesses":
                        await ws.wait_closed()
        await asyncio.sleep(0.02)


async def hostile(count: int, seconds: float, idlers: int, options: Sequence[str]) -> dict[str, Any]:
    """Hold live sessions alone, and then beside strangers who mean no good; say what became of their delay."""
    counts = dict.fromkeys(("guesses", "damaged", "left", "messages"), 0)
    found: dict[str, Any] = {"sessions": count, "idle": idlers}
    with TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        grant = {"name": "all", "sha256": hash_token(SECRET), "sessions": 100_000}
        tokens.write_text(json.dumps({"tokens": [grant]}))
        async with serving([*options, "--tokens", str(tokens), "--slots", "4096"]) as server:

            async def held(name: str) -> None:
                begin = time.monotonic() + 1
                starts = [begin + 0.32 * i / count for i in range(count)]
                parts = await asyncio.gather(
                    *(talk(server.url, "transcode", seconds, start, SECRET) for start in starts)
                )
                p50, p95, worst = (float(v) for v in np.percentile(np.concatenate(parts), (50, 95, 100)))
                found[name] = {"p50": p50, "p95": p95, "worst": worst, "resident_kb": server.resident()}
                print(f"{name:<8} p50 {1e3 * p50:.0f}, p95 {1e3 * p95:.0f}, {1e3 * worst:.0f} ms; {counts}")

            await held("alone")
            ready = asyncio.Semaphore(0)
            tasks = [asyncio.create_task(idle(server.url, ready)) for _ in range(idlers)]
            for _ in range(idlers):
                await ready.acquire()
            tasks += [asyncio.create_task(harass(server.url, seed, counts)) for seed in range(4)]
            await held("beside")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return {**found, "strangers": counts}


# --- memory -------------------------------------------------------------------------------------------------------


async def memory(minutes: int, options: Sequence[str]) -> list[int]:
    """Send so many minutes of sound as fast as the server takes it; return its resident memory (kB) after each."""
    minute = np.resize(voice(), 60 * RATE)
    sizes, seq = [], 0
    async with serving(options) as server, session(server.url, "transcode") as one:
        for n in range(minutes):
            for at in range(0, len(minute), one.block):
                await one.send(seq, n * len(minute) + at, minute[at : at + one.block])
                seq += 1
            sizes.append(server.resident())
            print(f"{n + 1:>3} min: {sizes[-1] / 1024:.1f} MB")
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("batching", "live", "memory", "hostile"))
    parser.add_argument("--model", default="mini-100", help="preset or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--streams", type=int, default=16, help="batching: streams")
    parser.add_argument("--blocks", type=int, default=4, help="batching: blocks of each")
    parser.add_argument("--rounds", type=int, default=3, help="batching: of which the best counts")
    parser.add_argument("--mode", choices=("publish", "transcode"), default="transcode", help="live")
    parser.add_argument("--seconds", type=float, default=20.0, help="live: of each number of sessions")
    parser.add_argument("--least", type=int, default=1, help="live: sessions to begin with")
    parser.add_argument("--most", type=int, default=256, help="live: sessions")
    parser.add_argument("--strangers", type=int, default=0, help="live: others who send nonsense all the time")
    parser.add_argument("--sessions", type=int, default=2, help="hostile: healthy ones")
    parser.add_argument("--idle", type=int, default=2000, help="hostile: idle sessions")
    parser.add_argument("--minutes", type=int, default=30, help="memory: of sound")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    flags = ["--presets", options.model, "--device", options.device, "--threads", str(options.threads)]
    found: dict[str, Any] = {"machine": machine(), "company": company(), "what": options.what, "device": options.device}
    if options.what == "batching":
        models = load_models([options.model], options.device)
        gains = batching(models, options.streams, options.blocks, options.rounds, options.threads)
        for gain in gains:
            print(
                f"{gain.side}: {gain.alone.wall:.2f} ms per block alone, {gain.batched.wall:.2f} ms of {gain.streams}: "
                f"{gain.wall:.2f} times as fast; in processor time {gain.alone.cpu:.2f}, {gain.batched.cpu:.2f} ms: "
                f"{gain.cpu:.2f} times"
            )
        found["gains"] = [{**asdict(gain), "gain": gain.wall, "gain_cpu": gain.cpu} for gain in gains]
    elif options.what == "live":
        held = asyncio.run(live(options.mode, options.seconds, options.least, options.most, options.strangers, flags))
        found["strangers"], found["held"] = options.strangers, [asdict(r) for r in held]
    elif options.what == "hostile":
        found |= asyncio.run(hostile(options.sessions, options.seconds, options.idle, flags))
    else:
        found["resident_kb"] = asyncio.run(memory(options.minutes, flags))
    if options.write:
        target = RESULTS / f"serving-{options.what}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        target.write_text(json.dumps(found, indent=2) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
