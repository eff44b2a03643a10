import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.conftest import read_safetensors, write_safetensors
from tests.report.example import example_report
from weightsmith.cli.main import main
from weightsmith.cli.report_text import print_report
from weightsmith.report.advice import with_conclusions


def _text(report, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    print_report(report, Console(file=stream, width=width))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("kind", ["models", "recipe", "merged"])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_fit_the_terminal_and_end_without_blanks(kind, width):
    report = with_conclusions(example_report(layers=40, models=5, kind=kind))
    lines = _text(report, width).splitlines()
    # What is to be copied is not broken.
    copied = {f"      {line}" for one in (*report.findings, *report.advice) for line in one.action.splitlines()}
    assert all(len(line) <= width for line in lines if line not in copied)
    assert all(line == line.rstrip() for line in lines)
    assert copied <= set(lines)


def test_every_finding_and_every_label_is_there():
    report = with_conclusions(example_report(layers=12, models=8, kind="merged"))
    text = _text(report, 80)
    for one in (*report.findings, *report.advice):
        assert one.title in text
    for model in report.models:
        assert f"{model.label}: models/{model.label}-7b" in text
    for section in ("Models", "How much of each input", "Between task vectors", "Singular values", "Health", "Advice"):
        assert section in text


def test_numbers_are_those_of_the_report():
    report = example_report(layers=3, models=2)
    rows = tuple(replace(row, relative=0.0123, changed=0.5, cosine_base=-0.001) for row in report.changes.total)
    layers = tuple(
        replace(row, relative=(0.1, 0.3, 0.2)[int(row.scope.layer.split(".")[-1])])
        for row in report.changes.layers
        if row.scope.layer.startswith("model.layers")
    )
    changed = replace(report.changes, total=rows, layers=layers)
    text = _text(replace(report, changes=changed))
    line = next(line for line in text.splitlines() if "▁█" in line)
    assert line.split() == ["math", "1.2%", "50%", "0.00", "▁█▅", "10%", "(0)", "30%", "(1)"]


def test_no_colour_goes_into_a_pipe_and_any_encoding_will_do():
    report = with_conclusions(example_report(layers=12, models=8))
    assert "\x1b" not in _text(report)
    text = _text(report, encoding="ascii")
    assert "0" in text
    assert "▁" not in text


def test_names_of_strangers_move_no_cursor_and_are_no_markup():
    report = example_report(layers=2, models=1)
    bad = "[red]x\x1b[2J\nERROR"
    base = replace(report.base, label=bad, reference=bad)
    report = replace(report, notes=(bad,), base=base, components=(*report.components, bad))
    text = _text(with_conclusions(report), 120)
    assert "\x1b" not in text
    assert "[red]x\\x1b[2J\\nERROR" in text


def test_a_report_on_one_model_has_no_empty_sections():
    report = example_report(layers=2, models=0)
    text = _text(report)
    assert "Models" in text
    for absent in ("Between", "Singular", "Distribution", "Health", "Vocabularies", "Recipe", "Advice", "How "):
        assert absent not in text


def _with_chances(report, chances):
    found = [replace(row, chance=next(chances)) if row.top == 0.05 else row for row in report.overlaps.total]
    return replace(report, overlaps=replace(report.overlaps, total=tuple(found)))


def test_chance_is_told_of_all_pairs():
    """Models in a coarse dtype tie, so that more than 5% are among the top 5% of some."""
    report = example_report(layers=2, models=3)
    text = " ".join(_text(_with_chances(report, iter([0.075, 0.056, 0.06])), width=200).split())
    assert "that both have, by chance 5.6% to 7.5%" in text
    text = " ".join(_text(_with_chances(report, iter([0.05, 0.05, 0.0501])), width=200).split())
    assert "that both have, by chance 5.0% " in text + " "


def test_what_is_the_same_as_written_is_drawn_flat():
    report = example_report(layers=4, models=2)
    layers = tuple(replace(row, cosine=0.001 * number) for number, row in enumerate(report.agreements.layers))
    text = _text(replace(report, agreements=replace(report.agreements, layers=layers)), width=160)
    assert len(layers) >= 4
    (line,) = (line for line in text.splitlines() if " / " in line)
    assert "▁▁▁▁" in line


def test_a_mean_without_a_base_is_told_by_coefficients_of_all_its_models():
    report = replace(example_report(layers=3, models=2, kind="merged"), base_named=False)
    first, *others = (report.base.label, *report.composition.total[0].models)
    given = iter([(0.25, 0.45), (0.2, 0.4), (0.3, 0.5), (0.25, 0.45), (0.25, 0.45), (0.25, 0.45)])
    layers = tuple(replace(row, coefficients=next(given)) for row in report.composition.layers)
    total = tuple(replace(row, coefficients=(0.25, 0.45)) for row in report.composition.total)
    text = _text(replace(report, composition=replace(report.composition, total=total, layers=layers)), width=160)
    table = text[text.index("How much of each input") :].splitlines()[2:5]
    assert [line.split()[:2] for line in table] == [
        [label, share] for label, share in zip((first, *others), ("0.300", "0.250", "0.450"), strict=True)
    ]
    assert "0.20 (" in table[0]
    assert "0.40 (" in table[0]


def test_pairs_beyond_the_first_are_counted():
    text = _text(example_report(layers=2, models=8))
    assert "… and 13 pairs nearer to orthogonal" in text


def test_real_models_are_told_from_strangers(capsys, tmp_path):
    zoo = Path(__file__).parents[2] / "examples" / "zoo"
    # The same values in another order: as large as the model's, and nothing to do with them.
    draw = np.random.default_rng(0)
    stranger = {
        name: draw.permutation(array.reshape(-1)).reshape(array.shape)
        for name, array in read_safetensors(zoo / "mnist").items()
    }
    (tmp_path / "stranger").mkdir()
    write_safetensors(tmp_path / "stranger" / "model.safetensors", stranger)
    models = [zoo / "covered", tmp_path / "stranger", zoo / "fashion"]
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, models), "--base", str(zoo / "base"), "--text", "--quiet"])
    text = capsys.readouterr().out
    assert not ended.value.code
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "float16" in line.split()}
    assert rows == {"base": "base", "covered": "yes", "stranger": "NO", "fashion": "yes"}
    assert "ERROR  stranger has nothing to do with base" in text
    assert "ERROR  Leave stranger out" in text
    assert "GOOD  Task vectors can be summed" in text
