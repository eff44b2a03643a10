"""Configs after layers were put together anew, dtypes and ties, in the layouts of real configs."""

from __future__ import annotations

import pytest

from weightsmith.architecture.config import alias_source, tied_embeddings, tied_source, with_dtype, with_layers
from weightsmith.architecture.stacks import analyse


def restack(config, picked, prefix="model.layers", layers=range(3), others=()):
    """Take the layers ``picked`` of the stack ``prefix``; ``others`` are further stacks of the model."""
    names = [f"{p}.{i}.attn.q.weight" for p in (prefix, *others) for i in layers]
    architecture = analyse(names)
    return with_layers(config, architecture.stacks[0], picked, architecture)


@pytest.mark.parametrize(
    ("config", "prefix", "others", "expected"),
    [
        (
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 3}},
            "decoder.bert.encoder.layer",
            ("encoder.encoder.layer",),
            {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 2}},
        ),
        (
            {"num_layers": 3},
            "decoder.block",
            ("encoder.block",),
            {"num_layers": 3, "num_decoder_layers": 2},
        ),
        (
            {"num_layers": 3},
            "encoder.block",
            ("decoder.block",),
            {"num_layers": 2, "num_decoder_layers": 3},
        ),
        (
            {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 3}},
            "model.layers",
            ("visual.blocks",),
            {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 3}},
        ),
        (
            {"num_hidden_layers": 3, "vision_config": {"depth": 3}},
            "visual.blocks",
            ("model.layers",),
            {"num_hidden_layers": 3, "vision_config": {"depth": 2}},
        ),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": 3}}, "talker_config": {"num_hidden_layers": 3}},
            "thinker.model.layers",
            ("talker.model.layers",),
            {"thinker_config": {"text_config": {"num_hidden_layers": 2}}, "talker_config": {"num_hidden_layers": 3}},
        ),
        (
            {"num_layers": 3, "num_single_layers": 3},
            "single_transformer_blocks",
            ("transformer_blocks",),
            {"num_layers": 3, "num_single_layers": 2},
        ),
    ],
)
def test_the_count_of_the_right_part_changes(config, prefix, others, expected):
    assert restack(config, [0, 2], prefix, others=others) == (expected, [])


def test_a_towers_missing_count_is_not_taken_from_another_tower():
    config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"size": 3}}
    found, notes = restack(config, [0], "vision_model.encoder.layers", others=("text_model.encoder.layers",))
    assert found == config
    assert "no key" in notes[0]


def test_lists_that_are_as_long_by_chance_stay_as_they_are():
    config = {
        "num_hidden_layers": 3,
        "eos_token_id": [1, 2, 3],
        "architectures": ["A", "B", "C"],
        "image_mean": [0, 0, 1],
    }
    found, _ = restack(config, [0, 1, 1, 2])
    assert found == {**config, "num_hidden_layers": 4}


def test_lists_of_layer_numbers_are_numbered_anew():
    found, notes = restack({"num_hidden_layers": 3, "mlp_only_layers": [0, 2]}, [2, 1, 1, 0, 2])
    assert found["mlp_only_layers"] == [0, 3, 4]
    assert notes == []
    assert "out_indices" in restack({"num_hidden_layers": 3, "out_indices": [0, 2]}, [0, 1])[1][0]


def test_a_pruned_model_is_counted_anew_with_its_own_settings_per_layer():
    config = {"num_hidden_layers": 4, "block_configs": ["a", "b", "c", "d"]}
    assert restack(config, [0, 1, 2], layers=(0, 1, 3)) == (
        {"num_hidden_layers": 3, "block_configs": ["a", "b", "d"]},
        [],
    )


def test_an_unchanged_order_changes_nothing():
    config = {"num_hidden_layers": 3, "num_layers": 3, "layer_types": ["a", "b", "c"]}
    assert restack(config, [0, 1, 2], others=("encoder.layers", "decoder.layers")) == (config, [])
    assert restack({"model_type": "x"}, [2, 1, 0]) == ({"model_type": "x"}, [])


def test_layers_of_another_kind_at_the_ends_are_counted_by_themselves():
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "first_k_dense_replace": 2}
    assert restack(config, [0, 1, 2, 2, 3, 4], layers=range(5))[0] == {**config, "num_hidden_layers": 5}
    assert restack(config, [1, 2, 3], layers=range(5)) == (
        {"num_hidden_layers": 3, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1},
        [],
    )
    assert "are not the first any more" in restack(config, [2, 0, 3], layers=range(5))[1][0]


def test_a_kind_that_goes_by_number_is_noted_where_numbers_shift():
    config = {"num_hidden_layers": 4, "attn_layer_period": 2}
    assert "attn_layer_period: 2" in restack(config, [0, 1, 1, 2], layers=range(4))[1][0]
    assert restack(config, [0, 1, 0, 1, 2, 3], layers=range(4))[1] == []
    listed = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "layer_types": ["a", "b", "a", "b"]}
    assert restack(listed, [0, 1, 1], layers=range(4)) == (
        {"num_hidden_layers": 3, "sliding_window_pattern": 2, "layer_types": ["a", "b", "b"]},
        [],
    )


def test_the_dtype_goes_where_the_config_keeps_it():
    assert with_dtype({"model_type": "llama"}, "float16") == {"model_type": "llama", "torch_dtype": "float16"}
    assert with_dtype({"_class_name": "UNet"}, "float16") == {"_class_name": "UNet"}
    nested = {"dtype": "x", "thinker_config": {"text_config": {"dtype": "x"}}, "quantization_config": {"dtype": "int4"}}
    assert with_dtype(nested, "bfloat16") == {
        "dtype": "bfloat16",
        "thinker_config": {"text_config": {"dtype": "bfloat16"}},
        "quantization_config": {"dtype": "int4"},
    }


@pytest.mark.parametrize(
    ("missing", "present", "source"),
    [
        ("lm_head.weight", ["model.shared.weight", "model.decoder.embed_tokens.weight"], "model.shared.weight"),
        ("proj_out.weight", ["model.decoder.embed_positions.weight", "model.decoder.embed_tokens.weight"],
         "model.decoder.embed_tokens.weight"),
        ("lm_head.decoder.weight", ["roberta.embeddings.word_embeddings.weight"], "roberta.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.weight", ["bert.embeddings.word_embeddings.weight"],
         "bert.embeddings.word_embeddings.weight"),
        ("language_model.lm_head.weight", ["draft.embed_tokens.weight", "language_model.model.embed_tokens.weight"],
         "language_model.model.embed_tokens.weight"),
        ("output.weight", ["model.tok_embeddings.weight"], "model.tok_embeddings.weight"),
        ("model.layers.3.attn.output.weight", ["model.embed_tokens.weight"], None),
        ("lm_head.weight", ["model.norm.weight"], None),
    ],
)  # fmt: skip
def test_a_missing_head_is_the_embedding_it_is_tied_to(missing, present, source):
    assert tied_source(missing, present) == source


@pytest.mark.parametrize(
    ("missing", "present", "source"),
    [
        ("shared.weight", ["encoder.embed_tokens.weight"], "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", ["decoder.embed_tokens.weight", "shared.weight"], "shared.weight"),
        ("model.decoder.embed_tokens.weight", ["model.shared.weight"], "model.shared.weight"),
        ("model.decoder.embed_tokens.weight", ["shared.weight", "model.embed_tokens.weight"], None),
        ("lm_head.weight", ["shared.weight"], None),
    ],
)
def test_the_table_that_encoder_and_decoder_share_goes_by_several_names(missing, present, source):
    assert alias_source(missing, present) == source


def test_ties_that_configs_leave_out_are_known():
    assert tied_embeddings({"model_type": "whisper"})
    assert tied_embeddings({"model_type": "gemma3", "text_config": {}})
    assert not tied_embeddings({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}})
    assert not tied_embeddings({"model_type": "llama"})
    assert not tied_embeddings({})
