"""The web page in Debian's Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from benchmarks.page import CHROMIUM

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]
WAIT = 30_000
"""Milliseconds that anything may take on a busy machine."""


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
