"""Every speed goal as a ratio, from one run: ``make bench-speed`` (about 11 minutes on two quiet cores).

* official: parts of one 10.24 s window against the published implementation, both as multiples of the machine's own
  2048^3 matrix product per second of processor time (random weights, float32), all held to AVX2, which is what the
  published implementation was timed with; where the time goes
* native: the same parts with every instruction that the machine has
* encode: a recording of exactly one window, and one of 16, against the published windows on the same networks, which
  add one of silence and go one by one, through PyTorch's own layers; median and range of rounds
* solver: distance of the latents to the 200-step solution against the number of steps, U-Net of full size, random
  weights, a latent of 2.56 s; how many steps of the default sampler are as near as 50 of DDIM
* mini: real-time factors at the default and the fast setting, short and long recordings; median and range of rounds
* compiled (only if named): what torch.compile makes of the U-Nets, and the time until it has
* start: seconds of whole processes, from nothing to the end of ``--help`` and of ``encode``, with the files that they
  read in the system's memory

``--device cuda`` measures batch scaling instead: real-time factors, streams, and TFLOP/s over the peak.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from semanticodec import SamplerOptions, SemantiCodec, published
from semanticodec.audio import load
from semanticodec.config import COLUMN, SAMPLE_RATE, CodecConfig, preset
from semanticodec.diffusion import FAST, noise
from semanticodec.graphs import cuda_recorder, rerun_recorder
from semanticodec.latent import Conditioning
from semanticodec.model import CodecModel
from semanticodec.nn.audiomae import Linear

from .measure import Sgemm, company, gflop, in_turn, least, machine, randomise, rounds, spread, timed
from .speed import ASSETS, OFFICIAL, PUBLISHED_CPU, RESULTS, STEPS, Row, Window, official

PUBLISHED_GFLOPS = 68
"""SGEMM of the machine that timed the published implementation, per second of processor time."""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""Hold what computes to the instructions of that machine.  With AVX-512 the libraries part ways: on some processors
convolutions use it and the matrix product, which is the yardstick, does not."""
ROUNDS = 7
"""Of encoding and of mini, whose times vary most."""
LONG = 16
"""Windows of a long recording, 2.7 minutes: as many as are encoded at once."""
RANGE = "{median:.2f} ({low:.2f} to {high:.2f})"
REFERENCE = 200
CURVE = {"dpmpp_2m": (5, 8, 10, 12, 15, 20, 30, 50), "ddim": (10, 20, 30, 50, 100)}
PARTS = ("official", "native", "encode", "solver", "mini", "start")
MORE = ("compiled",)
"""Parts that take long and are measured if they are named."""

T = TypeVar("T")


def against_published(part: str, cpu: float, gflops: float) -> float:
    """Return how many times as much matrix-product time the published implementation takes for a part."""
    return PUBLISHED_CPU[part][0] * PUBLISHED_GFLOPS / (cpu * gflops)


def hot(run: Callable[[], object], top: int = 5) -> list[tuple[str, float]]:
    """Return the operators that take the most processor time, and their shares."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        run()
    rows = sorted(record.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [(row.key.removeprefix("aten::"), row.self_cpu_time_total / total) for row in rows[:top]]


def held_to_avx2(run: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, whose libraries use no instructions beyond AVX2."""
    before = dict(os.environ)
    # Elsewhere the name would not hold them back, and might lead them on.
    os.environ.update(AVX2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else {})
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(run, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def measure_official(config: CodecConfig, threads: int) -> dict[str, Any]:
    """Compare the parts of the decoder with the published implementation's, in a process that is held to AVX2."""
    torch.set_num_threads(threads)
    beside, sgemm = company(), Sgemm()
    sgemm.measure()
    result = measure_parts(config, sgemm)
    rows, steps = result["rows"], config.decoder.latent.steps
    default = rows["window"]["timing"]["cpu"] - (STEPS - steps) * rows["guided step"]["timing"]["cpu"]
    ratios = {part: against_published(part, rows[part]["timing"]["cpu"], sgemm.gflops_cpu) for part in PUBLISHED_CPU}
    whole = against_published("window", default, sgemm.gflops_cpu)
    result["times_published"] = ratios | {f"default, {steps} steps": whole}
    print("  x published: " + ", ".join(f"{part} {ratio:.2f}" for part, ratio in result["times_published"].items()))
    print(f"  a window with the default {steps} steps: {default:.1f} CPU s; SGEMM {sgemm.gflops_cpu:.0f} per CPU s")
    return result | {"machine": measured_on(sgemm, beside)}


def measure_parts(config: CodecConfig, sgemm: Sgemm) -> dict[str, Any]:
    """Measure the parts of the decoder, and where their time goes."""
    rows, window = official(config, sgemm, full=False), Window(config, "cpu")
    found = {part: hot(run) for part, run in window.parts().items() if part != "contexts"}
    for name, row in rows.items():
        print(f"  {name:<14}{row.timing.wall:8.2f} s wall{row.timing.cpu:8.2f} s CPU, share {row.share_cpu:.2f}")
    for part, ops in found.items():
        print(f"  {part}: " + ", ".join(f"{name} {share:.0%}" for name, share in ops))
    sys.stdout.flush()
    return {"rows": {name: dataclasses.asdict(row) for name, row in rows.items()}, "hot": found}


def measured_on(sgemm: Sgemm, beside: dict[str, Any]) -> dict[str, Any]:
    """Say on what a part was measured, how fast its matrix product is, and what else ran when the measuring began."""
    return machine() | {"sgemm_gflops_per_cpu_second": sgemm.gflops_cpu, "company": beside}


def random_encoder(config: CodecConfig) -> SemantiCodec:
    """Return an official encoder with random weights."""
    model = CodecModel(config, decoder=False)
    randomise([p for p in model.parameters() if p.ndim > 1], seed=0)
    randomise(model.codebooks.buffers(), seed=1)
    return SemantiCodec.from_model(config, model)


def as_published(run: Callable[[], T]) -> T:
    """Run with PyTorch's own linear layers in the encoder, as the published code does."""
    with mock.patch.object(Linear, "forward", nn.Linear.forward):
        return run()


def measure_encode(config: CodecConfig, sgemm: Sgemm) -> dict[str, Any]:
    """Time recordings of exactly one window and of :data:`LONG`; the published windows are one more, one by one."""
    codec = random_encoder(config)
    results: dict[str, Any] = {}
    each = 0.0
    for windows, repeats in ((1, ROUNDS), (LONG, 2)):
        samples = noise(0, 0, 0, (1, windows * config.encoder.mae.columns * COLUMN)) * 0.1
        runs = {
            "ours": lambda: codec.encode(samples, SAMPLE_RATE),  # noqa: B023
            "published windows": lambda: as_published(lambda: published.encode(codec, samples, SAMPLE_RATE)),  # noqa: B023
        }
        seen = rounds(runs, repeats, warm_up=windows == 1)
        best = least(seen["ours"])
        ratios = spread(theirs.cpu / ours.cpu for ours, theirs in zip(*seen.values(), strict=True))
        each = each or gflop(runs["ours"])
        row = Row.of("encode", windows * each, best, sgemm)
        print(
            f"  windows, {windows}: {best.wall:.2f} s wall, {best.cpu:.2f} s CPU, {row.gflop:.0f} GFLOP, share "
            f"{row.share_cpu:.2f}; the published {windows + 1}: {RANGE.format(**ratios)} x in {repeats} rounds"
        )
        results[str(windows)] = {"row": dataclasses.asdict(row), "rounds": repeats, "times_published_windows": ratios}
        if windows == 1:
            results["1"]["hot"] = hot(runs["ours"])
            print("  " + ", ".join(f"{name} {share:.0%}" for name, share in results["1"]["hot"]))
    return results


def curve(config: CodecConfig, columns: int = 16) -> dict[str, dict[int, float]]:
    """Return sampler -> steps -> distance of the latents to the reference, over the reference's standard deviation."""
    small = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, columns=columns))
    window = Window(small, "cpu")
    conditioning = Conditioning(((window.context, None),))
    away = Conditioning(((torch.zeros_like(window.context), None),))

    def solve(sampler: str, steps: int) -> Tensor:
        options = SamplerOptions(sampler=sampler, steps=steps, eta=0.0)  # type: ignore[arg-type]
        with torch.inference_mode():
            return window.latent.generate(
                conditioning, away, lambda step: noise(0, 0, step, window.shape)[None], options
            )

    target = solve("dpmpp_2m", REFERENCE)
    found: dict[str, dict[int, float]] = {}
    for sampler, counts in CURVE.items():
        found[sampler] = {n: float((solve(sampler, n) - target).std() / target.std()) for n in counts}
        print(f"  {sampler:<9}" + "  ".join(f"{n}: {distance:.4f}" for n, distance in found[sampler].items()))
    return found


def enough(distances: dict[str, dict[int, float]]) -> int:
    """Return the fewest steps of the default sampler that come as near as DDIM's 50."""
    return min(n for n, distance in distances["dpmpp_2m"].items() if distance <= distances["ddim"][STEPS])


def measure_solver(config: CodecConfig, rows: dict[str, Any] | None, peak: float) -> dict[str, Any]:
    """Compare the samplers; with times of the same run also say what an equally near window costs."""
    distances = curve(config)
    steps = enough(distances)
    result: dict[str, Any] = {"reference": REFERENCE, "distances": distances, "as_near_as_ddim_50": steps}
    print(f"  {steps} steps of dpmpp_2m are as near to the {REFERENCE}-step solution as {STEPS} of ddim")
    if rows is not None:
        step, window = (rows[part]["timing"]["cpu"] for part in ("guided step", "window"))
        cpu = window - (STEPS - steps) * step
        result["window_cpu"], ratio = cpu, against_published("window", cpu, peak)
        result["times_published"] = ratio
        print(f"  a window with {steps} steps: {cpu:.1f} CPU s, {ratio:.2f} x published")
    return result


def measure_mini() -> dict[str, Any]:
    """Measure real-time factors of mini on the shipped voice, once and four times in a row."""
    codec = SemantiCodec.from_pretrained()
    voice, rate = load(min(ASSETS.glob("*.flac")))
    result: dict[str, Any] = {}
    for times in (1, 4):
        wave = voice.repeat(1, times)
        seconds = wave.shape[1] / rate
        codes = codec.encode(wave, rate)
        runs = {"encode": lambda: codec.encode(wave, rate)}  # noqa: B023
        for name, options in (("default", SamplerOptions()), ("fast", FAST)):
            runs[name] = lambda options=options: codec.decode(codes, options=options)  # type: ignore[misc]  # noqa: B023
        timings = rounds(runs, ROUNDS)
        length = result[f"{seconds:.1f} s"] = {
            name: {clock: spread(getattr(t, clock) / seconds for t in seen) for clock in ("wall", "cpu")}
            for name, seen in timings.items()
        }
        for name in ("default", "fast"):
            both = zip(timings["encode"], timings[name], strict=True)
            length[f"in all, {name}"] = {"wall": spread((a.wall + b.wall) / seconds for a, b in both)}
        told = (
            f"{name} {{median:.3f}} ({{low:.3f}} to {{high:.3f}})".format(**all_["wall"])
            for name, all_ in length.items()
        )
        print(f"  {seconds:5.1f} s: {', '.join(told)}")
    result["hot"] = hot(lambda: codec.decode(codes))
    print("  " + ", ".join(f"{name} {share:.0%}" for name, share in result["hot"]))
    return result


def measure_compiled(config: CodecConfig) -> dict[str, Any]:
    """Compare U-Nets as they are with what torch.compile makes of them, in the official step and in mini's decoding."""
    window, codec = Window(config, "cpu"), SemantiCodec.from_pretrained()
    voice, rate = load(min(ASSETS.glob("*.flac")))
    codes = codec.encode(voice, rate)
    assert codec.model.latent is not None
    runs: dict[str, tuple[torch.nn.Module, Callable[[], object]]] = {
        "official: guided step": (window.latent.unet, window.parts()["guided step"]),
        "mini: decode": (codec.model.latent.unet, lambda: codec.decode(codes)),
    }
    result = {}
    for name, (unet, run) in runs.items():
        eager, compiled = unet.forward, torch.compile(unet.forward)

        def through(forward: Callable[..., object], unet: torch.nn.Module = unet, run: Any = run) -> object:
            unet.forward = forward
            return run()

        with torch.inference_mode():
            begin = time.perf_counter()
            through(compiled)
            first = time.perf_counter() - begin
            both = {"eager": lambda: through(eager), "compiled": lambda: through(compiled)}  # noqa: B023
            times = in_turn(both, 4)
        unet.forward = eager
        ratio = times["eager"].cpu / times["compiled"].cpu
        result[name] = {"seconds_until_compiled": first, "times_faster": ratio}
        print(f"  {name:<24}compiled {ratio:.2f} x faster, after {first:.0f} s")
    return result


def measure_start(runs: int = 3) -> dict[str, float]:
    """Time whole processes: median seconds from start to end."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        encode = ["encode", str(min(ASSETS.glob("*.flac"))), "-f", "-o", str(Path(folder) / "a.scodec")]
        for name, words in (("--help", ["--help"]), ("encode", encode)):
            seen = []
            for _ in range(runs + 1):
                begin = time.perf_counter()
                command = [sys.executable, "-c", "from semanticodec.cli import main; main()", *words]
                subprocess.run(command, check=True, capture_output=True)
                seen.append(time.perf_counter() - begin)
            result[name] = statistics.median(seen[1:])
    print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.items()))
    return result


def scaling(
    name: str, device: str, dtype: torch.dtype, batches: Sequence[int], seconds: int = 10
) -> list[dict[str, Any]]:
    """Measure a preset at growing batch sizes: real-time factor, streams, and TFLOP/s over the peak.

    Encoding and decoding, with the networks as they are and recorded as CUDA graphs (on a CPU their stand-in).

    Args:
        name: of the preset; official ones get random weights.
        device: where.
        dtype: of the weights.
        batches: rows per call.
        seconds: of sound in each row.
    """
    config = preset(name)

    def load_codec() -> SemantiCodec:
        if name.startswith("mini"):
            return SemantiCodec.from_pretrained(name, device=device, dtype=dtype)
        model = CodecModel(config)
        randomise([p for p in model.parameters() if p.ndim > 1], seed=0)
        randomise(model.codebooks.buffers(), seed=1)
        return SemantiCodec.from_model(config, model.to(device, dtype))

    recorder = rerun_recorder if device == "cpu" else cuda_recorder
    codecs = {"plain": load_codec(), "recorded": load_codec().record(recorder)}
    for codec in codecs.values():
        codec.columns_at_once = 4096
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    peak = 2 * size**3 / 1e12 / timed(lambda: _wait(device, a @ a), 5).wall
    rows = []
    frames = config.frames(seconds * SAMPLE_RATE)
    sizes = torch.tensor(config.codebook_sizes)[:, None]
    for batch in batches:
        codes = (torch.rand(batch, 2, frames, generator=torch.Generator().manual_seed(0)) * sizes).long()
        waves = noise(0, 0, 0, (batch, seconds * SAMPLE_RATE)) * 0.1
        counts: dict[str, float] = {}
        for kind, codec in codecs.items():
            ways = {"encode": partial(codec.encode, waves, SAMPLE_RATE), "decode": partial(codec.decode, codes)}
            for way, run in ways.items():
                if way not in counts:  # of the plain networks: a replay shows no operations
                    counts[way] = gflop(run) / 1e3
                wall = timed(lambda run=run: _wait(device, run()), 2).wall  # type: ignore[misc]
                factor, rate = wall / (batch * seconds), counts[way] / wall
                rows.append({"batch": batch, "networks": kind, "way": way, "factor": factor, "streams": 1 / factor,
                             "tflops": rate, "share": rate / peak})  # fmt: skip
                print(f"  {name:<22}{batch:>4} rows, {kind:<9}{way}: real-time factor {factor:.5f} per row, "
                      f"{1 / factor:8.0f} streams, {rate:7.2f} TFLOP/s, {rate / peak:.2f} of {peak:.1f}")  # fmt: skip
    return rows


def _wait(device: str, result: torch.Tensor) -> None:
    """Return when ``result`` has really been computed."""
    del result
    if device != "cpu":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=(*PARTS, *MORE), help="parts to measure")
    parser.add_argument("--device", default="cpu", help="cuda: batch scaling in bfloat16 instead")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ratios.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    path = RESULTS / ("ratios.json" if given.device == "cpu" else "ratios-gpu.json")
    # Parts that are not measured now stay as they were.
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if given.device != "cpu":
        names = ("mini-100", OFFICIAL)
        result["scaling"] = {name: scaling(name, given.device, torch.bfloat16, given.batches) for name in names}
        gpu = torch.cuda.get_device_name() if given.device.startswith("cuda") else None
        result["scaling_machine"] = machine() | {"gpu": gpu, "dtype": "bfloat16"}
        given.only = []
    beside, sgemm, config = company(), Sgemm(), preset(OFFICIAL)
    sgemm.measure()

    def solver() -> dict[str, Any]:
        if "official" not in done:  # times of another run are none to compare with
            return measure_solver(config, None, sgemm.gflops_cpu)
        return measure_solver(
            config, result["official"]["rows"], result["official_machine"]["sgemm_gflops_per_cpu_second"]
        )

    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "official": lambda: held_to_avx2(measure_official, config, given.threads),
        "native": lambda: measure_parts(config, sgemm),
        "encode": lambda: measure_encode(config, sgemm),
        "solver": solver,
        "mini": measure_mini,
        "compiled": lambda: measure_compiled(config),
        "start": measure_start,
    }
    done: set[str] = set()
    for part in given.only:
        print(f"{part}:", flush=True)
        result[part] = runs[part]()
        done.add(part)
        sgemm.measure()
        result[f"{part}_machine"] = result[part].pop("machine", None) or measured_on(sgemm, beside)
    print(f"SGEMM {sgemm.gflops:.0f} GFLOP/s, {sgemm.gflops_cpu:.0f} per CPU second; commit {machine()['commit']}")
    if given.write:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
