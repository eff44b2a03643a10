"""The rows that mergekit 0.1.5 gave every token of models of different vocabularies (golden/make_tokenizers.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import weightsmith as ws
from conftest import read_safetensors

GOLDEN = Path(__file__).parent / "golden" / "tokenizers"
CASES = sorted(path.stem for path in (GOLDEN / "cases").glob("*.safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_every_token_has_mergekit_s_row(name, tmp_path):
    recipe = (GOLDEN / "cases" / f"{name}.yaml").read_text().replace("MODELS", str(GOLDEN / "models"))
    # Rows beyond the tokenizer stay here, and are cut off there.
    ws.merge_recipe(recipe + "compat: mergekit\n").save(tmp_path / "out")
    found = read_safetensors(tmp_path / "out")
    theirs = json.loads((GOLDEN / "cases" / f"{name}.json").read_text())
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert set(ours) == set(theirs)
    tokens = sorted(ours)
    for table, expected in read_safetensors(GOLDEN / "cases" / f"{name}.safetensors").items():
        assert found[table].shape == expected.shape
        one, other = found[table][[ours[t] for t in tokens]], expected[[theirs[t] for t in tokens]]
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[table][len(ours) :], expected[len(theirs) :], rtol=1e-5, atol=1e-6)


def test_there_are_cases():
    assert len(CASES) == 5
