"""One self-contained HTML page of results: no host is asked for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from ..audio import load, save
from ..config import SAMPLE_RATE
from ..demo import log_mel
from ..errors import ConfigError
from .clips import Clip
from .codecs import MESSAGE
from .curves import FILE, plots, read
from .entries import aligned
from .figures import Plot, against_speed, bars, counted, rate_distortion
from .folders import emptied
from .metrics import METRICS
from .results import BITS, Results
from .statistics import INTERVALS, METHOD, Interval

PAGE = Path(__file__).parent / "report.html"
LEADING = ("visqol", "stoi", "pesq_wb", "mel_l1")
"""Metrics whose plots stand open."""
SECONDS = 3
"""Of each recording in the gallery."""
LONGEST = 200
"""Bytes of a name on a shelf of the gallery, of the 255 that a disk takes."""
COSTS = {
    "peak_memory_mb": ("peak memory", "MB"),
    "gflop_per_second": ("operations", "GFLOP per s"),
    "first_block_ms": ("first block", "ms"),
}
"""Facts about systems, and what the report calls them."""
CODES = {
    "tokens_per_second": ("tokens", "per s"),
    "codebook_use": ("used of each codebook", ""),
    "entropy_bits": ("entropy", "bits per code"),
    "kbps_at_entropy": ("bits at that entropy", "kbit/s, too low if clips are few"),
    "probe_codes": ("told from counted codes", "right"),
    "probe_embedded": ("told from mean features", "right"),
}
"""The same of codes."""
ENTROPY = """<p>Entropy is that of how often each code came up, without context.  What few clips do not bring up counts
as never used: unless many times more codes were counted than a codebook has entries, entropy is too low, and so are the
bits at that entropy, which no coder was run to reach.</p>"""
PROBES = """<p>Linear classifiers tell the manifest's labels of clips they have not seen, from how often each code comes
in a clip, and from the mean of what codes stand for (the last row: from mean and deviation of the recording's log-mel);
chance is what guessing gets right.</p>"""
TEXTS = {"what", "further", "second", "p after Holm", CODES["probe_codes"][0], CODES["probe_embedded"][0]}
"""Heads of columns that hold words."""


def hang(results: Results, clips: Iterable[Clip], cache: Path, folder: Path, each: int = 1) -> None:
    """Put short pieces of originals and decodes, delay and level undone, where the report finds them.

    Args:
        results: of a run.
        clips: of the same run.
        cache: of the same run.
        folder: gets ``gallery/CLIP/SYSTEM.flac``.
        each: clips of each kind, the first that last long enough, or if none does the first.
    """
    gallery = emptied(folder / "gallery")  # of an earlier run
    clips = [clip for clip in clips if clip.name in results.clips]  # the others could not be read
    for kind in results.kinds:
        those = [clip for clip in clips if clip.kind == kind]
        for clip in ([clip for clip in those if clip.seconds >= SECONDS] or those)[:each]:
            target = gallery / _shelf(clip.name, kind)
            target.mkdir()
            original = clip.wave.astype(np.float64)
            pieces = {"original": original}
            for name, system in results.systems.items():
                if "fingerprint" in system and clip.name in results.scores(name, "kbps_net"):
                    level = bool(results.settings["compensate"])
                    pieces[name] = aligned(results, name, clip, cache, level=level)
            for name, wave in pieces.items():
                piece = wave[: SECONDS * SAMPLE_RATE]
                save(target / f"{name}.flac", torch.from_numpy(piece), SAMPLE_RATE)


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.html`` with the gallery and lost blocks of the folder, and the plots as PNG and SVG for papers.

    Args:
        results: of a run.
        folder: to write to.
    """
    present = [name for name in METRICS if any(results.scores(system, name) for system in results.systems)]
    leading = [name for name in LEADING if name in present] or present[:2]
    (folder / "plots").mkdir(parents=True, exist_ok=True)

    def drawn(plot: Plot | None, name: str) -> str:
        if plot is None:
            return ""
        plot.save(folder / "plots" / name)
        return f"<figure>{plot.inline()}<figcaption>{html.escape(plot.title)}</figcaption></figure>"

    curves = {name: drawn(rate_distortion(results, name), f"rate-{name}") for name in present}
    speed = [found for name in leading if (found := drawn(against_speed(results, name), f"speed-{name}"))]
    rest = [curves[name] for name in present if name not in leading]
    page = Template(PAGE.read_text())
    target = folder / "report.html"
    text = page.substitute(
        title=html.escape(results.title),
        facts=_facts(results),
        curves="".join(curves[name] for name in leading),
        rest=_folded("All other metrics", rest),
        speed="".join(speed[:1]) + _folded("The same by other metrics", speed[1:])
        or "<p>None of the systems was timed.</p>",
        bars="".join(drawn(bars(results, name), f"bars-{name}") for name in leading),
        losses=_losses(folder / FILE, drawn),
        message=f"{MESSAGE:g}",
        tables="".join(f"<h3>{kind}</h3>{_table(results, kind, present)}" for kind in results.kinds),
        systems=_systems(results),
        codes=_codes(results),
        method=html.escape(METHOD.replace("p_holm", "the last p")),
        tests="".join(_tests(results, name) for name in present) or "<p>There are no two systems.</p>",
        gallery=_gallery(folder / "gallery", results) or "<p>No recordings were kept.</p>",
        left_out=_left_out(results),
    )
    target.write_text(text)
    return target


def _shelf(clip: str, kind: str) -> str:
    """Return the name of a clip's folder in the gallery, cut where a disk would not take it."""
    name = f"{kind} - {clip.removeprefix(kind + '/').replace('/', ' ')}"
    octets = name.encode(errors="surrogateescape")
    if len(octets) <= LONGEST:
        return name
    # What is cut off may be all that tells two clips apart.
    return f"{octets[:LONGEST].decode(errors='ignore')} {hashlib.sha256(octets).hexdigest()[:8]}"


def _folded(summary: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>" if parts else ""


def _facts(results: Results) -> str:
    machine, settings = results.machine, results.settings
    seconds = sum(clip["seconds"] for clip in results.clips.values())
    counts = ", ".join(_count(results, kind) for kind in results.kinds)
    facts = {
        "clips": f"{len(results.clips)} ({counts}), {seconds / 60:.1f} minutes",
        "footing": f"{settings['rate'] / 1000:g} kHz mono; "
        + (
            "each codec's delay undone, each decode at its original's loudness"
            if settings["compensate"]
            else "neither delay nor level undone"
        ),
        "intervals": INTERVALS,
        "on a part": _on_a_part(settings),
        "machine": f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}",
        "commit": f"{str(machine['commit'])[:12]}{' (modified)' if machine['modified'] else ''}, {machine['date']}",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items() if text)


def _count(results: Results, kind: str) -> str:
    """Write of how many clips a kind is, and of how many groups these are, if they are fewer."""
    groups = [results.groups[name] for name, clip in results.clips.items() if clip["kind"] == kind]
    count = len(set(groups))
    return f"{len(groups)} {kind}" + f" in {count} group{'s' * (count > 1)}" * (count < len(groups))


def _on_a_part(settings: Mapping[str, Any]) -> str:
    if not settings.get("costly") or settings["costly_every"] == 1:
        return ""
    names = ", ".join(METRICS[name].label for name in settings["costly"])
    return f"{names}: one clip of {settings['costly_every']}"


def _table(results: Results, kind: str, metrics: Sequence[str]) -> str:
    """Lay out means of one kind with their intervals; the best at its bitrate or below is set off."""
    columns = {name: (f"{what} bits", "kbit/s") for name, what in BITS.items()}
    columns |= {"band": ("band", "kHz"), "encode_cpu": ("encode", "s/s"), "decode_cpu": ("decode", "s/s")}
    columns |= {name: (METRICS[name].label, METRICS[name].unit) for name in metrics}
    means = {s: {name: results.mean(s, name, kind) for name in columns} for s in results.systems}
    columns = {name: head for name, head in columns.items() if any(found[name] for found in means.values())}
    rows = []
    for system, found in means.items():
        if not any(found.values()):
            continue
        stated = "" if results.systems[system].get("measured", True) else "<small>bits as stated</small>"
        cells = [f'<th scope="row">{html.escape(system)}{stated}</th>']
        for name in columns:
            mean = found[name]
            if mean is None:
                cells.append("<td></td>")
                continue
            scale = 1000 if name == "band" else 1
            digits = 3 if mean.mean / scale < 10 else 2 if mean.mean / scale < 100 else 1
            value, low, high = (f"{number / scale:.{digits}f}" for number in (mean.mean, mean.low, mean.high))
            reach = f"<small>{low}–{high}</small>" if low != high else ""
            if mean.clips < _most(name, means):
                reach += f"<small>n = {mean.clips}</small>"
            strong = ' class="best"' if name in METRICS and _leads(system, name, means) else ""
            cells.append(f'<td{strong} data-value="{mean.mean}">{value}{reach}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = {
        text: f"{unit}, {counted(found[name] for found in means.values())}".removeprefix(", ")
        for name, (text, unit) in columns.items()
    }
    return _laid_out({"system": "", **heads}, rows, kind, sort=True)


def _leads(system: str, measure: str, means: Mapping[str, Mapping[str, Interval | None]]) -> bool:
    """Tell whether no system of the same bitrate or less is better; those that lack a clip are not compared."""
    sign = 1 if METRICS[measure].better == "high" else -1
    points = {
        name: (bits.mean, sign * value.mean)
        for name, found in means.items()
        if (bits := found["kbps_net"]) and (value := found[measure]) and value.clips == _most(measure, means)
    }
    mine = points.get(system)
    return mine is not None and not any(bits <= mine[0] and value > mine[1] for bits, value in points.values())


def _most(measure: str, means: Mapping[str, Mapping[str, Interval | None]]) -> int:
    """Return of how many clips the system that has most of them has a measure."""
    return max(value.clips for found in means.values() if (value := found[measure]))


def _undone(results: Results, system: str) -> str:
    """Say which delays in ms were undone, the usual one first."""
    usual = results.systems[system].get("delay_samples")
    if usual is None:
        return "not found" if "delay_samples" in results.systems[system] else ""
    counts = Counter(results.late(system, clip) for clip in results.values[system].get("late", ()))
    shown = [f"{late / 16:.1f}" for late, _ in counts.most_common()] if len(counts) > 1 else [f"{usual / 16:.1f}"]
    return "" if shown == ["0.0"] else " or ".join(shown)


def _systems(results: Results) -> str:
    """Lay out what is known of the systems beside scores."""
    heads = {"what": "", "works at": "kHz", "delay": "ms", "delay undone": "ms", "parameters": "millions"}
    heads |= {**dict(COSTS.values()), "further": ""}
    known = {"family", "what", "rate", "delay", "block", "parameters", "measured", "delay_samples", "fingerprint"}
    known |= COSTS.keys() | CODES.keys() | {"block_bits", "packet", "by_name"}
    table: dict[str, list[str]] = {}
    for name, system in results.systems.items():
        delay, parameters = (system.get(fact) for fact in ("delay", "parameters"))
        table[name] = [
            system["what"] if system.get("measured", True) else f"{system['what']} (not measured here)",
            f"{system['rate'] / 1000:g}",
            "" if delay is None else f"{1000 * delay:.0f}",
            _undone(results, name),
            "" if parameters is None else f"{parameters / 1e6:.1f}",
            *("" if system.get(fact) is None else f"{system[fact]:.3g}" for fact in COSTS),
            "; ".join(f"{key.replace('_', ' ')} {_told(v)}" for key, v in system.items() if v and key not in known),
        ]
    used = [head for place, head in enumerate(heads) if any(cells[place] for cells in table.values())]
    rows = []
    for name, cells in table.items():
        shown = "".join(
            f"<td{' class=text' * (head in TEXTS)}>{html.escape(cell)}</td>"
            for head, cell in zip(heads, cells, strict=True)
            if head in used
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{shown}</tr>')
    return _laid_out({"system": "", **{head: heads[head] for head in used}}, rows, "systems")


def _codes(results: Results) -> str:
    """Lay out what is known of codes."""
    rows = []
    coded = {name: system for name, system in results.systems.items() if system.get("codebook_use")}
    if not coded:
        return "<p>No codes were looked at.</p>"
    if baseline := results.settings.get("probe_baseline"):
        coded["log-mel, no codec"] = {"probe_embedded": baseline}
    columns = {fact: head for fact, head in CODES.items() if any(system.get(fact) for system in coded.values())}
    for name, system in coded.items():
        cells = (
            f"<td{' class=text' * fact.startswith('probe')}>{html.escape(_told(system.get(fact) or ''))}</td>"
            for fact in columns
        )
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    told = ENTROPY * ("kbps_at_entropy" in columns) + PROBES * ("probe_codes" in columns)
    return told + _laid_out({"system": "", **dict(columns.values())}, rows, "codes")


def _told(value: object) -> str:
    """Write a fact for readers."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_told(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " and ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _laid_out(heads: Mapping[str, str], rows: Sequence[str], what: str, *, sort: bool = False) -> str:
    """Return a table, in a frame that scrolls, with the unit of each column under its name."""
    texts = [f"{html.escape(head)}<small>{html.escape(unit)}</small>" for head, unit in heads.items()]
    if sort:
        texts = [f'<button type="button">{text}</button>' for text in texts]
    head = "".join(
        f'<th scope="col"{" class=text" * (name in TEXTS)}>{text}</th>' for name, text in zip(heads, texts, strict=True)
    )
    table = f"<table{' class=sort' * sort}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="region" aria-label="table: {html.escape(what)}">{table}</div>'


def _tests(results: Results, measure: str) -> str:
    """Lay out the tests of one metric, kind by kind."""
    parts, tested, pairs = [], 0, 0
    for kind in results.kinds:
        found = results.compare(measure, kind)
        rows = [
            f'<tr><th scope="row">{html.escape(c.first)}</th><td class="text">{html.escape(c.second)}</td>'
            f'<td data-value="{c.difference}">{c.difference:+.3f}<small>{c.low:+.3f} to {c.high:+.3f}</small></td>'
            f"<td>{'' if c.p is None else f'{c.p:.2g}'}</td><td class=text>{html.escape(c.verdict)}</td>"
            f"<td>{c.clips}</td></tr>"
            for c in found
        ]
        tested, pairs = tested + sum(c.p is not None for c in found), pairs + len(found)
        if rows:
            heads = {"first": "", "second": "", "first − second": METRICS[measure].unit, "p": "", "p after Holm": ""}
            table = _laid_out(heads | {"n": "clips"}, rows, f"tests, {METRICS[measure].label}, {kind}", sort=True)
            parts += [f"<h3>{kind}</h3>", table]
    return _folded(f"{METRICS[measure].label}: {tested} of {pairs} pairs tested", parts)


def _losses(file: Path, drawn: Callable[[Plot, str], str]) -> str:
    """Show what a run of ``bench losses`` found, which need not be of this report's clips and commit."""
    if not file.is_file():
        return (
            "<p>Not measured.  <code>semanticodec bench losses CLIPS -o THIS_FOLDER</code> does, and then "
            "<code>semanticodec bench report THIS_FOLDER</code> shows it here.</p>"
        )
    try:
        kept = read(file)
    except ConfigError as error:
        return f"<p>{html.escape(str(error))}</p>"
    figures = "".join(drawn(plot, f"losses-{name}") for name, plot in plots(kept).items())
    told = "Upright lines are 95 % intervals; points of one share stand side by side."
    return f"<p>{html.escape(kept.title)}.  {told if figures else 'Every clip failed.'}</p>{figures}"


def _gallery(folder: Path, results: Results) -> str:
    order = {"original": -1} | {name: place for place, name in enumerate(results.systems)}
    shelves = []
    for clip, facts in results.clips.items():
        shelf = folder / _shelf(clip, facts["kind"])
        files = sorted(shelf.glob("*.flac"), key=lambda file: order.get(file.stem, len(order)))
        cards = [_card(file, clip, results) for file in files]
        if cards:
            shelves.append(f'<h3>{html.escape(shelf.name)}</h3><div class="cards">{"".join(cards)}</div>')
    return "".join(shelves)


def _card(file: Path, clip: str, results: Results) -> str:
    """Lay out a recording with what its system needed and scored on this very clip."""
    name = html.escape(file.stem)
    sound = base64.b64encode(file.read_bytes()).decode()
    kbps = results.scores(file.stem, "kbps_net").get(clip)
    scores = {METRICS[measure].label: results.scores(file.stem, measure).get(clip) for measure in LEADING}
    told = " · ".join(f"<span>{metric} {value[0]:.2f}</span>" for metric, value in scores.items() if value)
    return (
        f'<div class="card"><p><b>{name}</b>{f" {kbps[0]:.2f} kbit/s net" if kbps else ""}<small>{told}</small></p>'
        f'<img alt="spectrogram of {name}" src="data:image/png;base64,{_picture(file)}">'
        f'<audio controls aria-label="{name}" preload="metadata" src="data:audio/flac;base64,{sound}"></audio></div>'
    )


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
