"""Where points lie, and how much of every model they have."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from weightsmith.curves.positions import Plane, along_edges, evenly_along_edges, labels_of
from weightsmith.curves.scale import borders, colour, padded, texts, ticks


@pytest.fixture
def trio(write_model):
    return [write_model(name, llama_tensors(i)) for i, name in enumerate("abc")]


def flat(tensors):
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def test_an_even_grid_has_the_nearest_doubles_and_exact_complements():
    for points in (2, 3, 7, 11, 101):
        positions = evenly_along_edges(2, points)
        for i, one in enumerate(positions):
            assert one.coefficients[1] == float(Fraction(i, points - 1))
            assert math.fsum(one.coefficients) == 1.0
        assert positions[0].coefficients == (1.0, 0.0)
        assert positions[-1].coefficients == (0.0, 1.0)


def test_a_finer_grid_holds_the_points_of_a_coarser_one():
    fine = {one.coefficients for one in evenly_along_edges(3, 21)}
    assert {one.coefficients for one in evenly_along_edges(3, 11)} < fine
    assert {one.coefficients for one in along_edges(3, [0.1, 0.7, 1.3, 2])} < fine


def test_a_chain_goes_on_from_model_to_model_and_beyond():
    found = {one.label: one.coefficients for one in along_edges(3, [2.2, -0.5, 1, 1.3])}
    assert list(found) == ["-0.50", "1.00", "1.30", "2.20"]
    assert found["-0.50"] == (1.5, -0.5, 0.0)
    assert found["1.00"] == (0.0, 1.0, 0.0)
    assert found["1.30"] == (0.0, 0.7, 0.3)
    assert found["2.20"] == pytest.approx((0.0, -0.2, 1.2))


def test_labels_are_short_and_different():
    assert labels_of([0.0, 0.3, 0.125, 1 / 3, 1.2]) == ["0.00", "0.30", "0.125", "0.333333", "1.20"]
    close = labels_of([0.1234561, 0.1234562, 1e-9, 0.0])
    assert len(set(close)) == 4


@pytest.mark.parametrize(
    ("lambdas", "words"),
    [([0.3, 0.3], "given twice"), ([math.nan], "not finite"), ([], "no lambda"), ([math.inf], "not finite")],
)
def test_lambdas_that_make_no_grid_are_refused(lambdas, words):
    with pytest.raises(ws.WeightsmithError, match=words):
        along_edges(2, lambdas)


def test_points_of_a_line_are_the_weighted_mean_and_its_ends_the_models(trio, tmp_path):
    a, b = (read_safetensors(one) for one in trio[:2])
    for point in ws.curve(trio[:2], lambdas=[-0.25, 0, 0.3, 1, 1.5]):
        lambda_ = point.coordinates[0]
        for name, tensor in point.checkpoint.items():
            wanted = (1 - lambda_) * a[name].astype(np.float64) + lambda_ * b[name].astype(np.float64)
            np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)
            if lambda_ in (0, 1):
                np.testing.assert_array_equal(tensor.numpy(), (a, b)[int(lambda_)][name])


def test_points_of_a_polygon_lie_on_its_edges(trio):
    models = [read_safetensors(one) for one in trio]
    closed = ws.curve([*trio, trio[0]], points=3, shape="polygon")
    assert [point.label for point in closed] == ["0.00", "0.50", "1.00", "1.50", "2.00", "2.50", "3.00"]
    for point in closed:
        for name, tensor in point.checkpoint.items():
            wanted = sum(
                share * model[name].astype(np.float64)
                for share, model in zip(point.coefficients, [*models, models[0]], strict=True)
            )
            np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_plane_coordinates_are_those_of_whole_vectors_in_plain_numpy(trio):
    a, b, c = (flat(read_safetensors(one)) for one in trio)
    u = (b - a) / np.linalg.norm(b - a)
    v = (c - a) - (c - a) @ u * u
    height = np.linalg.norm(v)
    v = v / height
    found = ws.curve(trio, points=4, shape="plane", margin=0.25)
    np.testing.assert_allclose(
        found.corners, [(0, 0), (np.linalg.norm(b - a), 0), ((c - a) @ u, height)], rtol=1e-9, atol=1e-12
    )
    assert len(found) == 16
    for point in found:
        x, y = point.coordinates
        merged = flat({name: tensor.numpy() for name, tensor in point.checkpoint.items()})
        np.testing.assert_allclose(merged, a + x * u + y * v, atol=2e-5)
        assert math.fsum(point.coefficients) == pytest.approx(1, abs=1e-15)
        # Weighing the corners gives the coordinates again.
        again = np.asarray(point.coefficients) @ np.asarray(found.corners)
        np.testing.assert_allclose(again, point.coordinates, atol=1e-9)
    xs = sorted({point.coordinates[0] for point in found})
    width = max(corner[0] for corner in found.corners) - min(corner[0] for corner in found.corners)
    assert xs[-1] - xs[0] == pytest.approx(1.5 * width)


def test_a_plane_is_the_same_whatever_the_threads(trio):
    one, two = (ws.curve(trio, points=2, shape="plane", threads=threads) for threads in (1, 3))
    assert one.corners == two.corners


def test_corners_of_a_plane_are_the_models_to_the_bit_of_their_coefficients():
    plane = Plane(3.0, 1.0, 2.0)
    for i, corner in enumerate(plane.corners):
        assert plane.coefficients(*corner) == tuple(float(i == j) for j in range(3))


def test_models_on_one_line_span_no_plane(trio, write_model):
    a, b = (read_safetensors(one) for one in trio[:2])
    middle = write_model("middle", {name: 0.25 * a[name] + 0.75 * b[name] for name in a})
    with pytest.raises(ws.WeightsmithError, match=r"lie on one line \(middle is 0.75 of the way from a to b\)"):
        ws.curve([*trio[:2], middle], shape="plane")
    same = write_model("same", a)
    with pytest.raises(ws.WeightsmithError, match="a and same have the same weights"):
        ws.curve([*trio[:2], same], shape="plane")


def test_a_weight_that_is_not_finite_is_named(trio, write_model):
    broken = read_safetensors(trio[2])
    broken["model.norm.weight"] = np.full(8, np.nan, np.float32)
    with pytest.raises(ws.WeightsmithError, match=r"model\.norm\.weight of broken has values that are NaN"):
        ws.curve([*trio[:2], write_model("broken", broken)], shape="plane")


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (1, {}, "1 model given; a curve runs between two or more"),
        (3, {}, "take --shape polygon to go on from each to the next, or --shape plane"),
        (2, {"shape": "plane"}, "three models span a plane, and 2 are given"),
        (2, {"shape": "circle"}, "line, polygon, plane"),
        (2, {"points": 1}, "2 at least"),
        (2, {"points": 3, "lambdas": [0.5]}, "either points or lambdas"),
        (3, {"shape": "plane", "lambdas": [0.5]}, "set by points and margin"),
        (2, {"margin": 0.1}, "margin is for the grid of a plane"),
        (3, {"shape": "plane", "margin": -1.0}, "0 or more"),
        (3, {"shape": "plane", "points": 1000}, "give 2 to 201"),
    ],
)
def test_settings_that_make_no_curve_are_refused(trio, count, options, words):
    with pytest.raises(ws.WeightsmithError, match=words):
        ws.curve(trio[:count], **options)


def test_a_model_twice_in_a_row_and_models_of_other_shapes_are_refused(trio, write_model):
    with pytest.raises(ws.WeightsmithError, match="given twice, one after the other"):
        ws.curve([trio[0], trio[0]])
    other = write_model("other", llama_tensors(3, hidden=4))
    with pytest.raises(ws.WeightsmithError, match="models of different shape cannot be merged"):
        ws.curve([trio[0], other])
    assert ws.curve([trio[0], other], on_shape_mismatch="base")[3].checkpoint


def test_merges_that_were_not_saved_are_models_too(trio):
    a, b, c = (flat(read_safetensors(one)) for one in trio)
    soup = ws.average(trio[:2])
    (point,) = ws.curve([soup, trio[2]], lambdas=[0.25])
    found = flat({name: tensor.numpy() for name, tensor in point.checkpoint.items()})
    np.testing.assert_allclose(found, 0.75 * (a + b) / 2 + 0.25 * c, atol=1e-6)
    corners = ws.curve([soup, trio[1], trio[2]], shape="plane").corners
    assert corners[1][0] == pytest.approx(np.linalg.norm(b - a) / 2)


def test_models_of_one_name_are_told_apart(write_model):
    same = [write_model(f"{i}/model", llama_tensors(i)) for i in range(2)]
    assert ws.curve(same).models == ("model", "model#2")


def test_ticks_are_round_and_lie_within():
    for low, high in ((0, 1), (-0.2, 1.2), (0.9444, 0.9741), (1e-9, 3e-9), (-5e6, 7e6), (100.0, 100.001)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 12
        assert all(low - 1e-9 * abs(low) <= one <= high + 1e-9 * abs(high) for one in found)
        assert len(set(texts(found))) == len(found)
    assert texts(ticks(0, 1)) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_scales_of_one_value_have_room_and_colours_stay_in_the_palette():
    low, high = padded(2.0, 2.0)
    assert low < 2.0 < high
    assert padded(0.0, 0.0)[1] > 0
    assert (colour(-1), colour(2)) == ("#440154", "#fde725")
    assert borders([0.0, 1.0, 3.0]) == [-0.5, 0.5, 2.0, 4.0]
