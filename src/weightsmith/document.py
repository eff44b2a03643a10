"""What the HTML pages that commands write have in common: one file each, without network, in light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

_LIGHT = """
  --ground: #ffffff; --raised: #f6f7f8; --ink: #1c2024; --quiet: #57606a; --grid: #e0e4e8; --edge: #8b949e;
  --link: #0b57b0; --error: #b3261e; --warning: #8a5300; --note: #0b57b0; --good: #1b6e3c; --best: #b4470c;
  color-scheme: light;
"""
_DARK = """
  --ground: #14171a; --raised: #1c2126; --ink: #e8eaed; --quiet: #a3adb8; --grid: #2f363d; --edge: #6b7680;
  --link: #79b8ff; --error: #ff8a80; --warning: #f5b84d; --note: #79b8ff; --good: #6fd08c; --best: #ffa657;
  color-scheme: dark;
"""
# The colours of pages, all of which are read on the ground: they follow the system, unless the root says otherwise in
# data-theme, or is being printed.
THEME = f""":root {{{_LIGHT}}}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]):not(.printing) {{{_DARK}}} }}
:root[data-theme="dark"]:not(.printing) {{{_DARK}}}
"""


def document(title: str, style: str, body: Iterable[str], policy: Mapping[str, str] | None = None) -> str:
    """Return an HTML page that loads nothing.

    Args:
        title: what windows and bookmarks show; plain text.
        style: CSS after :data:`THEME`.
        body: what is in it, as HTML.
        policy: what its Content-Security-Policy allows beyond styles of its own: directive -> sources. Names come
            from files of strangers; whatever they hold, nothing is loaded and no other script runs.
    """
    rules = {"default-src": "'none'", "style-src": "'unsafe-inline'", **(policy or {})}
    # A path's name may hold bytes that are no UTF-8.
    shown = title.encode("utf-8", "replace").decode()
    said = "; ".join(f"{name} {sources}" for name, sources in rules.items())
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(said, quote=False)}">',
            f"<title>{escape(shown)}</title>",
            f"<style>{THEME}{style}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )
