"""Tables of the README from results that are lists of outcomes, and from those of the server and its page."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table."""
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


SHARE, DISTANCE = "{:.0%}", "{:.2f}"
OUTCOMES: dict[str, dict[str, tuple[str, str]]] = {
    "generation": {
        "recordings: label": ("held-out recordings that the probe takes for their label", SHARE),
        "recordings: kind": ("... for their kind", SHARE),
        "generated: label": ("generated clips that it takes for their label", SHARE),
        "generated: kind": ("... for their kind", SHARE),
        "transfer, strength 0.4: taken for the target": ("transferred at strength 0.4: taken for the new label", SHARE),
        "transfer, strength 0.7: taken for the target": ("transferred at 0.7: taken for the new label", SHARE),
        "transfer, strength 0.4: loudness, correlation": ("at 0.4: loudness, correlation to before", DISTANCE),
        "transfer, strength 0.7: loudness, correlation": ("at 0.7: loudness, correlation to before", DISTANCE),
        "gap: generated": ("half a second filled in: log-mel L1 to what was there, nats", DISTANCE),
        "gap: another recording": ("the same of another recording with this label", DISTANCE),
    },
    "control": {
        "no control: correlation": ("no control: correlation of the loudness to the curve", DISTANCE),
        "scale 0.5: correlation": ("scale 0.5", DISTANCE),
        "scale 1.0: correlation": ("scale 1", DISTANCE),
        "no control: distance, dB": ("no control: distance to the curve, dB", "{:.1f}"),
        "scale 0.5: distance, dB": ("scale 0.5", "{:.1f}"),
        "scale 1.0: distance, dB": ("scale 1", "{:.1f}"),
        "scale 0.0: largest difference to no control": ("scale 0: largest difference to no control", "{:g}"),
    },
    "edits": {
        "gap: plain decode of the codes": ("half a second: plain decode of the recording's codes", DISTANCE),
        "gap: generated from its codes": ("filled in, told these codes", DISTANCE),
        "gap: generated from no codes": ("filled in, told nothing", DISTANCE),
        "gap: changed outside": ("largest change of a sample outside", "{:g}"),
        "end: plain decode of the codes": ("a second at the end: plain decode", DISTANCE),
        "end: generated from its codes": ("outpainted, told these codes", DISTANCE),
    },
    "codes": {
        "repair 20%: damaged, decoded": ("20 % of the groups damaged, decoded as they are", DISTANCE),
        "repair 20%: lost, left to the model": ("marked as lost (-1), left to the model", DISTANCE),
        "repair 20%: lost, held": ("replaced by the group before", DISTANCE),
        "crossfade at once": ("from one stream to another at once: largest change, in usual ones", DISTANCE),
        "crossfade in turns": ("group by group in turns", DISTANCE),
        "swap: features, cosine to the semantic side minus to the acoustic side": (
            "semantic codes of one clip, acoustic of another: how much nearer to the first, cosine of features",
            DISTANCE,
        ),
        "swap: mean log-mel, distance to the acoustic side minus to the semantic side": (
            "the same: mean log-mel, nats",
            DISTANCE,
        ),
    },
}
"""Of a results file: which of its outcomes are shown, how they are called, and with how many digits."""


def outcome(name: str) -> str:
    """Means with their intervals, one per line."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    rows = []
    for key, (label, digits) in OUTCOMES[name].items():
        mean, low, high = (digits.format(found["outcome"][key][part]) for part in ("mean", "low", "high"))
        rows.append((label, mean, f"{low} to {high}", str(found["outcome"][key]["clips"])))
    chance = f"The probe guesses a label right in {found['chance']:.0%}.  " if "chance" in found else ""
    commit = str(found["machine"]["commit"])[:7]
    return f"{table((found.get('model', ''), 'mean', '95 %', 'clips'), rows)}\n\n{chance}Commit {commit}."


def newest(name: str) -> dict[str, Any]:
    """Read the last of the results that are kept with their time."""
    found: dict[str, Any] = json.loads(max(RESULTS.glob(f"{name}-2*.json")).read_text())
    return found


def page() -> str:
    """What the web page needs of the link, and how late one hears oneself."""
    found = newest("page")
    rows = [
        (f"mini-{row['rate']}, {row['bundle']} block{'s' * (row['bundle'] > 1)} per message", f"{row['gross']:.0f}",
         "{:.0f} / {:.0f} ms".format(*row["delay"]["total"]))
        for row in found["heard"]
    ]  # fmt: skip
    heads = ("through the page", "bit/s with all framing", "mouth to ear, p50 / p95")
    return f"{table(heads, rows)}\n\n{found['seconds']:.0f} s each; commit {found['machine']['commit'][:7]}."


def serving() -> str:
    """How many sessions a server holds, what batching gains, and what strangers cost."""
    live = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("serving-live-*.json"))]
    modes = {rows[0]["mode"]: rows for rows in (found["held"] for found in live)}
    names = {"transcode": "live sessions that hear themselves", "publish": "live sessions that only encode"}
    lines = [
        (f"{names[mode]}: p95 of the delay after a block",
         "; ".join(f"{row['sessions']}: {1000 * row['p95']:.0f} ms" for row in rows))
        for mode, rows in modes.items()
    ]  # fmt: skip
    batching, memory, hostile = (newest(f"serving-{part}") for part in ("batching", "memory", "hostile"))
    gains = ", ".join(f"{row['side']} {row['gain']:.1f} times as fast" for row in batching["gains"])
    streams = batching["gains"][0]["streams"]
    lines.append((f"batching, {streams} streams against one at a time", gains))
    kept = memory["resident_kb"]
    last = f"{kept[0] / 1024:.0f} MiB after 1 minute, {kept[-1] / 1024:.0f} after {len(kept)}"
    lines.append((f"resident memory over {len(kept)} minutes of sound", last))
    alone, beside = (f"{1000 * hostile[part]['p95']:.0f} ms" for part in ("alone", "beside"))
    strangers = (
        f"{hostile['strangers']['guesses']} guessed tokens and {hostile['strangers']['damaged']} damaged sessions"
    )
    lines.append((f"p95 beside {hostile['idle']:,} idle sessions, {strangers}", f"{alone} alone, {beside} beside"))
    commits = {found["machine"]["commit"][:7] for found in (*live, batching, memory, hostile)}
    return f"{table(('server', ''), lines)}\n\nCommits {', '.join(sorted(commits))}."
