"""The page of a novelty report: figures, a histogram, and players for the nearest pairs, all in one file."""

from __future__ import annotations

import base64
import html
import io

from . import audio
from .config import SAMPLE_RATE
from .novelty import BINS, THRESHOLDS, Clip, Novelty, read, summary

PAIRS = 20
"""Nearest pairs that can be heard, unless told otherwise."""
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .4rem; vertical-align: top }
tr + tr { border-top: 1px solid #8885 } audio { width: 100%; min-width: 14rem } pre { white-space: pre-wrap }
small { overflow-wrap: anywhere } rect { fill: #47a } .over { fill: #c44 } text { fill: currentColor; font-size: 11px }
"""


def page(found: Novelty, pairs: int = PAIRS) -> str:
    """Write the report.

    Args:
        found: what to report.
        pairs: how many of the nearest pairs get players; their sound is kept inside the page.

    Returns:
        HTML that asks nothing of any host.

    Raises:
        AudioError: a sound file has changed and is not readable any more.
    """
    rows = "".join(_row(rank, found, index) for rank, index in enumerate(found.closest[:pairs], 1))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Novelty report</title><style>{_STYLE}</style></head><body>
<h1>How near generated clips come to training clips</h1>
<pre>{html.escape(summary(found))}</pre>
<p>A cosine of 1 is a copy as far as this embedding can tell. {_caution(found)}</p>
<h2>Cosine with the nearest training clip</h2>
{_histogram(found.histogram)}
<h2>Nearest pairs</h2>
<table><tr><th>#</th><th>cosine</th><th>generated</th><th>nearest training clip</th></tr>{rows}</table>
</body></html>
"""


def _caution(found: Novelty) -> str:
    if "CLAP" in found.embedder:
        return "The thresholds are those published for CLAP embeddings."
    return (
        "The thresholds 0.90 and 0.95 were published for CLAP embeddings; here another embedding was used, so compare "
        "with the same report over held-out recordings instead of with published figures."
    )


def _row(rank: int, found: Novelty, index: int) -> str:
    cells = (found.generated[index], found.training[int(found.nearest[index])])
    players = "".join(f"<td>{_player(clip, found.sample_rate)}</td>" for clip in cells)
    return f"<tr><td>{rank}</td><td>{float(found.similarity[index]):.3f}</td>{players}</tr>\n"


def _player(clip: Clip, sample_rate: int) -> str:
    file = io.BytesIO()
    audio.save(file, audio.resample(read(clip, sample_rate), sample_rate, SAMPLE_RATE), SAMPLE_RATE, "MP3")
    sound = base64.b64encode(file.getvalue()).decode()
    begin, end = clip.start / sample_rate, (clip.start + clip.samples) / sample_rate
    name = html.escape(str(clip.file))
    return (
        f'<audio controls preload="none" src="data:audio/mpeg;base64,{sound}"></audio>'
        f"<br><small>{name}, {begin:.1f} to {end:.1f} s</small>"
    )


def _histogram(counts: list[int]) -> str:
    width, height = 16, 160
    most = max(*counts, 1)
    bars = "".join(
        f'<rect x="{i * width}" y="{height * (1 - n / most):.1f}" width="{width - 2}" height="{height * n / most:.1f}"'
        f"{_over(i)}><title>{2 * i / BINS - 1:.2f} to {2 * (i + 1) / BINS - 1:.2f}: {n}</title></rect>"
        for i, n in enumerate(counts)
    )
    labels = "".join(
        f'<text x="{i * width}" y="{height + 14}">{2 * i / BINS - 1:.2f}</text>' for i in range(0, BINS + 1, BINS // 8)
    )
    return f'<svg viewBox="0 0 {BINS * width + 24} {height + 20}" role="img">{bars}{labels}</svg>'


def _over(place: int) -> str:
    return ' class="over"' if 2 * place / BINS - 1 >= THRESHOLDS[0] - 1e-9 else ""
