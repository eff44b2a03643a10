"""The contract: what a function must look like to be a method, and where methods come from."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Literal

import pytest
from click.testing import CliRunner

from weightsmith.cli.main import cli
from weightsmith.errors import MethodError
from weightsmith.methods import registry
from weightsmith.methods.registry import Param, PerModel, get_method, load_plugin, method
from weightsmith.methods.settings import complete


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    registry.all_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_parameters_are_read_from_the_signature():
    @method(base="required")
    def sample(
        block,
        *,
        share: PerModel[Annotated[float, Param("a share", minimum=0, maximum=1)]],
        mode: Annotated[Literal["a", "b"], Param("a mode")] = "a",
        lambda_: float = 1.0,
        steps: Annotated[int, Param("steps", minimum=1, exclusive=True)] = 3,
    ):
        """One line.

        More.
        """

    found = get_method("sample")
    assert found.summary == "One line."
    assert list(found.parameters) == ["share", "mode", "lambda", "steps"]
    share, mode, _, steps = found.parameters.values()
    assert (share.per_model, share.required, share.range_text) == (True, True, "[0, 1]")
    assert (mode.choices, mode.default) == (("a", "b"), "a")
    assert share.check(1) == 1.0
    for parameter, value in ((share, 1.1), (share, True), (share, float("nan")), (mode, "c"), (steps, 1), (steps, 2.5)):
        with pytest.raises(MethodError, match=parameter.name):
            parameter.check(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: method()(eval("lambda block, *, x: block")), "has no type annotation"),
        (lambda: method("ties")(lambda block: block), "there is a method 'ties' already"),
    ],
)
def test_a_function_that_is_no_method_is_refused(make, message):
    with pytest.raises(MethodError, match=message):
        make()


def test_a_statistic_may_only_name_parameters_of_its_method():
    def statistic(scope, *, density):
        yield

    with pytest.raises(MethodError, match="names 'density'"):
        method("odd", statistic=statistic)(lambda block, found: block)


def test_the_least_number_of_models_may_depend_on_parameters():
    @method("some", minimum=2, least=lambda *, bad, lambda_: 3 * bad + lambda_)
    def some(block, *, bad: int = 1, lambda_: int = 0):
        return block.models[0]

    known = get_method("some")
    assert complete(known, {}, 3, has_base=False) == {"bad": 1, "lambda": 0}
    assert complete(known, {"bad": 0}, 2, has_base=False)
    with pytest.raises(MethodError, match="'some' takes at least 7 model.* with bad: 2, lambda: 1, and 6 are given"):
        complete(known, {"bad": 2, "lambda": 1}, 6, has_base=False)
    with pytest.raises(MethodError, match="the least number of models of 'odd' names 'good'"):
        method("odd", least=lambda *, good: good)(lambda block: block)


def test_roles_are_told_with_the_base_first_where_there_is_one():
    roles = ("what is changed", "the teacher", "pupils")
    method("with_base", base="required", minimum=2, roles=roles)(lambda block: block)
    method("without", minimum=2, roles=roles[1:])(lambda block: block)
    method("alike", base="required")(lambda block: block)
    in_order = "the models are, in this order, the teacher, pupils"
    assert get_method("with_base").order == f"base_model is what is changed; {in_order}"
    assert get_method("without").order == in_order
    assert get_method("alike").order == ""
    with pytest.raises(MethodError, match="takes at least 2 .* beside the base, and 1 are given; base_model is what"):
        complete(get_method("with_base"), {}, 1, has_base=True)
    page = CliRunner().invoke(cli, ["methods", "with_base"]).output
    assert f"Roles: base_model is what is changed; {in_order}" in page
    assert "path/to/model-1  # the teacher" in page
    assert "path/to/model-2  # pupils" in page


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("1 / 0", "failed while it was loaded: ZeroDivisionError"),
        ("x = 1", "defines no method"),
    ],
)
def test_a_plugin_that_is_none_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.py").write_text(content)
    with pytest.raises(MethodError, match=message):
        load_plugin(str(tmp_path / "p.py"))


def test_an_installed_package_brings_methods_by_its_entry_point(tmp_path):
    (tmp_path / "mypackage.py").write_text(
        "import weightsmith as ws\n@ws.method(minimum=1)\ndef brought(block):\n    '''Brought along.'''\n    return block.models[0]\n"
    )
    facts = tmp_path / "mypackage-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[weightsmith.methods]\nmine = mypackage\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom weightsmith.cli.main import main; main(sys.argv[1:])"
    )
    call = [sys.executable, "-c", script, "methods"]
    listed = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert "brought" in listed
    page = subprocess.run([*call, "brought"], capture_output=True, text=True, check=True).stdout
    assert "Brought along." in page
