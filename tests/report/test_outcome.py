import pytest

from tests.report.families import mixed, trained, tuned
from tests.report.plain import measured
from weightsmith.report.outcome import outcome


@pytest.fixture(scope="module")
def base():
    return trained(0)


@pytest.fixture(scope="module")
def models(base):
    return {label: tuned(base, seed) for seed, label in enumerate(("a", "b", "c"))}


def _found(base, models, *weights):
    result = mixed(base, list(zip(models.values(), weights, strict=True)))
    return {one.code: one for one in outcome(measured(base, models, result=result))}


def test_a_balanced_merge_is_said_to_be(base, models):
    found = _found(base, models, 0.6, 0.6, 0.6)
    assert list(found) == ["present"]
    assert [one.value for one in found["present"].figures] == pytest.approx([1 / 3] * 3, abs=0.02)


def test_an_input_with_no_weight_is_absent(base, models):
    found = _found(base, models, 0.7, 0.7, 0.0)
    assert list(found) == ["absent"]
    assert found["absent"].models == ("c",)
    assert "raise its weight" in found["absent"].text


def test_an_input_with_a_short_task_vector_is_absent_for_that(base, models):
    short = {**models, "c": tuned(base, 2, size=0.005)}
    found = _found(base, short, 0.7, 0.7, 0.7)
    assert found["absent"].models == ("c",)
    assert "short" in found["absent"].text


@pytest.mark.parametrize(("weight", "code"), [(0.15, "shrunken"), (1.5, "overshot")])
def test_a_result_of_another_length_is_told(base, models, weight, code):
    found = _found(base, models, weight, weight, weight)
    assert list(found) == [code, "present"]
    # Three nearly orthogonal task vectors.
    assert found[code].figures[0].value == pytest.approx(weight * 3**0.5, rel=0.05)


def test_a_mean_without_a_base_has_the_first_model_in_it_too(base, models):
    first, second, third = models.values()
    mean = mixed(first, [(second, 1 / 3), (third, 1 / 3)])
    (found,) = outcome(measured(first, {"b": second, "c": third}, result=mean, base_named=False))
    assert found.code == "present"
    assert found.models == ("base", "b", "c")
    assert [one.value for one in found.figures] == pytest.approx([1 / 3] * 3, abs=1e-3)


def test_a_result_that_is_one_input_is_told(base, models):
    assert list(_found(base, models, 0.0, 1.0, 0.0)) == ["single-input"]


def test_a_result_that_is_the_base_is_told(base, models):
    assert list(_found(base, models, 0.0, 0.0, 0.0)) == ["unchanged"]


def test_layers_of_one_input_are_named(base, models):
    result = mixed(base, [(one, 0.6) for one in models.values()])
    alone = mixed(base, [(models["b"], 1.0)])
    result = {name: alone[name] if name.startswith("model.layers.2.") else array for name, array in result.items()}
    found = {one.code: one for one in outcome(measured(base, models, result=result))}
    assert found["dominated"].models == ("b",)
    assert found["dominated"].scope.layer == "model.layers.2"
    assert "present" in found


def test_what_lies_around_the_layers_is_named_in_words(base, models):
    result = mixed(base, [(one, 0.6) for one in models.values()])
    alone = mixed(base, [(models["b"], 1.0)])
    result = {name: array if name.startswith("model.layers.") else alone[name] for name, array in result.items()}
    report = measured(base, models, result=result)
    found = {one.code: one for one in outcome(report)}["dominated"]
    assert found.scope.layer in {layer.key for layer in report.layers}
    assert "what lies before the layers" in found.text
    # Shares are of what is explained, which is not all.
    assert found.text.startswith("Of what inputs explain of the change of ")


def test_a_result_that_went_elsewhere_is_told(base, models):
    found = {one.code: one for one in outcome(measured(base, models, result=tuned(base, 77)))}
    assert found["unexplained"].figures[0].value < 0.05


def test_nothing_is_said_without_a_result(base, models):
    assert outcome(measured(base, models)) == ()
