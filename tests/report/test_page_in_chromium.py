"""The page in a real browser: it draws, sorts, filters, saves, follows themes, and complains about nothing."""

import csv
import io
import itertools
import math
import statistics
import time
from dataclasses import replace

import pytest

from tests.report.browser import CHROMIUM, NO_CHROMIUM, browser
from tests.report.example import example_report
from weightsmith.report.findings import (
    BaseTest,
    Figure,
    Finding,
    Health,
    Layer,
    Overlap,
    Scope,
    Scoped,
    TensorFacts,
)
from weightsmith.report.page import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

ALL_DRAWN = "for (const one of document.querySelectorAll('figure')) one.dispatchEvent(new Event('insight'))"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
# Its lines are longer than a telephone is wide.
ACTION = f"models:\n- {{model: {'long/' * 20}}}\nsteps: []"
FORMULA = '=HYPERLINK("http://example.org","x")'


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def page(chromium):
    return chromium.page()


@pytest.fixture
def show(page, tmp_path):
    """Write the page of a report and open it, wide and light."""

    def open_page(report, width=1280, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(write_page(report), "utf-8")
        page.size(width)
        page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        page.open(file)
        page.run(ALL_DRAWN)
        return page

    return open_page


@pytest.fixture
def saved(chromium, tmp_path):
    """Wait for a file that the page hands over."""
    folder = tmp_path / "saved"
    folder.mkdir()
    chromium.downloads(folder)

    def wait(name):
        end = time.monotonic() + 20
        while not (folder / name).is_file():
            assert time.monotonic() < end, f"{name} was not saved"
            chromium.send("Browser.getVersion")
            time.sleep(0.02)
        return (folder / name).read_bytes()

    return wait


def advised(report):
    """The report with findings of all levels."""
    findings = tuple(
        Finding(level, level, f"A {level}", "Do `this`.", (Figure("x", 0.5, "share"),), action=ACTION)
        for level in ("error", "warning", "note", "good")
    )
    tests = tuple(BaseTest(one.label, True, 0.5, (Figure("distance", 0.1),)) for one in report.models)
    return replace(report, advice=findings, findings=findings[:1], base_tests=tests)


def sections(page):
    return page.run("[...document.querySelectorAll('main > section')].map((one) => one.id)")


def choose(page, field, value):
    page.run(
        f"(() => {{ const one = document.getElementById('{field}'); one.value = '{value}';"
        "one.dispatchEvent(new Event(one.tagName === 'INPUT' ? 'input' : 'change')); })()"
    )


def column(page, table, number):
    return page.run(
        f"[...document.querySelectorAll('{table} tbody tr:not(.gap)')].map((row) => row.cells[{number}].textContent)"
    )


def numbers(texts):
    return [float(text.replace("\u2212", "-").replace(",", "")) for text in texts]


def rows(content):
    return list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def test_merged_report_draws_all_sections_and_asks_for_nothing(show):
    page = show(advised(example_report(4, 3, "merged")))
    assert sections(page) == [
        "summary",
        "recipe",
        "composition",
        "task-vectors",
        "between-models",
        "spectra",
        "distribution",
        "subspaces",
        "health",
        "vocabularies",
        "tensors",
        "about",
    ]
    cells = len({(one.layer, one.component) for one in example_report(4, 3).tensors})
    drawn = page.run(
        "[...document.querySelectorAll('#task-vectors-by-layer .panels svg')]"
        ".map((one) => one.querySelectorAll('g[aria-label=cell] rect').length)"
    )
    assert drawn == [cells] * 4
    empty = (
        "[...document.querySelectorAll('figure')].filter((one) => !one.querySelector('svg[role=application]')).length"
    )
    assert page.run(empty) == 0
    assert page.complaints == []
    assert all(one.startswith(("data:", "file:")) for one in page.requests)
    assert sum(one.startswith("file:") for one in page.requests) == 1


def _without_figures(report):
    return replace(
        report,
        changes=Scoped(),
        agreements=Scoped(),
        conflicts=Scoped(),
        overlaps=Scoped(),
        subspaces=(),
        spectra=(),
        histograms=Scoped(),
        health=Health(),
        sampling=(),
        timings=(),
        notes=(),
    )


def _nothing_moved(report):
    """All models are the base's twins: no cosine, no spectrum, no bins."""

    def blank(scoped, **values):
        kinds = ("total", "components", "layers", "cells", "tensors")
        return Scoped(**{kind: tuple(replace(row, **values) for row in getattr(scoped, kind)) for kind in kinds})

    bins = (0.0,) * 36
    return replace(
        report,
        changes=blank(report.changes, delta_norm=0.0, relative=0.0, changed=0.0, largest=0.0, mass=0.0, against=None),
        agreements=blank(report.agreements, cosine=None, both_moved=0.0, same_sign=None, conflict=None, distance=0.0),
        conflicts=blank(report.conflicts, share=None, contested=None),
        overlaps=blank(report.overlaps, overlap=None, chance=None),
        histograms=blank(report.histograms, zero=1.0, positive=bins, negative=bins, kurtosis=None),
        spectra=tuple(replace(one, values=(0.0,) * len(one.values)) for one in report.spectra),
    )


def _two_stacks(report):
    names = ("encoder.layers", "decoder.layers")
    layers = tuple(Layer(f"{name}.{index}", "layer", name, index) for name in names for index in range(2))
    keys = dict(zip([one.key for one in report.layers[1:5]], [one.key for one in layers], strict=True))

    def renamed(row):
        return replace(row, scope=replace(row.scope, layer=keys.get(row.scope.layer, row.scope.layer)))

    changes = report.changes
    return replace(
        report,
        layers=(report.layers[0], *layers, report.layers[-1]),
        tensors=tuple(replace(one, layer=keys.get(one.layer, one.layer)) for one in report.tensors),
        changes=replace(changes, layers=tuple(map(renamed, changes.layers)), cells=tuple(map(renamed, changes.cells))),
    )


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (example_report(2, 1), {"task-vectors", "spectra"}),
        (example_report(2, 2, "recipe"), {"recipe", "between-models"}),
        (example_report(1, 8), {"between-models"}),
        (example_report(100, 2), {"between-models"}),
        (replace(example_report(2, 2), base_named=False, exact=True, sampling=()), {"task-vectors"}),
        (_nothing_moved(example_report(2, 3)), {"task-vectors", "between-models"}),
        (_two_stacks(example_report(4, 2)), {"task-vectors"}),
    ],
    ids=["one-model", "recipe", "eight-models", "hundred-layers", "no-base-named", "nothing-moved", "two-stacks"],
)
def test_reports_of_all_kinds_are_drawn_without_complaint(show, report, expected):
    page = show(report)
    assert expected <= set(sections(page))
    assert "composition" not in sections(page)
    assert page.complaints == []


def test_advice_is_given_in_order_with_its_figures_and_what_to_type(show):
    page = show(advised(example_report(1, 1)))
    said = "[...document.querySelectorAll('#summary .findings')[0].children].map((one) => one.querySelector('{}').textContent)"
    assert page.run(said.format(".level")) == ["\u2715Problem", "!Warning", "iNote", "\u2713Good"]
    assert page.run(said.format("h4")) == ["A error", "A warning", "A note", "A good"]
    assert page.run(said.format("code")) == ["this"] * 4
    assert page.run(said.format("dl")) == ["x50.00\u202f%"] * 4
    assert page.run(said.format("pre")) == [ACTION] * 4
    page.run("document.querySelector('.finding .copy').click()")
    page.wait("document.querySelector('.copy').textContent === 'Copied' || `${getSelection()}`.includes('steps: []')")


def test_sections_without_data_are_absent(show):
    page = show(_without_figures(example_report(2, 0)))
    assert sections(page) == ["summary", "vocabularies", "tensors", "about"]
    page = show(replace(_without_figures(example_report(2, 2)), tensors=()))
    assert sections(page) == ["summary", "vocabularies", "about"]
    assert page.complaints == []


def test_every_choice_of_every_figure_is_drawn(show):
    page = show(example_report(2, 3, "merged"))
    tried = page.run(
        """(() => {
          let tried = 0;
          for (const figure of document.querySelectorAll("figure")) {
            for (const id of [...figure.querySelectorAll("select")].map((one) => one.id)) {
              const field = document.getElementById(id);
              for (const option of [...field.options]) {
                field.value = option.value;
                field.dispatchEvent(new Event("change"));
                if (!figure.querySelector("svg[role=application], .plots .quiet")) throw new Error(`${id} ${option.value}`);
                tried++;
              }
              field.value = field.options[0].value;
              field.dispatchEvent(new Event("change"));
            }
            for (const box of [...figure.querySelectorAll("input[type=checkbox]")]) box.click();
            if (figure.querySelector("fieldset") && !figure.querySelector(".plots .quiet")) throw new Error(`${figure.id} none`);
          }
          return tried;
        })()"""
    )
    assert tried > 80
    assert page.complaints == []


def test_heads_sort_by_click_and_by_enter(show):
    report = example_report(3, 2)
    page = show(report)
    assert column(page, "#tensors table", 0) == [one.name for one in report.tensors]
    page.run("document.querySelectorAll('#tensors th button')[4].click()")
    values = numbers(column(page, "#tensors table", 4))
    assert values == sorted(values, reverse=True)
    expected = {one.scope.tensor: one.relative for one in report.changes.tensors if one.model == "math"}
    assert values == pytest.approx(sorted((100 * one for one in expected.values()), reverse=True), abs=0.006)
    assert page.run("document.querySelectorAll('#tensors th')[4].getAttribute('aria-sort')") == "descending"
    # The head keeps the focus, so Enter turns the order round.
    page.key("Enter", 13, "\r")
    assert numbers(column(page, "#tensors table", 4)) == values[::-1]
    assert page.run("document.querySelectorAll('#tensors th')[4].getAttribute('aria-sort')") == "ascending"
    page.run("document.querySelectorAll('#tensors th button')[0].click()")
    assert column(page, "#tensors table", 0)[1:3] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
    ]


def test_what_is_missing_comes_last_in_either_order(show):
    report = example_report(2, 2)
    rows = [replace(row, cosine=None) if row.scope.component == "norm" else row for row in report.agreements.tensors]
    page = show(replace(report, agreements=replace(report.agreements, tensors=tuple(rows))))
    choose(page, "tensor-measure", "agreements.cosine")
    missing = sum(row.cosine is None for row in rows)
    for sign in (-1, 1):
        page.run("document.querySelectorAll('#tensors th button')[4].click()")
        shown = column(page, "#tensors table", 4)
        assert shown[-missing:] == ["\u2014"] * missing
        values = numbers(shown[:-missing])
        assert values == sorted(values, key=lambda value, sign=sign: sign * value)


def _by_mean(values, sign=-1):
    """Keys of lists of values by their means, the largest first; keys of nothing last, as they came."""
    return sorted(values, key=lambda key: sign * statistics.fmean(values[key]) if values[key] else math.inf)


def _ticks(page, plot, axis):
    return page.run(
        f"[...document.querySelectorAll('{plot}')].map((one) => "
        f"[...one.querySelectorAll('g[aria-label=\"{axis}-axis tick label\"] text')].map((text) => text.textContent))"
    )


@pytest.mark.parametrize("by", ["components", "layers", "both"])
def test_heat_maps_are_all_ordered_by_the_mean_over_those_shown(show, saved, by):
    report = example_report(5, 3)
    # One model outweighs the others, so its own order would be another.
    cells = tuple(
        replace(
            one, relative=None if one.scope.component == "norm" else one.relative * (10 if one.model == "code" else 1)
        )
        for one in report.changes.cells
    )
    page = show(replace(report, changes=replace(report.changes, cells=cells)))
    maps = "#task-vectors-by-layer .panels svg"
    names = {one.key: one.key.rsplit(".")[-1] for one in report.layers}
    parts = [one for one in report.components if one != "norm"]
    assert _ticks(page, maps, "x") == [list(names.values())] * 3
    assert _ticks(page, maps, "y") == [[one.replace("_", " ") for one in parts]] * 3

    page.run("document.querySelector('#task-vectors-by-layer-models input').click()")
    choose(page, "task-vectors-by-layer-order", by)
    shown = [one for one in cells if one.model != "math" and one.relative is not None]
    layers = {key: [one.relative for one in shown if one.scope.layer == key] for key in names}
    components = {key: [one.relative for one in shown if one.scope.component == key] for key in parts}
    across = list(names) if by == "components" else _by_mean(layers)
    down = parts if by == "layers" else _by_mean(components)
    assert (across, down) != (list(names), parts)
    assert _ticks(page, maps, "x") == [[names[one] for one in across]] * 2
    assert _ticks(page, maps, "y") == [[one.replace("_", " ") for one in down]] * 2

    # The first that is read aloud is the cell at the upper left, and the table has the order of the maps.
    known = {(one.scope.layer, one.scope.component): one.relative for one in shown if one.model == "code"}
    expected = [(layer, part) for layer in across for part in (*down, "norm") if (layer, part) in known]
    page.run(f"document.querySelectorAll('{maps}')[0].focus()")
    page.key("ArrowRight", 39)
    said = page.run("document.querySelector('[role=status][aria-live]').textContent")
    assert f" {names[expected[0][0]]}" in said
    assert said.endswith(f"{100 * known[expected[0]]:.2f}\u202f%")
    page.run("document.querySelector('#task-vectors-by-layer .actions button:nth-child(3)').click()")
    found = [row for row in rows(saved("task-vectors-by-layer.csv"))[1:] if row[1] != "norm"]
    assert [(row[0], row[1].replace(" ", "_")) for row in found] == expected
    assert [float(row[2]) for row in found] == pytest.approx([known[one] for one in expected], rel=1e-3)
    assert page.complaints == []


def test_layers_by_value_are_named_where_there_is_room(show):
    page = show(example_report(60, 1), width=390)
    choose(page, "task-vectors-by-layer-order", "layers")
    gaps = page.run(
        """(() => {
          const axis = '#task-vectors-by-layer .panels g[aria-label="x-axis tick label"] text';
          const boxes = [...document.querySelectorAll(axis)].map((one) => one.getBoundingClientRect());
          return boxes.slice(1).map((one, number) => one.left - boxes[number].right);
        })()"""
    )
    assert len(gaps) > 15
    assert min(gaps) > 0
    # A number says which layer it is only with the name of its stack, where there are two.
    page = show(_two_stacks(example_report(4, 2)))
    choose(page, "task-vectors-by-layer-order", "layers")
    ticks = _ticks(page, "#task-vectors-by-layer .panels svg", "x")[0]
    assert any(one.startswith(("encoder.layers ", "decoder.layers ")) for one in ticks)
    assert not any(one.isdigit() for one in ticks)


@pytest.mark.parametrize(("measure", "sign"), [("cosine", -1), ("distance", 1)])
def test_models_of_a_matrix_stand_with_the_most_alike_first(show, measure, sign):
    report = example_report(2, 5)
    page = show(report)
    choose(page, "agreement-measure", measure)
    labels = [one.label for one in report.models]
    assert _ticks(page, "#agreement .panel svg", "y") == [labels]
    choose(page, "agreement-order", "alike")
    known = {frozenset((one.first, one.second)): getattr(one, measure) for one in report.agreements.total}
    order = _by_mean({label: [value for pair, value in known.items() if label in pair] for label in labels}, sign)
    assert order != labels
    assert _ticks(page, "#agreement .panel svg", "x") == _ticks(page, "#agreement .panel svg", "y") == [order]
    # The rows of the table are the matrix above its diagonal.
    page.run("document.querySelector('#agreement .actions button').click()")
    pairs = list(zip(column(page, "#agreement .twin table", 0), column(page, "#agreement .twin table", 1), strict=True))
    assert pairs == list(itertools.combinations(order, 2))
    cosines = dict(zip(pairs, numbers(column(page, "#agreement .twin table", 2)), strict=True))
    expected = {(one.first, one.second): one.cosine for one in report.agreements.total}
    for pair, cosine in cosines.items():
        assert cosine == pytest.approx(expected.get(pair, expected.get(pair[::-1])), abs=6e-4)
    assert page.complaints == []


def test_matrices_are_ordered_by_the_overlap_of_their_subspaces(show):
    report = example_report(3, 3)
    page = show(report)
    names = _ticks(page, "#subspace-overlap .panel svg", "y")[0]
    tensors = dict(zip(dict.fromkeys(one.tensor for one in report.subspaces), names, strict=True))
    choose(page, "subspace-overlap-order", "value")
    left = {tensor: [one.left for one in report.subspaces if one.tensor == tensor] for tensor in tensors}
    expected = [tensors[one] for one in _by_mean(left)]
    assert _ticks(page, "#subspace-overlap .panel svg", "y") == [expected] != [names]
    page.run("document.querySelector('#subspace-overlap .actions button').click()")
    assert list(dict.fromkeys(column(page, "#subspace-overlap .twin table", 0))) == expected
    assert page.complaints == []


def test_distribution_has_what_grew_above_and_what_fell_below_its_axis(show):
    page = show(example_report(2, 1))
    ends = page.run(
        "[...document.querySelectorAll('#histogram g[aria-label=line] path')].map((one) => one.getBBox())"
        ".map(({ y, height }) => [y, y + height])"
    )
    (grew, grew_end), (fell, fell_end) = ends
    assert grew < grew_end <= fell + 1 < fell_end
    # Half of the entries each.
    assert grew_end - grew == pytest.approx(fell_end - fell, rel=0.05)


def test_tensors_are_filtered_and_what_is_shown_is_saved(show, saved):
    report = example_report(3, 2)
    page = show(report)
    choose(page, "tensor-filter", "PROJ layers.1")
    expected = [one.name for one in report.tensors if "proj" in one.name and "layers.1" in one.name]
    assert column(page, "#tensors table", 0) == expected
    assert (
        page.run("document.getElementById('tensor-count').textContent")
        == f"{len(expected)} of {len(report.tensors)} tensors"
    )
    choose(page, "tensor-component", str(report.components.index("attention_q")))
    choose(page, "tensor-measure", "agreements.cosine")
    page.run("document.querySelector('#tensors .actions button').click()")
    head, row = rows(saved("tensors.csv"))
    assert head == ["Tensor", "Component", "Shape", "Entries", "math – code"]
    assert row[:4] == ["model.layers.1.self_attn.q_proj.weight", "attention q", "64 × 64", "4096"]
    found = next(one.cosine for one in report.agreements.tensors if one.scope.tensor == row[0])
    assert float(row[4]) == pytest.approx(found, rel=1e-3)


def test_values_show_under_the_pointer_and_by_arrow_keys(show):
    report = example_report(3, 2)
    page = show(report)
    page.run("document.querySelector('#task-vectors-by-layer').scrollIntoView()")
    place = page.run(
        """(() => {
          const cells = document.querySelectorAll("#task-vectors-by-layer .panels svg g[aria-label=cell] rect");
          const box = cells[6].getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
    )
    # The page has scrolled, which hides what was shown.
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.point(*place)
    page.wait("!document.getElementById('tooltip').hidden")
    data_cells = list(dict.fromkeys((one.layer, one.component) for one in report.tensors))
    layer, component = data_cells[6]
    value = next(
        one.relative
        for one in report.changes.cells
        if (one.scope.layer, one.scope.component, one.model) == (layer, component, "math")
    )
    said = page.run("[...document.getElementById('tooltip').children].map((one) => one.textContent)")
    assert said == [
        "math",
        f"layer {layer.rsplit('.')[-1]}, {component.replace('_', ' ')}",
        f"relative norm: {100 * value:.2f}\u202f%",
    ]
    page.run("document.querySelector('#task-vectors-by-layer .panels svg').focus()")
    page.key("ArrowRight", 39)
    page.key("ArrowRight", 39)
    first = page.run("document.querySelector('[role=status][aria-live]').textContent")
    assert first.startswith("math, ")
    page.key("ArrowDown", 40)
    assert page.run("document.querySelector('[role=status][aria-live]').textContent") != first
    page.key("Escape", 27)
    assert page.run("document.getElementById('tooltip').hidden")
    assert page.complaints == []


def test_plot_has_a_table_twin_one_key_away(show, saved):
    report = example_report(2, 3)
    page = show(report)
    page.run("document.querySelector('#agreement svg[role=application]').focus()")
    page.key("t", 84, "t")
    twin = "#agreement .twin table"
    assert column(page, twin, 0) == ["math", "math", "code"]
    cosines = [one.cosine for one in report.agreements.total]
    assert numbers(column(page, twin, 2)) == pytest.approx(cosines, abs=6e-4)
    assert page.run("document.querySelector('#agreement .plots').offsetParent === null")
    page.run("document.querySelector('#agreement .actions button:nth-child(3)').click()")
    content = rows(saved("agreement.csv"))
    assert [float(row[2]) for row in content[1:]] == pytest.approx(cosines, abs=1e-5)
    page.key("t", 84, "t")
    assert page.run("document.querySelector('#agreement .plots').offsetParent !== null")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_png_shows_the_plot_in_the_colours_of_the_page(show, saved, scheme):
    from PIL import Image

    page = show(example_report(3, 2), scheme=scheme)
    page.run("document.querySelector('#task-vectors-by-layer .actions button:nth-child(2)').click()")
    picture = Image.open(io.BytesIO(saved("task-vectors-by-layer.png")))
    picture.load()
    assert picture.format == "PNG"
    box = page.run(
        "(() => { const { width } = document.querySelector('#task-vectors-by-layer .panels').getBoundingClientRect(); return width; })()"
    )
    assert 480 <= picture.width / 2 <= box + 40
    colours = {colour: count for count, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    ground = max(colours, key=colours.get)
    assert ground == ((255, 255, 255) if scheme == "light" else (0x14, 0x17, 0x1A))
    # Cells, the ramp and letters: not a blank.
    assert sum(count > 500 for count in colours.values()) > 20
    assert colours[ground] < 0.95 * picture.width * picture.height
    cell = page.run("getComputedStyle(document.querySelector('#task-vectors-by-layer g[aria-label=cell] rect')).fill")
    assert tuple(int(part) for part in cell[4:-1].split(",")) in colours
    assert page.complaints == []


CONTRASTS = """(() => {
  const part = (one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * part(r / 255) + 0.7152 * part(g / 255) + 0.0722 * part(b / 255);
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const found = rgb(getComputedStyle(at).backgroundColor);
      if (found.length === 3 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const poor = [];
  let [seen, inCells] = [0, 0];
  for (const one of document.querySelectorAll("body *")) {
    const svg = one.namespaceURI.endsWith("svg");
    if (svg ? one.tagName !== "text" : ![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    if (!one.getClientRects().length) continue;
    const style = getComputedStyle(one);
    const colour = svg && style.fill !== "none" ? style.fill : style.color;
    // A number in a cell stands on the cell of its rank.
    const cells = svg && one.closest("g[aria-label=text]") ? one.ownerSVGElement.querySelectorAll("g[aria-label=cell] rect") : [];
    const cell = cells[[...one.parentElement.children].indexOf(one)];
    const under = cell ? rgb(getComputedStyle(cell).fill) : ground(svg ? one.ownerSVGElement.parentElement : one);
    if (cell) inCells++;
    const [ink, paper] = [light(rgb(colour)), light(under)];
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    seen++;
    if (contrast < 4.5) poor.push(`${one.tagName}.${one.className} ${one.textContent.slice(0, 30)} ${contrast.toFixed(2)}`);
  }
  for (const one of document.querySelectorAll("g[aria-label=dot][stroke] path, g[aria-label=line][stroke] path")) {
    const style = getComputedStyle(one);
    if (style.stroke === "none") throw new Error("a mark without a stroke");
    const [ink, paper] = [light(rgb(style.stroke)), light(ground(document.body))];
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    seen++;
    if (contrast < 3) poor.push(`line ${style.stroke} ${contrast.toFixed(2)}`);
  }
  return [seen, inCells, [...new Set(poor)]];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_and_lines_have_contrast(show, scheme):
    # Eight models: all colours of lines.
    page = show(advised(example_report(2, 8, "merged")), scheme=scheme)
    for figure in ("agreement-by-layer", "overlap"):
        page.run(f"for (const one of document.querySelectorAll('#{figure} fieldset input:not(:checked)')) one.click()")
    seen, in_cells, poor = page.run(CONTRASTS)
    assert poor == []
    assert seen > 500
    assert in_cells == 8 * 7


def test_no_two_lines_that_are_shown_look_the_same(show):
    page = show(example_report(1, 8))
    looks = """(() => {
      const marks = document.querySelectorAll("#agreement-by-layer .entry svg");
      return [...marks].map((one) => {
        const dot = one.querySelector("g[aria-label=dot]");
        return dot.getAttribute("stroke") + dot.querySelector("path, circle").outerHTML.replace(/ style=.*/, "");
      });
    })()"""
    first = "document.querySelectorAll('#agreement-by-layer fieldset input')[{}].click()"
    page.run(first.format(0))
    page.run(first.format(8))
    some = page.run(looks)
    assert len(set(some)) == 6
    page.run(
        "for (const one of document.querySelectorAll('#agreement-by-layer fieldset input:not(:checked)')) one.click()"
    )
    every = page.run(looks)
    assert len(set(every)) == len(every) == 28


def test_theme_follows_the_system_until_one_is_chosen(show):
    page = show(example_report(2, 2), scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    cell = "getComputedStyle(document.querySelector('#agreement g[aria-label=cell] rect')).fill"
    assert page.run(ground) == "rgb(20, 23, 26)"
    dark = page.run(cell)
    choose(page, "theme", "light")
    assert page.run(ground) == "rgb(255, 255, 255)"
    assert page.run(cell) != dark
    choose(page, "theme", "system")
    assert page.run(ground) == "rgb(20, 23, 26)"
    page.media(prefers_color_scheme="light")
    page.wait(f"{ground} === 'rgb(255, 255, 255)'")
    # Figures are drawn anew when the page comes to it.
    page.wait(f"{cell} !== {dark!r}")


def test_paper_is_white_and_all_plots_are_on_it(show):
    report = example_report(2, 2)
    page = show(report, scheme="dark")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('figure.undrawn').length") == 0
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    line = "getComputedStyle(document.querySelector('#agreement-by-layer g[aria-label=line]')).stroke"
    assert page.run(line) == "rgb(15, 98, 176)"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert page.run(line) == "rgb(108, 176, 255)"
    assert page.complaints == []


def test_figures_out_of_sight_are_drawn_when_they_come_near(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(write_page(example_report(2, 2)), "utf-8")
    page.size(1280)
    page.open(file)
    last = "document.getElementById('subspace-overlap')"
    assert page.run(f"{last}.classList.contains('undrawn')")
    page.run(f"{last}.scrollIntoView()")
    page.wait(f"{last}.querySelector('svg[role=application]') !== null")


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_window_and_its_letters_are_readable(show, width):
    page = show(advised(example_report(32, 4, "merged")), width)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    small = page.run(
        """[...document.querySelectorAll("body *")].filter((one) => one.getClientRects().length
          && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
          && !one.closest(".mark") && parseFloat(getComputedStyle(one).fontSize) < 12).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert small == []
    # What is wider scrolls within its own box.
    wide = page.run(
        """[...document.querySelectorAll("main *")].filter((one) => one.getBoundingClientRect().right > innerWidth + 1
          && !one.closest(".scroll, pre")).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert wide == []
    assert page.complaints == []


def test_names_of_strangers_are_text_and_no_formulas(show, saved):
    report = example_report(2, 2)
    first = report.tensors[0]
    hostile = TensorFacts(HOSTILE, first.layer, first.component, first.shape, first.dtypes)
    formula = TensorFacts(FORMULA, first.layer, first.component, first.shape, first.dtypes)
    model = replace(report.models[0], reference=HOSTILE)
    finding = Finding(
        "code", "note", HOSTILE, HOSTILE, (Figure(HOSTILE, 1.0, HOSTILE),), (HOSTILE,), Scope(tensor=HOSTILE)
    )
    page = show(
        replace(
            report,
            models=(model, report.models[1]),
            tensors=(hostile, formula, *report.tensors[2:]),
            advice=(finding,),
            notes=(HOSTILE,),
        )
    )
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.title").startswith("weightsmith report")
    assert column(page, "#tensors table", 0)[:2] == [HOSTILE, FORMULA]
    assert page.run("document.querySelector('.finding h4').textContent") == HOSTILE
    page.run("document.querySelector('#tensors .actions button').click()")
    content = rows(saved("tensors.csv"))
    assert content[1][0] == HOSTILE
    assert content[2][0] == f"'{FORMULA}"
    assert page.complaints == []


def test_cells_of_csv_are_quoted_where_a_spreadsheet_would_compute(show, saved):
    computed = ("=1+1", "+a", "-a", "@a", "\t=a", "\r=a", " =a")
    plain = ('a"b', "a,b\nc", "a=b", "a-b")
    report = example_report(2, 1)
    names = (*computed, *plain)
    tensors = tuple(replace(one, name=name) for one, name in zip(report.tensors, names, strict=False))
    page = show(replace(report, tensors=tensors))
    page.run("document.querySelector('#tensors .actions button').click()")
    saved_names = [row[0] for row in rows(saved("tensors.csv"))[1:]]
    assert saved_names == [*(f"'{one}" for one in computed), *plain]


def test_policy_stops_scripts_and_connections(show):
    page = show(example_report(1, 1))
    page.run(
        "(() => { const one = document.createElement('script'); one.text = 'window.owned = 1'; document.body.append(one); })()"
    )
    assert page.run("typeof window.owned") == "undefined"
    assert page.run("(() => { try { return eval('1'); } catch { return 'stopped'; } })()") == "stopped"
    assert page.run("fetch('http://127.0.0.1:9/').then(() => 'went', () => 'stopped')") == "stopped"
    refused = [one for one in page.complaints if "Content Security Policy" in one]
    assert len(refused) >= 2
    page.complaints.clear()


def test_ten_thousand_tensors_open_fast_and_only_those_in_sight_are_drawn(page, tmp_path):
    report = example_report(1, 4)
    one = report.tensors[1]
    many = tuple(replace(one, name=f"model.layers.0.part_{number}.weight") for number in range(10_000))
    by_model = {row.model: row for row in report.changes.tensors}
    rows = tuple(
        replace(row, scope=Scope(one.layer, one.component, tensor.name), relative=number / 10_000)
        for number, tensor in enumerate(many)
        for row in by_model.values()
    )
    file = tmp_path / "report.html"
    text = write_page(replace(report, tensors=many, changes=replace(report.changes, tensors=rows)))
    file.write_text(text, "utf-8")
    page.size(1280)
    page.open(file)
    # A second on an idle machine; tests share theirs.
    assert page.run("performance.getEntriesByType('navigation')[0].domComplete") < 5000
    assert page.run("document.querySelectorAll('#tensors tbody tr').length") < 80
    page.run("document.querySelectorAll('#tensors th button')[4].click()")
    assert column(page, "#tensors table", 0)[0] == "model.layers.0.part_9999.weight"
    page.run("document.querySelector('#tensors .tall').scrollTop = 1e9")
    page.wait(
        "[...document.querySelectorAll('#tensors tbody tr')].some((row) => row.textContent.includes('part_0.weight'))"
    )
    assert page.complaints == []


def test_overlap_has_its_chance_level_in_words(show):
    report = example_report(2, 2)
    overlap = Overlap(Scope(), "math", "code", 0.01, 0.5, 0.0123, (0.01, 0.01))
    page = show(replace(report, overlaps=replace(report.overlaps, total=(overlap,))))
    page.run("document.querySelector('#overlap .actions button').click()")
    assert column(page, "#overlap .twin table", 3)[0] == "1.23"


def test_chance_is_seen_where_no_line_can_be(show):
    """A line of one point is not drawn: what lies before and after the layers, or a single layer."""
    report = example_report(3, 2)
    page = show(report)
    values = [row for row in report.overlaps.layers if row.top == report.overlaps.total[0].top]
    alone = sum(row.chance is not None and row.scope.layer in ("before", "after") for row in values)
    assert alone
    # The values of the one pair are circles.
    assert page.run("document.querySelectorAll('#overlap-by-layer [aria-label=dot] path').length") == alone


def test_names_turn_no_writing_round_and_hide_nothing(show):
    report = example_report(1, 1)
    page = show(replace(report, notes=("a\u202eb \x1b c\u200bd \ud800 ä\n漢 👩",)))
    found = page.run("document.querySelector('#notes li').textContent")
    assert found == r"a\u202eb \u001b c\u200bd \ud800 ä" + "\n漢 👩"


def test_a_mean_without_a_base_is_told_by_coefficients_of_all_its_models(show):
    report = replace(example_report(2, 2, "merged"), base_named=False)
    page = show(report)
    (total,) = report.composition.total
    labels = [report.base.label, *total.models]
    assert page.run("document.querySelector('h1').innerText").endswith(": " + ", ".join(labels))
    page.run("document.querySelector('#composition-by-layer .actions button').click()")
    heads = page.run(
        "[...document.querySelectorAll('#composition-by-layer .twin th')].map((one) => one.innerText.trim())"
    )
    assert [one.split()[0] for one in heads[1:]] == labels
    for row, cells in zip(report.composition.layers, range(len(report.composition.layers)), strict=True):
        found = [column(page, "#composition-by-layer .twin table", place)[cells] for place in (1, 2, 3)]
        expected = [1 - sum(row.coefficients), *row.coefficients]
        assert [float(one.replace("\u2212", "-")) for one in found] == pytest.approx(expected, abs=1e-3)
    assert column(page, "#composition .block table", 0)[:3] == labels
    assert page.complaints == []


def test_lines_of_noise_are_flat(show):
    report = example_report(4, 2)
    rows = tuple(replace(row, cosine=0.001 * (-1) ** number) for number, row in enumerate(report.agreements.layers))
    page = show(replace(report, agreements=replace(report.agreements, layers=rows)))
    ticks = page.run(
        "[...document.querySelectorAll('#agreement-by-layer [aria-label=\"y-axis tick label\"] text')].map((one) => one.textContent)"
    )
    assert max(float(one.replace("\u2212", "-")) for one in ticks) == 0.1


def test_notes_stand_before_all_figures(show):
    report = example_report(2, 0)
    note = "models/base cannot be opened any more"
    page = show(replace(report, kind="merged", notes=(note,)))
    assert page.run("document.querySelector('#summary #notes').innerText") == note
    assert page.run("document.querySelector('h1').innerText") == "A merge"


def test_keyboard_reaches_the_content_and_focus_is_seen(show):
    page = show(example_report(2, 2))
    page.run("document.body.focus()")
    page.key("Tab", 9)
    assert page.run("document.activeElement.textContent") == "Skip to the content"
    assert page.run("document.activeElement.getBoundingClientRect().left >= 0")
    page.key("Enter", 13, "\r")
    page.wait("document.activeElement.id === 'content'")
    page.key("Tab", 9)
    outline = "(({ outlineStyle, outlineWidth }) => `${outlineWidth} ${outlineStyle}`)(getComputedStyle(document.activeElement))"
    assert page.run(outline) == "2px solid"
    unnamed = page.run(
        """[...document.querySelectorAll("input, select, button, svg[tabindex], [role=region]")].filter((one) =>
          !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim())).map((one) => one.outerHTML.slice(0, 90))"""
    )
    assert unnamed == []


def test_motion_is_reduced_for_those_who_ask(show):
    page = show(example_report(1, 1))
    assert page.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.media(prefers_reduced_motion="no-preference")
    assert page.run("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"
