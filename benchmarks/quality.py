"""Quality of mini and of the classical codecs at measured bits: ``make bench-quality``.

Four runs of :mod:`semanticodec.bench`, each kept in ``results/quality-NAME.json``:

* ``dev``: mini at its default steps and the classical codecs on the 121 development clips, delay and level undone;
  word error rates on every fourth clip of speech; codebooks, probes, memory, operations
* ``steps``: mini at 1, 2 and 4 solver steps, on every fourth clip of each kind, word error rates on every fourth of
  these
* ``fast``: mini at its default and as ``decode --fast`` decodes it, on the same clips, nothing undone
* ``published``: mini, the decodes of published codecs and their recorded scores on the same 24 clips, as those were
  taken: nothing undone
"""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from semanticodec.bench.clips import Clip, find, thin
from semanticodec.bench.codecs import Codec, Semanticodec, ours
from semanticodec.bench.commands import classical
from semanticodec.bench.cost import Cost
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.metrics import METRICS
from semanticodec.bench.results import Results, read_results
from semanticodec.bench.run import Plan, run
from semanticodec.bench.survey import survey

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
SHARED = ROOT.parent.parent / "shared"
COSTLY_EVERY = 4
"""Development clips from one that every metric is taken on to the next, of each kind."""
MINI = ("mini-100", "mini-50", "mini-25")
RUNS = ("published", "dev", "fast", "steps")
LEFT_OUT = ("speex-wb-q3", "mp3-8", "mp3-24", "aac-12", "aac-24")
"""Of the classical codecs, to keep the run at two to three hours of one core."""

KINDS = {"libritts": "speech", "musdb": "music", "audioset": "sound"}
FOLDERS = {
    "semanticodec_0.35kbps": ("SemantiCodec published", 0.35),
    "semanticodec_0.71kbps": ("SemantiCodec published", 0.71),
    "semanticodec_1.43kbps": ("SemantiCodec published", 1.43),
    "encodec24k_1.5kbps": ("EnCodec 24k", 1.5),
    "dac_1.41kbps": ("DAC (retrained by the authors)", 1.41),
}
RECORDED = ("pesq_wb", "stoi", "estoi", "visqol", "mel_l1")
"""Metrics of ../shared/figures/published_scores.csv, whose columns are named otherwise."""
COLUMNS = dict(zip(RECORDED, ("pesq", "stoi", "estoi", "visqol", "mel"), strict=True))
USED = {"Opus (asked 6)": 6.7, "Opus (asked 12)": 12.5}
"""kbit/s of recorded systems that used others than they were asked for, as ../shared/figures/README.md says."""


def published_clips(audio: Path) -> list[Clip]:
    """Return the 24 clips of the published demo page; their names say what they are."""
    files = sorted((audio / "published" / "groundtruth").glob("*.flac"))
    return [Clip(file.stem, KINDS[file.stem.partition("_")[0]], file) for file in files]


def published_decodes(audio: Path) -> Iterator[Decodes]:
    """Yield the decodes that were published."""
    for folder, (family, kbps) in FOLDERS.items():
        yield Decodes(f"{family} {kbps:g}", audio / "published" / folder, kbps, family)


def recorded(figures: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Read the scores of systems that there are no decodes of: system -> metric -> clip -> [value, weight]."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    with (figures / "published_scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            kbps = USED.get(row["system"], float(row["nominal_kbps"]))
            system = values.setdefault(f"{row['system']} {kbps:g}", {})
            clip = Path(row["name"]).stem
            for metric, column in COLUMNS.items():
                if row[column] != "nan":
                    system.setdefault(metric, {})[clip] = [float(f"{float(row[column]):.5g}"), 1.0]
            system.setdefault("kbps_net", {})[clip] = [kbps, 1.0]
    return values


def with_recorded(results: Results, figures: Path) -> Results:
    """Add the systems that only scores are known of."""
    systems, values = dict(results.systems), dict(results.values)
    for name, measures in recorded(figures).items():
        if name not in systems:
            family = name.rpartition(" ")[0]
            what = "scores recorded in shared/figures/published_scores.csv, bitrate stated"
            systems[name] = {"family": family, "what": what, "rate": results.settings["rate"], "measured": False}
            values[name] = measures
    return dataclasses.replace(results, systems=systems, values=values)


def with_costs(results: Results, measured: Results) -> Results:
    """Add memory, operations and latency that an idle machine measured before, and say which commit that was."""
    names = [field.name for field in dataclasses.fields(Cost)]
    systems = {
        name: {**facts, **{cost: known[cost] for cost in names if cost in (known := measured.systems.get(name, {}))}}
        for name, facts in results.systems.items()
    }
    settings = {
        **results.settings,
        "costs_of_commit": measured.settings.get("costs_of_commit", measured.machine["commit"]),
    }
    return dataclasses.replace(results, systems=systems, settings=settings)


def plans(audio: Path, cache: Path, jobs: int, every: int = 1, without: Sequence[str] = ()) -> dict[str, Plan]:
    """Return the runs by name; ``every`` thins the development clips, ``without`` drops metrics."""
    dev, published = thin(find(audio / "dev"), every), published_clips(audio)
    metrics = [name for name in METRICS if name not in without]
    costly = max(1, COSTLY_EVERY // every)
    codecs: list[Codec] = [*ours(MINI), *(codec for codec in classical() if codec.name not in LEFT_OUT)]
    steps: list[Codec] = [Semanticodec(name, count) for count in (1, 2, 4) for name in MINI]
    return {
        "published": Plan(
            [*ours(MINI), *published_decodes(audio)],
            published,
            cache,
            [name for name in RECORDED if name not in without],
            compensate=False,
            jobs=jobs,
        ),
        "dev": Plan(codecs, dev, cache, metrics, costly_every=costly, jobs=jobs),
        "fast": Plan(
            [*ours(MINI, fast=True)],
            dev,
            cache,
            ("stoi", "mel_l1"),
            compensate=False,
            jobs=jobs,
        ),
        "steps": Plan(steps, thin(dev, costly), cache, metrics, costly_every=costly, jobs=jobs),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and keep the results; what is cached is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="RUN", help=f"of {', '.join(RUNS)} [all four]")
    parser.add_argument("--audio", type=Path, default=SHARED / "audio", help="folder with dev/ and published/")
    parser.add_argument("--figures", type=Path, default=SHARED / "figures")
    parser.add_argument("--cache", type=Path, default=ROOT.parent / ".bench", help="of decodes and scores")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--every", type=int, default=1, help="take every n-th development clip of each kind")
    parser.add_argument("--without", nargs="*", default=[], choices=list(METRICS), help="metrics to leave out")
    parser.add_argument("--costs-from", type=Path, help="results to take memory, operations and latency of dev from")
    given = parser.parse_args(arguments)
    if wrong := [name for name in given.runs if name not in RUNS]:  # choices= would refuse that none are given
        parser.error(f"no run {', '.join(wrong)}; there are {', '.join(RUNS)}")
    torch.set_num_threads(1)
    wanted = plans(given.audio, given.cache, given.jobs, given.every, given.without)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name in given.runs:
            task = progress.add_task(name)

            def advance(stage: str, what: str, done: int, total: int, task=task) -> None:  # type: ignore[no-untyped-def]
                progress.update(task, description=f"{stage} {what}", completed=done, total=total)
                if not console.is_terminal and done % 100 == 0:
                    print(f"{stage} {what}: {done} of {total}", file=sys.stderr, flush=True)

            results = run(wanted[name], f"quality-{name}", advance)
            if name == "published":
                results = with_recorded(results, given.figures)
            elif name == "dev":
                results = survey(results, wanted[name], costs=given.costs_from is None)
                if given.costs_from is not None:
                    results = with_costs(results, read_results(given.costs_from))
            given.out.mkdir(parents=True, exist_ok=True)
            results.write(given.out / f"quality-{name}.json")
            print(f"written to {given.out / f'quality-{name}.json'}")


if __name__ == "__main__":
    main()
