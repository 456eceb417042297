"""Mouth to ear through the web page: ``python -m benchmarks.page``.

`semanticodec serve` and a real Chromium share this machine's cores; the browser's microphone is the shipped recording.
The page itself says when each sample that is heard was spoken, sent, coded and received, and what codes cost at the
socket.  Sound comes back when a listener who has only the codes would hear it: bundles of blocks are waited for.
"""

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import soxr
from playwright.async_api import Browser as AsyncBrowser
from playwright.async_api import async_playwright
from playwright.sync_api import Browser, sync_playwright

from .measure import company, machine
from .serving import RESULTS, VOICE, serving

CHROMIUM = shutil.which("chromium")
PARTS = ("capture", "encode", "network", "decode", "playout", "total")
SETTINGS = ((50, 1), (100, 2), (100, 1), (25, 2))
"""Codes per second and blocks per message, the page's default first."""
WAIT = 60_000
"""Milliseconds that the browser may take for anything."""


def record(path: Path) -> None:
    """Write the shipped recording in the form that Chromium takes for a microphone."""
    sound, rate = soundfile.read(VOICE, dtype="float32", always_2d=True)
    mono = soxr.resample(sound.mean(axis=1), rate, 48000)[: 8 * 48000]
    soundfile.write(path, mono / np.abs(mono).max() * 0.7, 48000, subtype="PCM_16")


def options(microphone: Path | None) -> dict[str, Any]:
    """Return how to launch Chromium, with a recording for its microphone."""
    flags = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    if microphone is not None:
        flags += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"]
    return {"executable_path": CHROMIUM, "args": flags}


@contextmanager
def launched(microphone: Path | None = None) -> Iterator[Browser]:
    """Run Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options(microphone))
        yield browser
        browser.close()


@dataclass(frozen=True)
class Heard:
    """One stretch of talking: mouth to ear in milliseconds by part (p50, p95), bits per second, what went wrong."""

    rate: int
    bundle: int
    samples: int
    delay: dict[str, tuple[float, float]]
    net: float
    gross: float
    underruns: int
    lost: int


async def talk(browser: AsyncBrowser, url: str, rate: int, bundle: int, seconds: float, shot: Path | None) -> Heard:
    """Talk for a while, and measure once the first seconds have passed."""
    context = await browser.new_context(permissions=["microphone"], viewport={"width": 1200, "height": 900})
    page = await context.new_page()
    page.set_default_timeout(WAIT)
    await page.goto(url)
    for name, value in (("rate", rate), ("bundle", bundle)):
        await page.check(f'input[name="{name}"][value="{value}"]', force=True)
    await page.get_by_label("Headphones").check()
    await page.get_by_role("button", name="Start").click()
    await page.wait_for_function("() => semanticodec.call?.report?.playing")
    await asyncio.sleep(6)
    before = await page.evaluate("(semanticodec.call.latency.samples.length = 0, semanticodec.call.report.underruns)")
    await asyncio.sleep(seconds)
    samples, codes, underruns, losses = await page.evaluate(
        "(({latency, codesSession, report, session}) => "
        "[latency.samples, codesSession.codesMeter.rates, report.underruns, session.losses])(semanticodec.call)"
    )
    if shot is not None:
        await page.screenshot(path=shot, full_page=True)
    await context.close()
    delay = {part: _percentiles([1000 * sample[part] for sample in samples]) for part in PARTS}
    lost = losses["lost"] + losses["unsent"]
    return Heard(rate, bundle, len(samples), delay, codes["net"], codes["gross"], underruns - before, lost)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    p50, p95 = np.percentile(values, (50, 95))
    return round(float(p50), 1), round(float(p95), 1)


async def measure(settings: Sequence[tuple[int, int]], seconds: float, shot: Path | None) -> list[Heard]:
    """Serve mini, and talk with each of the settings."""
    rows = []
    with TemporaryDirectory() as folder:
        microphone = Path(folder) / "voice.wav"
        record(microphone)
        async with serving([]) as server, async_playwright() as playwright:
            url = server.url.replace("ws", "http")
            browser = await playwright.chromium.launch(**options(microphone))
            for rate, bundle in settings:
                rows.append(await talk(browser, url, rate, bundle, seconds, shot))
                shot = None
                print(line(rows[-1]))
            await browser.close()
    return rows


def line(row: Heard) -> str:
    """Say in a line what was measured."""
    parts = ", ".join(f"{part} {row.delay[part][0]:.0f}/{row.delay[part][1]:.0f}" for part in PARTS)
    return (
        f"{row.rate} codes/s, {row.bundle} blocks per message: {row.net:.0f} bit/s net, {row.gross:.0f} gross; "
        f"ms p50/p95: {parts}; {row.underruns} under-runs, {row.lost} lost"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each setting")
    parser.add_argument("--default", action="store_true", help="only the page's default setting")
    parser.add_argument("--shot", type=Path, help="where to put a picture of the page")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ as JSON")
    given = parser.parse_args(arguments)
    beside = company()
    rows = asyncio.run(measure(SETTINGS[: 1 if given.default else None], given.seconds, given.shot))
    if given.write:
        target = RESULTS / f"page-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        found = {"machine": machine(), "company": beside, "seconds": given.seconds}
        found["heard"] = [asdict(row) for row in rows]
        target.write_text(json.dumps(found, indent=2) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
