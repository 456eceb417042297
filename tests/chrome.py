"""Debian's Chromium for tests of the web page, with a recording as its microphone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]
WAIT = 30_000
"""Milliseconds that anything may take on a busy machine."""


def record(path: Path, root: Path) -> None:
    """Write the shipped recording in the form that Chromium takes for a microphone."""
    sound, rate = soundfile.read(root / "semanticodec" / "assets" / "demo.flac", dtype="float32", always_2d=True)
    mono = soxr.resample(sound.mean(axis=1), rate, 48000)[: 8 * 48000]
    soundfile.write(path, mono / np.abs(mono).max() * 0.7, 48000, subtype="PCM_16")


@contextmanager
def launched(microphone: Path | None = None) -> Iterator[Browser]:
    """Run Chromium."""
    flags = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
    if microphone is not None:
        flags += ["--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, microphone: bool = True, **options: Any) -> Iterator[Page]:
    """Open the page; fail if anything is thrown or logged as an error."""
    context = browser.new_context(permissions=["microphone"] if microphone else [], **options)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # A connection that the test cuts is logged by the browser itself.
    page.on(
        "console",
        lambda line: wrong.append(line.text) if line.type == "error" and "WebSocket" not in line.text else None,
    )
    page.goto(url)
    try:
        yield page
        assert wrong == []
    finally:
        context.close()
