"""What the server answers to plain HTTP: the page, its health, its counters."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from websockets.datastructures import Headers
from websockets.http11 import Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
}
"""Files of the page that are served, and what they are."""

SECURITY = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; "
    "media-src 'self' blob:; worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Pages:
    """The files of the web page, found once, so that no request names a path of the file system.

    Args:
        folder: of the page; what is not there is not served.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.rglob("*")) if folder.is_dir() else []
        self._files = {
            "/" + file.relative_to(folder).as_posix(): file
            for file in files
            if file.is_file() and file.suffix in TYPES and not any(p.startswith(".") for p in file.parts[-2:])
        }
        if "/index.html" in self._files:
            self._files["/"] = self._files["/index.html"]

    def find(self, path: str) -> Response:
        """Answer a request for a path of the page."""
        file = self._files.get(path.partition("?")[0])
        if file is None:
            return respond(HTTPStatus.NOT_FOUND, b"there is nothing here\n")
        return respond(HTTPStatus.OK, file.read_bytes(), TYPES[file.suffix])


def respond(
    status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", retry: int | None = None
) -> Response:
    """Make an HTTP answer."""
    headers = Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **SECURITY})
    headers["Cache-Control"] = "no-cache"
    if retry is not None:
        headers["Retry-After"] = str(retry)
    return Response(status.value, status.phrase, headers, body)
