"""The engine: what comes out of shared steps is what the codec makes of each stream alone; fairness, failure, room."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import codec, noise, random_codes

from benchmarks.serving import batching
from semanticodec import SemantiCodec
from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import Block, Chunk, Geometry, chunk_of
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import Marker
from server.engine import Engine, Stream, Work
from server.lanes import Done, Event, Failed, Mark, Sound, Tuned
from server.metrics import Metrics
from server.models import Models, load_models

RATES = (100, 50, 25)
BLOCK = 5120


def models(rates: tuple[int, ...] = RATES) -> Models:
    return Models({rate: codec("mini", rate) for rate in rates}, dict.fromkeys(rates, "00000000"))


class Bench:
    """An engine whose event loop is the test: posted functions run when the test waits."""

    def __init__(self, work: Work, load: Callable[[], Models] = models) -> None:
        self.metrics = Metrics()
        self.posted: list[Callable[[], object]] = []
        self.bell = threading.Condition()
        self.engine = Engine(load, work, self.metrics, self.post)
        self.events: defaultdict[Any, list[Event]] = defaultdict(list)
        self.log: list[tuple[Any, Event]] = []
        self.engine.start()
        self.wait(lambda: self.engine.models is not None or self.engine.failure is not None)

    def post(self, function: Callable[[], object]) -> None:
        with self.bell:
            self.posted.append(function)
            self.bell.notify()

    def wait(self, until: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, "the engine took too long"
            with self.bell:
                self.bell.wait(0.005)
                posted, self.posted = self.posted, []
            for function in posted:
                function()

    def note(self, key: Any, event: Event) -> None:
        self.events[key].append(event)
        self.log.append((key, event))

    def encode(self, key: Any, sample_rate: int = 16000, form: str = "f32", rate: int = 100) -> Stream:
        return self.engine.encode(sample_rate, form, rate, partial(self.note, key))

    def decode(self, key: Any, rate: int = 100) -> Stream:
        return self.engine.decode(rate, partial(self.note, key))

    def of(self, key: Any, kind: type) -> list[Any]:
        return [event for event in self.events[key] if isinstance(event, kind)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    torch.set_num_threads(1)
    bench = Bench(Work(batch=4, threads=1))
    yield bench
    bench.engine.stop()


@pytest.fixture
def bench(shared: Bench) -> Iterator[Bench]:
    yield shared
    for stream in list(shared.engine._opened):
        stream.close()
    shared.events.clear()
    shared.log.clear()


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return noise(samples, seed=seed, scale=0.2).clamp(-1, 1).numpy()


def send(stream: Stream, wave: np.ndarray, size: int = 777, begin: int = 0) -> None:
    for at in range(0, len(wave), size):
        stream.put(Chunk(chunk_of(wave[at : at + size], "f32"), begin + at))


def flush(stream: Stream, tag: int = 0, at: int | None = None) -> None:
    stream.put(Marker(id=1, seq=0, flush=True, tag=tag, at=at))


def codes_of(blocks: list[Block], rate: int = 100) -> torch.Tensor:
    geometry = models().geometry
    return torch.cat([torch.from_numpy(geometry.unpack(block.data, rate)) for block in blocks], 1)[None]


def test_streams_that_share_steps_give_what_the_codec_gives(bench: Bench) -> None:
    lengths = {"a": 3 * BLOCK + 17, "b": 5 * BLOCK, "c": 40, "d": 2 * BLOCK - 1, "e": 4 * BLOCK + 1}
    waves = {key: sound(length, seed) for seed, (key, length) in enumerate(lengths.items())}
    streams = {key: bench.encode(key) for key in waves}
    for key, stream in streams.items():
        send(stream, waves[key])
        flush(stream)
    bench.wait(lambda: all(bench.of(key, Mark) for key in waves))
    for key, wave in waves.items():
        blocks = bench.of(key, Block)
        assert [block.at for block in blocks] == [i * BLOCK for i in range(len(blocks))]
        wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)
        assert torch.equal(codes_of(blocks)[:, :, : wanted.shape[2]], wanted)
        assert bench.of(key, Mark) == [Mark(True, len(wave), 0)]
        assert sum(done.units for done in bench.of(key, Done)) == -(-len(wave) // 777)
        assert streams[key].queued == 0
    assert "engine_batch_streams_sum" in bench.metrics.text().decode()


def test_another_sample_rate_gives_the_codes_of_the_file(bench: Bench) -> None:
    wave = sound(3 * 16000)
    stream = bench.encode("x", sample_rate=48000)
    send(stream, wave, 960)
    flush(stream)
    bench.wait(lambda: bool(bench.of("x", Mark)))
    wanted = codec("mini", 100).encode(torch.from_numpy(wave), 48000)
    assert torch.equal(codes_of(bench.of("x", Block))[:, :, : wanted.shape[2]], wanted)


def test_decoded_streams_are_the_codecs_samples(bench: Bench) -> None:
    geometry = models().geometry
    rows = {
        key: random_codes(codec("mini", 100).config, 16 * count, seed=count)
        for key, count in zip("abc", (1, 3, 4), strict=True)
    }
    for key, codes in rows.items():
        stream = bench.decode(key)
        for i, part in enumerate(codes[0].split(16, 1)):
            stream.put(Block(geometry.pack(part.numpy(), 100), 100, i * BLOCK))
        flush(stream, tag=7, at=codes.shape[2] // 16 * BLOCK - 100)
    bench.wait(lambda: all(bench.of(key, Mark) for key in rows))
    for key, codes in rows.items():
        wanted = codec("mini", 100).decode(codes, seed=0)[0].numpy()
        assert bench.of(key, Mark) == [Mark(True, len(wanted) - 100, 7)]
        sounds = bench.of(key, Sound)
        assert [one.at for one in sounds] == list(np.cumsum([0, *(len(one.samples) for one in sounds[:-1])]))
        np.testing.assert_array_equal(np.concatenate([one.samples for one in sounds]), wanted)


def test_a_rate_switch_in_mid_stream_goes_on_without_a_break(bench: Bench) -> None:
    wave = sound(4 * BLOCK)
    stream = bench.encode("x")
    send(stream, wave[: 2 * BLOCK + 100], BLOCK // 4)
    bench.wait(lambda: len(bench.of("x", Block)) == 1 and not stream.queued)
    stream.put(Tuned(25, copies=False))
    send(stream, wave[2 * BLOCK + 100 :], begin=2 * BLOCK + 100)
    flush(stream)
    bench.wait(lambda: bool(bench.of("x", Mark)))
    blocks: list[Block] = bench.of("x", Block)
    switch = [block.rate for block in blocks].index(25)
    assert [block.rate for block in blocks] == [100] * switch + [25] * (4 - switch)
    for rate, some in ((100, blocks[:switch]), (25, blocks[switch:])):
        whole = codec("mini", rate).encode(torch.from_numpy(wave), 16000)
        frames = BLOCK * rate // 32000
        begin = some[0].at // BLOCK * frames
        assert torch.equal(codes_of(some, rate), whole[:, :, begin : begin + len(some) * frames])
    other = bench.decode("y")
    for block in blocks:
        other.put(block)
    flush(other)
    bench.wait(lambda: bool(bench.of("y", Mark)))
    heard = np.concatenate([one.samples for one in bench.of("y", Sound)])
    assert len(heard) == len(wave)
    alone = codec("mini", 100).decode(codes_of(blocks[:switch]), seed=0)[0].numpy()
    whole_blocks = switch * BLOCK - 960  # what comes after depends on the next block
    np.testing.assert_array_equal(heard[:whole_blocks], alone[:whole_blocks])


def test_copies_are_the_lowest_rates_codes(bench: Bench) -> None:
    wave = sound(3 * BLOCK)
    stream = bench.encode("x")
    stream.put(Tuned(100, copies=True))
    send(stream, wave)
    flush(stream)
    bench.wait(lambda: bool(bench.of("x", Mark)))
    blocks = bench.of("x", Block)
    low = codec("mini", 25).encode(torch.from_numpy(wave), 16000)
    assert torch.equal(codes_of([replace(block, data=block.copy) for block in blocks], 25), low)


def test_gaps_are_bridged_or_begin_anew(bench: Bench) -> None:
    wave = sound(3 * BLOCK)
    stream = bench.encode("x")
    send(stream, wave[:BLOCK])
    send(stream, wave[BLOCK + 1000 :], begin=BLOCK + 1000)  # 1000 samples are gone
    send(stream, wave, begin=100_000)  # a jump
    flush(stream)
    bench.wait(lambda: bool(bench.of("x", Mark)))
    silent = wave.copy()
    silent[BLOCK : BLOCK + 1000] = 0
    blocks = bench.of("x", Block)
    assert [block.at for block in blocks] == [0, BLOCK, 2 * BLOCK, *(100_000 + i * BLOCK for i in range(3))]
    for some, samples in ((blocks[:3], silent), (blocks[3:], wave)):
        assert torch.equal(codes_of(some), codec("mini", 100).encode(torch.from_numpy(samples), 16000))


def test_lost_blocks_are_concealed_and_long_gaps_skipped(bench: Bench) -> None:
    geometry = models().geometry
    codes = random_codes(codec("mini", 100).config, 16 * 4)
    parts = [geometry.pack(part.numpy(), 100) for part in codes[0].split(16, 1)]
    stream = bench.decode("x")
    stream.put(Block(parts[0], 100, 0))
    stream.put(Lost(1, 2, "source"))
    stream.put(Block(parts[2], 100, 2 * BLOCK))
    stream.put(Lost(3, 500, "source"))
    stream.put(Block(parts[3], 100, 500 * BLOCK))
    flush(stream)
    bench.wait(lambda: bool(bench.of("x", Mark)))
    holed = codes[:, :, : 16 * 3].clone()
    holed[:, :, 16:32] = -1
    wanted = [codec("mini", 100).decode(holed, seed=0), codec("mini", 100).decode(codes[:, :, 48:], seed=0)]
    sounds = bench.of("x", Sound)
    heard = np.concatenate([one.samples for one in sounds])
    np.testing.assert_array_equal(heard, torch.cat(wanted, 1)[0].numpy())
    assert 500 * BLOCK in {one.at for one in sounds}


def test_bad_codes_end_their_own_stream_only(bench: Bench) -> None:
    geometry = models().geometry
    codes = random_codes(codec("mini", 100).config, 16 * 3)
    bad = Geometry(BLOCK, geometry.code_bits, RATES).pack(np.full((2, 16), 63), 100)
    streams = {key: bench.decode(key) for key in "abc"}
    for i, part in enumerate(codes[0].split(16, 1)):
        for key, stream in streams.items():
            stream.put(Block(bad if (key, i) == ("b", 1) else geometry.pack(part.numpy(), 100), 100, i * BLOCK))
    for key in "ac":
        flush(streams[key])
    bench.wait(lambda: all(bench.of(key, Mark) for key in "ac") and bool(bench.of("b", Failed)))
    for key in "ac":
        heard = np.concatenate([one.samples for one in bench.of(key, Sound)])
        np.testing.assert_array_equal(heard, codec("mini", 100).decode(codes, seed=0)[0].numpy())


def test_a_step_that_fails_is_repeated_one_by_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bench.engine._decoders[100]
    real = decoder.step

    def step(codes: torch.Tensor, *others: Any) -> Any:
        if (codes[:, 0, 0] == 49).any():
            raise RuntimeError("a row that the model cannot take")
        return real(codes, *others)

    monkeypatch.setattr(decoder, "step", step)
    geometry = models().geometry
    hold = threading.Event()
    bench.engine._inbox.put((Blocker(hold), "hold"))  # so that all three are ready at once
    for key in "abc":
        stream = bench.decode(key)
        codes = random_codes(codec("mini", 100).config, 16)[0].numpy()
        codes[0, 0] = 49 if key == "b" else 3
        stream.put(Block(geometry.pack(codes, 100), 100, 0))
    hold.set()
    bench.wait(lambda: all(bench.of(key, Sound) for key in "ac") and bool(bench.of("b", Failed)))


class Blocker:
    """Something in the inbox that makes the thread wait."""

    side = "decode"

    def __init__(self, hold: threading.Event) -> None:
        self.lane = self
        self.items = self
        self.hold = hold
        self.waits = True

    def append(self, _: object) -> None:
        assert self.hold.wait(10)


def test_a_busy_stream_does_not_delay_a_live_one(bench: Bench) -> None:
    geometry = models().geometry
    codes = random_codes(codec("mini", 100).config, 16)[0].numpy()
    data = geometry.pack(codes, 100)
    for i in range(6):
        busy = bench.decode(("busy", i))
        for n in range(40):
            busy.put(Block(data, 100, n * BLOCK))
    bench.wait(lambda: len(bench.of(("busy", 0), Sound)) > 2)
    live = bench.decode("live")
    before = len(bench.log)
    live.put(Block(data, 100, 0))
    bench.wait(lambda: bool(bench.of("live", Sound)))
    ahead = [key for key, event in bench.log[before:] if isinstance(event, Sound) and key != "live"]
    # Those that were ready before it, and the step that was running; posted results may lag by another step.
    assert len(ahead) <= 6 + 2 * 4, ahead


def test_admission_follows_slots_and_measured_steps() -> None:
    bench = Bench(Work(batch=2, slots=3, threads=1), lambda: models((100,)))
    try:
        engine = bench.engine
        assert engine.admit(0, 0) is None
        engine._seconds = {("encode", 2): 9.0, ("decode", 2): 9.0}
        assert engine.admit(1, 1) is None  # too slow, but the first one
        engine._seconds = {}
        streams = [bench.decode(i) for i in range(3)]
        retry = engine.admit(1, 0)
        assert retry is not None
        assert 1 <= retry <= 60
        streams[0].close()
        assert engine.admit(1, 0) is None
        engine._seconds = {("decode", 1): 0.1, ("decode", 2): 0.2, ("encode", 1): 0.1, ("encode", 2): 0.1}
        assert engine.load() == pytest.approx(0.2 / 0.32)
        assert engine.admit(0, 1) is not None  # 0.3 s of work per 0.32 s: beyond 85 %
        engine._seconds["decode", 2] = 0.1
        assert engine.admit(0, 1) is None
    finally:
        bench.engine.stop()


def test_rows_that_are_not_finite_are_silent_and_recover(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = bench.engine._decoders[100]
    real, broken = decoder.step, [True]

    def step(*given: Any) -> Any:
        wave, state = real(*given)
        return (wave * torch.nan, state) if broken.pop() else (wave, state)

    broken[:] = [False, True]
    monkeypatch.setattr(decoder, "step", step)
    codes = random_codes(codec("mini", 100).config, 16)[0].numpy()
    stream = bench.decode("x")
    for n in range(2):
        stream.put(Block(models().geometry.pack(codes, 100), 100, n * BLOCK))
    bench.wait(lambda: len(bench.of("x", Sound)) == 2)
    first, second = bench.of("x", Sound)
    assert not first.samples.any()
    assert np.isfinite(second.samples).all()
    assert second.samples.any()


def test_what_cannot_be_loaded_is_said() -> None:
    def load() -> Models:
        raise OSError("no such disk")

    bench = Bench(Work(), load)
    assert bench.engine.models is None
    assert "no such disk" in str(bench.engine.failure)


def test_whatever_loading_raises_is_said() -> None:
    def load() -> Models:
        raise KeyError("no such preset")

    assert "no such preset" in str(Bench(Work(), load).engine.failure)


def test_a_lane_that_breaks_ends_its_stream_and_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = bench.encode("bad")

    def absorb() -> list[Event]:
        raise TypeError("a bug")

    monkeypatch.setattr(stream.lane, "absorb", absorb)
    send(stream, sound(BLOCK))
    good = bench.encode("good")
    send(good, sound(2 * BLOCK))
    bench.wait(lambda: bool(bench.of("bad", Failed)) and bool(bench.of("good", Block)))
    assert bench.of("bad", Failed) == [Failed("TypeError: a bug")]
    assert bench.engine.failure is None


def test_a_thread_that_dies_says_so_and_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(Work(batch=1, threads=1))
    stream = bench.encode("x")

    def choose() -> list[Stream]:
        raise AssertionError("a bug")

    monkeypatch.setattr(bench.engine, "_choose", choose)
    send(stream, sound(100))
    bench.wait(lambda: bool(bench.of("x", Failed)))
    assert bench.engine.failure == "AssertionError: a bug"
    assert bench.engine.models is None
    with pytest.raises(ConfigError):
        bench.encode("y")
    bench.engine.stop()


def test_accelerators_see_few_shapes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine._on_cpu", lambda _: False)
    seen = set()
    encoder = bench.engine._encoders[100]
    real = encoder.step

    def step(samples: torch.Tensor, *others: Any) -> Any:
        seen.add(len(samples))
        return real(samples, *others)

    monkeypatch.setattr(encoder, "step", step)
    hold = threading.Event()
    bench.engine._inbox.put((Blocker(hold), "hold"))
    waves = {seed: sound(BLOCK + 240, seed) for seed in range(3)}
    for key, wave in waves.items():
        send(bench.encode(key), wave)
    hold.set()
    bench.wait(lambda: all(bench.of(key, Block) for key in waves))
    assert seen == {4}
    for key, wave in waves.items():
        wanted = codec("mini", 100).encode(torch.from_numpy(wave), 16000)[:, :, :16]
        assert torch.equal(codes_of(bench.of(key, Block)), wanted)


def test_a_fault_behind_one_stream_stays_there(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fault(event: Event) -> None:
        raise KeyError(event)

    codes = random_codes(codec("mini", 100).config, 16)[0].numpy()
    block = Block(models().geometry.pack(codes, 100), 100, 0)
    bench.engine.decode(100, fault).put(block)
    bench.decode("y").put(block)
    bench.wait(lambda: bool(bench.of("y", Sound)))
    assert "deliver" in caplog.messages


def test_the_benchmark_takes_its_times() -> None:
    gains = batching(models((100,)), streams=2, blocks=2, rounds=1, threads=1)
    assert [gain.side for gain in gains] == ["encode", "decode"]
    assert all(gain.alone.cpu > 0 and gain.batched.cpu > 0 and gain.cpu > 0 for gain in gains)


@pytest.mark.parametrize(("kind", "recorded"), [("cpu", 0), ("cuda", 3)])
def test_only_on_a_gpu_networks_are_recorded(monkeypatch, kind, recorded):
    recordings = []

    class Loaded(SemantiCodec):
        device = torch.device(kind)

        def record(self):
            recordings.append(self.config.name)
            return self

    def from_pretrained(name, *, device):
        assert device == kind
        loaded = Loaded.__new__(Loaded)
        loaded.__dict__ |= vars(codec("mini", int(name.rsplit("-")[1])))
        return loaded

    monkeypatch.setattr("server.models.SemantiCodec.from_pretrained", from_pretrained)
    load_models(["mini-100", "mini-50", "mini-25"], kind)
    assert len(set(recordings)) == recorded
