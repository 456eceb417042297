"""What is kept of lost blocks: ``losses.json``, and its curves, as ``losses.png`` and in the report."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..errors import ConfigError
from .figures import COLOURS, MARKERS, Plot, Sheet, label, told
from .losses import METHODS, NONE, PATTERNS, Condition, Point, differences, table
from .results import ALL, Results
from .statistics import INTERVALS, METHOD, Interval

FILE = "losses.json"


@dataclass(frozen=True)
class Kept:
    """What a run of ``bench losses`` found, as far as it is drawn.

    Args:
        model: name of the preset, and its solver steps if they are not its own.
        kbps: net bitrate of the preset (as "model") and of each codec beside.
        kinds: kind of sound -> number of clips.
        commit: that measured; "modified" where the tree was.
        points: means, as :func:`.losses.table` returns them.
    """

    model: str
    kbps: Mapping[str, float]
    kinds: Mapping[str, int]
    commit: str
    points: Sequence[Point]

    @property
    def title(self) -> str:
        """What was measured, on what, and by which commit."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        kbps = self.kbps.get(METHODS[0])
        rate = f" at {kbps:.2f} kbit/s net" if kbps else ""  # none if every clip failed
        return f"{self.model}{rate}, {sum(self.kinds.values())} clips ({kinds}), commit {self.commit}"


def read(path: Path) -> Kept:
    """Read ``losses.json``.

    Args:
        path: of the file.

    Raises:
        ConfigError: it is not a file that :func:`write` wrote.
    """
    try:
        plain = json.loads(path.read_text())
        machine, steps = plain["machine"], plain.get("options", {}).get("steps")
        return Kept(
            plain["model"] + (f"@{steps}" if steps else ""),
            dict(plain["kbps_net"]),
            Counter(clip["kind"] for clip in plain["clips"]),
            str(machine["commit"])[:12] + " (modified)" * bool(machine.get("modified")),
            [_point(row) for row in plain["table"]],
        )
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{path} holds no results of semanticodec bench losses: {error}") from error


def _point(row: Mapping[str, Any]) -> Point:
    means = {name: row[name] and Interval(**row[name]) for name in ("mel_l1", "stoi")}
    return Point(**{**row, **means})


def plots(kept: Kept) -> dict[str, Plot]:
    """Plot log-mel L1 and STOI against what share of the blocks was lost, a panel per pattern.

    A condition asks for a share of all blocks there could be; what a few clips lose of theirs is another, and stands
    below their means.

    Args:
        kept: to be drawn.

    Returns:
        Measure -> its plot; none of a measure that was not taken.
    """
    heard = "speech" if any(point.kind == "speech" for point in kept.points) else ALL
    found = {name: _plot(kept, name, kind) for name, kind in (("mel_l1", ALL), ("stoi", heard))}
    return {name: plot for name, plot in found.items() if plot}


def _plot(kept: Kept, measure: str, kind: str) -> Plot | None:
    known = [(p, value) for p in kept.points if p.kind == kind and (value := getattr(p, measure))]
    if not known:
        return None
    methods = list(dict.fromkeys((*METHODS, *(point.method for point, _ in known))))
    names = {name: name if name in METHODS else f"{name}, {kept.kbps[name]:.1f} kbit/s" for name in methods}
    looks = {names[name]: (COLOURS[place], MARKERS[place]) for place, name in enumerate(methods)}
    low, high = min(value.low for _, value in known), max(value.high for _, value in known)
    room = 0.05 * (high - low or 1)

    def draw(sheet: Sheet, axes: Axes, pattern: str) -> None:
        for place, method in enumerate(methods):
            colour, marker = looks[names[method]]
            clean = METHODS[0] if method in METHODS else method
            wanted = ((NONE, clean), (pattern, method))
            mine = [(100 * p.lost, value) for p, value in known if (p.pattern, p.method) in wanted]
            mine.sort(key=lambda pair: pair[0])  # few clips may lose less where more was asked for
            # Side by side, since the intervals of all would hide each other.
            shift = (place - len(methods) // 2) / len(methods)
            places = [share + shift for share, _ in mine]
            axes.plot(places, [value.mean for _, value in mine], "-", color=colour, linewidth=1.2, zorder=2)
            for x, (share, value) in zip(places, mine, strict=True):
                if value.clips > 1:
                    axes.plot([x] * 2, [value.low, value.high], color=colour, linewidth=1, alpha=0.7, zorder=2)
                tip = sheet.tip(f"{names[method]}: {share:.1f} % lost, {told(value)}")
                axes.plot(x, value.mean, marker, color=colour, markersize=5, gid=tip, zorder=3)
        axes.set(title=pattern, xlabel="lost blocks in % (drawn side by side)", ylim=(low - room, high + room))

    clips = max(value.clips for _, value in known)
    of = f"{'all clips' if kind == ALL else kind}, n = {clips}"
    return Plot(f"{label(measure)} of {of} against lost blocks", f"{label(measure)}; {of}", PATTERNS, looks, draw)


def draw(path: Path, kept: Kept) -> None:
    """Draw the plots of all measures into one picture, for papers and READMEs.

    ``draw(folder / "losses.png", read(folder / "losses.json"))`` draws again what was measured before.

    Args:
        path: of the PNG to write.
        kept: to be drawn.
    """
    found = list(plots(kept).values())
    sheet = Sheet(len(PATTERNS), rows=len(found), width=5.0, height=0.6 + 3.4 * len(found))
    for place, axes in enumerate(sheet.axes):
        plot = found[place // len(PATTERNS)]
        plot.put(sheet, axes, PATTERNS[place % len(PATTERNS)])
        if place % len(PATTERNS) == 0:
            axes.set_ylabel(plot.ylabel)
    sheet.figure.suptitle(kept.title, fontsize=10)
    found[0].explain(sheet, below=True)
    sheet.figure.savefig(path, dpi=110)


def write(folder: Path, results: Results) -> None:
    """Write ``losses.json``, and ``losses.png`` unless every clip failed.

    Args:
        folder: to write to; made if it is not there.
        results: of :func:`.losses.measure`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips = list(results.clips)
    bits = {
        name: results.mean(Condition(NONE, 0.0, name).name, "kbps_net")
        for name in (METHODS[0], *results.settings.get("beside", ()))
    }
    kept: dict[str, Any] = {
        "machine": results.machine,
        **results.settings,
        "kbps_net": {name: round(mean.mean, 3) for name, mean in bits.items() if mean},
        "skipped": results.skipped,
        "failed": results.failed,
        "intervals": INTERVALS,
        "test": f"{METHOD}; here the three pairs of methods at one rate",
        "table": [dataclasses.asdict(point) for point in table(results)],
        "differences": [dataclasses.asdict(each) for each in differences(results)],
        "clips": [{"name": name, **facts} for name, facts in results.clips.items()],
        "values": [
            {"system": system, "measure": name, "clips": [found[clip][0] if clip in found else None for clip in clips]}
            for system, measures in results.values.items()
            for name, found in measures.items()
        ],
    }
    # A row per line: the file is read by people too, and kept under version control.
    parts = [
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        if isinstance(value, list) and value
        else f" {json.dumps(name)}: {json.dumps(value)}"
        for name, value in kept.items()
    ]
    (folder / FILE).write_text("{\n" + ",\n".join(parts) + "\n}\n")
    picture = folder / "losses.png"
    picture.unlink(missing_ok=True)  # of an earlier run
    if kept["table"]:
        draw(picture, read(folder / FILE))
