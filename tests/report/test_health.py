import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from tests.report.families import permuted, trained, tuned
from tests.report.plain import measured
from weightsmith.report.advice import with_conclusions
from weightsmith.report.findings import (
    Difference,
    DtypeShare,
    Health,
    RecipeFacts,
    Report,
    Rows,
    Scoped,
    TokenDifference,
)
from weightsmith.report.health import health
from weightsmith.report.wording import percent, times

EMBEDDINGS, MATRIX = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base():
    return trained(0)


def _health(base, tables=None, **models):
    return health(measured(base, models or {"a": tuned(base, 1), "b": tuned(base, 2)}, health=tables))


def _codes(found):
    return [one.code for one in found]


def test_sound_models_are_said_to_be(base):
    (found,) = _health(base)
    assert (found.code, found.level, found.figures[0].value) == ("healthy", "good", len(base))


def test_nan_and_infinity_are_counted(base):
    broken = tuned(base, 1)
    broken[MATRIX] = broken[MATRIX].copy()
    broken[MATRIX][0, :2] = np.nan
    broken[MATRIX][3, 4] = -np.inf
    (found,) = _health(base, a=broken, b=tuned(base, 2))
    assert (found.code, found.level, found.models) == ("nonfinite", "error", ("a",))
    assert [one.value for one in found.figures] == [2, 1]
    assert MATRIX in found.text


def test_models_of_another_base_are_one_finding(base):
    found = _health(base, a=tuned(base, 1), x=trained(5), y=trained(6))
    assert [(one.code, one.models) for one in found] == [("unrelated", ("x", "y"))]
    assert found[0].level == "error"


def test_units_in_another_order_are_said_to_be(base):
    (found,) = _health(base, a=permuted(tuned(base, 1, size=0.01), 3))
    assert found.code == "partly-unrelated"
    assert "another order" in found.text


def test_replaced_layers_are_named(base):
    other = {name: (trained(8) if ".mlp." in name else base)[name] for name in base}
    (found,) = _health(base, a=other)
    assert found.code == "partly-unrelated"
    assert "model.layers.0.mlp.up_proj.weight" in found.text
    assert "another order" not in found.text


def _apart(base, tables=None):
    """Return a report in which b has no tensor of the base."""
    report = measured(base, {"a": tuned(base, 1), "b": tuned(base, 2)}, health=tables)
    changes = Scoped(
        **{
            field.name: tuple(row for row in getattr(report.changes, field.name) if row.model != "b")
            for field in dataclasses.fields(Scoped)
        }
    )
    return replace(report, changes=changes, agreements=Scoped(), conflicts=Scoped(), overlaps=Scoped())


def test_a_model_with_none_of_the_tensors_is_said_to_have_none(base):
    report = _apart(base)
    (found,) = health(report)
    assert (found.code, found.level, found.models) == ("incomparable", "error", ("b",))
    assert with_conclusions(report).advice == ()


def test_a_far_model_is_said_to_be(base):
    (found,) = _health(base, a=tuned(base, 1, size=3.0))
    assert (found.code, found.level) == ("far", "warning")


def test_the_base_again_is_said_to_be(base):
    (found,) = _health(base, a=tuned(base, 1), again=dict(base), once_more=dict(base))[:1]
    assert (found.code, found.models) == ("unmoved", ("again",))
    # Two copies of the base are not said to be copies of each other too.
    assert _codes(_health(base, a=tuned(base, 1), again=dict(base), once_more=dict(base))) == ["unmoved", "unmoved"]


def test_copies_and_near_copies_are_found(base):
    a = tuned(base, 1)
    near = tuned(a, 7, size=0.001)
    found = _health(base, a=a, copy=dict(a), near=near, b=tuned(base, 2))
    assert {(one.code, one.models) for one in found} == {
        ("identical", ("a", "copy")),
        ("nearly-identical", ("a", "near")),
        ("nearly-identical", ("copy", "near")),
    }
    assert found[1].figures[1].value == pytest.approx(0.001 / 0.05, rel=0.05)


def test_another_vocabulary_is_named_with_the_way_out(base):
    tables = Health(tokens=(TokenDifference("a", 2, 0, 5, ("<x>",)), TokenDifference("b", 0, 0, 0, ())))
    (found,) = _health(base, tables)
    assert (found.code, found.models) == ("vocabulary", ("a",))
    assert found.action.startswith("weightsmith tokens models/base models/a\n")
    assert "rows of different tokens" in found.text


@pytest.mark.parametrize(("kind", "level"), [("missing", "warning"), ("shape", "warning"), ("extra", "note")])
def test_other_tensors_are_told(base, kind, level):
    found = _health(base, Health(differences=(Difference("a", "x.weight", kind, "[2]", "[3]"),)))
    assert (found[0].code, found[0].level) == ("tensors", level)
    assert "x.weight" in found[0].text
    assert bool(found[0].action) == (kind == "shape")


def _with_dtype(report, label, dtype):
    models = tuple(
        replace(one, dtypes=(DtypeShare(dtype, 1, 1, 1),)) if one.label == label else one for one in report.models
    )
    changed = Health(differences=(Difference(label, MATRIX, "dtype", "float32", dtype),))
    return replace(report, models=models, health=changed)


def test_rounding_is_told_from_training(base):
    import ml_dtypes

    # The base in bfloat16 and nothing else: all of its change is rounding, and of the second, as much as rounding is of both.
    rounded = {name: array.astype(ml_dtypes.bfloat16).astype("f4") for name, array in base.items()}
    lightly = {name: a.astype(ml_dtypes.bfloat16).astype("f4") for name, a in tuned(base, 1, size=0.0015).items()}
    for model, expected in ((rounded, 1.0), (lightly, 1 / (1 + (0.0015 / (0.4247 / 256)) ** 2))):
        found = health(_with_dtype(measured(base, {"a": model}), "a", "bfloat16"))
        assert [one.code for one in found] == ["rounded"]
        assert found[0].figures[1].value == pytest.approx(expected, abs=0.11)  # norms near 1 are rounded more
    found = health(_with_dtype(measured(base, {"a": tuned(base, 1)}), "a", "bfloat16"))
    assert _codes(found) == ["dtype", "healthy"]


def test_padding_of_the_vocabulary_is_normal_and_dead_rows_of_a_matrix_are_not(base):
    padding = Rows("a", EMBEDDINGS, 80, 3, (77, 78, 79), 1, ((5, 4),), 0)
    found = _health(base, Health(rows=(padding,)))
    assert [(one.code, one.level) for one in found] == [("token-rows", "note"), ("healthy", "good")]
    assert "normal" in found[0].text
    dead = Rows("a", MATRIX, 96, 7, (1, 2), 0, (), 5)
    found = _health(base, Health(rows=(padding, dead)))
    assert [(one.code, one.level) for one in found] == [("dead-rows", "warning"), ("token-rows", "note")]
    assert found[0].figures[0].value == 5


def test_of_a_model_without_a_common_tensor_no_more_is_told(base):
    """That tokens and tensors differ as well is no news, and merging by tokens is no way out."""
    tables = Health(
        differences=(Difference("b", EMBEDDINGS, "missing", "[80, 64]", ""),),
        tokens=(TokenDifference("b", 3, 0, 0, ("x",)),),
        rows=(Rows("b", f"other.{EMBEDDINGS}", 80, 3, (77, 78, 79), 0, (), 0),),
    )
    assert _codes(health(_apart(base, tables))) == ["incomparable", "token-rows"]


@pytest.mark.parametrize("by_tokens", [True, False])
def test_shapes_of_tables_are_a_matter_of_the_recipe_that_merges_by_tokens(base, by_tokens):
    rows = tuple(Difference("a", name, "shape", "[80, 64]", "[90, 64]") for name in (EMBEDDINGS, "lm_head.weight"))
    report = measured(base, {"a": tuned(base, 1), "b": tuned(base, 2)}, health=Health(differences=rows))
    facts = RecipeFacts("", "linear", (), {}, (), "", by_tokens=by_tokens)
    assert _codes(health(replace(report, recipe=facts))) == (["healthy"] if by_tokens else ["tensors"])


def test_verbs_go_with_their_numbers(base):
    one = Rows("a", MATRIX, 96, 1, (1,), 0, (), 1)
    assert f"1 row of 96 in {MATRIX} of a is zero and was not in base" in _health(base, Health(rows=(one,)))[0].text
    two = replace(one, dead=2, new_dead=2)
    assert "are zero and were not in base" in _health(base, Health(rows=(two,)))[0].text
    still = replace(one, dead=0, new_dead=0, duplicated=1)
    assert f"{MATRIX} holds up to 1 row twice" in _health(base, Health(rows=(still,)))[0].text


def test_one_model_alone_is_looked_at_and_not_compared(base):
    report = replace(measured(base, {"a": tuned(base, 1)}), models=(), tensors=())
    (found,) = health(report)
    assert found.text == f"{report.base.tensors} tensors looked at: no NaN or infinity."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "100%"),
        (0.9999, "99.9%"),
        (0.0, "0%"),
        (9999.0, "999900%"),
        (1.59e28, "1.6e+30%"),
        (1e-9, "less than 0.001%"),
    ],
)
def test_shares_are_short_however_large(value, text):
    assert percent(value) == text


def test_ratios_are_short_however_large():
    found = [times(one) for one in (0.34, 2.44, 31.0, 2e5, 7.2e29)]
    assert found == ["0.34 times", "2.4 times", "31 times", "200,000 times", "7.2e+29 times"]


def test_heads_that_differ_are_told(base):
    rows = (
        Difference("a", "lm_head.weight", "tied", "", "[80, 64]"),
        Difference("b", "lm_head.weight", "tied", "x", ""),
    )
    found = _health(base, Health(differences=rows))
    assert [(one.code, one.models) for one in found] == [("head", ("a",)), ("head", ("b",)), ("healthy", ())]
    assert "one apart" in found[0].text
    assert "out" in found[1].text


def test_the_gravest_comes_first_and_all_have_figures(base):
    broken = tuned(base, 1)
    broken[MATRIX] = np.where(np.eye(*broken[MATRIX].shape) > 0, np.nan, broken[MATRIX])
    report = measured(base, {"a": broken, "x": trained(5), "again": dict(base)})
    tokens = (TokenDifference("a", 2, 0, 5, ("<x>",)),)
    found = health(replace(report, health=replace(report.health, tokens=tokens)))
    assert [one.level for one in found] == ["error", "error", "warning", "warning"]
    assert all(one.figures for one in found)
    assert Report.from_json(replace(report, findings=found).to_json()).findings == found
