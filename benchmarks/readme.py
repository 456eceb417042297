"""Write the tables of the README, and of that of corpora, from results: ``python -m benchmarks.readme``.

``--check`` only compares.  A table stands between ``<!-- table NAME -->`` and ``<!-- /table -->``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from semanticodec.bench.metrics import METRICS
from semanticodec.bench.results import Results, read_results
from semanticodec.config import DEFAULT_PRESET, PRESETS

from . import corpus_table
from .outcomes import OUTCOMES, RESULTS, outcome, page, serving, table
from .ratios_table import ratios

ROOT = Path(__file__).resolve().parent
README = ROOT.parent / "README.md"
CORPUS = ROOT.parent / "semanticodec" / "corpus" / "README.md"


def cell(results: Results, system: str, measure: str, kind: str | None, digits: int = 3) -> str:
    """Return a mean, or nothing where there is none."""
    mean = results.mean(system, measure, kind)
    return "" if mean is None else f"{mean.mean:.{digits}f}"


def within(results: Results, system: str, measure: str, kind: str | None) -> str:
    """Return a mean and how far the longer side of its 95 % interval reaches, or nothing where there is none."""
    mean = results.mean(system, measure, kind)
    if mean is None:
        return ""
    return f"{mean.mean:.3f}" + f" ± {max(mean.high - mean.mean, mean.mean - mean.low):.3f}" * (mean.clips > 1)


def compared(results: Results, columns: Sequence[tuple[str, str]], *, reach: bool = False) -> str:
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
        rows.append(
            (name, kbps, *((within if reach else cell)(results, name, measure, kind) for kind, measure in columns))
        )
    told = "  ± is the longer side of the 95 % interval over speakers and recordings." * reach
    return f"{table(heads, rows)}\n\n{counted(results, columns, short)}{told}"


def counted(results: Results, columns: Sequence[tuple[str, str]], short: Mapping[str, str]) -> str:
    """Say how many clips the columns are means of."""
    parts = []
    for kind in dict.fromkeys(kind for kind, _ in columns):
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
    results = read_results(RESULTS / "quality-dev.json")
    return f"{compared(results, columns, reach=True)}\n\n{probed(results, 'mini-100')}"


def probed(results: Results, system: str) -> str:
    """Say what share of clips linear classifiers label rightly from a system's codes, without it, and by chance."""
    codes = results.systems.get(system, {}).get("probe_codes", {})
    without = results.settings.get("probe_baseline", {})
    told = []
    for label in ("kind", "source"):
        if label in codes and label in without:
            ours, theirs = (str(found[label]).partition(" [")[0] for found in (codes, without))
            told.append(f"{label} {ours} ({theirs}; {codes[label].partition('(chance ')[2].partition(';')[0]} %)")
    return (
        f"Clips whose label a linear classifier tells from how often each code of {system} comes up (from mean and "
        f"deviation of the originals' log-mel, without a codec; by chance): {', '.join(told) or 'too few to say'}."
    )


def published() -> str:
    """Mini beside the published codecs on their clips."""
    columns = [
        ("speech", "visqol"),
        ("speech", "pesq_wb"),
        ("speech", "stoi"),
        ("speech", "mel_l1"),
        ("music", "visqol"),
        ("music", "stoi"),
        ("music", "mel_l1"),
        ("sound", "visqol"),
        ("sound", "stoi"),
        ("sound", "mel_l1"),
    ]
    return compared(read_results(RESULTS / "quality-published.json"), columns)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a results file that pytest kept."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def parity(*, codec: bool = False) -> str:
    """One row per component of the family, or of the codec: each system's largest error, and what they are held to."""
    components: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("parity"):
        if row["system"].startswith("semanticodec") == codec:
            # The same component with other settings or in pieces is one of the README's lines.
            components.setdefault(re.split(r",| S\d", row["component"])[0], []).append(row)
    lines = []
    for component, rows in components.items():
        worst: dict[str, float] = {}
        for row in rows:
            worst[row["system"]] = max(float(row["error"]), worst.get(row["system"], 0.0))
        errors = "; ".join(f"{system}: {error:.1e}" for system, error in worst.items())
        bound = max(float(row["bound"]) for row in rows)
        passed = all(row["error"] < row["bound"] or row["error"] == 0 for row in rows)
        lines.append((component, errors, f"{bound:.0e}" if bound else "equal", "yes" if passed else "**no**"))
    return table(("component", "largest error", "tolerance", "pass"), lines)


def coverage() -> str:
    """One row per kind of published file: how many of its tensors go somewhere."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for row in rows_of("coverage"):
        counts = (row["tensors"], row["mapped"], row["tensors"] - row["mapped"] - row["unmapped"])
        alike.setdefault((*counts, row["unmapped"], row["unfilled"]), []).append(row["checkpoint"])
    heads = ("checkpoint", "tensors", "mapped", "dropped by name", "unmapped", "unfilled")
    return table(heads, [(", ".join(names), *map(str, counts)) for counts, names in alike.items()])


def step() -> str:
    """What a guided solver step of AudioLDM 2 costs, beside this machine's matrix product."""
    result = json.loads((RESULTS / "family-audioldm2-full.json").read_text())
    lines = [
        (
            f"{result['system']}: {row['part']}",
            f"{row['gflop']:.1f}",
            f"{row['timing']['wall']:.2f}",
            f"{row['gflop'] / row['timing']['wall']:.1f}",
            f"{row['share']:.2f}",
        )
        for row in result["rows"]
    ]
    peak = f"share of SGEMM, {result['sgemm_gflops']:.1f} GFLOP/s"
    return table((f"{result['machine']['cpu']}, 1 thread", "GFLOP", "s", "GFLOP/s", peak), lines)


def mini() -> str:
    """Mini's rates, delay, speed and quality at a glance."""
    results = read_results(RESULTS / "quality-fast.json")
    speed = next(iter(json.loads((RESULTS / "ratios.json").read_text())["mini"].values()))
    lines = []
    for name, about in results.systems.items():
        preset = PRESETS.get(name)
        if preset is None:  # the fast setting has a table of its own
            continue
        both = " + ".join(f"{speed[way]['wall']['median']:.3f}" for way in ("encode", "default"))
        factor = both if name == DEFAULT_PRESET else ""
        quality = [cell(results, name, "stoi", "speech")]
        quality += [cell(results, name, "mel_l1", kind) for kind in ("speech", "music", "sound")]
        bits = results.mean(name, "kbps_net")
        net = "" if bits is None else f"{bits.mean:.2f}"
        lines.append((name, str(preset.token_rate), net, f"{1000 * about['delay']:.0f} ms", factor, *quality))
    heads = ("preset", "tokens/s", "net kbit/s", "delay", "real-time factor", "speech STOI", "log-mel L1: speech")
    clips = len(results.clips)
    commit = str(results.machine["commit"])[:7]
    return f"{table((*heads, 'music', 'sound'), lines)}\n\nMeans over {clips} development clips; commit {commit}."


def fast() -> str:
    """Mini's default beside its fast setting."""
    columns = [(kind, measure) for kind in ("speech", "music", "sound") for measure in ("stoi", "mel_l1")]
    return compared(read_results(RESULTS / "quality-fast.json"), columns)


def entropy() -> str:
    """What coding the codes saves."""
    found = json.loads((RESULTS / "entropy.json").read_text())
    lines = []
    for name, about in found.items():
        if not (isinstance(about, dict) and "prior" in about):
            continue
        kinds = about["kinds"]
        every = kinds["all"]
        saved = {kind: 100 * (1 - bits["coded"] / bits["net"]) for kind, bits in kinds.items()}
        lines.append(
            (
                name,
                *(f"{every[bits] / every['seconds'] / 1000:.3f}" for bits in ("net", "coded")),
                f"{saved['all']:.1f} %",
                *(f"{saved[kind]:.0f} %" for kind in ("speech", "music", "sound")),
                f"{100 * (1 - every['file'] / every['packed_file']):.1f} %",
                ", ".join(f"{100 * about[part]['1']:.1f} %" for part in ("saved_in_messages", "saved_in_frames")),
                ", ".join(f"{every['seconds'] / every[way]:.0f}" for way in ("encode", "decode")),
            )
        )
    heads = ("preset", "net kbit/s", "coded", "saved", "speech", "music", "sound", "of whole files",
             "of messages of 0.32 s: codes, all bytes", "codes, decodes (x real time, one core)")  # fmt: skip
    return f"{table(heads, lines)}\n\n{found['clips']} development clips; commit {str(found['machine']['commit'])[:7]}."


def superres() -> str:
    """How much nearer than sinc resampling mini-sr comes."""
    result = json.loads((RESULTS / "superres.json").read_text())
    found = {(row["kind"], row["rate"]): row for row in result["summary"]}
    kinds, rates = ("speech", "music", "sound"), sorted({rate for _, rate in found})
    heads = ["", "clips"]
    for rate in rates:
        heads += [f"from {rate // 1000} kHz: sinc", "mini-sr", "smaller by"]
    lines = []
    for kind in kinds:
        line = [kind, str(found[kind, rates[0]]["clips"])]
        for rate in rates:
            row = found[kind, rate]
            smaller, low, high = (f"{100 * row[name]:.0f}" for name in ("smaller", "low", "high"))
            line += [f"{row['sinc']:.2f}", f"{row['ours']:.2f}", f"{smaller} % ({low} to {high})"]
        lines.append(line)
    return f"{table(heads, lines)}\n\nCommit {str(result['machine']['commit'])[:7]}."


def steps() -> str:
    """Mini at other numbers of solver steps than its own."""
    columns = [(kind, measure) for kind in ("speech", "music", "sound") for measure in ("stoi", "mel_l1")]
    return compared(read_results(RESULTS / "quality-steps.json"), columns)


def losses() -> str:
    """What lost blocks cost, by what stands in for them; a star where the test of the model against that tells."""
    result = json.loads((RESULTS / "losses.json").read_text())
    points = {(p["pattern"], p["rate"], p["method"], p["kind"]): p for p in result["table"]}
    told = {
        (d["pattern"], d["rate"], d["test"]["second"], d["kind"], d["measure"])
        for d in result["differences"]
        if d["test"]["first"] == "model"
        and (d["test"]["p_holm"] or 1.0) < 0.05
        and d["test"]["low"] * d["test"]["high"] > 0  # what speakers and recordings agree on as well
    }
    columns = (("speech", "stoi"), ("speech", "mel_l1"), ("music", "mel_l1"), ("sound", "mel_l1"))
    beside = {name: f"{name}, {kbps:.1f} kbit/s" for name, kbps in result["kbps_net"].items() if name != "model"}
    lines = []
    for pattern, rate in (("none", 0.0), ("random", 0.05), ("random", 0.2), ("bursts", 0.2)):
        for method in (*(("model", "repetition", "silence") if rate else ("model",)), *beside):
            cells = []
            for kind, measure in columns:
                value = points[pattern, rate, method, kind][measure]
                star = "*" * ((pattern, rate, method, kind, measure) in told)
                cells.append(f"{value['mean']:.3f}{star} ({value['low']:.3f} to {value['high']:.3f})")
            share = f"{points[pattern, rate, method, 'all']['lost']:.1%}, {pattern}" if rate else "none"
            lines.append((share, beside.get(method, method if rate else ""), *cells))
    kinds = [clip["kind"] for clip in result["clips"]]
    counts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in dict.fromkeys(kinds))
    heads = ("lost blocks", "filled by", "speech: STOI", "mel L1", "music: mel L1", "sound: mel L1")
    return (
        f"{table(heads, lines)}\n\n{result['model']}, clips: {counts}; 95 % intervals; * differs from the model, over "
        "speakers and recordings and with p < 0.05 in the signed-rank test on the same clips, after Holm; commit "
        f"{str(result['machine']['commit'])[:7]}."
    )


def corpus() -> str:
    """One row per part of ``benchmarks.corpus``."""
    lines = []
    for part in corpus_table.PARTS:
        result = json.loads((RESULTS / f"corpus-{part}.json").read_text())
        what, seen = corpus_table.told(part, result[part])
        lines.append((f"`{part}`", what, seen, f"{result['load']:.0f}", str(result["machine"]["commit"])[:7]))
    return table(("part", "what", "seen", "load", "commit"), lines)


TABLES: dict[str, Callable[[], str]] = {
    "mini": mini,
    "quality-dev": dev,
    "quality-published": published,
    "parity": parity,
    "parity-codec": partial(parity, codec=True),
    "coverage": coverage,
    "family-audioldm2-full": step,
    "quality-fast": fast,
    "quality-steps": steps,
    "superres": superres,
    "entropy": entropy,
    "ratios": ratios,
    "losses": losses,
    "page": page,
    "serving": serving,
    **{name: partial(outcome, name) for name in OUTCOMES},
    "corpus": corpus,
}


def filled(text: str) -> str:
    """Put every table in its place."""

    def put(match: re.Match[str]) -> str:
        try:
            body = TABLES[match[1]]()
        except FileNotFoundError:
            body = "Not measured yet: `make bench-quality`, `make bench-speed` and `make parity` do it."
        return f"<!-- table {match[1]} -->\n\n{body}\n\n<!-- /table -->"

    return re.sub(r"<!-- table (\S+) -->.*?<!-- /table -->", put, text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill in the README, or say whether it agrees with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    for file in (README, CORPUS):
        now = file.read_text()
        then = filled(now)
        if not given.check:
            file.write_text(then)
        elif now != then:
            sys.exit(f"the tables of {file.relative_to(ROOT.parent)} are not those of benchmarks/results: make readme")


if __name__ == "__main__":
    main()
