"""`/`: a page to try models on, which asks the API as any other client does."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

PAGES = {
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
"""Path -> file and kind. They hold nothing of the server's, and need no key."""

_STATIC = Path(__file__).parent.parent / "static"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_playground(app: FastAPI) -> None:
    """Let an application serve the page."""
    for path, (name, kind) in PAGES.items():
        _add_file(app, path, (_STATIC / name).read_bytes(), kind)


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    def read() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)
