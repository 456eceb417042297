"""Write the README's tables from results files: ``python -m benchmarks.readme`` (``--check`` only compares).

A table stands between ``<!-- table NAME -->`` and ``<!-- /table -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from semanticodec.bench.metrics import METRICS
from semanticodec.bench.results import Results, read_results

ROOT = Path(__file__).resolve().parent
README = ROOT.parent / "README.md"
RESULTS = ROOT / "results"


def cell(results: Results, system: str, measure: str, kind: str | None, digits: int = 3) -> str:
    """Return a mean, or nothing where there is none."""
    mean = results.mean(system, measure, kind)
    return "" if mean is None else f"{mean.mean:.{digits}f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def compared(results: Results, columns: Sequence[tuple[str, str]]) -> str:
    """One row per system in the order of its bitrate, a column per (kind, metric)."""
    short = {"visqol": "ViSQOL", "mel_l1": "mel L1"}
    heads, before = ["system", "kbit/s"], ""
    for kind, measure in columns:
        name = short.get(measure, METRICS[measure].label)
        heads.append(name if kind == before else f"{kind}: {name}")
        before = kind
    order = sorted(results.systems, key=lambda name: float(cell(results, name, "kbps_net", None) or 0))
    rows = []
    for name in order:
        kbps = cell(results, name, "kbps_net", None, 2) + ("" if results.systems[name].get("measured", True) else "*")
        rows.append((name, kbps, *(cell(results, name, measure, kind) for kind, measure in columns)))
    return f"{table(heads, rows)}\n\n{counted(results, columns, short)}"


def counted(results: Results, columns: Sequence[tuple[str, str]], short: Mapping[str, str]) -> str:
    """Say how many clips the columns are means of."""
    parts = []
    for kind in results.kinds:
        sizes = {
            short.get(measure, METRICS[measure].label): max(
                len(results.scores(s, measure, kind)) for s in results.systems
            )
            for where, measure in columns
            if where == kind
        }
        fewer = [f"{name} {size}" for name, size in sizes.items() if 0 < size < max(sizes.values())]
        parts.append(f"{max(sizes.values())} of {kind}" + (f" ({', '.join(fewer)})" if fewer else ""))
    return f"Clips: {', '.join(parts)}; commit {str(results.machine['commit'])[:7]}."


def dev() -> str:
    """Mini and the classical codecs on development clips."""
    columns = [
        ("speech", "visqol_speech"),
        ("speech", "pesq_wb"),
        ("speech", "stoi"),
        ("speech", "mel_l1"),
        ("music", "visqol"),
        ("music", "mel_l1"),
        ("sound", "visqol"),
        ("sound", "mel_l1"),
    ]
    return compared(read_results(RESULTS / "quality-dev.json"), columns)


def published() -> str:
    """Mini beside the published codecs on their clips."""
    columns = [
        ("speech", "pesq_wb"),
        ("speech", "stoi"),
        ("speech", "mel_l1"),
        ("music", "pesq_wb"),
        ("music", "stoi"),
        ("music", "mel_l1"),
        ("sound", "stoi"),
        ("sound", "mel_l1"),
    ]
    return compared(read_results(RESULTS / "quality-published.json"), columns)


TABLES: dict[str, Callable[[], str]] = {"quality-dev": dev, "quality-published": published}


def filled(text: str) -> str:
    """Put every table in its place."""

    def put(match: re.Match[str]) -> str:
        measured = (RESULTS / f"{match[1]}.json").is_file()
        body = TABLES[match[1]]() if measured else "Not measured yet: `make bench-quality`."
        return f"<!-- table {match[1]} -->\n\n{body}\n\n<!-- /table -->"

    return re.sub(r"<!-- table (\S+) -->.*?<!-- /table -->", put, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill in the README, or say whether it agrees with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    now = README.read_text()
    then = filled(now)
    if given.check:
        sys.exit(0 if now == then else "the README's tables are not those of benchmarks/results: make readme")
    README.write_text(then)


if __name__ == "__main__":
    main()
