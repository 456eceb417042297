"""How long coding takes, and on what."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable
from typing import TypeVar

from .machine import machine

T = TypeVar("T")
TIMING = (
    "seconds per second of sound on one thread, of the process that codes and of programs that it starts; the first "
    "time that a process uses a codec, it codes and decodes one clip before, untimed (timed_by of a system: who timed "
    "it, if another machine, torch or commit timed some clips)"
)


@functools.cache
def timer() -> str:
    """Name what times are of."""
    here = machine()
    return f"{here['cpu']}, torch {here['torch']}, commit {str(here['commit'])[:7]}{'*' * bool(here['modified'])}"


def spent_on(work: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    """Return a result, and the elapsed and the processor seconds that it took here and in programs it ran."""

    def spent() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, cpu = time.perf_counter(), spent()
    result = work()
    return result, (time.perf_counter() - wall, spent() - cpu)
