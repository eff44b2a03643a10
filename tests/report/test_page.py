"""What the page holds, without a browser: its size, its policy, its data and the code that it carries."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from importlib.resources import files

import pytest

from tests.report.example import example_report
from weightsmith.report.embedded import MOST_PAIR_VALUES, embedded, rounded
from weightsmith.report.findings import Scope, Scoped
from weightsmith.report.page import SCRIPTS, VENDORED, write_page

ASSETS = files("weightsmith.report").joinpath("assets")
HOSTILE = '</script><script>alert(1)</script><!-- <script> \u2028 & " \ud800'


def content(page):
    """The data in a page, as a browser would find them: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.S)
    return json.loads(found[1])


def test_page_of_32_layers_and_4_inputs_is_below_2_mb():
    assert len(write_page(example_report(32, 4, "merged")).encode()) < 2_000_000


def test_page_is_the_same_for_the_same_report():
    assert write_page(example_report(2, 2)) == write_page(example_report(2, 2))


def test_names_of_strangers_cannot_leave_the_data():
    report = example_report(1, 2)
    model = replace(report.models[0], reference=HOSTILE)
    page = write_page(replace(report, models=(model, report.models[1]), notes=(HOSTILE,)))
    assert page.count("</script") == write_page(report).count("</script")
    assert "\u2028" not in page
    assert content(page)["notes"] == [HOSTILE]
    page.encode()


def test_title_is_escaped():
    report = example_report(1, 0)
    page = write_page(replace(report, base=replace(report.base, label="<b>&\udcff")))
    assert "<title>weightsmith report: &lt;b&gt;&amp;?</title>" in page


def test_policy_allows_the_scripts_of_the_page_alone_and_no_connection():
    page = write_page(example_report(1, 1))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert rules["script-src"].split() == [f"'sha256-{one}'" for one in hashes]
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert {"connect-src", "frame-src", "font-src"}.isdisjoint(rules)


def test_no_script_of_the_page_makes_markup_or_code_of_text():
    for name in SCRIPTS:
        text = ASSETS.joinpath(name).read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            name
        )


def test_vendored_files_are_those_that_are_pinned():
    folder = ASSETS.joinpath("vendor")
    rows = re.findall(
        r"^\| (\S+\.js) \|.*`(\S+)` \| ([0-9a-f]{64}) \|$", folder.joinpath("README.md").read_text(), re.M
    )
    assert [name for name, _, _ in rows] == list(VENDORED)
    for name, licence, pin in rows:
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == pin
        assert folder.joinpath(licence).is_file()
    assert {one.name for one in folder.iterdir() if one.name.endswith(".js")} == set(VENDORED)


def test_page_carries_the_licences_of_its_plotting_code():
    page = write_page(example_report(1, 1))
    for holder in ("Mike Bostock", "Observable, Inc.", "Mikola Lysenko"):
        assert holder in page
    assert page.count("Permission to use, copy, modify") == 3


@pytest.mark.parametrize("sign", ["</script", "<!--"])
def test_nothing_in_the_assets_ends_a_script(sign):
    for name in (*SCRIPTS, *(f"vendor/{one}" for one in VENDORED)):
        assert sign not in ASSETS.joinpath(*name.split("/")).read_text("utf-8")


def test_every_script_is_type_checked():
    settings = json.loads(ASSETS.joinpath("jsconfig.json").read_text())
    assert settings["files"] == ["types.d.ts", *SCRIPTS]
    assert {one.name for one in ASSETS.iterdir() if one.name.endswith(".js")} == set(SCRIPTS)


def test_figures_stand_at_their_place():
    report = example_report(3, 3, "merged")
    data = embedded(report)
    labels = [data["models"][number]["label"] for number in data["changed"]]
    cells = [tuple(cell) for cell in data["cells"]]
    layers = [one["key"] for one in data["layers"]]
    seen = 0
    for row in report.changes.cells:
        place = cells.index((layers.index(row.scope.layer), data["components"].index(row.scope.component)))
        found = data["changes"]["cells"]["relative"][labels.index(row.model)][place]
        assert found == pytest.approx(row.relative, rel=1e-3)
        seen += 1
    assert seen == len(cells) * len(labels) > 0
    pairs = [(data["models"][a]["label"], data["models"][b]["label"]) for a, b in data["pairs"]]
    for row in report.overlaps.layers:
        number = pairs.index((row.first, row.second)) * 3 + data["tops"].index(row.top)
        found = data["overlaps"]["layers"]["overlap"][number][layers.index(row.scope.layer)]
        assert found == pytest.approx(row.overlap, rel=1e-3)
    for row in report.composition.layers:
        found = [one[layers.index(row.scope.layer)] for one in data["composition"]["layers"]["coefficient"]]
        assert found == pytest.approx(row.coefficients, rel=1e-3)
    for row in report.agreements.tensors:
        place = data["tensors"]["names"].index(row.scope.tensor)
        found = data["agreements"]["tensors"]["sameSign"][pairs.index((row.first, row.second))][place]
        assert found == pytest.approx(row.same_sign, rel=1e-3)


def test_what_is_missing_is_null():
    report = example_report(1, 2)
    data = embedded(report)
    norms = [number for number, (_, part) in enumerate(data["cells"]) if data["components"][part] == "norm"]
    assert norms
    assert all(data["agreements"]["cells"]["cosine"][0][number] is None for number in norms)
    nothing = replace(report.changes.total[0], relative=None, scope=Scope())
    data = embedded(replace(report, changes=Scoped(total=(nothing,))))
    assert "relative" not in data["changes"]["total"]


def test_figures_of_pairs_are_left_out_where_there_are_too_many(monkeypatch):
    report = example_report(2, 3)
    monkeypatch.setattr("weightsmith.report.embedded.MOST_PAIR_VALUES", 10)
    data = embedded(report)
    assert data["pairTensorsLeftOut"]
    assert "tensors" not in data["agreements"]
    assert "tensors" in data["changes"]
    assert MOST_PAIR_VALUES >= 10_000 * 6


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (math.nan, None),
        (math.inf, None),
        (0.0, 0),
        (1.0, 1),
        (0.999984, 0.99998),
        (-0.123456789, -0.12346),
        (0.000123456, 0.0001235),
        (123456.7, 123500),
        (1e-300, 1e-300),
    ],
)
def test_numbers_keep_the_digits_that_are_shown(value, expected):
    assert rounded(value) == expected
    assert isinstance(rounded(value), type(expected))
