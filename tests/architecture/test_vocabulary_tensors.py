"""Which tensors have a row for every token."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.architecture.vocabulary import vocabulary_tensors
from weightsmith.checkpoint.tensor import ArrayTensor


def tensors(**shapes):
    return {name: ArrayTensor(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"model.embed_tokens.weight": (64, 8), "model.layers.0.mlp.up_proj.weight": (64, 8), "lm_head.weight": (64, 8)},
         {"model.embed_tokens.weight": 0, "lm_head.weight": 0}),
        ({"wte.weight": (64, 8), "wpe.weight": (64, 8)}, {"wte.weight": 0}),
        ({"bert.embeddings.word_embeddings.weight": (64, 8), "bert.embeddings.token_type_embeddings.weight": (64, 8),
          "cls.predictions.bias": (64,), "cls.predictions.decoder.weight": (64, 8), "cls.predictions.transform.dense.bias": (64,)},
         {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0, "cls.predictions.decoder.weight": 0}),
        ({"final_logits_bias": (1, 64), "model.shared.weight": (64, 8), "model.encoder.embed_positions.weight": (64, 8)},
         {"final_logits_bias": 1, "model.shared.weight": 0}),
        ({"lm_head.weight": (64, 8), "lm_head.bias": (64,), "vision.embeddings.patch.weight": (10, 8)},
         {"lm_head.weight": 0, "lm_head.bias": 0}),
    ],
)  # fmt: skip
def test_embeddings_head_and_its_bias_are_told_from_what_is_as_long_by_chance(shapes, expected):
    assert vocabulary_tensors(tensors(**shapes), {"vocab_size": 64}, 60) == expected


def test_without_a_config_the_tokenizer_tells_how_long_tables_are():
    found = vocabulary_tensors(tensors(**{"emb.weight": (64, 8), "model.embed_extra.weight": (5, 8)}), {}, 60)
    assert found == {"emb.weight": 0}
