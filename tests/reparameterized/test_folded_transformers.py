"""Models of transformers fold under the names that they have, and compute the same with their batch norms taken out."""

from __future__ import annotations

import pytest
import torch
import training_forms as forms
from torch import nn

import weightsmith as ws
from conftest import read_safetensors

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_sizes": [8, 16], "depths": [1, 2], "embedding_size": 8}
MODELS = {
    "resnet": lambda: transformers.ResNetModel(transformers.ResNetConfig(**SMALL)),
    "regnet": lambda: transformers.RegNetModel(transformers.RegNetConfig(**SMALL, groups_width=4)),
}


def without_norms(module: nn.Module) -> nn.Module:
    """Put a bias in every convolution that a batch norm stands behind, and nothing in the place of the norm."""
    for inner in module.modules():
        if hasattr(inner, "convolution") and hasattr(inner, "normalization"):
            conv = inner.convolution
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels, dtype=conv.weight.dtype))
            inner.normalization = nn.Identity()
    return module


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_its_batch_norms(tmp_path, name):
    model = forms.randomise(MODELS[name]())
    model.save_pretrained(tmp_path / "model")
    ws.fold_model(tmp_path / "model").save(tmp_path / "out")
    plain = without_norms(MODELS[name]().double().eval())
    found = {key: torch.from_numpy(array.copy()) for key, array in read_safetensors(tmp_path / "out").items()}
    plain.load_state_dict(found)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(image).last_hidden_state
    torch.testing.assert_close(plain(image).last_hidden_state, expected, rtol=1e-9, atol=1e-9)
