"""Plots of results: for papers as PNG and SVG, and inline in the report, where the page's colours apply."""

from __future__ import annotations

import html
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .metrics import METRICS
from .results import Results

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
    "#5f3dc4",
    "#868e96",
    "#a0522d",
    "#74b816",
    "#4263eb",
)
MARKERS = "os^DvP*XphH8"

Tip = Callable[[str], str]


class Sheet:
    """One figure, with what is said when the mouse rests on its points."""

    def __init__(self, columns: int, *, width: float = 3.6, height: float = 3.1) -> None:
        self.figure = Figure(figsize=(width * columns, height), layout="constrained")
        FigureCanvasAgg(self.figure)
        self.axes: list[Axes] = list(self.figure.subplots(1, columns, squeeze=False)[0])
        self.tips: list[str] = []

    def tip(self, text: str) -> str:
        """Return the id that a drawn thing must have to say this."""
        self.tips.append(text)
        return f"tip-{len(self.tips) - 1}"

    def save(self, path: Path) -> None:
        """Write a PNG and an SVG beside each other; the ending of ``path`` is replaced."""
        for ending in (".png", ".svg"):
            self.figure.savefig(path.with_suffix(ending), dpi=200)

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


def families(results: Results) -> dict[str, tuple[str, str]]:
    """Return family -> (colour, marker), in the order of the systems."""
    names = dict.fromkeys(str(system["family"]) for system in results.systems.values())
    return {name: (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)}


def label(measure: str) -> str:
    """Return what an axis of a measure says."""
    metric = METRICS[measure]
    unit = f", {metric.unit}" if metric.unit else ""
    return f"{metric.label}{unit} ({'higher' if metric.better == 'high' else 'lower'} is better)"


def rate_distortion(results: Results, measure: str) -> Sheet | None:
    """Plot a metric against the net bitrate, a column per kind, a line per family, with 95 % intervals."""
    kinds = [kind for kind in results.kinds if any(results.scores(name, measure, kind) for name in results.systems)]
    if not kinds:
        return None
    sheet = Sheet(len(kinds))
    for axes, kind in zip(sheet.axes, kinds, strict=True):
        for family, (colour, marker) in families(results).items():
            points = []
            for name, system in results.systems.items():
                if system["family"] == family:
                    kbps, value = results.mean(name, "kbps_net", kind), results.mean(name, measure, kind)
                    if kbps and value:
                        points.append((kbps.mean, value, name))
            points.sort(key=lambda point: point[0])
            axes.plot(
                [p[0] for p in points],
                [p[1].mean for p in points],
                marker + "-",
                color=colour,
                linewidth=1.4,
                markersize=5,
                label=family,
                zorder=2,
            )
            for kbps_mean, value, name in points:
                axes.plot([kbps_mean] * 2, [value.low, value.high], color=colour, linewidth=1, alpha=0.7, zorder=2)
                tip = sheet.tip(f"{name}: {kbps_mean:.3f} kbit/s, {METRICS[measure].label} {value}")
                axes.plot(kbps_mean, value.mean, marker, color=colour, markersize=5, gid=tip, zorder=3)
        _log(axes)
        axes.set(title=kind, xlabel="net kbit/s")
    _finish(sheet, label(measure))
    return sheet


def against_speed(results: Results, measure: str, kind: str) -> Sheet | None:
    """Plot a metric against the processor time of encoding and decoding, a point per system."""
    sheet = Sheet(1, width=7.2, height=4)
    drawn = False
    for family, (colour, marker) in families(results).items():
        labelled = family
        for name, system in results.systems.items():
            encode, decode = (results.mean(name, cost, kind) for cost in ("encode_cpu", "decode_cpu"))
            value = results.mean(name, measure, kind)
            if system["family"] == family and encode and decode and value:
                cost = encode.mean + decode.mean
                sheet.axes[0].plot([cost] * 2, [value.low, value.high], color=colour, linewidth=1, alpha=0.7)
                tip = sheet.tip(f"{name}: {cost:.4f} processor seconds per second, {METRICS[measure].label} {value}")
                sheet.axes[0].plot(
                    cost, value.mean, marker, color=colour, markersize=6, gid=tip, label=labelled, linestyle="none"
                )
                labelled, drawn = "_nolegend_", True
    if not drawn:
        return None
    _log(sheet.axes[0])
    sheet.axes[0].set(title=kind, xlabel="processor seconds per second of sound, encoding + decoding, one thread")
    _finish(sheet, label(measure))
    return sheet


def bars(results: Results, measure: str) -> Sheet | None:
    """Plot a metric per system, a column per kind, in the order of the bitrate."""
    names = [name for name in results.systems if results.scores(name, measure)]
    if not names:
        return None
    names.sort(key=lambda name: value.mean if (value := results.mean(name, "kbps_net")) else 0.0, reverse=True)
    kinds = [kind for kind in results.kinds if any(results.scores(name, measure, kind) for name in names)]
    sheet = Sheet(len(kinds), height=1 + 0.24 * len(names))
    colours = families(results)
    for place, (axes, kind) in enumerate(zip(sheet.axes, kinds, strict=True)):
        for row, name in enumerate(names):
            value = results.mean(name, measure, kind)
            if value:
                colour = colours[str(results.systems[name]["family"])][0]
                gid = sheet.tip(f"{name}, {kind}: {value}, {value.clips} clips")
                axes.barh(row, value.mean, height=0.7, color=colour, alpha=0.85)[0].set_gid(gid)
                axes.plot([value.low, value.high], [row, row], color=INK, linewidth=1)
        axes.set(title=kind, ylim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
        axes.margins(x=0.02)
    _finish(sheet, "", legend=False)
    sheet.figure.supxlabel(label(measure), fontsize=9, color=INK)
    return sheet


def _log(axes: Axes) -> None:
    axes.set_xscale("log")
    axis = axes.xaxis
    low, high = axes.get_xlim()
    ticks = [n * 10**e for e in range(-5, 4) for n in (1, 2, 5) if low <= n * 10**e <= high]
    axis.set_ticks(ticks if len(ticks) < 9 else [tick for tick in ticks if f"{tick:e}".startswith("1")])
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _finish(sheet: Sheet, ylabel: str, *, legend: bool = True) -> None:
    for axes in sheet.axes:
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
    sheet.axes[0].set_ylabel(ylabel, fontsize=9, color=INK)
    if legend:
        shown = {
            str(line.get_label()): line
            for axes in sheet.axes
            for line in axes.get_lines()
            if len(np.atleast_1d(line.get_xdata())) and not str(line.get_label()).startswith("_")
        }
        sheet.figure.legend(
            list(shown.values()),
            list(shown),
            loc="outside right center",
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
