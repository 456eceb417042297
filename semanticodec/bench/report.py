"""One self-contained HTML page of results: no host is asked for anything."""

from __future__ import annotations

import base64
import html
import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from ..audio import load, save
from ..config import SAMPLE_RATE
from ..demo import log_mel
from .align import align
from .clips import Clip
from .figures import Sheet, against_speed, bars, label, rate_distortion
from .metrics import METRICS
from .results import BITS, Results
from .run import Entry
from .statistics import METHOD, Interval

PAGE = Path(__file__).parent / "report.html"
LEADING = ("visqol", "stoi", "pesq_wb", "mel_l1")
"""Metrics whose plots stand open."""
SECONDS = 3
"""Of each recording in the gallery."""


def hang(results: Results, clips: Iterable[Clip], cache: Path, folder: Path, each: int = 1) -> None:
    """Put short pieces of originals and decodes, delay and level undone, where the report finds them.

    Args:
        results: of a run.
        clips: of the same run.
        cache: of the same run.
        folder: gets ``gallery/CLIP/SYSTEM.flac``.
        each: clips of each kind, the first that last long enough.
    """
    shutil.rmtree(folder / "gallery", ignore_errors=True)  # of an earlier run
    for kind in results.kinds:
        long = [clip for clip in clips if clip.kind == kind and clip.seconds >= SECONDS]
        for clip in long[:each]:
            target = folder / "gallery" / f"{kind} - {clip.name.removeprefix(kind + '/').replace('/', ' ')}"
            target.mkdir(parents=True, exist_ok=True)
            original = clip.wave.astype(np.float64)
            pieces = {"original": original}
            for name, system in results.systems.items():
                if "fingerprint" in system and clip.name in results.scores(name, "kbps_net"):
                    decoded = Entry.of(cache, system["fingerprint"], clip.digest).decoded()
                    level = bool(results.settings["compensate"])
                    pieces[name] = align(original, decoded, delay=system["delay_samples"] or 0, level=level).wave
            for name, wave in pieces.items():
                piece = wave[: SECONDS * SAMPLE_RATE]
                save(target / f"{name}.flac", torch.from_numpy(piece), SAMPLE_RATE)


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.html`` with the gallery that lies in the folder, and the plots as PNG and SVG for papers.

    Args:
        results: of a run.
        folder: to write to.
    """
    present = [name for name in METRICS if any(results.scores(system, name) for system in results.systems)]
    leading = [name for name in LEADING if name in present] or present[:2]
    (folder / "plots").mkdir(parents=True, exist_ok=True)

    def drawn(sheet: Sheet | None, name: str, title: str) -> str:
        if sheet is None:
            return ""
        sheet.save(folder / "plots" / name)
        return f"<figure>{sheet.inline(title)}<figcaption>{html.escape(title)}</figcaption></figure>"

    curves = {
        name: drawn(
            rate_distortion(results, name), f"rate-{name}", f"{label(name)} against the net bitrate, 95 % intervals"
        )
        for name in present
    }
    rest = "".join(curves[name] for name in present if name not in leading)
    speed = [
        drawn(against_speed(results, leading[0], kind), f"speed-{kind}", f"{label(leading[0])} against speed, {kind}")
        for kind in results.kinds[:1]
    ]
    page = Template(PAGE.read_text())
    target = folder / "report.html"
    text = page.substitute(
        title=html.escape(results.title),
        facts=_facts(results),
        curves="".join(curves[name] for name in leading),
        rest=f"<details><summary>All other metrics</summary>{rest}</details>" if rest else "",
        speed="".join(speed) or "<p>None of the systems was timed.</p>",
        bars="".join(
            drawn(bars(results, name), f"bars-{name}", f"{label(name)}; systems in the order of their bitrate")
            for name in leading
        ),
        losses=_losses(folder / "losses.png"),
        tables="".join(f"<h3>{kind}</h3>{_table(results, kind, present)}" for kind in results.kinds),
        systems=_systems(results),
        method=html.escape(METHOD),
        tests="".join(_tests(results, name) for name in present),
        gallery=_gallery(folder / "gallery", results) or "<p>No recordings were kept.</p>",
        left_out=_left_out(results),
    )
    target.write_text(text)
    return target


def _facts(results: Results) -> str:
    machine, settings = results.machine, results.settings
    seconds = sum(clip["seconds"] for clip in results.clips.values())
    counts = ", ".join(
        f"{sum(clip['kind'] == kind for clip in results.clips.values())} {kind}" for kind in results.kinds
    )
    facts = {
        "clips": f"{len(results.clips)} ({counts}), {seconds / 60:.1f} minutes",
        "footing": f"{settings['rate'] / 1000:g} kHz mono; "
        + (
            "each codec's delay undone, each decode at its original's loudness"
            if settings["compensate"]
            else "neither delay nor level undone"
        ),
        "on a part": _on_a_part(settings),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}",
        "commit": f"{str(machine['commit'])[:12]}{' (modified)' if machine['modified'] else ''}, {machine['date']}",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)


def _on_a_part(settings: Mapping[str, Any]) -> str:
    if not settings.get("costly") or settings["costly_every"] == 1:
        return ""
    names = ", ".join(METRICS[name].label for name in settings["costly"])
    return f"{names}: one clip of {settings['costly_every']}"


def _table(results: Results, kind: str, metrics: Sequence[str]) -> str:
    """Lay out means of one kind; the best at its bitrate or below is set off."""
    columns = {name: f"kbit/s {what}" for name, what in BITS.items()}
    columns |= {"band": "band kHz", "encode_cpu": "encode s/s", "decode_cpu": "decode s/s"}
    columns |= {name: METRICS[name].label for name in metrics}
    means = {s: {name: results.mean(s, name, kind) for name in columns} for s in results.systems}
    columns = {name: head for name, head in columns.items() if any(found[name] for found in means.values())}
    rows = []
    for system, found in means.items():
        if not any(found.values()):
            continue
        cells = [f"<th>{html.escape(system)}</th>"]
        for name in columns:
            mean = found[name]
            if mean is None:
                cells.append("<td></td>")
                continue
            scale = 1000 if name == "band" else 1
            tip = f' title="95 %: {mean.low / scale:.4g} to {mean.high / scale:.4g}, {mean.clips} clips"'
            strong = ' class="best"' if name in METRICS and _leads(system, name, means) else ""
            cells.append(f"<td{strong}{tip}>{mean.mean / scale:.{1 if name == 'band' else 3}f}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _laid_out("".join(f"<th>{text}</th>" for text in ("system", *columns.values())), rows, sort=True)


def _leads(system: str, measure: str, means: Mapping[str, Mapping[str, Interval | None]]) -> bool:
    """Tell whether no system of the same bitrate or less is better."""
    sign = 1 if METRICS[measure].better == "high" else -1
    points = {
        name: (bits.mean, sign * value.mean)
        for name, found in means.items()
        if (bits := found["kbps_net"]) and (value := found[measure])
    }
    mine = points.get(system)
    return mine is not None and not any(bits <= mine[0] and value > mine[1] for bits, value in points.values())


def _systems(results: Results) -> str:
    """Lay out what is known of the systems beside scores."""
    heads = ("system", "what", "works at Hz", "delay ms", "delay undone, samples", "parameters", "further")
    known = {"family", "what", "rate", "delay", "block", "parameters", "measured", "delay_samples", "fingerprint"}
    rows = []
    for name, system in results.systems.items():
        delay, parameters = system.get("delay"), system.get("parameters")
        cells = (
            system["what"] if system.get("measured", True) else f"{system['what']} (not measured here)",
            str(system["rate"]),
            "" if delay is None else f"{1000 * delay:.0f}",
            "not found" if system.get("delay_samples", 0) is None else str(system.get("delay_samples") or ""),
            "" if parameters is None else f"{parameters / 1e6:.1f} M",
            "; ".join(f"{key.replace('_', ' ')} {_told(v)}" for key, v in system.items() if v and key not in known),
        )
        rows.append(
            f"<tr><th>{html.escape(name)}</th>{''.join(f'<td class=text>{html.escape(c)}</td>' for c in cells)}</tr>"
        )
    return _laid_out("".join(f"<th class=text>{text}</th>" for text in heads), rows)


def _told(value: object) -> str:
    """Write a fact for readers."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " and ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _laid_out(head: str, rows: Sequence[str], *, sort: bool = False) -> str:
    kind = ' class="sort"' if sort else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _tests(results: Results, measure: str) -> str:
    parts = []
    for kind in results.kinds:
        rows = [
            f"<tr><td class=text>{html.escape(c.first)}</td><td class=text>{html.escape(c.second)}</td>"
            f"<td>{c.difference:+.3f}</td><td>{c.low:+.3f} to {c.high:+.3f}</td>"
            f"<td>{'' if c.p is None else f'{c.p:.2g}'}</td><td>{c.verdict}</td><td>{c.clips}</td></tr>"
            for c in results.compare(measure, kind)
        ]
        if rows:
            heads = ("first", "second", "first − second", "95 %", "p", "p after Holm", "clips")
            parts.append(
                f"<details><summary>{METRICS[measure].label}, {kind}: {len(rows)} pairs</summary>"
                f"{_laid_out(''.join(f'<th>{head}</th>' for head in heads), rows, sort=True)}</details>"
            )
    return "".join(parts)


def _losses(picture: Path) -> str:
    if not picture.is_file():
        return "<p>Not measured; <code>semanticodec bench losses</code> does.</p>"
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<figure><img alt="quality against lost blocks" src="data:image/png;base64,{data}"></figure>'


def _gallery(folder: Path, results: Results) -> str:
    order = {"original": -1} | {name: place for place, name in enumerate(results.systems)}
    shelves = []
    for shelf in sorted(folder.glob("*"), key=lambda path: results.kinds.index(path.name.partition(" - ")[0])):
        files = sorted(shelf.glob("*.flac"), key=lambda file: order.get(file.stem, len(order)))
        cards = []
        for file in files:
            name = html.escape(file.stem)
            sound = base64.b64encode(file.read_bytes()).decode()
            kbps = results.mean(file.stem, "kbps_net")
            rate = f" · {kbps.mean:.2f} kbit/s" if kbps else ""
            cards.append(
                f'<div class="card"><b>{name}</b><small>{rate}</small>'
                f'<img alt="spectrogram of {name}" src="data:image/png;base64,{_picture(file)}">'
                f'<audio controls preload="metadata" src="data:audio/flac;base64,{sound}"></audio></div>'
            )
        if cards:
            shelves.append(f'<h3>{html.escape(shelf.name)}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(shelves)


def _picture(file: Path) -> str:
    """Return the log-mel spectrogram of a sound file as a PNG in base64."""
    from matplotlib.image import imsave

    wave, _ = load(file)
    rows = log_mel(wave[0]).mT.numpy()
    data = io.BytesIO()
    imsave(data, np.kron(rows[::-1], np.ones((2, 1))), vmin=-11.5, vmax=2, cmap="magma", format="png")
    return base64.b64encode(data.getvalue()).decode()


def _left_out(results: Results) -> str:
    rows = [*results.skipped.items(), *results.failed.items()]
    if not rows:
        return "<p>Nothing.</p>"
    return f"<dl>{''.join(f'<dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd>' for a, b in rows)}</dl>"
