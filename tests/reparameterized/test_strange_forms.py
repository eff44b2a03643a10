"""Whatever tensors a file holds under the names of training forms: a fold, or one clear error."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import training_forms as forms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.errors import WeightsmithError
from weightsmith.reparameterized.fold import fold_model

BLOCKS: tuple[nn.Module, ...] = (
    forms.RepVGGBlock(4, 4),
    forms.RepVGGBlock(4, 4, timm=True),
    forms.MobileOneBlock(4, 4, 3),
    forms.MobileOneBlock(4, 4, 3, timm=True),
    forms.RepMixer(4),
    forms.RepMixer(4, timm=True),
    forms.RepCPE(4),
    forms.LargeKernel(4, 4),
    forms.RepDWConvS(4),
    forms.RepDWConvM(4),
    forms.RepVggDw(4),
    forms.TwoHeads(4, 3),
    forms.RePaMlp(4, 8, 2),
    forms.SigmaLinear(4, 4),
    nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
)
RULES = (
    "eps:*,value=0.1",
    "keep:*conv1*",
    "repavit:*,active=3",
    "sigma_reparam:*,kernel=2",
    "compander:*.weight,a=1,b=sigma",
    "conditioned:*weight",
    "stable_ssm:*bias,function=best",
    "conv_bn:*,conv=fc1,norm=norm2",
    "bn_linear:*,norm=norm1,linear=fc2",
    "branches:*,conv=fc1+fc2,channels=4",
    "branches:*,conv=rbr_dense+rbr_1x1,skip=rbr_identity,residual=true",
    "branches:*,conv=conv_3_3+conv_2_2,scale=conv_7_7.bias,norm=norm1",
    "serial:*,first=conv_3_w,second=conv_3_h,padding=false",
    "serial:*,first=fc1,second=fc2,channels=4",
)
DTYPES = (np.float64, np.float32, np.float16, np.int8, np.int64)
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)


def check(arrays: dict[str, np.ndarray[Any, Any]], rules: list[str]) -> None:
    model = Checkpoint("m", {name: ArrayTensor(name, array) for name, array in arrays.items()})
    with contextlib.suppress(WeightsmithError):
        for name, tensor in fold_model(model, rules).items():
            with np.errstate(all="ignore"):
                found = tensor.numpy()
            assert found.shape == tensor.shape, name
            assert found.dtype == tensor.dtype, name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=400)
@given(data=st.data())
def test_blocks_with_a_few_tensors_changed(data):
    """Each tensor may be of another shape or dtype, gone, or a copy under the name of another block's."""
    chosen = data.draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3))
    arrays = {
        f"{i}.{name}": tensor.detach().double().numpy()
        for i, block in enumerate(chosen)
        for name, tensor in block.state_dict().items()
    }
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), max_size=4, unique=True)):
        how = data.draw(st.sampled_from(["shape", "dtype", "gone", "zero"]))
        if how == "shape":
            arrays[name] = np.ones(data.draw(SHAPES))
        elif how == "dtype":
            arrays[name] = np.ones(arrays[name].shape, data.draw(st.sampled_from(DTYPES)))
        elif how == "zero":
            arrays[name] = np.zeros(arrays[name].shape)
        else:
            del arrays[name]
    check(arrays, data.draw(st.lists(st.sampled_from(RULES), max_size=3)))


NAMES = sorted({name for block in BLOCKS for name in block.state_dict()})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=200)
@given(
    tensors=st.dictionaries(st.sampled_from(NAMES), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=12),
    prefix=st.sampled_from(["", "a.", "a.b.c.d.e.f.g."]),
    rules=st.lists(st.sampled_from(RULES), max_size=3),
)
def test_any_tensors_under_these_names(tensors, prefix, rules):
    check({prefix + name: np.ones(shape, dtype) for name, (shape, dtype) in tensors.items()}, rules)
