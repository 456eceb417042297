"""The tables of speed in the README, from results/ratios.json."""

import json
from collections.abc import Mapping
from typing import Any

from .outcomes import RESULTS, table
from .speed import PUBLISHED_CPU, STEPS

RANGE = "{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
PARTS = {
    "guided step": "guided step (both branches in one batch)",
    "VAE decoder": "autoencoder",
    "vocoder": "vocoder",
    "window": f"window, {STEPS} steps with guidance",
}
Found = Mapping[str, Any]


def ratios() -> str:
    """Speed: the parts of the official decoder beside the published code, the solver's curve, mini, whole processes."""
    found = json.loads((RESULTS / "ratios.json").read_text())
    solver, start = found["solver"], found["start"]
    curves = "; ".join(
        f"{label} " + ", ".join(f"{distance:.3f} ({n})" for n, distance in solver["distances"][sampler].items())
        for sampler, label in (("dpmpp_2m", "DPM-Solver++(2M)"), ("ddim", "DDIM"))
    )
    compiled = "; ".join(
        f"{name} {about['times_faster']:.2f} times as fast, after {about['seconds_until_compiled']:.0f} s of compiling"
        for name, about in found.get("compiled", {}).items()
    )
    return "\n\n".join(
        (
            _official(found),
            f"Distance of the latents to the {solver['reference']}-step solution, in its standard deviations (steps): "
            f"{curves}.",
            _mini(found["mini"]),
            _profile(found),
            *([f"`torch.compile` on a CPU: {compiled}."] if compiled else []),
            f"`semanticodec encode` is done {start['encode']:.1f} s after its start, `--help` after "
            f"{start['--help']:.1f} s (median of three processes, what they read in the system's memory).  "
            f"{_measured(found)}.",
        )
    )


def _official(found: Found) -> str:
    rows, times, native = found["official"]["rows"], found["official"]["times_published"], found["native"]["rows"]
    lines = [
        (name, f"{rows[part]['gflop']:.0f}", f"{rows[part]['timing']['cpu']:.2f}", f"{rows[part]['share_cpu']:.2f}",
         *map(str, PUBLISHED_CPU[part]), f"{times[part]:.2f}", f"{native[part]['timing']['cpu']:.2f}")
        for part, name in PARTS.items()
    ]  # fmt: skip

    def fewer(rows: Found, steps: int) -> str:
        step, window = (rows[part]["timing"]["cpu"] for part in ("guided step", "window"))
        return f"{window - (STEPS - steps) * step:.1f}"

    solver, whole = found["solver"], str(PUBLISHED_CPU["window"][0])
    default = next(int(name.split()[1]) for name in times if name.startswith("default"))
    near = solver["as_near_as_ddim_50"]
    for name, steps, ratio in (
        (f"window, default: DPM-Solver++(2M), {default} steps", default, times[f"default, {default} steps"]),
        (f"window, {near} steps: as near to the {solver['reference']}-step solution as DDIM-{STEPS}", near,
         solver.get("times_published")),
    ):  # fmt: skip
        told = f"{ratio:.2f}" if ratio else ""
        lines.append((name, "", fewer(rows, steps), "", whole, "", told, fewer(native, steps)))
    for windows, about in found["encode"].items():
        row, count = about["row"], "exactly one window" if windows == "1" else f"{windows} windows"
        ratio = RANGE.format(**about["times_published_windows"], digits=2)
        name = f"encoding of {count}; ratio to the published {int(windows) + 1}, one by one, same weights"
        lines.append((name, f"{row['gflop']:.0f}", "", "", "", "", ratio, f"{row['timing']['cpu']:.2f}"))
    heads = ["part", "GFLOP", "CPU s", "share of SGEMM", "published CPU s", "share", "ratio", "CPU s, all instructions"]
    return table(heads, lines)


def _mini(lengths: Found) -> str:
    factors = [
        (length, *(f"{runs[name]['wall']['median']:.3f}" for name in ("encode", "default", "fast")),
         *(RANGE.format(**runs[name]["wall"], digits=3) for name in ("in all, default", "in all, fast")))
        for length, runs in lengths.items() if length != "hot"
    ]  # fmt: skip
    return table(["mini: sound of", "encode", "decode", "decode, fast", "in all", "in all, fast"], factors)


def _profile(found: Found) -> str:
    """Where the time goes: the operators that take most of it."""
    where = {PARTS.get(part, part): shares for part, shares in found["official"]["hot"].items()}
    where |= {"encoding": found["encode"]["1"]["hot"], "mini: decoding": found["mini"]["hot"]}
    lines = [
        (name, ", ".join(f"{op.strip('_').replace('_', ' ')} {share:.0%}" for op, share in shares))
        for name, shares in where.items()
    ]
    return table(("part", "where the time goes: operators, share of processor time"), lines)


def _measured(found: Found) -> str:
    """Which commit and how many threads each part is of."""
    where: dict[tuple[str, int], list[str]] = {}
    for part in ("official", "native", "encode", "solver", "mini", "start", "compiled"):
        if f"{part}_machine" in found:
            about = found[f"{part}_machine"]
            where.setdefault((about["commit"][:7], about["threads"]), []).append(part)
    about = found["official_machine"]
    peak = about["sgemm_gflops_per_cpu_second"]
    return f"Compared: {about['instructions']}, SGEMM {peak:.0f} GFLOP per CPU second.  " + "; ".join(
        f"{', '.join(parts)}: commit {commit}, {threads} thread{'s' * (threads > 1)}"
        for (commit, threads), parts in where.items()
    )
