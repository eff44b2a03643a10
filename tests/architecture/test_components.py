import pytest

from weightsmith.architecture.components import COMPONENTS, component


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention_q"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp_gate"),
        ("model.layers.0.mlp.up_proj.weight", "mlp_up"),
        ("model.layers.0.mlp.down_proj.weight", "mlp_down"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "expert_gate"),
        ("model.layers.0.mlp.experts.gate_up_proj", "expert_up"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "expert_down"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("lm_head.weight", "head"),
        ("h.0.attn.c_attn.weight", "attention_qkv"),
        ("h.0.mlp.c_fc.weight", "mlp_up"),
        ("h.0.mlp.c_proj.bias", "mlp_down"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention_o"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "mlp_up"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp_down"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "mlp_gate"),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "mlp_down"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "mlp_down"),
        ("visual.blocks.0.attn.qkv.weight", "attention_qkv"),
        ("visual.blocks.0.attn.proj.weight", "attention_o"),
        ("transformer.resblocks.0.attn.in_proj_weight", "attention_qkv"),
        ("transformer_blocks.0.ff.net.0.proj.weight", "mlp_up"),
        ("transformer_blocks.0.ff.net.2.weight", "mlp_down"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight", "mlp_up"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight", "mlp_down"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight", "attention_k"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight", "attention_o"),
        ("down_blocks.0.attentions.1.transformer_blocks.0.norm3.weight", "norm"),
        ("down_blocks.0.attentions.1.proj_out.weight", "attention"),
        ("mid_block.attentions.0.to_q.weight", "attention_q"),
        ("mid_block.attentions.0.to_out.0.weight", "attention_o"),
        ("mid_block.attentions.0.proj_attn.weight", "attention"),
        ("proj_out.weight", "head"),
        ("encoder.layers.0.linear2.weight", "mlp_down"),
        ("layer1.0.conv1.weight", "conv"),
        ("a.b", "other"),
    ],
)
def test_component_is_told_by_the_name(name, expected):
    assert component(name) == expected
    assert expected in COMPONENTS
