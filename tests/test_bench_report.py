"""The report of made-up results: what its plots, tables and cards say."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from chrome import opened

from benchmarks.page import CHROMIUM, launched
from semanticodec.audio import save
from semanticodec.bench import curves
from semanticodec.bench.clips import find
from semanticodec.bench.codecs import MESSAGE
from semanticodec.bench.figures import (
    COLOURS,
    MARKERS,
    PANEL,
    Plot,
    Sheet,
    against_speed,
    bars,
    log_ticks,
    rate_distortion,
    told,
)
from semanticodec.bench.folders import emptied, marked
from semanticodec.bench.losses import conditions
from semanticodec.bench.report import write_report
from semanticodec.bench.results import Results
from semanticodec.bench.statistics import interval
from semanticodec.config import SAMPLE_RATE
from semanticodec.errors import ConfigError

CLIPS = {"speech/a": "speech", "speech/b": "speech", "music/c": "music"}
SYSTEMS = {"low": ("ours", 0.5), "high": ("ours", 1.5), "other": ("theirs", 6.0)}


@pytest.fixture(scope="module")
def results() -> Results:
    """Three systems on two clips of speech and one of music."""
    values = {
        system: {
            "kbps_net": {clip: [kbps + 0.01 * n, 2.0] for n, clip in enumerate(CLIPS)},
            "encode_cpu": {clip: [0.01 * kbps, 2.0] for clip in CLIPS},
            "decode_cpu": {clip: [0.1, 2.0] for clip in CLIPS},
            "stoi": {clip: [0.5 + 0.03 * kbps + 0.1 * n, 1.0] for n, clip in enumerate(CLIPS)},
            "mel_l1": {clip: [1.5 - 0.1 * kbps - 0.1 * n, 1.0] for n, clip in enumerate(CLIPS)},
        }
        for system, (_, kbps) in SYSTEMS.items()
    }
    return Results(
        title="made up",
        machine={"cpu": "an abacus", "cores": 1, "torch": "none", "commit": "0" * 40, "modified": False, "date": "now"},
        settings={"rate": SAMPLE_RATE, "compensate": True, "costly_every": 1, "costly": []},
        clips={name: {"kind": kind, "seconds": 2.0, "digest": "0"} for name, kind in CLIPS.items()},
        systems={
            name: {"family": family, "what": "a codec with a long description", "rate": 16000, "peak_memory_mb": 773.24}
            for name, (family, _) in SYSTEMS.items()
        },
        values=values,
    )


@pytest.fixture(scope="module")
def report(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of them with two recordings, beside a folder that is none of its own."""
    folder = tmp_path_factory.mktemp("report")
    for place in ("speech - b/original", "speech - b/high", "somebody's own/high"):
        (folder / "gallery" / place).parent.mkdir(parents=True, exist_ok=True)
        save(folder / "gallery" / f"{place}.flac", torch.zeros(8000), SAMPLE_RATE)
    return write_report(results, folder)


def lines(plot: Plot | None, kind: str) -> list[list[float]]:
    """Return the upright or level strokes of a panel: its intervals."""
    assert plot is not None
    sheet = Sheet(1)
    plot.draw(sheet, sheet.axes[0], kind)
    ends = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in sheet.axes[0].lines]
    strokes = [(x, y) for x, y in ends if len(x) == 2 and (x[0] == x[1] or y[0] == y[1])]
    return [y if x[0] == x[1] else x for x, y in strokes]


def test_groups_of_clips_are_counted(tmp_path: Path, results: Results):
    clips = {name: {**clip, "group": "one voice"} for name, clip in results.clips.items()}
    page = write_report(replace(results, clips=clips), tmp_path).read_text()
    assert "3 (2 speech in 1 group, 1 music), 0.1 minutes" in page


@pytest.mark.parametrize("plot", [rate_distortion, against_speed, bars])
def test_one_clip_has_no_interval(plot, results: Results):  # type: ignore[no-untyped-def]
    drawn = plot(results, "stoi")
    assert drawn.kinds == ["speech", "music"]
    assert len(lines(drawn, "speech")) == len(SYSTEMS)
    assert all(low < high for low, high in lines(drawn, "speech"))
    assert lines(drawn, "music") == []
    panels = drawn.inline()
    assert panels.count('<svg role="img"') == 2
    assert "speech, n = 2" in panels
    assert "music, n = 1" in panels


def test_numbers_say_of_how_many_clips():
    several, one = interval([(1.0, 1.0), (2.0, 1.0)]), interval([(1.0, 1.0)])
    assert several
    assert one
    assert told(several) == "1.500 [1.000, 2.000], n = 2"
    assert told(one) == "1.000, n = 1"


def test_axes_and_legends_say_what_they_are(results: Results):
    rates, speeds = rate_distortion(results, "mel_l1"), against_speed(results, "mel_l1")
    assert rates
    assert speeds
    for plot, text in ((rates, "net kbit/s (log scale)"), (speeds, "processor s per s of sound (log scale)")):
        panels = plot.inline()
        assert panels.count(text) == panels.count("log-mel L1 (lower is better)</text>") == 2
        legend = re.findall(r"<li>.*?</li>", panels)
        assert [re.sub("<[^>]*>", "", key) for key in legend] == ["ours", "theirs"]
        shapes = [re.findall('points="([^"]*)"', key) for key in legend]
        assert shapes[0] != shapes[1]  # for those who cannot tell the colours
    assert rate_distortion(results, "visqol") is None
    assert bars(results, "visqol") is None


def test_lines_go_from_bitrate_to_bitrate(results: Results):
    """In whatever order the systems come."""
    names = ("high", "other", "low")
    systems = {name: {**results.systems[name], "family": "ours"} for name in names}
    plot = rate_distortion(replace(results, systems=systems), "stoi")
    assert plot
    sheet = Sheet(1)
    plot.draw(sheet, sheet.axes[0], "speech")
    (line,) = (line for line in sheet.axes[0].lines if len(line.get_xdata()) == len(names))
    assert list(line.get_xdata()) == pytest.approx([0.505, 1.505, 6.005])


def lost_blocks() -> Results:
    """What lost blocks cost three clips, which lose more than was asked for where it was 1 %, and less elsewhere."""
    clips = {f"{kind}{n}": {"kind": kind} for n, kind in enumerate(("speech", "speech", "music"))}
    values = {
        each.name: {
            "lost": {clip: [0.035 if each.rate == 0.01 else 0.9 * each.rate, 20.0] for clip in clips},
            "mel_l1": {clip: [0.5 + each.rate + n / 10, 1.0] for n, clip in enumerate(clips)},
            "stoi": {clip: [0.75 - each.rate, 1.0] for clip in clips},
            "kbps_net": {clip: [6.5 if "opus" in each.method else 1.25, 1.0] for clip in clips},
        }
        for each in conditions(["opus-6"])
    }
    settings = {"model": "mini-100", "beside": ["opus-6"], "options": {"steps": 4}}
    return Results("t", {"commit": "0123456789abcdef", "modified": True}, settings, clips, {}, values)


def test_lost_blocks_are_drawn_where_they_are(tmp_path: Path):
    curves.write(tmp_path, lost_blocks())
    plots = curves.plots(curves.read(tmp_path / "losses.json"))
    assert plots.keys() == {"mel_l1", "stoi"}
    assert plots["mel_l1"].ylabel.endswith("all clips, n = 3")
    assert plots["stoi"].ylabel.endswith("speech, n = 2")
    assert list(plots["stoi"].families) == ["model", "silence", "repetition", "opus-6, 6.5 kbit/s"]
    sheet = Sheet(1)
    plots["mel_l1"].draw(sheet, sheet.axes[0], "bursts")
    curve, *others = (line for line in sheet.axes[0].lines if len(line.get_xdata()) > 2)
    assert len(others) == 3
    lost = np.asarray(curve.get_xdata()) - curve.get_xdata()[0]  # nothing is lost in the first of them
    assert lost.tolist() == pytest.approx([0, 2.7, 3.5, 4.5, 9, 18])
    asked = [0, 0.03, 0.01, 0.05, 0.1, 0.2]
    assert np.asarray(curve.get_ydata()).tolist() == pytest.approx([0.6 + rate for rate in asked])
    assert len({line.get_xdata()[0] for line in (curve, *others)}) == 4  # beside each other
    assert "model: 3.5 % lost, 0.610 [0.510, 0.710], n = 3" in sheet.tips
    before = (tmp_path / "losses.png").read_bytes()
    curves.draw(tmp_path / "again.png", curves.read(tmp_path / "losses.json"))
    assert (tmp_path / "again.png").read_bytes() == before
    curves.write(tmp_path, replace(lost_blocks(), values={}))
    assert curves.plots(curves.read(tmp_path / "losses.json")) == {}
    assert not (tmp_path / "losses.png").exists()


def test_the_report_says_what_lost_its_blocks(results: Results, tmp_path: Path):
    results = replace(results, systems={}, values={})  # what else there is would take long to draw
    (tmp_path / "losses.png").write_bytes(b"somebody's")
    section = lambda page: page.partition('<h2 id="losses">')[2].partition("<h2")[0]  # noqa: E731
    assert "Not measured" in section(write_report(results, tmp_path).read_text())
    curves.write(tmp_path, lost_blocks())
    shown = section(write_report(results, tmp_path).read_text())
    assert "mini-100@4 at 1.25 kbit/s net, 3 clips (2 speech, 1 music), commit 0123456789ab (modified)" in shown
    assert shown.count('<svg role="img"') == 4  # of two measures and patterns
    assert "<img" not in shown
    assert "currentColor" in shown
    assert (tmp_path / "plots" / "losses-stoi.svg").is_file()
    curves.write(tmp_path, replace(lost_blocks(), values={}))
    assert "Every clip failed" in section(write_report(results, tmp_path).read_text())
    (tmp_path / "losses.json").write_text('{"model": "x"}')
    assert "losses.json holds no results of semanticodec bench losses" in section(
        write_report(results, tmp_path).read_text()
    )


def test_the_report_says_how_bits_are_counted(results: Results, report: Path, tmp_path: Path):
    page = " ".join(report.read_text().split())
    assert f"WebSocket messages of {MESSAGE:g} s, or of a block where that is longer" in page
    assert f"without the wait for a message of {MESSAGE:g} s" in page
    assert "Net bits of Codec 2 and Speex are of a clip's own frames" in page
    assert "no coder was run to reach" not in page
    facts = {"codebook_use": ["9 % of 9"], "entropy_bits": [1.5], "kbps_at_entropy": 0.5}
    coded = replace(results, systems={**results.systems, "low": {**results.systems["low"], **facts}})
    assert "no coder was run to reach" in write_report(coded, tmp_path).read_text()


@pytest.mark.parametrize("rates", [(1.3, 5.4), (0.3, 24.2), (6.0, 6.4), (0.001, 900.0)])
def test_a_log_axis_has_figures_enough_to_read_it(rates: tuple[float, float]):
    axes = Sheet(1).axes[0]
    axes.plot(rates, (0, 1))
    log_ticks(axes)
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log"
    assert 4 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 9


def test_pictures_for_papers_are_opaque(results: Results, tmp_path: Path):
    from PIL import Image

    plot = rate_distortion(results, "stoi")
    assert plot
    plot.save(tmp_path / "plot")
    picture = np.asarray(Image.open(tmp_path / "plot.png").convert("RGBA"))
    assert (picture[..., 3] == 255).all()
    edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 255).all()  # nothing is cut off


def test_families_are_told_apart_on_light_and_dark():
    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour, paper in ((colour, paper) for colour in COLOURS for paper in ("#f6f8fa", "#171d24")):
        dark, bright = sorted((light(colour), light(paper)))
        assert (bright + 0.05) / (dark + 0.05) >= 3, (colour, paper)
    looks = [(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n in range(100)]
    assert all(one != other for one, other in combinations(looks, 2))


def test_tables_show_units_intervals_and_counts(results: Results, report: Path):
    page = report.read_text()
    speech, music = (page.partition(f"<h3>{kind}</h3>")[2].partition("</table>")[0] for kind in ("speech", "music"))
    assert "net bits<small>kbit/s, n = 2</small>" in speech
    assert "STOI<small>n = 1</small>" in music
    mean = results.mean("low", "stoi", "speech")
    assert mean
    assert f"{mean.mean:.3f}<small>{mean.low:.3f}–{mean.high:.3f}</small>" in speech
    assert "–" not in music
    assert re.search(r">0\.100</td>", speech)  # decoding takes the same for both clips: no interval of no width
    assert "peak memory<small>MB</small>" in page
    assert "STOI: 0 of 6 pairs tested" in page
    assert "of one speaker or recording" in page.partition("<h2")[0]  # in its head
    assert "not tested: 2 clips cannot reach" in page
    assert "<td>773</td>" in page
    for plot in ("rate-stoi", "speed-stoi", "speed-mel_l1", "bars-stoi"):
        assert (report.parent / "plots" / f"{plot}.png").is_file()
        assert (report.parent / "plots" / f"{plot}.svg").is_file()


def test_means_of_fewer_clips_do_not_lead(results: Results, tmp_path: Path):
    lucky = {"stoi": {"speech/b": [0.99, 1.0]}}  # on the one clip that it did not fail on
    values = {**results.values, "low": {**results.values["low"], **lucky}}
    page = write_report(replace(results, values=values), tmp_path).read_text()
    speech = page.partition("<h3>speech</h3>")[2].partition("</table>")[0]
    assert re.search(r'<td data-value="0.99">0.990<small>n = 1</small>', speech)
    for system in ("high", "other"):
        stoi = results.mean(system, "stoi", "speech")
        assert stoi
        assert f'<td class="best" data-value="{stoi.mean}">' in speech
        assert f"{stoi.high:.3f}</small></td>" in speech  # of all clips: no more is said


def test_stated_bits_and_long_names_are_shown(results: Results, tmp_path: Path):
    long = "a system whose authors call it by many words"
    systems = {long if name == "other" else name: facts for name, facts in results.systems.items()}
    systems[long] = {**systems[long], "measured": False}
    values = {long if name == "other" else name: found for name, found in results.values.items()}
    renamed = replace(results, systems=systems, values=values)
    page = write_report(renamed, tmp_path).read_text()
    assert page.count(f"{long}<small>bits as stated</small>") == 2
    assert "delay<small>ms</small>" not in page  # nobody knows any
    plot = bars(renamed, "stoi")
    assert plot
    sheet = Sheet(1, width=PANEL + plot.names, height=plot.height)
    plot.draw(sheet, sheet.axes[0], "speech")
    sheet.figure.draw_without_rendering()
    canvas, text = sheet.figure.bbox, sheet.axes[0].xaxis.label.get_window_extent()
    assert canvas.x0 <= text.x0 < text.x1 <= canvas.x1
    assert (
        sheet.axes[0].get_position().width * sheet.figure.get_figwidth() > 2
    )  # inches that bars have beside the names


def test_cards_are_of_their_own_clip(report: Path):
    original, card = re.findall(r'<div class="card">.*?</div>', report.read_text())
    assert "kbit/s" not in original
    assert "1.51 kbit/s net" in card
    assert "<span>STOI 0.65</span>" in card  # the mean is 0.595
    assert 'aria-label="high"' in card


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_the_report_fits_narrow_pages_and_works_by_keyboard(report: Path):
    with launched() as browser:
        for width in (1280, 500, 360):
            options = {"viewport": {"width": width, "height": 900}, "color_scheme": "dark", "microphone": False}
            with opened(browser, report.as_uri(), **options) as page:
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                boxes = [box.bounding_box() for box in page.locator("figure, figure svg, .wide, .card").all()]
                assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes if box)
                sizes = page.evaluate(
                    "[...document.querySelectorAll('#curves ~ figure svg text')].filter(t => t.checkVisibility())"
                    ".map(t => t.getBoundingClientRect()).map(r => Math.min(r.width, r.height))"
                )
                assert min(sizes) > 6, width  # letters do not shrink with the page
        with opened(browser, report.as_uri(), microphone=False) as page:
            page.locator("table.sort button", has_text="STOI").first.focus()
            page.keyboard.press("Enter")
            page.keyboard.press("Enter")
            first = page.locator("table.sort").first
            assert first.locator("tbody th").all_text_contents() == ["other", "high", "low"]
            assert first.locator("th[aria-sort=descending]").inner_text().startswith("STOI")
            sound = page.locator("audio").first
            sound.focus()
            page.keyboard.press("Space")
            page.wait_for_function("document.querySelector('audio').played.length > 0")


def test_only_what_is_ours_is_emptied(tmp_path: Path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "take.wav").write_bytes(b"once")
    for place in (theirs, theirs / "take.wav"):
        with pytest.raises(ConfigError, match="not made by semanticodec bench"):
            emptied(place)
    assert (theirs / "take.wav").read_bytes() == b"once"
    ours = emptied(tmp_path / "ours")
    (ours / "old").mkdir()
    assert [path.name for path in emptied(ours).iterdir()] == [".semanticodec-bench"]


def test_what_runs_left_is_no_recording(tmp_path: Path):
    sound = torch.zeros(800)
    for folder in (tmp_path / "speech", marked(tmp_path / "out" / "cache"), marked(tmp_path / "mushra") / "stimuli"):
        folder.mkdir(exist_ok=True)
        save(folder / "a.wav", sound, SAMPLE_RATE)
    assert [clip.name for clip in find(tmp_path)] == ["speech/a"]
    assert [clip.name for clip in find(tmp_path / "mushra")] == ["stimuli/a"]  # asked for by name
