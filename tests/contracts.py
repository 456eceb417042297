"""The four laws of design.md, section 2, for everything that steps.

1. steps + flush == whole; 2. any cut of the input gives the same; 3. a row does not depend on its batch-mates, be they
active or not; 4. reset == fresh.  Exact on CPU fp32.  A :class:`Subject` says how to drive one kind of stepping object;
units are what it consumes: samples for encoders, frames for decoders.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from semanticodec.streaming import Decoder, Encoder, StreamDecoder, StreamEncoder
from semanticodec.windows import State

SEEDS = (3, 2**64 - 1, 0, 77)


@dataclass(frozen=True)
class Subject:
    """One stepping object and what it must give.

    Args:
        steps: the pure layer.
        stream: makes the object that owns the ragged remainder, given a seed.
        make: (units, seed) -> input ``[1, ..., units]``.
        whole: (input ``[1, ..., units]``, seed) -> the definition of its output, computed without stepping.
    """

    steps: Encoder | Decoder
    stream: Callable[[int], StreamEncoder | StreamDecoder]
    make: Callable[[int, int], Tensor]
    whole: Callable[[Tensor, int], Tensor]

    @property
    def hop(self) -> int:
        """Units that a step consumes."""
        return self.steps.block if isinstance(self.steps, Encoder) else self.steps.frames

    @property
    def span(self) -> int:
        """Units that a step sees."""
        ahead = self.steps.lookahead if isinstance(self.steps, Encoder) else self.steps.ahead
        return self.hop + ahead

    @property
    def lag(self) -> int:
        """Outputs at the beginning that nobody hears."""
        return 0 if isinstance(self.steps, Encoder) else self.steps.lag

    def step(
        self, given: Tensor, state: Any, seeds: Sequence[int], active: Tensor | None = None
    ) -> tuple[Tensor, State]:
        kept = tensors(state, clone=True)
        if isinstance(self.steps, Encoder):
            result: tuple[Tensor, State] = self.steps.step(given, state, active)
        else:
            result = self.steps.step(given, state, seeds, active)
        assert same(tensors(state), kept), "the old state was written to"
        return result

    def finish(self, given: Tensor, state: Any, seeds: Sequence[int]) -> Tensor:
        kept = tensors(state, clone=True)
        if isinstance(self.steps, Encoder):
            result = self.steps.finish(given, state)
        else:
            result = self.steps.finish(given, state, seeds)
        assert same(tensors(state), kept), "the old state was written to"
        return result


def stepped(subject: Subject, given: Tensor, seeds: Sequence[int]) -> Tensor:
    """Drive the pure layer over a whole batch of equally long inputs."""
    state, outputs, start = subject.steps.begin(len(given)), [], 0
    while given.shape[-1] - start >= subject.span:
        out, state = subject.step(given[..., start : start + subject.span], state, seeds)
        outputs.append(out)
        start += subject.hop
    outputs.append(subject.finish(given[..., start:], state, seeds))
    return torch.cat(outputs, -1)[..., subject.lag :]


def pushed(stream: StreamEncoder | StreamDecoder, given: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """Push ``given`` ``[..., units]`` in pieces; the last output is that of the flush."""
    edges = [0, *sorted(min(cut, given.shape[-1]) for cut in cuts), given.shape[-1]]
    outputs = [stream.push(given[..., a:b]) for a, b in itertools.pairwise(edges)]
    return [*outputs, stream.flush()]


def check_whole(subject: Subject, units: int, rows: int = 2) -> None:
    """Law 1, for a batch whose rows have their own seeds."""
    given = [subject.make(units, row) for row in range(rows)]
    outputs = stepped(subject, torch.cat(given), SEEDS[:rows])
    for row, own in enumerate(given):
        assert torch.equal(outputs[row : row + 1], subject.whole(own, SEEDS[row]))


def check_cuts(subject: Subject, units: int, cuts: Sequence[int]) -> None:
    """Laws 2 and 4 of the outer layer: any pieces, and after a flush the same object begins afresh."""
    given = subject.make(units, 5)
    want = subject.whole(given, SEEDS[0])
    stream = subject.stream(SEEDS[0])
    pieces = given[0] if isinstance(subject.steps, Encoder) else given
    for order in (cuts, cuts[: len(cuts) // 2]):
        assert torch.equal(torch.cat(pushed(stream, pieces, order), -1), want)


def check_rows(subject: Subject, schedule: Sequence[Sequence[bool]], restart: int) -> None:
    """Laws 3 and 4 of the inner layer.

    Rows come and go as in a server: ``schedule[tick][row]`` says who is active; after every tick the states are taken
    apart and put together in another order; at tick ``restart`` the first row is reset.  Each row gives what it gives
    alone, inactive rows see rubbish and keep their state, and nobody's old state is written to.
    """
    batch, ticks = len(schedule[0]), len(schedule)
    inputs = [subject.make(subject.span + ticks * subject.hop, row) for row in range(batch)]
    alone = [subject.steps.begin(1) for _ in range(batch)]
    at = [0] * batch
    state, order = subject.steps.begin(batch), list(range(batch))
    for tick, mask in enumerate(schedule):
        if tick == restart:
            state = subject.steps.reset(state, torch.tensor([row == 0 for row in order]))
            alone[0], at[0] = subject.steps.begin(1), 0
        given = torch.cat([inputs[row][..., at[row] : at[row] + subject.span] for row in order])
        active = torch.tensor([mask[row] for row in order])
        given[~active] = torch.nan if given.is_floating_point() else -1
        out, after = subject.step(given, state, [SEEDS[row] for row in order], active)
        for place, row in enumerate(order):
            if mask[row]:
                own = inputs[row][..., at[row] : at[row] + subject.span]
                want, alone[row] = subject.step(own, alone[row], [SEEDS[row]])
                assert torch.equal(out[place : place + 1], want)
                at[row] += subject.hop
            assert same(tensors(after.rows()[place]), tensors(alone[row]))
        order = [*order[1:], order[0]]
        state = type(after).joined([*after.rows()[1:], after.rows()[0]])


def check_constant(subject: Subject, steps: int) -> None:
    """State neither grows nor keeps larger memory alive, and a stream holds less than one span of input."""
    given, state = subject.make(subject.span, 0), subject.steps.begin(1)
    sizes = set()
    for _ in range(steps):
        _, state = subject.step(given, state, [0])
        sizes.add(tuple(part.untyped_storage().nbytes() for part in tensors(state)))
    assert len(sizes) == 1
    assert [part.shape for part in tensors(state)] == [part.shape for part in tensors(subject.steps.begin(1))]


def tensors(state: State, *, clone: bool = False) -> list[Tensor]:
    return [part.clone() if clone else part for part in vars(state).values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
