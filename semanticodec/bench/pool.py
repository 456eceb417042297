"""Jobs in this process or in several, one after the other or at once, the results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from ..errors import SemantiCodecError
from ..processes import end_with

Advance = Callable[[str, str, int, int], None]
"""Told what is done: the round, the codec and clip, how many of how many."""
Each = Callable[..., Iterator[tuple[Any, Any]]]
"""Goes through jobs, see :class:`workers`: function, jobs, round, advance -> job and result."""

J = TypeVar("J", bound=tuple[Any, ...])


def _started(parent: int) -> None:
    """Prepare a process of the pool."""
    torch.set_num_threads(1)
    end_with(parent)


class workers:
    """Go through jobs here, or in several processes."""

    def __init__(self, jobs: int) -> None:
        self._pool = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_started, initargs=(os.getpid(),))
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Each:
        torch.set_num_threads(1)  # times are those of one thread, here as in the pool
        return self._each

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _each(
        self, function: Callable[..., Any], jobs: Sequence[J], stage: str, advance: Advance
    ) -> Iterator[tuple[J, Any]]:
        results: Iterable[Any]
        done = 0
        try:
            if self._pool is None:
                results = (function(*job) for job in jobs)
            else:
                results = self._pool.map(function, *zip(*jobs, strict=True)) if jobs else ()
            for done, (job, result) in enumerate(zip(jobs, results, strict=True), 1):
                advance(stage, _label(job), done, len(jobs))
                yield job, result
        except BrokenProcessPool as error:
            raise SemantiCodecError(
                f"a process died while {stage} {_label(jobs[done])!r} or what comes soon after it; what is done is "
                "kept, and one process (-j 1) shows which it is"
            ) from error


def _label(job: tuple[Any, ...]) -> str:
    """Name a job after what in it has a name: a codec, a clip."""
    return " ".join(part.name for part in job if isinstance(getattr(part, "name", None), str))
