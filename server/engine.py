"""The codec behind the server: one thread that steps many streams at once.

The thread owns the models.  Each stream has a lane (:mod:`.lanes`); whatever lanes are ready with codes of one rate
share a step, oldest first, one block per stream, so that a busy stream waits behind the others.  What comes out goes
back to the thread that runs the event loop.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from semanticodec import Decoder, Encoder, SamplerOptions
from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import Block, Chunk
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import Marker

from .lanes import Decoding, Done, Encoding, Event, Failed, Fence, Samples, Tuned
from .limits import RATE
from .metrics import Metrics
from .models import Models

log = logging.getLogger("semanticodec.server")

Side = Literal["encode", "decode"]
Post = Callable[[Callable[[], object]], object]

SMOOTHING = 0.1
"""Share of a new measurement in the step times that admission goes by."""
MAX_RETRY = 60


@dataclass(frozen=True)
class Work:
    """How the engine works.

    Args:
        batch: streams per step.
        slots: streams at a time.
        load: share of the time that steps may take, by which streams are admitted.
        threads: of a CPU; 0 leaves PyTorch's choice.
        seed: of the decoders' noise.
        steps: solver steps; None takes the preset's.
    """

    batch: int = 16
    slots: int = 256
    load: float = 0.85
    threads: int = 0
    seed: int = 0
    steps: int | None = None


class Stream:
    """The event loop's handle on a lane.

    Attributes:
        queued: units that were put and not taken in yet.
    """

    def __init__(self, engine: Engine, side: Side, lane: Encoding | Decoding, deliver: Callable[[Event], None]) -> None:
        self.queued = 0
        self.side: Side = side
        self.lane = lane
        self.since = 0.0
        self.waits = False
        self._engine, self._deliver = engine, deliver
        self._closed = False

    def put(self, item: Chunk | Block | Marker | Lost | Tuned | Fence) -> None:
        """Append something to be worked off."""
        self.queued += isinstance(item, Chunk | Block)
        self._engine.send(self, item)

    def close(self) -> None:
        """End the stream; nothing more will be delivered."""
        if not self._closed:
            self._closed = True
            self._engine.release(self)

    def deliver(self, event: Event) -> None:
        """Hand on what came out, in the event loop."""
        if not self._closed:
            self._deliver(event)


class Engine:
    """Step streams.  Everything but the thread itself is to be called from the event loop.

    Args:
        load: loads the models; called in the thread.
        work: how to work.
        metrics: where to count.
        post: runs a function in the event loop, from any thread.
        broken: is called in the event loop when there will never be any models (again).

    Attributes:
        models: once they are loaded and warm, and while the thread lives, else None.
        failure: why there will never be any (again).
    """

    def __init__(
        self,
        load: Callable[[], Models],
        work: Work,
        metrics: Metrics,
        post: Post,
        broken: Callable[[], object] = lambda: None,
    ) -> None:
        self.models: Models | None = None
        self.failure: str | None = None
        self._broken = broken
        self._load, self._work, self._metrics, self._post = load, work, metrics, post
        self._inbox: SimpleQueue[tuple[Stream, Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._opened: dict[Stream, float] = {}
        self._lifetime = 0.0
        self._seconds: dict[tuple[Side, int], float] = {}
        # Only the thread looks at what follows.
        self._encoders: dict[int, Encoder] = {}
        self._decoders: dict[int, Decoder] = {}
        self._ready: dict[tuple[Side, int], deque[Stream]] = {}
        self._outbox: list[tuple[Stream, Event]] = []
        self._gone: set[Stream] = set()

    def start(self) -> None:
        """Load the models and begin."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step that is running, and end."""
        self._inbox.put(None)
        self._thread.join()

    # The event loop's side

    def encode(self, sample_rate: int, form: str, rate: int, deliver: Callable[[Event], None]) -> Stream:
        """Open a stream of audio; ``deliver`` gets blocks, marks and what was done."""
        models = self._loaded()
        lane = Encoding(self._encoders, models.geometry, sample_rate, form, rate)
        return self._open(Stream(self, "encode", lane, deliver))

    def decode(self, rate: int, deliver: Callable[[Event], None]) -> Stream:
        """Open a stream of codes; ``deliver`` gets sound, marks and what was done."""
        models = self._loaded()
        lane = Decoding(self._decoders, models.geometry, models.sizes, rate, carry=models.carries)
        return self._open(Stream(self, "decode", lane, deliver))

    def admit(self, encode: int, decode: int) -> int | None:
        """Tell whether so many more streams can be kept up with.

        Returns:
            None if they can, else the seconds after which to ask again: when, as streams have come and gone so far,
            one will have gone.
        """
        more: dict[Side, int] = {"encode": encode, "decode": decode}
        if not encode + decode:
            return None
        fits = len(self._opened) + encode + decode <= self._work.slots
        # One that is alone is let in, whatever was measured, so that there is something to measure.
        if fits and (not self._opened or self.load(more) <= self._work.load):
            return None
        now = time.monotonic()
        ages = [now - since for since in self._opened.values()]
        lifetime = max([self._lifetime, *ages])
        return max(1, min(MAX_RETRY, math.ceil(lifetime / max(1, len(ages)))))

    def load(self, more: Mapping[Side, int] | None = None) -> float:
        """Return the share of the time that steps take if every stream, and ``more`` of them, goes on at its pace."""
        spent = 0.0
        sides: tuple[Side, ...] = ("encode", "decode")
        for side in sides:
            count = sum(stream.side == side for stream in self._opened) + (more or {}).get(side, 0)
            whole, rest = divmod(count, self._work.batch)
            spent += whole * self._cost(side, self._work.batch) + (self._cost(side, rest) if rest else 0)
        return spent * RATE / self._loaded().geometry.block

    def send(self, stream: Stream, item: Chunk | Block | Marker | Lost | Tuned | Fence) -> None:
        """Pass an item to the thread (for :class:`Stream`)."""
        self._inbox.put((stream, item))

    def release(self, stream: Stream) -> None:
        """Take a stream out (for :class:`Stream`)."""
        age = time.monotonic() - self._opened.pop(stream)
        self._lifetime += SMOOTHING * (age - self._lifetime)
        self._metrics.streams.labels(stream.side).dec()
        self._inbox.put((stream, None))

    def _open(self, stream: Stream) -> Stream:
        self._opened[stream] = time.monotonic()
        self._metrics.streams.labels(stream.side).inc()
        return stream

    def _loaded(self) -> Models:
        if self.models is None:
            raise ConfigError("the models are not loaded yet; wait until the engine is ready")
        return self.models

    def _cost(self, side: Side, rows: int) -> float:
        """Return the seconds that a step of so many rows takes: as measured, and between that in proportion."""
        low, high = self._seconds.get((side, 1), 0.0), self._seconds.get((side, self._work.batch), 0.0)
        share = (rows - 1) / max(1, self._work.batch - 1)
        return low + share * (max(low, high) - low)

    # The thread's side

    def _run(self) -> None:
        try:
            if self._work.threads:
                torch.set_num_threads(self._work.threads)
            models = self._load()
            self._warm(models)
            self.models = models
            while self._read():
                batch = self._choose()
                if batch:
                    self._advance(batch)
                self._deliver()
        except BaseException as error:
            # Nobody is behind this thread to see it: a server whose engine is gone must say so.
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """Let nobody in any more, and end every stream."""
        log.error("engine", exc_info=error)
        self.failure = f"{type(error).__name__}: {error}"
        self.models = None
        with contextlib.suppress(RuntimeError):  # the event loop is gone already
            self._post(lambda: _hand_out([(stream, Failed(str(self.failure))) for stream in self._opened]))
            self._post(self._broken)

    def _read(self) -> bool:
        """Take what has come in, waiting for it if there is nothing else to do; tell whether to go on."""
        idle = not any(self._ready.values())
        touched: dict[Stream, None] = {}
        while idle or not self._inbox.empty():
            idle = False
            entry = self._inbox.get()
            if entry is None:
                return False
            stream, item = entry
            if item is None:
                self._drop(stream)
            elif stream not in self._gone:
                stream.lane.items.append(item)
                touched[stream] = None
        for stream in touched:
            if stream not in self._gone:
                self._absorb(stream)
        # A stream sends nothing after it was closed.
        self._gone.clear()
        return True

    def _drop(self, stream: Stream) -> None:
        self._gone.add(stream)
        for waiting in self._ready.values():
            if stream in waiting:
                waiting.remove(stream)

    def _absorb(self, stream: Stream) -> None:
        """Let a lane take in what it can, and queue it if it is ready."""
        if stream.waits:
            return
        try:
            events = stream.lane.absorb()
        except Exception as error:
            self._fail(stream, error)
            return
        self._outbox += ((stream, event) for event in events)
        if stream.lane.ready:
            stream.waits, stream.since = True, time.monotonic()
            self._ready.setdefault((stream.side, stream.lane.rate), deque()).append(stream)

    def _choose(self) -> list[Stream]:
        """Take the streams of the next step: the one that has waited longest, and those that can share its step."""
        waiting = [streams for streams in self._ready.values() if streams]
        if not waiting:
            return []
        streams = min(waiting, key=lambda streams: streams[0].since)
        if streams[0].lane.finishing:
            return [streams.popleft()]
        batch: list[Stream] = []
        while streams and len(batch) < self._work.batch and not streams[0].lane.finishing:
            batch.append(streams.popleft())
        return batch

    def _advance(self, batch: list[Stream]) -> None:
        """Take a step; if it fails, let each stream take it alone, so that only the one at fault suffers."""
        begin = time.monotonic()
        side, finishing = batch[0].side, batch[0].lane.finishing
        try:
            step = self._encode_step if side == "encode" else self._decode_step
            outcome = step(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            for stream in batch:
                self._advance([stream])
            return
        took = time.monotonic() - begin
        self._metrics.batch.labels(side).observe(len(batch))
        self._metrics.step.labels(side).observe(took)
        if not finishing:
            self._note(side, len(batch), took)
        for stream, events in zip(batch, outcome, strict=True):
            self._metrics.wait.labels(side).observe(begin - stream.since)
            self._outbox += ((stream, event) for event in events)
            stream.waits = False
            self._absorb(stream)

    def _note(self, side: Side, rows: int, took: float) -> None:
        """Correct the step times that admission goes by; a step of few rows tells about those of one row."""
        key: tuple[Side, int] = (side, self._work.batch if 2 * rows > self._work.batch > 1 else 1)
        known = self._seconds.get(key)
        expected = self._cost(side, rows)
        # In proportion, since the step was of another size than those that are remembered.
        seen = took if known is None or not expected else known * took / expected
        self._seconds[key] = seen if known is None else known + SMOOTHING * (seen - known)

    def _encode_step(self, batch: list[Stream]) -> list[list[Event]]:
        lanes = [stream.lane for stream in batch if isinstance(stream.lane, Encoding)]
        first = lanes[0]
        lowest = min(self._encoders)
        encoder = self._encoders[first.rate]
        states = [encoder.begin(1) if lane.state is None else lane.state for lane in lanes]
        if first.finishing:
            samples = torch.from_numpy(first.rest())[None]
            both = {rate: self._encoders[rate].finish(samples, states[0]) for rate in self._rates(first, lowest)}
            blocks = [self._packed(codes[0], rate) for rate, codes in both.items()]
            together = [dict(zip(both, parts, strict=True)) for parts in zip(*blocks, strict=True)]
            return [list(first.give(together, None))]
        samples = torch.from_numpy(np.stack([lane.take() for lane in lanes]))
        codes, new = _stepped(encoder.step, samples, states)
        copying = [i for i, lane in enumerate(lanes) if lane.copies and lane.rate != lowest]
        copies: dict[int, Tensor] = {}
        if copying:
            rows, _ = _stepped(self._encoders[lowest].step, samples[copying], [states[i] for i in copying])
            copies = dict(zip(copying, rows, strict=True))
        events = []
        for i, (lane, state) in enumerate(zip(lanes, new, strict=True)):
            packed = {lane.rate: self._packed(codes[i], lane.rate)[0]}
            if lane.copies:
                packed |= {lowest: self._packed(copies[i], lowest)[0]} if i in copies else {}
            events.append(lane.give([packed], state))
        return events

    def _rates(self, lane: Encoding, lowest: int) -> list[int]:
        return [lane.rate, lowest] if lane.copies and lane.rate != lowest else [lane.rate]

    def _packed(self, codes: Tensor, rate: int) -> list[bytes]:
        """Pack codes ``[2, F]`` block by block."""
        geometry = self._geometry
        return [geometry.pack(block.cpu().numpy(), rate) for block in codes.split(geometry.frames(rate), 1)]

    def _decode_step(self, batch: list[Stream]) -> list[list[Event]]:
        lanes = [stream.lane for stream in batch if isinstance(stream.lane, Decoding)]
        first, seed = lanes[0], self._work.seed
        decoder = self._decoders[first.rate]
        states = [decoder.begin(1) if lane.state is None else lane.state for lane in lanes]
        if first.finishing:
            wave = decoder.finish(torch.from_numpy(first.rest())[None], states[0], [seed])
            return [list(first.give(_finite(wave)[0][0], None))]
        codes = torch.from_numpy(np.stack([lane.take() for lane in lanes]))

        def step(codes: Tensor, state: Any, active: Tensor) -> tuple[Tensor, Any]:
            return decoder.step(codes, state, [seed] * len(codes), active)

        wave, new = _stepped(step, codes, states)
        samples, sane = _finite(wave)
        # A row that is not finite begins again, or it would never recover.
        kept = [state if fine else None for state, fine in zip(new, sane, strict=True)]
        self._metrics.upsets.inc(len(batch) - sum(sane))
        return [lane.give(row, state) for lane, row, state in zip(lanes, samples, kept, strict=True)]

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._metrics.failures.labels(stream.side).inc()
        self._drop(stream)
        stream.waits = True
        self._outbox.append((stream, Failed(f"{type(error).__name__}: {error}")))

    def _deliver(self) -> None:
        if self._outbox:
            self._post(functools.partial(_hand_out, self._outbox))
            self._outbox = []

    def _warm(self, models: Models) -> None:
        """Take steps of each rate and the smallest and largest size, twice, and note how long the second took."""
        self._geometry = models.geometry
        options = SamplerOptions(steps=self._work.steps)
        for rate, codec in models.codecs.items():
            encoder, decoder = Encoder(codec), Decoder(codec, options)
            self._encoders[rate], self._decoders[rate] = encoder, decoder
            for rows in sorted({1, self._work.batch}):
                codes = torch.zeros(rows, 2, decoder.frames + decoder.ahead, dtype=torch.int64)
                samples = torch.zeros(rows, encoder.latency)
                for _ in range(2):
                    begin = time.monotonic()
                    encoder.step(samples, encoder.begin(rows))[0].cpu()
                    middle = time.monotonic()
                    decoder.step(codes, decoder.begin(rows), [self._work.seed] * rows)[0].cpu()
                    end = time.monotonic()
                sides: list[tuple[Side, float]] = [("encode", middle - begin), ("decode", end - middle)]
                for side, took in sides:
                    self._seconds[side, rows] = max(self._seconds.get((side, rows), 0.0), took)


def _stepped(
    step: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]], given: Tensor, states: list[Any]
) -> tuple[Tensor, list[Any]]:
    """Take a step with the states of single rows; on other devices than the CPU, at a size that is a power of two.

    A model on an accelerator then sees few shapes, whatever comes and goes; rows that fill it up take no part.
    """
    state = type(states[0]).joined(states)
    rows = len(states)
    spare = 0 if _on_cpu(states[0]) else (1 << (rows - 1).bit_length()) - rows
    if spare:
        given = torch.cat([given, given[:1].expand(spare, *given.shape[1:])])
        state = type(state).joined([state, *[states[0]] * spare])
    active = torch.arange(rows + spare) < rows
    results, new = step(given, state, active)
    return results[:rows], new.rows()[:rows]


def _on_cpu(state: Any) -> bool:
    return all(part.device.type == "cpu" for part in vars(state).values())


def _finite(wave: Tensor) -> tuple[list[Samples], list[bool]]:
    """Return the rows as arrays, silent where they are not finite, and whether each is finite."""
    rows = wave.float().cpu()
    sane = torch.isfinite(rows).all(1)
    return list(torch.where(sane[:, None], rows, 0.0).numpy()), sane.tolist()


def _hand_out(events: Iterable[tuple[Stream, Event]]) -> None:
    for stream, event in events:
        if isinstance(event, Done):
            stream.queued -= event.units
        try:
            stream.deliver(event)
        except Exception:
            # Whatever is wrong with one stream, the others get theirs.
            log.exception("deliver")
            with contextlib.suppress(Exception):
                stream.deliver(Failed("internal error"))
