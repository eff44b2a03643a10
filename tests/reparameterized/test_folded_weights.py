"""Weights that are stored as something else, against PyTorch's own forward passes; and back, where that is exact."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import training_forms as forms
from folded_modules import fold_and_save, write_module
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import weightsmith as ws
from conftest import read_safetensors, write_safetensors
from weightsmith.errors import CheckpointError, PlanError, RecipeError

F64 = {"rtol": 1e-10, "atol": 1e-10}
# Both of PyTorch's spellings of weight normalisation; the older one warns that it is old.
NORMS = {"suffix": old_weight_norm, "parametrization": parametrizations.weight_norm}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning"
)


@pytest.fixture
def fold_module(tmp_path):
    return partial(fold_and_save, tmp_path)


def same_names_and_outputs(plain: nn.Module, tensors: dict[str, torch.Tensor], model: nn.Module, *inputs) -> None:
    plain.double().eval().load_state_dict(tensors)
    torch.testing.assert_close(plain(*inputs), model(*inputs), **F64)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7), (0, 1, -1, None)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), (0, 1, 3, None)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 5), (2, 4, 8), (0, 1, None)),
    "of one channel": (lambda: nn.Conv1d(1, 1, 3), (2, 1, 8), (0, 1, 2, None)),
}


@pytest.mark.parametrize(
    ("layer", "dim", "spelling"),
    # To the older function -1 is the whole tensor.
    [
        (name, i, how)
        for name, (_, _, dims) in LAYERS.items()
        for i in dims
        for how in NORMS
        if i != -1 or how != "suffix"
    ],
)
def test_weight_norm(fold_module, layer, dim, spelling):
    make, shape, _ = LAYERS[layer]
    model = forms.randomise(nn.Sequential(NORMS[spelling](make(), dim=dim)))
    x = torch.randn(shape, dtype=torch.float64)
    same_names_and_outputs(nn.Sequential(make()), fold_module(model), model, x)


def test_weight_norm_of_a_recurrent_layer(fold_module):
    model = nn.Sequential(nn.LSTM(3, 4))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(model[0], name)
    forms.randomise(model)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    plain = nn.Sequential(nn.LSTM(3, 4)).double()
    plain.load_state_dict(fold_module(model))
    torch.testing.assert_close(plain(x)[0], model(x)[0], **F64)


def test_weight_norm_within_a_pair_within_a_block(fold_module):
    block = forms.RepVGGBlock(6, 6)
    for name in ("rbr_dense", "rbr_1x1"):
        parametrizations.weight_norm(getattr(block, name).conv)
    model = forms.randomise(nn.ModuleDict({"block": block}))
    t = fold_module(model)
    assert set(t) == {"block.rbr_reparam.weight", "block.rbr_reparam.bias"}
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    y = nn.functional.conv2d(x, t["block.rbr_reparam.weight"], t["block.rbr_reparam.bias"], padding=1)
    torch.testing.assert_close(torch.relu(y), block(x), **F64)


@pytest.mark.parametrize("layer", ["linear", "convolution", "transposed"])
def test_spectral_norm(fold_module, layer):
    make, shape, _ = LAYERS[layer]
    x = torch.randn(shape, dtype=torch.float64)
    for wrap in (old_spectral_norm, parametrizations.spectral_norm):
        model = forms.randomise(nn.Sequential(wrap(make())), seed=5)
        same_names_and_outputs(nn.Sequential(make()), fold_module(model), model, x)


def test_sigma_reparam(fold_module):
    """In evaluation mode the authors' layer takes one power iteration from the stored vector, converged or not."""
    model = forms.randomise(nn.Sequential(forms.SigmaLinear(7, 5), nn.GELU(), forms.SigmaLinear(5, 4, stats_only=True)))
    model[0].spectral_normed_weight.u.copy_(torch.randn(7, dtype=torch.float64))
    x = torch.randn(3, 7, dtype=torch.float64)
    same_names_and_outputs(nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4)), fold_module(model), model, x)


def test_sigma_reparam_of_a_convolution_gets_its_shape_back(fold_module):
    model = forms.randomise(nn.Sequential(forms.SigmaLinear(3, 5, kernel=4)))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    t = fold_module(model, ["sigma_reparam:0,kernel=4"])
    same_names_and_outputs(nn.Sequential(nn.Conv2d(3, 5, 4)), t, model, x)


def fold_arrays(tmp_path, arrays, rules=()):
    write_safetensors(tmp_path / "model.safetensors", arrays)
    folded = ws.fold_model(tmp_path / "model.safetensors", rules)
    folded.save(tmp_path / "out.safetensors", overwrite=True)
    return read_safetensors(tmp_path / "out.safetensors")


def test_compander_with_numbers_and_with_learned_ones(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "0.weight": rng.standard_normal((5, 7)),
        "0.bias": rng.standard_normal(5),
        "1.weight": rng.standard_normal((4, 3, 2)),
        "1.a": np.array([0.7]),
        "1.b": np.array(0.1),
    }
    rules = ["compander:0.weight,a=0.5,b=0.2", {"kind": "compander", "names": "1.weight", "a": "a", "b": "b"}]
    found = fold_arrays(tmp_path, arrays, rules)
    assert set(found) == {"0.weight", "0.bias", "1.weight"}
    for name, a, b in (("0.weight", 0.5, 0.2), ("1.weight", 0.7, 0.1)):
        expected = [a * math.atan(v / b) for v in arrays[name].reshape(-1).tolist()]
        np.testing.assert_allclose(found[name].reshape(-1), expected, rtol=1e-14)


def test_weight_conditioning_divides_rows_by_their_norms(tmp_path):
    weights = np.random.default_rng(0).standard_normal((5, 3, 2, 2))
    weights[2] = 0
    found = fold_arrays(tmp_path, {"a.weight": weights, "a.bias": np.ones(5)}, ["conditioned:*.weight"])
    for row, expected in zip(found["a.weight"], weights, strict=True):
        norm = math.sqrt(sum(value * value for value in expected.reshape(-1).tolist()))
        np.testing.assert_allclose(row, expected / norm if norm else expected, rtol=1e-14)
    assert (found["a.bias"] == 1).all()


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ("function=exp", lambda w: -math.exp(w)),
        ("function=softplus", lambda w: -math.log1p(math.exp(w))),
        ("function=best,a=2,b=0.25", lambda w: -1 / (2 * w * w + 0.25)),
        ("function=best_discrete", lambda w: 1 - 1 / (w * w + 0.5)),
    ],
)
@pytest.mark.parametrize("shape", [(6,), (3, 2), ()])
def test_stable_ssm(tmp_path, settings, function, shape):
    w = np.random.default_rng(0).standard_normal(shape)
    found = fold_arrays(tmp_path, {"ssm.w": np.asarray(w), "other": np.ones(3)}, [f"stable_ssm:ssm.w,{settings}"])
    assert found["ssm.w"].shape == shape
    np.testing.assert_allclose(found["ssm.w"], np.vectorize(function)(w), rtol=1e-13)
    assert (found["other"] == 1).all()


def test_names_that_only_look_like_weight_norm_stay(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "w_g": rng.standard_normal((4, 4)),
        "w_v": rng.standard_normal((4, 4)),
        "x_g": np.ones(4),
        "x_v": np.ones((4, 2)),
    }
    with pytest.raises(PlanError, match="nothing in .* is recognised"):
        fold_arrays(tmp_path, arrays)


def test_gains_without_axes_of_length_one(tmp_path):
    """Other libraries than PyTorch keep one axis; the name says what it is."""
    v = np.random.default_rng(0).standard_normal((4, 3))
    found = fold_arrays(
        tmp_path, {"weight_v": v, "weight_g": np.arange(4.0), "a.weight_v": v, "a.weight_g": np.ones(1)}
    )
    np.testing.assert_allclose(np.linalg.norm(found["weight"], axis=1), np.arange(4), rtol=1e-14)
    np.testing.assert_allclose(found["a.weight"], v / np.linalg.norm(v), rtol=1e-14)


def test_spectral_norm_of_nothing_is_refused_by_name(tmp_path):
    arrays = {"a.weight_orig": np.zeros((3, 2)), "a.weight_u": np.ones(3), "a.weight_v": np.ones(2)}
    with pytest.raises(CheckpointError, match=r"a\.weight_u.* spectral norm 0"):
        fold_arrays(tmp_path, arrays)


@pytest.mark.parametrize("spelling", NORMS)
@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_weight_norm_unfolds_to_what_pytorch_loads_and_folds_back(tmp_path, spelling, axis):
    model = forms.randomise(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].weight[:, 3] = 0
    write_module(tmp_path / "plain.safetensors", model)
    unfolded = ws.unfold_weight_norm(tmp_path / "plain.safetensors", "*.weight", axis=axis, spelling=spelling)
    assert unfolded.unfolded == ("0.weight", "2.weight")
    unfolded.save(tmp_path / "unfolded.safetensors")
    loaded = read_safetensors(tmp_path / "unfolded.safetensors")
    dim = None if axis is None else axis % 2
    wrapped = nn.Sequential(
        *(
            NORMS[spelling](one, dim=dim) if hasattr(one, "weight") else one
            for one in (nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))
        )
    ).double()
    wrapped.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in loaded.items()})
    if axis is None:
        x = torch.randn(3, 7, dtype=torch.float64)
        torch.testing.assert_close(wrapped(x), model(x), **F64)
    folded = ws.fold_model(tmp_path / "unfolded.safetensors")
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(folded[name].numpy(), tensor.numpy(), rtol=1e-14)


def test_compander_unfolds_and_folds_back(tmp_path):
    weights = np.random.default_rng(0).uniform(-0.99, 0.99, (300, 400)).astype(np.float32)
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": weights, "a.bias": np.ones(300, np.float32)})
    a = 2 / math.pi
    ws.unfold_compander(tmp_path / "m.safetensors", a=a, b=0.3).save(tmp_path / "v.safetensors")
    v = read_safetensors(tmp_path / "v.safetensors")["a.weight"]
    np.testing.assert_allclose(v, 0.3 * np.tan(weights.astype(np.float64) / a), rtol=1e-7)
    back = ws.fold_model(tmp_path / "v.safetensors", [f"compander:*.weight,a={a},b=0.3"])
    np.testing.assert_allclose(back["a.weight"].numpy(), weights, rtol=2e-7)


def test_weights_beyond_the_compander_are_counted(tmp_path):
    weights = np.zeros((4, 5), np.float32)
    weights[1, 2], weights[3, 3] = 2, -3
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": weights, "b.weight": weights / 2})
    with pytest.raises(PlanError, match=r"a\.weight: 2 of 20 \(up to 3\)") as raised:
        ws.unfold_compander(tmp_path / "m.safetensors", a=0.7, b=1)
    text = str(raised.value)
    assert "b.weight: 1 of 20 (up to 1.5)" in text
    assert "a above 1.90986" in text


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: ws.unfold_weight_norm(m, "*.wight"), PlanError, "none fits"),
        (lambda m: ws.unfold_weight_norm(m, "*.bias"), PlanError, "none of the 1 that fit has 2 axes"),
        (lambda m: ws.unfold_weight_norm(m, axis=2), PlanError, "has no axis 2"),
        (lambda m: ws.unfold_weight_norm(m, spelling="old"), RecipeError, "suffix or parametrization"),
        (lambda m: ws.unfold_compander(m, a=0, b=1), RecipeError, "a is 0"),
        (lambda m: ws.unfold_compander(m, a=1, b=math.nan), RecipeError, "b is nan"),
    ],
)
def test_what_cannot_be_unfolded(tmp_path, call, error, text):
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.ones((2, 3)), "a.bias": np.ones(2)})
    with pytest.raises(error, match=text):
        call(tmp_path / "m.safetensors")
