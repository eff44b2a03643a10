"""``report.html``: the whole report in one page that needs no server and no network.

The page holds its data as JSON, its scripts and its styles. Its Content-Security-Policy names the scripts by their
hashes, so that nothing else can run, and forbids every connection. Names come from files of strangers: the data cannot
end its element, and the scripts make text nodes of them, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from weightsmith.document import document
from weightsmith.report.embedded import embedded
from weightsmith.report.findings import Report

# In the order in which they are loaded; see the README beside them for what they are.
VENDORED = ("d3.min.js", "plot.min.js")
_LICENCES = ("d3", "plot", "isoformat", "interval-tree-1d", "binary-search-bounds")
# The page's own, each of which uses those before it.
SCRIPTS = (
    "say.js",
    "theme.js",
    "table.js",
    "save.js",
    "pointer.js",
    "figure.js",
    "draw.js",
    "maps.js",
    "charts.js",
    "summary.js",
    "health.js",
    "changes.js",
    "pairs.js",
    "matrices.js",
    "merged.js",
    "tensors.js",
    "main.js",
)


def write_page(report: Report) -> str:
    """Return the page, UTF-8 text of HTML: the same for the same report.

    It is about 0.6 MB of code, and a megabyte or less of data for a model of a hundred layers; figures are rounded to
    what it shows, and the JSON of the report has them in full.

    Args:
        report: all that was found.
    """
    scripts = [*(_asset(f"vendor/{name}") for name in VENDORED), _own_script()]
    policy = {
        "script-src": " ".join(map(_hash, scripts)),
        # Pictures are saved by drawing them from data URLs.
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    labels = ", ".join(one.label for one in report.models) or report.base.label
    body = [
        "<noscript><p>This page draws its plots by a script of its own; please allow it. The same figures are in "
        "<code>weightsmith report --text</code> and <code>--json</code>.</p></noscript>",
        f'<script type="application/json" id="data">{_json(embedded(report))}</script>',
        f'<script type="text/plain" id="licences">{_licences()}</script>',
        *(f"<script>{script}</script>" for script in scripts),
    ]
    return document(f"weightsmith report: {labels}", _asset("report.css"), body, policy)


def _json(content: object) -> str:
    """Return JSON in which nothing can end or confuse the element around it."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Line separators of Unicode are escaped for tools that take the page apart; lone surrogates have no UTF-8.
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return "".join(f"\\u{ord(sign):04x}" if "\ud800" <= sign <= "\udfff" else sign for sign in text)


@cache
def _own_script() -> str:
    # One function around all of them: nothing of the page is reached from outside.
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();'


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _licences() -> str:
    parts = [f"{name}\n\n{_asset(f'vendor/{name}.LICENSE').strip()}" for name in _LICENCES]
    return "\n\n\n".join(parts)


@cache
def _asset(name: str) -> str:
    return files("weightsmith.report").joinpath("assets", *name.split("/")).read_text("utf-8")
