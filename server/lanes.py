"""What waits for the engine: one lane per stream gathers samples or codes until a step can be taken.

No torch: a lane holds numpy arrays, and its row's state as something that only the engine looks into.  Positions are
samples at 16 kHz.  A recording begins with a stream, and anew after every flush and every jump of positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soxr
from numpy.typing import NDArray

from semanticodec.errors import CodesError
from semanticodec.wire.blocks import Block, Chunk, Geometry, samples_of
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import Marker

from .limits import RATE

if TYPE_CHECKING:
    from semanticodec import Decoder, Encoder

Samples = NDArray[np.float32]
CodesArray = NDArray[np.int64]

FILL = RATE
"""Samples of silence that stand in for a gap in a publisher's audio; after a longer one a new recording begins."""
CONCEAL = 8
"""Lost blocks that are made up for; after a longer gap a new recording begins."""


@dataclass(frozen=True)
class Tuned:
    """From here on code at ``rate``, with or without copies at the lowest one."""

    rate: int
    copies: bool


@dataclass(frozen=True)
class Sound:
    """Decoded samples in [-1, 1] and the position of the first one."""

    samples: Samples
    at: int


@dataclass(frozen=True)
class Mark:
    """A marker comes out, behind all that came before it; ``at`` is its position, if it is known."""

    flush: bool
    at: int | None
    tag: int


@dataclass(frozen=True)
class Done:
    """So many units, of so many bytes, have been taken in."""

    units: int
    octets: int


@dataclass(frozen=True)
class Failed:
    """The stream has ended: what it was given cannot be worked off."""

    reason: str


@dataclass(frozen=True)
class Fence:
    """It comes out, for ``then`` to be called, behind all that the engine makes of what was put before it."""

    then: Callable[[], None]


Event = Block | Sound | Mark | Done | Failed | Fence


class Resampler:
    """Samples at one rate to samples at another; together the pieces are what the codec makes of the whole.

    Attributes:
        made: samples that came out, in all.
    """

    def __init__(self, source: int, target: int) -> None:
        self.made = 0
        self._source, self._target, self._seen = source, target, 0
        self._stream = None if source == target else soxr.ResampleStream(source, target, 1)

    def push(self, samples: Samples) -> Samples:
        """Take some samples and return those that are ready."""
        self._seen += len(samples)
        return self._resample(samples, last=False)

    def flush(self) -> Samples:
        """Return what is left: ``ceil(samples * target / source)`` have come out then."""
        missing = -(-self._seen * self._target // self._source) - self.made
        # soxr rounds the number of samples; enough silence behind the sound makes it at least that many.
        return self._resample(np.zeros(self._source // self._target + 2, np.float32), last=True)[:missing]

    def _resample(self, samples: Samples, *, last: bool) -> Samples:
        if self._stream is not None and len(samples):
            samples = self._stream.resample_chunk(samples, last=last)
        self.made += len(samples)
        return samples


def unpacked(block: Block, geometry: Geometry, sizes: tuple[int, int]) -> CodesArray:
    """Return the codes ``[2, F]`` of a block.

    Raises:
        CodesError: one is not in its codebook.
    """
    codes: CodesArray = geometry.unpack(block.data, block.rate)
    if (codes >= np.array(sizes)[:, None]).any():
        raise CodesError(f"codes up to {codes.max(1).tolist()}; the codebooks have {list(sizes)}")
    return codes


class Encoding:
    """A stream of audio on its way to codes.

    Args:
        encoders: one per token rate.
        geometry: of the codes.
        sample_rate: of the chunks in Hz.
        form: of the chunks.
        rate: token rate to begin with.

    Attributes:
        items: what has not been taken in: chunks, markers, wishes and fences, in order.
        state: of the row, or None where a recording begins.
        rate: token rate of the next block.
        copies: whether the next block needs a copy at the lowest rate.
        finishing: what is held is all there is of this recording.
    """

    def __init__(
        self, encoders: Mapping[int, Encoder], geometry: Geometry, sample_rate: int, form: str, rate: int
    ) -> None:
        self.items: deque[Chunk | Marker | Lost | Tuned | Fence] = deque()
        self.state: Any = None
        self.rate = rate
        self.copies = False
        self.finishing = False
        self._geometry, self._sample_rate, self._form = geometry, sample_rate, form
        self._latency = encoders[rate].latency
        self._held: Samples = np.zeros(0, np.float32)
        self._restart(0)

    def _restart(self, at: int) -> None:
        self.state, self.finishing = None, False
        self._resampler = Resampler(self._sample_rate, RATE)
        self._next = at
        self._at = at * RATE // self._sample_rate

    @property
    def ready(self) -> bool:
        """Whether the engine can take a step."""
        return self.finishing or len(self._held) >= self._latency

    def absorb(self) -> list[Event]:
        """Take in what fits before the next step."""
        events: list[Event] = []
        while self.items and not self.ready:
            item = self.items[0]
            if isinstance(item, Chunk) and self._gap(item.at):
                continue
            self.items.popleft()
            if isinstance(item, Chunk):
                self._push(samples_of(item.data, self._form))
                events.append(Done(1, len(item.data)))
            elif isinstance(item, Tuned):
                self.rate, self.copies = item.rate, item.copies
            elif isinstance(item, Marker):
                events += self._mark(item)
            elif isinstance(item, Fence):
                events.append(item)
        return events

    def _push(self, samples: Samples) -> None:
        self._next += len(samples)
        self._held = np.concatenate([self._held, self._resampler.push(samples)])

    def _gap(self, at: int) -> bool:
        """Bridge a gap before position ``at``, or end the recording there; tell whether the lane has to look again."""
        gap = at - self._next
        if 0 < gap * RATE <= FILL * self._sample_rate and self._resampler.made:
            self._push(np.zeros(gap, np.float32))
            return True
        return gap != 0 and self._end(at)

    def _end(self, at: int) -> bool:
        """End the recording, if there is one; tell whether something is left to code."""
        self._held = np.concatenate([self._held, self._resampler.flush()])
        self.finishing = len(self._held) > 0
        if not self.finishing:
            self._restart(at)
        return self.finishing

    def _mark(self, marker: Marker) -> list[Event]:
        if marker.flush and self._end(self._next):
            self.items.appendleft(marker)
            return []
        return [Mark(marker.flush, self._next * RATE // self._sample_rate, marker.tag)]

    def take(self) -> Samples:
        """Return the samples of the next step."""
        return self._held[: self._latency]

    def rest(self) -> Samples:
        """Return what is left of a recording that ends, filled up with silence to whole blocks."""
        return np.pad(self._held, (0, -len(self._held) % self._geometry.block))

    def give(self, blocks: list[dict[int, bytes]], state: Any) -> list[Event]:
        """Take the packed codes of a step by rate, the wanted rate first, and the new state (None after the last)."""
        events: list[Event] = []
        for packed in blocks:
            (rate, data), *copy = packed.items()
            events.append(Block(data, rate, self._at, copy[0][1] if copy else b""))
            self._held = self._held[self._geometry.block :]
            self._at += self._geometry.block
        if self.finishing:
            self._restart(self._next)
        self.state = state
        return events


class Decoding:
    """A stream of codes on its way to sound.

    Args:
        decoders: one per token rate.
        geometry: of the codes.
        sizes: entries of the (semantic, acoustic) codebook.
        rate: token rate to begin with.
        carry: whether a row's state may pass from one rate's decoder to another's.

    Attributes:
        items: what has not been taken in: blocks, losses, markers and fences, in order.
        state: of the row, or None where a recording begins.
        rate: token rate of the next step.
        finishing: what is held is all there is of this recording.
    """

    def __init__(
        self, decoders: Mapping[int, Decoder], geometry: Geometry, sizes: tuple[int, int], rate: int, *, carry: bool
    ) -> None:
        self.items: deque[Block | Marker | Lost | Fence] = deque()
        self.state: Any = None
        self.rate = rate
        self.finishing = False
        self._decoders, self._geometry, self._carry = decoders, geometry, carry
        self._sizes = sizes
        self._held: CodesArray = np.zeros((2, 0), np.int64)
        self._restart(0)

    def _restart(self, at: int) -> None:
        self.state, self.finishing = None, False
        self._next = self._at = at
        self._begun = False
        self._before = self._decoders[self.rate].lag

    @property
    def ready(self) -> bool:
        """Whether the engine can take a step."""
        decoder = self._decoders[self.rate]
        return self.finishing or self._held.shape[1] >= decoder.frames + decoder.ahead

    def absorb(self) -> list[Event]:
        """Take in what fits before the next step.

        Raises:
            CodesError: codes are out of range.
        """
        events: list[Event] = []
        while self.items and not self.ready:
            item = self.items[0]
            if isinstance(item, Block) and self._turns(item):
                continue
            self.items.popleft()
            if isinstance(item, Block):
                self._push(unpacked(item, self._geometry, self._sizes))
                events.append(Done(1, len(item.data)))
            elif isinstance(item, Lost):
                self._conceal(item.stop - item.seq)
            elif isinstance(item, Fence):
                events.append(item)
            elif item.flush and self._begun:
                self.finishing = True
                self.items.appendleft(item)
            else:
                events.append(Mark(item.flush, self._next if item.at is None else item.at, item.tag))
        return events

    def _push(self, codes: CodesArray) -> None:
        self._held = np.concatenate([self._held, codes], 1)
        self._next += self._geometry.block
        self._begun = True

    def _turns(self, block: Block) -> bool:
        """End the recording if the block cannot go on with it; tell whether the lane has to look again."""
        switched = block.rate != self.rate and (self._held.shape[1] > 0 or not self._carry)
        if self._begun and (block.at != self._next or switched):
            self.finishing = True
            return True
        self.rate = block.rate
        if not self._begun:
            self._restart(block.at)
        return False

    def _conceal(self, count: int) -> None:
        """Let the model make up for a few lost blocks."""
        if self._begun and count <= CONCEAL:
            for _ in range(count):
                self._push(np.full((2, self._geometry.frames(self.rate)), -1, np.int64))

    def take(self) -> CodesArray:
        """Return the codes of the next step."""
        decoder = self._decoders[self.rate]
        return self._held[:, : decoder.frames + decoder.ahead]

    def rest(self) -> CodesArray:
        """Return what is left of a recording that ends."""
        return self._held

    def give(self, samples: Samples, state: Any) -> list[Event]:
        """Take the samples of a step, and the new state (None after the last)."""
        heard = samples[self._before :]
        self._before -= len(samples) - len(heard)
        events: list[Event] = [Sound(heard, self._at)] if len(heard) else []
        self._at += len(heard)
        if self.finishing:
            self._held = self._held[:, :0]
            self._restart(self._at)
        else:
            self._held = self._held[:, self._decoders[self.rate].frames :]
        self.state = state
        return events
