"""The process that reads and encodes; its parent hands it chunks through a pipe.

A process of its own, because decoders of strangers' files cannot be trusted: it may die, and its parent goes on.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from ..checkpoints import locate
from ..codec import SemantiCodec
from ..config import CodecConfig
from ..errors import SemantiCodecError
from ..processes import end_with
from .encoding import WindowEncoder
from .reading import Channels, Reading, read
from .records import Assembler, Event, Finished, Item

AHEAD = 4
"""Spans (about a minute each) that every reading thread may be ahead of the encoder."""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know besides its chunks.

    Args:
        model: a preset's name or a folder with weights.
        preset: which preset to take from a folder with several.
        device: where to compute.
        dtype: name of the floating-point type of the weights.
        batch_seconds: of sound in one call of the networks.
        readers: threads that read ahead of the encoder; 0 reads in between.
        channels: average them, or make a row of each.
        vad: make a row of every stretch of speech.
        keep_features: keep the continuous features too.
    """

    model: str
    preset: str | None
    device: str
    dtype: str
    batch_seconds: float
    readers: int
    channels: Channels
    vad: bool
    keep_features: bool

    def load_config(self) -> CodecConfig:
        """Return the configuration of the model; no weights are read."""
        return locate(self.model, self.preset).config

    def load(self) -> SemantiCodec:
        """Load the encoder half; on a CPU one thread is used, and more workers are the way to use more cores."""
        if torch.device(self.device).type == "cpu":
            torch.set_num_threads(1)
        kind: torch.dtype = getattr(torch, self.dtype)
        return SemantiCodec.from_pretrained(
            self.model, preset=self.preset, device=self.device, dtype=kind, parts="encoder"
        )


class Tokeniser:
    """Reads and encodes chunks."""

    def __init__(self, work: Work) -> None:
        self._work = work
        codec = work.load()
        self._how = Reading(codec.config, work.channels, work.vad, work.keep_features)
        self._encoder = WindowEncoder(codec, work.batch_seconds, keep_features=work.keep_features)

    def run(self, chunk: int, items: list[Item]) -> Finished:
        """Work through one chunk."""
        assembler = Assembler(chunk, items, self._how.config, keep_features=self._work.keep_features)
        events = read_ahead(items, self._how, self._work.readers) if self._work.readers else read_all(items, self._how)
        for event in self._encoder.encode(events):
            assembler.add(event)
        return assembler.finish()


def read_all(items: list[Item], how: Reading) -> Iterator[Event]:
    """Read items one after the other."""
    for index, item in enumerate(items):
        yield from read(index, item, how)


def read_ahead(items: list[Item], how: Reading, threads: int) -> Iterator[Event]:
    """Read items in several threads; what comes of one item keeps its order."""
    ready: queue.Queue[Event | None] = queue.Queue(maxsize=AHEAD * threads)
    stopped = threading.Event()

    def put(event: Event | None) -> None:
        while not stopped.is_set():
            try:
                ready.put(event, timeout=0.1)
            except queue.Full:
                continue
            return

    def feed(index: int, item: Item) -> None:
        try:
            for event in read(index, item, how):
                if stopped.is_set():
                    return
                put(event)
        finally:
            put(None)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(feed, index, item) for index, item in enumerate(items)]
        try:
            for _ in futures:
                while (event := ready.get()) is not None:
                    yield event
            for future in futures:
                future.result()
        finally:
            stopped.set()


def main() -> None:
    """Serve the parent until it closes the pipe."""
    # Ctrl-C reaches every process of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(os.getppid())
    pipe = Connection(int(sys.argv[1]))
    try:
        work: Work | Reading = pipe.recv()
        if isinstance(work, Reading):
            while True:
                index, item = pipe.recv()
                for event in read(index, item, work):
                    pipe.send(event)
        tokeniser = Tokeniser(work)
        pipe.send(None)
        while True:
            pipe.send(tokeniser.run(*pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    except SemantiCodecError as error:
        pipe.send(error)
    except Exception:
        pipe.send(SemantiCodecError(f"a worker failed:\n{traceback.format_exc()}"))


if __name__ == "__main__":
    main()
