"""Qwen3-MoE as a family: config and tensor rows alone, so that experts are ours and the rest stays transformers'."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers_kt.families.base import Dims, Family, TensorRow
from transformers_kt.gguf.facts import MOST_CONTEXT, MOST_LAYERS, MOST_WIDTH, Facts

CLASSES = "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3Moe"

_LAYER = (
    TensorRow("attn_norm.weight", "input_layernorm", "weight", ("hidden",)),
    TensorRow("attn_q.weight", "self_attn.q_proj", "weight", ("queries", "hidden")),
    TensorRow("attn_k.weight", "self_attn.k_proj", "weight", ("keys", "hidden")),
    TensorRow("attn_v.weight", "self_attn.v_proj", "weight", ("keys", "hidden")),
    TensorRow("attn_q_norm.weight", "self_attn.q_norm", "weight", ("head",)),
    TensorRow("attn_k_norm.weight", "self_attn.k_norm", "weight", ("head",)),
    TensorRow("attn_output.weight", "self_attn.o_proj", "weight", ("hidden", "queries")),
    TensorRow("ffn_norm.weight", "post_attention_layernorm", "weight", ("hidden",)),
    TensorRow("ffn_gate_inp.weight", "mlp.gate", "weight", ("experts", "hidden")),
    TensorRow("ffn_gate_exps.weight", "mlp.experts", "gate", ("experts", "expert", "hidden")),
    TensorRow("ffn_up_exps.weight", "mlp.experts", "up", ("experts", "expert", "hidden")),
    TensorRow("ffn_down_exps.weight", "mlp.experts", "down", ("experts", "hidden", "expert")),
)


def _sizes(config: Any) -> dict[str, int]:
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "head": config.head_dim,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "experts": config.num_experts,
        "expert": config.moe_intermediate_size,
    }


def _dims(config: Any) -> Dims:
    sizes = _sizes(config)
    return Dims(
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        cache_values=2 * sizes["keys"],
        work_values=4 * sizes["hidden"]
        + 2 * (sizes["queries"] + sizes["keys"])
        + 2 * config.num_experts_per_tok * sizes["expert"],
    )


def _layer_rows(config: Any, present: Collection[str]) -> list[tuple[TensorRow, ...]]:
    return [_LAYER] * config.num_hidden_layers


def _config_values(facts: Facts) -> dict[str, Any]:
    experts = facts.integer("expert_count", most=MOST_WIDTH)
    heads = facts.integer("attention.head_count", most=MOST_WIDTH)
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": facts.vocab_size(),
        "hidden_size": facts.integer("embedding_length", most=MOST_WIDTH),
        "num_hidden_layers": facts.integer("block_count", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", most=heads),
        "head_dim": facts.integer("attention.key_length", most=MOST_WIDTH),
        "num_experts": experts,
        "num_experts_per_tok": facts.integer("expert_used_count", most=experts),
        "norm_topk_prob": True,
        "moe_intermediate_size": facts.integer("expert_feed_forward_length", most=MOST_WIDTH),
        "max_position_embeddings": facts.integer("context_length", most=MOST_CONTEXT),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", above=0.0),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", above=0.0)},
        "tie_word_embeddings": facts.tensors is not None and "output.weight" not in facts.tensors,
        **facts.token_ids(),
    }


TOY_QWEN = Family(
    name="toy-qwen",
    about="Qwen3-MoE, in tests",
    architectures=("qwen3moe",),
    model_types=("qwen3_moe",),
    dims=_dims,
    sizes=_sizes,
    layer_rows=_layer_rows,
    config_values=_config_values,
    stock_classes={"experts": (CLASSES + "Experts",)},
    keys_from="self_attn.k_proj.weight",
)
