"""A Ray cluster of two nodes on this machine that loses workers and nodes while it tokenises a corpus.

``python -m benchmarks.corpus ray-kills --write``
"""

import contextlib
import dataclasses
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import ray
import soundfile
from ray.cluster_utils import Cluster

from semanticodec.corpus import CorpusOptions, Progress, run, tokenize_corpus

from . import poison
from .corpus import RATE, contents, recordings

NODE, LATE = "a node", "nothing: the run had ended"
REST = ("::IDLE", "Agent")
"""Titles of Ray's processes that run nobody's code."""
DELAY = 3.0
"""Seconds at most between an input that is done and a disturbance."""
INPUTS = 60
"""Recordings of up to four seconds, besides the poison."""
STORE = 200 << 20
"""Bytes of every node's object store."""


class Nodes:
    """A cluster of two nodes, of which one can be lost and replaced.

    Args:
        cores: of each node.
    """

    def __init__(self, cores: int) -> None:
        self._arguments: dict[str, Any] = {"num_cpus": cores, "object_store_memory": STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=self._arguments)
        self.join()

    def join(self) -> None:
        """Add the second node."""
        self._second = self.cluster.add_node(**self._arguments)
        self.cluster.wait_for_nodes()

    def lose(self) -> str:
        """Take the second node away as if its plug were pulled; return what was lost."""
        self.cluster.remove_node(self._second, allow_graceful=False)
        return NODE

    def kill(self, name: str = "", generator: random.Random | None = None) -> str:
        """Kill a process of the cluster that is at work, as soon as there is one.

        Args:
            name: what its title contains.
            generator: chooses among several; None takes the first.

        Returns:
            Its title; empty if there was none for ten seconds.
        """
        for _ in range(100):
            if busy := [(pid, title) for pid, title in self.workers() if name in title]:
                pid, title = generator.choice(busy) if generator else busy[0]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return title
            time.sleep(0.1)
        return ""

    def workers(self) -> list[tuple[int, str]]:
        """Return process id and title of those that are at work: of this cluster, not of anybody else's."""
        nodes = {
            info.process.pid
            for node in self.cluster.list_all_nodes()
            for infos in node.all_processes.values()
            for info in infos
        }
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (process / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if title.startswith("ray::") and not title.endswith(REST) and int(parent) in nodes:
                    found.append((int(process.name), title))
        return sorted(found)


@contextlib.contextmanager
def cluster(plugin: Path, cores: int) -> Iterator[Nodes]:
    """Start two nodes whose every process dies of files named poison, connect to them, and stop them at the end.

    Args:
        plugin: new folder for the file system that such files are read through.
        cores: of each node.
    """
    with poison.known(plugin):
        nodes = Nodes(cores)
        try:
            ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield nodes
        finally:
            ray.shutdown()
            nodes.cluster.shutdown()


class Disturbance(threading.Thread):
    """Does something to the cluster in mid-run.

    Args:
        nodes: the cluster.
        share: of the inputs that are done by then, 0 to 1.
        delay: seconds to wait after that.
        act: what is done; returns what was hit.
    """

    def __init__(self, nodes: Nodes, share: float, delay: float, act: Callable[[], str]) -> None:
        super().__init__()
        self._nodes, self._share, self._delay, self._act = nodes, share, delay, act
        self._due, self._ended = threading.Event(), threading.Event()
        self._done = 0
        self.hit, self.done_before = LATE, 0

    def run(self) -> None:
        """Wait for the moment; nothing happens if the run has ended before it."""
        self._due.wait()
        while not self._nodes.workers() and not self._ended.wait(0.1):
            pass
        if not self._ended.wait(self._delay):
            self.done_before = self._done
            self.hit = self._act() or LATE

    def watch(self, status: Progress) -> None:
        """Take note of how far the run is."""
        self._done = status.items
        if status.items >= self._share * status.total:
            self._due.set()

    def end(self) -> None:
        """Say that the run is over."""
        self._ended.set()
        self._due.set()
        self.join()


def ray_kills(model: str, points: int, losses: int, folder: Path) -> dict[str, Any]:
    """Kill workers and lose nodes in mid-run; compare the contents with those of an undisturbed local run.

    One input is poison besides, which kills every process that reads it.

    Args:
        model: a preset's name.
        points: runs in which a worker is killed.
        losses: runs in which a node is lost.
        folder: for everything.
    """
    sounds = folder / "sounds"
    sounds.mkdir()
    for index, wave in enumerate(recordings(INPUTS / 6)[:INPUTS]):
        soundfile.write(sounds / f"{index:04d}.flac", wave[: 4 * RATE], RATE)
    shutil.copy(sounds / f"{INPUTS // 3:04d}.flac", sounds / f"{INPUTS // 3:04d}-poison.flac")
    options = CorpusOptions(model=model, workers=1, shard_mb=0.01)
    on_ray = dataclasses.replace(options, engine="ray", workers=None)
    generator = random.Random(2)
    with cluster(folder / "plugin", 1) as nodes, mock.patch.object(run, "CHUNK_ITEMS", 4):
        source = f"poison://{sounds}"
        tokenize_corpus([source], folder / "local", options=options)
        failures = pq.read_table(folder / "local" / "failures.parquet", columns=["id", "error"]).to_pylist()
        expected = contents(folder / "local")

        def tokenise(share: float, delay: float, act: Callable[[], str]) -> dict[str, Any]:
            out = folder / "out"
            disturbance = Disturbance(nodes, share, delay, act)
            begin = time.monotonic()
            disturbance.start()
            try:
                tokenize_corpus([source], out, options=on_ray, progress=disturbance.watch)
            finally:
                disturbance.end()
            seconds, same = time.monotonic() - begin, contents(out) == expected
            shutil.rmtree(out)
            hit, done = disturbance.hit, disturbance.done_before
            print(f"{hit:40} {done:4} of {INPUTS + 1} done {seconds:7.1f} s  {'same' if same else 'OTHER'}", flush=True)
            return {"hit": hit, "inputs_done": done, "seconds": round(seconds, 1), "byte_identical": same}

        calm = tokenise(2, 0, str)
        acts: list[Callable[[], str]] = [partial(nodes.kill, generator=generator)] * points + [nodes.lose] * losses
        generator.shuffle(acts)
        runs: list[dict[str, Any]] = []
        for act in acts:
            runs.append(tokenise(generator.uniform(0, 0.9), generator.uniform(0, DELAY), act))
            if runs[-1]["hit"] == NODE:
                nodes.join()
    killed = [one for one in runs if one["hit"] not in (LATE, NODE)]
    lost = [one for one in runs if one["hit"] == NODE]
    return {
        "model": model,
        "inputs": INPUTS + 1,
        "failures": {failure["id"]: failure["error"] for failure in failures},
        "undisturbed": {name: calm[name] for name in ("seconds", "byte_identical")},
        "workers_killed": len(killed),
        "workers_killed_byte_identical": sum(one["byte_identical"] for one in killed),
        "nodes_lost": len(lost),
        "nodes_lost_byte_identical": sum(one["byte_identical"] for one in lost),
        "runs": runs,
    }
