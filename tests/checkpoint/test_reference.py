"""The text by which a recipe names a model."""

from __future__ import annotations

import pytest

from weightsmith.checkpoint.reference import OnTop, Reference, parse_reference, with_adapters
from weightsmith.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models/a", Reference("models/a")),
        ("org/a@main", Reference("org/a", "main")),
        ("org/a+org/lora", Reference("org/a", None, (OnTop(Reference("org/lora")),))),
        ("org/a@v1+org/lora@v2", Reference("org/a", "v1", (OnTop(Reference("org/lora", "v2")),))),
        ("s3://bucket/a@b", Reference("s3://bucket/a@b")),
        ("bundles/a#maths", Reference("bundles/a", task="maths")),
        ("org/a@v1#maths", Reference("org/a", "v1", task="maths")),
        ("s3://bucket/a#maths", Reference("s3://bucket/a", task="maths")),
        ("s3://bucket/a#1/model", Reference("s3://bucket/a#1/model")),
        ("org/base@v2+bundles/a#maths", Reference("org/base", "v2", (OnTop(Reference("bundles/a", task="maths")),))),
        ("bundles/a#maths+lora", Reference("bundles/a", None, (OnTop(Reference("lora")),), "maths")),
        ("a+b+c", Reference("a", None, (OnTop(Reference("b")), OnTop(Reference("c"))))),
        ("a+0.5*b+-2*c@v", Reference("a", None, (OnTop(Reference("b"), 0.5), OnTop(Reference("c", "v"), -2.0)))),
        ("a+1e-05*b", Reference("a", None, (OnTop(Reference("b"), 1e-5),))),
    ],
)
def test_a_reference_is_read_and_written(text, expected):
    assert parse_reference(text) == expected
    assert str(expected) == text


def test_a_path_that_exists_is_taken_as_it_stands(tmp_path):
    for name in ("a+b", "a@b", "a@b@c", "a#b"):
        (tmp_path / name).mkdir()
        assert parse_reference(tmp_path / name) == Reference(str(tmp_path / name))
    assert parse_reference(f"{tmp_path}/a+b+lora") == Reference(f"{tmp_path}/a+b", None, (OnTop(Reference("lora")),))
    assert parse_reference(f"{tmp_path}/a#b#one") == Reference(f"{tmp_path}/a#b", task="one")
    (tmp_path / "c+d").mkdir()
    assert parse_reference(f"{tmp_path}/c+d#one") == Reference(f"{tmp_path}/c+d", task="one")
    assert parse_reference(f"{tmp_path}/c+d#one+lora") == Reference(
        f"{tmp_path}/c+d", None, (OnTop(Reference("lora")),), "one"
    )


def test_the_short_name_does_not_depend_on_the_folder(tmp_path, monkeypatch):
    (tmp_path / "maths").mkdir()
    assert parse_reference("models/maths").short_name == parse_reference("/else/where/maths/").short_name == "maths"
    monkeypatch.chdir(tmp_path / "maths")
    assert parse_reference(".").short_name == "maths"
    assert parse_reference("org/a@v1+x/lora").short_name == "a@v1+lora"
    assert parse_reference("org/a@v1#maths").short_name == "a@v1#maths"


@pytest.mark.parametrize(
    "text", ["", " ", "a+", "+a", "a@", "@a", "a@b@c", "a++b", "a+0.5*", "a+1e999*b", "a#", "#a", "a#b#c"]
)
def test_what_cannot_be_meant_is_refused(text):
    with pytest.raises(RecipeError):
        parse_reference(text)


def test_adapters_with_weights_make_a_reference_that_is_read_as_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x+y", "3*z"):
        (tmp_path / name).mkdir()
    text = with_adapters("base", [("lora", 1), ("x+y", 0.25), ("3*z", 1)])
    assert text == "base+lora+0.25*x+y+3*z"
    assert [one.reference.path for one in parse_reference(text).adapters] == ["lora", "x+y", "3*z"]
    for path in ("not+there", "2*gone"):
        with pytest.raises(RecipeError, match="give paths without"):
            with_adapters("base", [(path, 1)])
