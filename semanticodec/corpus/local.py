"""The local engine: one worker process per core or GPU, fed through pipes.

A worker that dies takes nothing with it.  Its chunk is done again item by item; an item that kills two workers in a
row is listed as a failure, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import pyarrow as pa

from ..errors import SemantiCodecError
from .reading import Reading
from .records import Assembler, Event, Finished, Item, ItemDone, ItemFailed, schema, seconds_of
from .worker import Work

ENTRY = "from semanticodec.corpus.worker import main; main()"
DEATHS = 2
"""Workers that an item may kill before it is given up."""
STILLBORN = 3
"""Workers in a row that may die before they are ready."""


@dataclass
class _Job:
    """A chunk on its way; once a worker has died of it, item by item."""

    chunk: int
    items: list[Item]
    apart: bool = False
    deaths: int = 0
    done: list[Finished] = field(default_factory=list)

    @property
    def task(self) -> tuple[int, list[Item]]:
        """What the worker is to do next."""
        return self.chunk, self.items[len(self.done) :][:1] if self.apart else self.items

    @property
    def finished(self) -> Finished | None:
        """The result, once it is whole."""
        if not self.apart:
            return self.done[0] if self.done else None
        if len(self.done) < len(self.items):
            return None
        rows = pa.concat_tables([part.rows for part in self.done])
        failures = [failure for part in self.done for failure in part.failures]
        return Finished(self.chunk, rows, failures, seconds_of(rows))

    def bury(self, work: Work, status: int) -> None:
        """A worker has died of the task: take the chunk apart, try the item again, or give it up."""
        if not self.apart:
            self.apart, self.done = True, []
            return
        self.deaths += 1
        if self.deaths >= DEATHS:
            failure = Assembler.failure(self.items[len(self.done)], _killer(0, status))
            self.done.append(Finished(self.chunk, schema(work.keep_features).empty_table(), [failure], 0.0))
            self.deaths = 0


class _Process:
    """A worker process and our end of its pipe."""

    def __init__(self, work: Work | Reading) -> None:
        self.pipe, theirs = Pipe()
        assert isinstance(theirs, Connection)
        with theirs:
            command = [sys.executable, "-c", ENTRY, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        with contextlib.suppress(BrokenPipeError):  # its death is noticed where it is waited for
            self.pipe.send(work)

    def send(self, task: object) -> None:
        """Hand out a task."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(task)

    def stop(self) -> int:
        """End the process; return how it ended."""
        self.pipe.close()
        self.process.terminate()
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Worker:
    """A process that tokenises, and what it is at."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.process = _Process(work)
        self.ready = False
        self.job: _Job | None = None

    def give(self, job: _Job) -> None:
        """Hand out a task."""
        self.job = job
        self.process.send(job.task)


def run(chunks: Iterator[tuple[int, list[Item]]], works: list[Work]) -> Iterator[Finished]:
    """Work through chunks in local processes.

    Args:
        chunks: number and items of each.
        works: one per worker.

    Yields:
        The chunks as they are done, in any order.

    Raises:
        SemantiCodecError: a worker cannot start, or failed of itself.
    """
    pool = _Pool(chunks)
    try:
        pool.workers = [_Worker(work) for work in works]
        while busy := [worker for worker in pool.workers if worker.job is not None or not worker.ready]:
            by_pipe = {worker.process.pipe: worker for worker in busy}
            for pipe in wait(list(by_pipe)):
                assert isinstance(pipe, Connection)
                finished = pool.attend(by_pipe[pipe])
                if finished is not None:
                    yield finished
    finally:
        for worker in pool.workers:
            worker.process.stop()


class _Pool:
    """The workers, and the chunks that are not handed out yet."""

    def __init__(self, chunks: Iterator[tuple[int, list[Item]]]) -> None:
        self.workers: list[_Worker] = []
        self._chunks = chunks
        self._again: list[_Job] = []
        self._stillborn = 0

    def attend(self, worker: _Worker) -> Finished | None:
        """Deal with a worker that has something to say, or is dead; return the chunk that is now finished."""
        try:
            answer = worker.process.pipe.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        if isinstance(answer, Exception):
            raise answer
        job, worker.job = worker.job, None
        if job is None:
            worker.ready, self._stillborn = True, 0
            self._feed(worker)
            return None
        job.deaths = 0
        job.done.append(answer)
        finished = job.finished
        if finished is None:
            worker.give(job)
        else:
            self._feed(worker)
        return finished

    def _feed(self, worker: _Worker) -> None:
        """Hand out what is to be done again, or the next chunk."""
        if self._again:
            worker.give(self._again.pop())
        elif (chunk := next(self._chunks, None)) is not None:
            worker.give(_Job(*chunk))

    def _replace(self, worker: _Worker) -> Finished | None:
        """Put a new worker in the place of a dead one; return the chunk that giving up an item has finished."""
        status = worker.process.stop()
        self._stillborn = 0 if worker.ready else self._stillborn + 1
        if self._stillborn >= STILLBORN:
            raise SemantiCodecError(f"{self._stillborn} workers died while they started, the last with {status}")
        self.workers[self.workers.index(worker)] = _Worker(worker.work)
        if worker.job is None:
            return None
        worker.job.bury(worker.work, status)
        finished = worker.job.finished
        if finished is None:
            self._again.append(worker.job)
        return finished


def read_apart(items: list[Item], how: Reading) -> Iterator[Event]:
    """Read items in another process, which may die of one: after two in a row the item has failed."""
    process = _Process(how)
    try:
        for index, item in enumerate(items):
            status = 0
            for _ in range(DEATHS):
                try:
                    yield from _events(process, index, item)
                    break
                except (EOFError, OSError):
                    status = process.stop()
                    process = _Process(how)
            else:
                yield _killer(index, status)
    finally:
        process.stop()


def _events(process: _Process, index: int, item: Item) -> Iterator[Event]:
    process.send((index, item))
    event: Event | None = None
    while not isinstance(event, ItemDone | ItemFailed):
        event = process.pipe.recv()
        if isinstance(event, Exception):
            raise event
        assert event is not None
        yield event


def _killer(index: int, status: int) -> ItemFailed:
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return ItemFailed(index, "WorkerDied", f"{DEATHS} workers died of reading or encoding it, the last of {how}")
