"""Corpus tokenisation: throughput beside the bare encoder's, memory, many small files, one long file, kills.

``python -m benchmarks.corpus throughput kills tiny memory long --write``

``throughput`` wants a quiet machine; ``memory`` and ``long`` replace filter bank and networks by zeros, as
they measure what the pipeline keeps, and say so in their results.  ``kills`` forks one process that does everything, so
that most kills lie in its commits; ``command-kills`` kills the whole command, its workers with it, and ``ray-kills``
workers and nodes of a Ray cluster.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch

from semanticodec import SemantiCodec
from semanticodec.audio import load, resample
from semanticodec.config import COLUMN
from semanticodec.corpus import CorpusOptions, local, run, tokenize_corpus
from semanticodec.corpus.records import Finished, Item, printable
from semanticodec.corpus.worker import Tokeniser, Work

from .hostile import hostile_corpus
from .measure import ROOT, machine

RESULTS = Path(__file__).parent / "results"
PARTS = ("throughput", "overhead", "memory", "long", "tiny", "kills", "command-kills", "ray-kills", "corrupt")
AUDIO = ROOT.parent / "shared" / "audio" / "dev"
RATE = 16_000


def recordings(minutes: float) -> list[np.ndarray]:
    """Return development recordings, mono at 16 kHz, over and over until there are so many minutes."""
    waves: list[np.ndarray] = []
    for file in sorted(AUDIO.rglob("*.flac")) or sorted(AUDIO.rglob("*.wav")):
        wave, rate = load(file)
        waves.append(resample(wave.mean(0), rate, RATE).numpy())
    total, once = 0, list(waves)
    waves = []
    while total < minutes * 60 * RATE:
        waves.append(once[len(waves) % len(once)])
        total += len(waves[-1])
    return waves


def _bare(waves: list[np.ndarray], model: str, start: Any, times: Any) -> None:
    torch.set_num_threads(1)
    codec = SemantiCodec.from_pretrained(model, parts="encoder")
    codec.encode([torch.from_numpy(waves[0])], RATE)
    start.wait()
    begin, spent = time.monotonic(), time.process_time()
    for at in range(0, len(waves), 64):
        codec.encode([torch.from_numpy(wave) for wave in waves[at : at + 64]], RATE)
    times.put((begin, time.monotonic(), time.process_time() - spent))


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def throughput(model: str, minutes: float, workers: int, folder: Path) -> dict[str, Any]:
    """Compare the pipeline, from FLAC files to shards, with encoding samples in memory in as many processes."""
    waves = recordings(minutes)
    seconds = sum(map(len, waves)) / RATE
    for index, wave in enumerate(waves):
        soundfile.write(folder / f"{index:05d}.flac", wave, RATE)

    def bare() -> tuple[float, float]:
        context = multiprocessing.get_context("spawn")
        start, times = context.Barrier(workers), context.Queue()
        jobs = [
            context.Process(target=_bare, args=(waves[part::workers], model, start, times)) for part in range(workers)
        ]
        for job in jobs:
            job.start()
        spans = [times.get() for _ in jobs]
        for job in jobs:
            job.join()
        wall = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
        return float(seconds / wall), float(sum(spent for _, _, spent in spans))

    def pipeline(inputs: Path, out: Path) -> tuple[float, float, float]:
        seen: list[tuple[float, float]] = []
        begin, spent = time.monotonic(), cpu_seconds()
        options = CorpusOptions(model=model, workers=workers)
        tokenize_corpus([inputs], out, options=options, progress=lambda p: seen.append((time.monotonic(), p.seconds)))
        whole = seconds / (time.monotonic() - begin)
        (first, before), (last, after) = seen[min(1, len(seen) - 2)], seen[-1]
        return whole, (after - before) / (last - first), cpu_seconds() - spent

    runs = [bare()]
    _, _, idle = pipeline(folder / "00000.flac", folder / "one")  # what starting costs
    whole, steady, spent = pipeline(folder, folder / "out")
    runs.append(bare())
    rates, bare_cpu = [rate for rate, _ in runs], sum(cpu for _, cpu in runs) / 2
    mean = sum(rates) / 2
    return {
        "model": model,
        "hours_of_sound": seconds / 3600,
        "processes": workers,
        "bare_hours_per_hour": [round(rate, 2) for rate in rates],
        "pipeline_hours_per_hour": round(steady, 2),
        "pipeline_hours_per_hour_with_start": round(whole, 2),
        "pipeline_over_bare": round(steady / mean, 3),
        "bare_cpu_seconds_per_hour": [round(cpu / seconds * 3600, 2) for _, cpu in runs],
        "pipeline_cpu_seconds_per_hour": round((spent - idle) / seconds * 3600, 2),
        "pipeline_over_bare_by_cpu_time": round(bare_cpu / (spent - idle), 3),
    }


def overhead(model: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Compare the processor time of the whole pipeline and of the bare encoder, in one process, turn by turn.

    A busy machine hardly changes it; the weights are loaded once, since loading does not grow with the corpus.
    """
    waves = recordings(minutes)
    seconds = sum(map(len, waves)) / RATE
    sounds = folder / "sounds"
    sounds.mkdir()
    for index, wave in enumerate(waves):
        soundfile.write(sounds / f"{index:05d}.flac", wave, RATE)
    options = CorpusOptions(model=model)
    codec = options.work("cpu", 0).load()
    spent: dict[str, list[float]] = {"bare": [], "pipeline": []}
    with in_process(Tokeniser), mock.patch.object(Work, "load", return_value=codec):
        for turn in range(3):
            begin = time.process_time()
            for at in range(0, len(waves), 64):
                codec.encode([torch.from_numpy(wave) for wave in waves[at : at + 64]], RATE)
            spent["bare"].append(time.process_time() - begin)
            begin = time.process_time()
            tokenize_corpus([sounds], folder / f"out{turn}", options=options)
            spent["pipeline"].append(time.process_time() - begin)
    best = {name: min(times) for name, times in spent.items()}
    return {
        "model": model,
        "hours_of_sound": round(seconds / 3600, 4),
        "cpu_seconds": {name: [round(one, 2) for one in times] for name, times in spent.items()},
        "hours_per_core_hour": {name: round(seconds / one, 2) for name, one in best.items()},
        "pipeline_over_bare": round(best["bare"] / best["pipeline"], 3),
    }


# --- in this process ----------------------------------------------------------------------------------------------


class StandIn(Tokeniser):
    """A tokeniser whose filter bank and networks cost nothing: everything but the codes is real."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        codec = self._encoder._codec
        frames = codec.config.coded_columns // codec.config.stack[0] * codec.config.group
        codec.window_features = lambda windows: torch.zeros(len(windows), 1, 1)  # type: ignore[method-assign]
        context, block = codec.config.encoder.context * COLUMN, codec.config.block
        windows_of = lambda span: torch.zeros((len(span.wave) - context) // block, 1, 1)  # noqa: E731
        self._encoder._windows = windows_of  # type: ignore[method-assign]
        zeros = functools.partial(torch.zeros, dtype=torch.int64)
        codec.quantise = lambda patches, windows: zeros(len(windows), 2, frames)  # type: ignore[method-assign]  # noqa: ARG005


@contextlib.contextmanager
def in_process(kind: type[Tokeniser], told: list[float] | None = None) -> Iterator[None]:
    """Make the local engine work in this process, so that its memory is all there is."""

    def run(chunks: Iterator[tuple[int, list[Item]]], works: list[Work]) -> Iterator[Finished]:
        tokeniser = kind(works[0])
        for chunk, items in chunks:
            yield tokeniser.run(chunk, items)
            if told is not None:
                told.append(resident())

    with mock.patch.object(local, "run", run):
        yield


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS in /proc/self/status")


def memory(model: str, hours: float, folder: Path) -> dict[str, Any]:
    """Tokenise many hours of sound of mixed lengths with a stand-in for the networks and watch the memory."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.uniform(np.log(0.2), np.log(1800), 40))
    for index, length in enumerate(lengths):
        soundfile.write(folder / f"{index:02d}.wav", generator.normal(0, 0.1, int(length * RATE)), RATE)
    total = 0.0
    lines: list[str] = []
    while total < hours * 3600:
        index = int(generator.integers(len(lengths)))
        lines.append(json.dumps({"path": f"{index:02d}.wav", "id": f"{len(lines)}"}))
        total += float(lengths[index])
    (folder / "list.jsonl").write_text("\n".join(lines))
    told: list[float] = []
    begin = time.monotonic()
    options = CorpusOptions(model=model, shard_mb=4)
    with in_process(StandIn, told):
        statistics = tokenize_corpus([folder / "list.jsonl"], folder / "out", options=options)
    fifths = np.array_split(np.array(told), 5)
    return {
        "filter_bank_and_networks": "stand-in",
        "hours": statistics["hours"],
        "rows": statistics["rows"],
        "shards": statistics["shards"],
        "longest_seconds": float(lengths.max()),
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "chunks": len(told),
        "resident_mib_by_fifth": {
            "mean": [round(float(fifth.mean()), 1) for fifth in fifths],
            "max": [round(float(fifth.max()), 1) for fifth in fifths],
        },
    }


def long(model: str, hours: float, folder: Path) -> dict[str, Any]:
    """Tokenise one long file with a stand-in for the networks."""
    generator = np.random.default_rng(0)
    minute = generator.normal(0, 0.1, 60 * RATE).astype(np.float32)
    with soundfile.SoundFile(folder / "long.wav", "w", RATE, 1, "PCM_16") as file:
        for _ in range(int(hours * 60)):
            file.write(minute)
    before = resident()
    begin = time.monotonic()
    with in_process(StandIn):
        statistics = tokenize_corpus([folder / "long.wav"], folder / "out", options=CorpusOptions(model=model))
    seconds = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (row,) = pq.read_table(folder / "out" / "data", columns=["frames"]).to_pylist()
    return {
        "filter_bank_and_networks": "stand-in",
        "hours": statistics["hours"],
        "frames": row["frames"],
        "resident_mib_before": round(before, 1),
        "resident_mib_peak": round(peak, 1),
        "minutes": round(seconds / 60, 2),
    }


def tiny(model: str, files: int, workers: int, folder: Path) -> dict[str, Any]:
    """Tokenise many files of a tenth of a second."""
    generator = np.random.default_rng(0)
    for index in range(files):
        place = folder / f"{index // 1000:03d}"
        place.mkdir(exist_ok=True)
        soundfile.write(place / f"{index:06d}.wav", generator.normal(0, 0.1, RATE // 10), RATE)
    begin = time.monotonic()
    options = CorpusOptions(model=model, workers=workers)
    statistics = tokenize_corpus([folder], folder / "out", options=options)
    seconds = time.monotonic() - begin
    return {
        "files": files,
        "rows": statistics["rows"],
        "failures": statistics["failures"],
        "duplicate_ids": statistics["duplicate_ids"],
        "seconds": round(seconds, 1),
        "files_per_second": round(files / seconds, 1),
    }


def contents(folder: Path) -> str:
    """Return one hash of everything in a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def kills(model: str, points: int, folder: Path) -> dict[str, Any]:
    """Kill a run at random moments, resume it, and compare the contents with those of an undisturbed run."""
    sounds = folder / "sounds"
    sounds.mkdir()
    for index, wave in enumerate(recordings(4)[:40]):
        soundfile.write(sounds / f"{index:04d}.flac", wave[: 2 * RATE], RATE)
    options = CorpusOptions(model=model, shard_mb=0.002)
    codec = options.work("cpu", 0).load()  # once: every run would spend most of its time on it

    def child(out: Path) -> int:
        pid = os.fork()
        if pid == 0:
            run.CHUNK_ITEMS = 4
            with in_process(Tokeniser), mock.patch.object(Work, "load", return_value=codec):
                tokenize_corpus([sounds], out, options=options, resume=True)
            os._exit(0)
        return pid

    begin = time.monotonic()
    os.waitpid(child(folder / "whole"), 0)
    duration = time.monotonic() - begin
    expected = contents(folder / "whole")
    generator = random.Random(0)
    equal, stages = 0, {"listing": 0, "parts": 0, "shards": 0, "finished": 0}
    for point in range(points):
        out = folder / f"cut{point}"
        pid = child(out)
        time.sleep(generator.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done = list((out / "done").glob("*.json"))
        parts = list((out / "_work" / "parts").glob("[0-9]*"))
        finished = (out / "manifest.json").exists()
        stages["finished" if finished else "shards" if done else "parts" if parts else "listing"] += 1
        os.waitpid(child(out), 0)
        equal += contents(out) == expected
        shutil.rmtree(out)
    return {"points": points, "byte_identical": equal, "killed_while": stages, "run_seconds": round(duration, 2)}


def command_kills(model: str, points: int, folder: Path) -> dict[str, Any]:
    """Kill the command with its workers at random moments, resume it, and compare the contents."""
    sounds = folder / "sounds"
    sounds.mkdir()
    for index, wave in enumerate(recordings(12)[:120]):
        for part in range(4):
            piece = wave[part * RATE // 2 : (part + 1) * RATE // 2]
            soundfile.write(sounds / f"{index:04d}-{part}.flac", piece if len(piece) else wave[:100], RATE)
    entry = "from semanticodec.cli import main; main()"
    words = ["tokenize", str(sounds), "--model", model, "--workers", "2", "--shard-mb", "0.01", "--resume", "-o"]

    def begin(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", entry, *words, str(out)]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    if begin(folder / "whole").wait():
        raise RuntimeError("the undisturbed run has failed")
    duration = time.monotonic() - started
    expected, generator, equal, finished = contents(folder / "whole"), random.Random(1), 0, 0
    for point in range(points):
        out = folder / f"cut{point}"
        process = begin(out)
        time.sleep(generator.uniform(0.3, 1.0) * duration)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finished += (out / "manifest.json").exists()
        begin(out).wait()
        equal += contents(out) == expected
        shutil.rmtree(out)
    return {
        "points": points,
        "byte_identical": equal,
        "finished_before_the_kill": finished,
        "run_seconds": round(duration, 2),
    }


def corrupt(model: str, folder: Path) -> dict[str, Any]:
    """Tokenise a corpus of odd and damaged files: which are rows, and which are listed with what reason."""
    sounds = folder / "sounds"
    sounds.mkdir()
    good, bad = hostile_corpus(sounds)
    tokenize_corpus([sounds], folder / "out", options=CorpusOptions(model=model, workers=1))
    rows = set(pq.read_table(folder / "out" / "data", columns=["id"])["id"].to_pylist())
    failures = pq.read_table(folder / "out" / "failures.parquet", columns=["id", "error", "reason"]).to_pylist()
    return {
        "good": len(good),
        "good_tokenised": len(rows & set(map(printable, good))),
        "bad": len(bad),
        "bad_listed": len({failure["id"] for failure in failures} & bad),
        "others": sorted(rows - set(map(printable, good))),
        "failures": {failure["id"]: f"{failure['error']}: {failure['reason']}" for failure in failures},
    }


def _ray_kills(model: str, points: int, losses: int, folder: Path) -> dict[str, Any]:
    from .corpus_ray import ray_kills  # Ray takes seconds to import

    return ray_kills(model, points, losses, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", default="mini-100")
    parser.add_argument("--minutes", type=float, default=60, help="sound for throughput and overhead")
    parser.add_argument("--hours", type=float, default=100, help="sound for memory")
    parser.add_argument("--long-hours", type=float, default=10)
    parser.add_argument("--files", type=int, default=10_000, help="for tiny")
    parser.add_argument("--points", type=int, default=50, help="for kills, command-kills and the workers of ray-kills")
    parser.add_argument("--losses", type=int, default=5, help="nodes of ray-kills")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ as JSON")
    options = parser.parse_args(arguments)
    runs = {
        "throughput": lambda folder: throughput(options.model, options.minutes, options.workers, folder),
        "overhead": lambda folder: overhead(options.model, options.minutes, folder),
        "memory": lambda folder: memory(options.model, options.hours, folder),
        "long": lambda folder: long(options.model, options.long_hours, folder),
        "tiny": lambda folder: tiny(options.model, options.files, options.workers, folder),
        "kills": lambda folder: kills(options.model, options.points, folder),
        "command-kills": lambda folder: command_kills(options.model, options.points, folder),
        "ray-kills": lambda folder: _ray_kills(options.model, options.points, options.losses, folder),
        "corrupt": lambda folder: corrupt(options.model, folder),
    }
    for part in options.parts:
        with tempfile.TemporaryDirectory(prefix=f"corpus-{part}-") as folder:
            found = runs[part](Path(folder))
        result = {"machine": machine(), "load": os.getloadavg()[0], part: found}
        print(json.dumps(result, indent=2))
        if options.write:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"corpus-{part}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
