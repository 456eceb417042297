"""Plots of results: for papers as PNG and SVG, and inline in the report, where the page's colours apply."""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import MaxNLocator, NullFormatter

from .metrics import METRICS
from .results import Results
from .statistics import Interval

INK, PAPER = "#123456", "#fedcba"
"""Colours that stand for the page's text and background in inline plots."""
COLOURS = (
    "#d9480f",
    "#1c7ed6",
    "#2b8a3e",
    "#ae3ec9",
    "#b08900",
    "#0c8599",
    "#e64980",
    "#7c5cff",
    "#868e96",
    "#a0522d",
    "#5c940d",
    "#4263eb",
)
"""Of families; each stands out from the report's light and dark background by a contrast of 3 or more."""
MARKERS = "os^DvP*X<>d"
"""Of families, so that nobody has to tell colours; their number has no divisor in common with the colours'."""

PANEL = 3.6
"""Inches that a panel is wide."""

Draw = Callable[["Sheet", Axes, str], None]


class Sheet:
    """One figure, with what is said when the mouse rests on its points."""

    def __init__(self, columns: int, *, rows: int = 1, width: float = PANEL, height: float = 3.1) -> None:
        self.figure = Figure(figsize=(width * columns, height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False).flat)
        self.tips: list[str] = []

    def tip(self, text: str) -> str:
        """Return the id that a drawn thing must have to say this."""
        self.tips.append(text)
        return f"tip-{len(self.tips) - 1}"

    def inline(self, title: str) -> str:
        """Return an SVG element that takes the page's colours and has a title."""
        file = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": ["sans-serif"]}):
            self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
        # Several plots share one page: ids that the renderer counts are made their own.
        mark = f"p{zlib.crc32(title.encode()):08x}-"
        text = re.sub(r'(?<=id=")(?!tip-)', mark, text)
        text = re.sub(r"(?<=url\(#)|(?<=href=\"#)", mark, text)
        for number, tip in enumerate(self.tips):
            text = text.replace(f'id="tip-{number}">', f'class="tip"><title>{html.escape(tip)}</title>', 1)
        width = round(110 * self.figure.get_figwidth())  # so that letters are of one size on the page
        opening = f'<svg role="img" aria-label="{html.escape(title)}" style="max-width: {width}px" viewBox'
        return re.sub(r"<svg[^>]*viewBox", opening, text, count=1)


@dataclass(frozen=True)
class Plot:
    """A panel per kind of sound: side by side for papers, one by one on the page, which sets them as its width allows.

    Args:
        title: what a reader is told.
        ylabel: of the panels; empty where their rows have names.
        kinds: of sound, one per panel.
        families: name -> (colour, marker), for the legend; none where panels say it themselves.
        draw: puts one kind on axes.
        height: in inches.
        names: inches that the names of rows need beside what a panel has for its figures.
    """

    title: str
    ylabel: str
    kinds: Sequence[str]
    families: Mapping[str, tuple[str, str]]
    draw: Draw
    height: float = 3.1
    names: float = 0.0

    def put(self, sheet: Sheet, axes: Axes, kind: str) -> None:
        """Draw one kind on axes of a sheet, and dress them.

        Args:
            sheet: that has the axes.
            axes: to be drawn on.
            kind: one of the plot's.
        """
        self.draw(sheet, axes, kind)
        _finish(axes)

    def explain(self, sheet: Sheet, *, below: bool = False) -> None:
        """Put the legend of the families on a sheet.

        Args:
            sheet: to be put on.
            below: whether it stands below the axes in one row, and not beside them.
        """
        keys = [Line2D([], [], color=colour, marker=marker, markersize=5) for colour, marker in self.families.values()]
        sheet.figure.legend(
            keys,
            list(self.families),
            loc="outside lower center" if below else "outside right center",
            ncols=len(keys) if below else 1,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )

    def save(self, path: Path) -> None:
        """Write all panels as a PNG and an SVG, for papers; the ending of ``path`` is replaced."""
        sheet = Sheet(len(self.kinds), width=PANEL + self.names / len(self.kinds), height=self.height)
        for axes, kind in zip(sheet.axes, self.kinds, strict=True):
            self.put(sheet, axes, kind)
            if self.names and axes is not sheet.axes[0]:
                axes.set_yticklabels([])  # those of the first one
        sheet.axes[0].set_ylabel(self.ylabel)
        if self.families:
            self.explain(sheet)
        for ending in (".png", ".svg"):
            sheet.figure.savefig(path.with_suffix(ending), dpi=200)
            sheet.figure.set_layout_engine("none")  # it has been laid out

    def inline(self) -> str:
        """Return an SVG element per panel, which take the page's colours, and a legend."""
        panels = []
        for kind in self.kinds:
            sheet = Sheet(1, width=PANEL + self.names, height=self.height)
            self.put(sheet, sheet.axes[0], kind)
            sheet.axes[0].set_ylabel(self.ylabel)
            panels.append(sheet.inline(f"{self.title}: {kind}"))
        keys = "".join(f"<li>{_key(*look)}{html.escape(name)}</li>" for name, look in self.families.items())
        width = round(94 * (PANEL + self.names))
        grid = f'<div class="panels" style="--panel: {width}px">{"".join(panels)}</div>'
        return f'{grid}<ul class="legend">{keys}</ul>' if keys else grid


def families(results: Results) -> dict[str, tuple[str, str]]:
    """Return family -> (colour, marker), in the order of the systems."""
    names = dict.fromkeys(str(system["family"]) for system in results.systems.values())
    return {name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)}


def label(measure: str) -> str:
    """Return what an axis of a measure says."""
    metric = METRICS[measure]
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.label}{unit} ({'higher' if metric.better == 'high' else 'lower'} is better)"


def told(value: Interval, digits: int = 3) -> str:
    """Write a mean, its interval unless it is of one clip, and the number of clips.

    Args:
        value: to write.
        digits: after the point.
    """
    reach = f" [{value.low:.{digits}f}, {value.high:.{digits}f}]" if value.clips > 1 else ""
    return f"{value.mean:.{digits}f}{reach}, n = {value.clips}"


def counted(values: Iterable[Interval | None]) -> str:
    """Write of how many clips means are."""
    counts = [value.clips for value in values if value]
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def rate_distortion(results: Results, measure: str) -> Plot | None:
    """Plot a metric against the net bitrate, a line per family, with 95 % intervals.

    Args:
        results: of a run.
        measure: name of the metric.

    Returns:
        None where no system has a bitrate and a value.
    """

    def rate(name: str, kind: str) -> float | None:
        kbps = results.mean(name, "kbps_net", kind)
        return kbps.mean if kbps else None

    return _scatter(
        results,
        measure,
        rate,
        title=f"{label(measure)} against the net bitrate",
        xlabel="net kbit/s (log scale)",
        unit="kbit/s",
        width=1.4,
    )


def against_speed(results: Results, measure: str) -> Plot | None:
    """Plot a metric against the processor time of encoding and decoding; lines join a family, bitrate by bitrate.

    Args:
        results: of a run.
        measure: name of the metric.

    Returns:
        None where no system was timed and has a value.
    """

    def cost(name: str, kind: str) -> float | None:
        encode, decode = (results.mean(name, half, kind) for half in ("encode_cpu", "decode_cpu"))
        return encode.mean + decode.mean if encode and decode else None

    return _scatter(
        results,
        measure,
        cost,
        title=f"{label(measure)} against the time of one thread; thin lines join the bitrates of a family",
        xlabel="processor s per s of sound (log scale)",
        unit="s/s, encoding and decoding",
        width=0.4,
    )


def bars(results: Results, measure: str) -> Plot | None:
    """Plot a metric per system, in the order of the bitrate.

    Args:
        results: of a run.
        measure: name of the metric.

    Returns:
        None where no system has a bitrate and a value.
    """
    kbps = {name: value.mean for name in results.systems if (value := results.mean(name, "kbps_net"))}
    names = sorted((name for name in kbps if results.scores(name, measure)), key=lambda name: -kbps[name])
    kinds = [kind for kind in results.kinds if any(results.scores(name, measure, kind) for name in names)]
    colours = families(results)
    if not kinds:
        return None

    def draw(sheet: Sheet, axes: Axes, kind: str) -> None:
        values = {name: results.mean(name, measure, kind) for name in names}
        for row, (name, value) in enumerate(values.items()):
            if value:
                colour = colours[str(results.systems[name]["family"])][0]
                gid = sheet.tip(f"{name}, {kind}: {told(value)}")
                axes.barh(row, value.mean, height=0.7, color=colour, alpha=0.85)[0].set_gid(gid)
                if value.clips > 1:
                    axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1)
        axes.set(title=f"{kind}, {counted(values.values())}", ylim=(-0.6, len(names) - 0.4))
        axes.set_xlabel(label(measure), loc="right")  # where long names leave it little room, it starts below them
        axes.set_yticks(range(len(names)), [f"{name}  {kbps[name]:.2f}" for name in names])
        axes.margins(x=0.02)

    title = f"{label(measure)}; systems in the order of their net kbit/s, which stands beside them"
    longest = max(len(name) for name in names)
    return Plot(title, "", kinds, {}, draw, 1 + 0.24 * len(names), names=max(0.3, 0.07 * (longest - 9)))


def _scatter(
    results: Results,
    measure: str,
    across: Callable[[str, str], float | None],
    *,
    title: str,
    xlabel: str,
    unit: str,
    width: float,
) -> Plot | None:
    """Plot a metric against something of a system and kind, a line per family in the order of the bitrate."""
    looks = families(results)
    points: dict[str, dict[str, list[tuple[float, float, Interval, str]]]] = {}
    for kind in results.kinds:
        for name, system in results.systems.items():
            x, value, kbps = across(name, kind), results.mean(name, measure, kind), results.mean(name, "kbps_net", kind)
            if x and value and kbps:
                points.setdefault(kind, {}).setdefault(system["family"], []).append((kbps.mean, x, value, name))
    if not points:
        return None

    def draw(sheet: Sheet, axes: Axes, kind: str) -> None:
        for family, found in points[kind].items():
            colour, marker = looks[family]
            found.sort(key=lambda point: point[0])
            axes.plot([p[1] for p in found], [p[2].mean for p in found], "-", color=colour, linewidth=width, zorder=2)
            for _, x, value, name in found:
                if value.clips > 1:
                    axes.plot([x] * 2, [value.low, value.high], color=colour, linewidth=1, alpha=0.7, zorder=2)
                tip = sheet.tip(f"{name}: {x:.3g} {unit}; {METRICS[measure].label} {told(value)}")
                axes.plot(x, value.mean, marker, color=colour, markersize=5, gid=tip, zorder=3)
        log_ticks(axes)
        clips = counted(value for found in points[kind].values() for *_, value, _ in found)
        axes.set(title=f"{kind}, {clips}", xlabel=xlabel)

    drawn = {family: look for family, look in looks.items() if any(family in found for found in points.values())}
    return Plot(title, label(measure), list(points), drawn, draw)


def _key(colour: str, marker: str) -> str:
    """Return the sign of a family in a legend."""
    style = MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform()).to_polygons()[0]
    places = " ".join(f"{10 + 8 * x:.1f},{8 - 8 * y:.1f}" for x, y in np.asarray(outline))
    return (
        f'<svg viewBox="0 0 20 16" aria-hidden="true"><path d="M0 8H20" stroke="{colour}" stroke-width="1.6"/>'
        f'<polygon points="{places}" fill="{colour}"/></svg>'
    )


def log_ticks(axes: Axes) -> None:
    """Give axes a log scale with ticks enough to read it, and few enough not to touch."""
    axes.set_xscale("log")
    axis = axes.xaxis
    low, high = axes.get_xlim()
    # As few digits as give four ticks; over less than that, those of a linear axis.
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [n * 10.0**e for e in range(-6, 5) for n in digits if low <= n * 10.0**e <= high]
        if len(ticks) >= 4:
            break
    else:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks)
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes) -> None:
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.title.set_color(INK)
    axes.title.set_fontsize(10)
    axes.tick_params(colors=INK, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
        text.set_fontsize(9)
    for place, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(place in ("left", "bottom"))
