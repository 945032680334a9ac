"""Which GGUF tensor goes to which module of transformers' DeepSeek models.

The table is the one place where the two vocabularies meet; everything else is derived from it and the config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transformers_kt.families.base import EXPERT_MERGES, Merge, TensorRow
from transformers_kt.families.deepseek.config import sparse_layers

CORRECTION_BIAS = "e_score_correction_bias"
KEYS = "self_attn.kv_a_proj_with_mqa"
INDEXER_WEIGHTS = "weights_proj"

_EVERY_LAYER = (
    TensorRow("attn_norm.weight", "input_layernorm", "weight", ("hidden",)),
    TensorRow("attn_kv_a_mqa.weight", KEYS, "weight", ("kv_lora_and_rope", "hidden")),
    TensorRow("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm", "weight", ("kv_lora",)),
    TensorRow("attn_output.weight", "self_attn.o_proj", "weight", ("hidden", "heads_v")),
    TensorRow("ffn_norm.weight", "post_attention_layernorm", "weight", ("hidden",)),
)
_QUERY_PLAIN = (TensorRow("attn_q.weight", "self_attn.q_proj", "weight", ("heads_qk", "hidden")),)
_QUERY_LORA = (
    TensorRow("attn_q_a.weight", "self_attn.q_a_proj", "weight", ("q_lora", "hidden")),
    TensorRow("attn_q_a_norm.weight", "self_attn.q_a_layernorm", "weight", ("q_lora",)),
    TensorRow("attn_q_b.weight", "self_attn.q_b_proj", "weight", ("heads_qk", "q_lora")),
)
_INDEXER = (
    TensorRow("indexer.attn_q_b.weight", "self_attn.indexer.wq_b", "weight", ("index_heads_width", "q_lora")),
    TensorRow("indexer.attn_k.weight", "self_attn.indexer.wk", "weight", ("index_width", "hidden")),
    TensorRow("indexer.k_norm.weight", "self_attn.indexer.k_norm", "weight", ("index_width",)),
    TensorRow("indexer.k_norm.bias", "self_attn.indexer.k_norm", "bias", ("index_width",)),
    TensorRow("indexer.proj.weight", f"self_attn.indexer.{INDEXER_WEIGHTS}", "weight", ("index_heads", "hidden")),
)
_KV_WHOLE = (TensorRow("attn_kv_b.weight", "self_attn.kv_b_proj", "weight", ("heads_nope_and_v", "kv_lora")),)
_KV_SPLIT = (
    TensorRow("attn_k_b.weight", "self_attn.kv_b_proj", "k_b", ("heads", "kv_lora", "nope")),
    TensorRow("attn_v_b.weight", "self_attn.kv_b_proj", "v_b", ("heads", "v", "kv_lora")),
)
_DENSE = (
    TensorRow("ffn_gate.weight", "mlp.gate_proj", "weight", ("dense", "hidden")),
    TensorRow("ffn_up.weight", "mlp.up_proj", "weight", ("dense", "hidden")),
    TensorRow("ffn_down.weight", "mlp.down_proj", "weight", ("hidden", "dense")),
)
_MOE = (
    TensorRow("ffn_gate_inp.weight", "mlp.gate", "weight", ("experts", "hidden")),
    TensorRow("ffn_gate_exps.weight", "mlp.experts", "gate", ("experts", "expert", "hidden")),
    TensorRow("ffn_up_exps.weight", "mlp.experts", "up", ("experts", "expert", "hidden")),
    TensorRow("ffn_down_exps.weight", "mlp.experts", "down", ("experts", "hidden", "expert")),
    TensorRow("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj", "weight", ("shared", "hidden")),
    TensorRow("ffn_up_shexp.weight", "mlp.shared_experts.up_proj", "weight", ("shared", "hidden")),
    TensorRow("ffn_down_shexp.weight", "mlp.shared_experts.down_proj", "weight", ("hidden", "shared")),
)
_CORRECTION_BIAS = TensorRow("exp_probs_b.bias", "mlp.gate", CORRECTION_BIAS, ("experts",))

UNREAD = tuple(row.gguf_name for row in (*_KV_WHOLE, *_KV_SPLIT))
"""Files that carry both layouts exist (forks add the halves, requantized, to the original): the original is read."""


def _kv_b(k_b: npt.NDArray[np.float32], v_b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(heads * (nope + v), latent) of (heads, latent, nope) and (heads, v, latent)."""
    joined = np.concatenate((k_b.transpose(0, 2, 1), v_b), axis=1)
    return np.ascontiguousarray(joined.reshape(-1, joined.shape[-1]))


MERGES: Mapping[str, Merge] = {**EXPERT_MERGES, "weight": Merge(("k_b", "v_b"), _kv_b)}


def layer_rows(config: Any, present: Collection[str]) -> Sequence[Sequence[TensorRow]]:
    """The tensors of each layer. ``present`` decides between ``attn_kv_b`` and its two halves."""
    has_correction_bias = config.model_type != "deepseek_v2"
    # Sigmoid-routed models without any bias are legitimate, and zero is what they mean; one layer without it is not.
    bias_is_optional = not any(name.endswith("." + _CORRECTION_BIAS.gguf_name) for name in present)
    bias = [_CORRECTION_BIAS._replace(optional=bias_is_optional)] if has_correction_bias else []
    query = _QUERY_PLAIN if config.q_lora_rank is None else _QUERY_LORA
    indexer = _INDEXER if config.model_type == "deepseek_v32" else ()
    layers = []
    for layer, has_experts in enumerate(sparse_layers(config)):
        whole = f"blk.{layer}.{_KV_WHOLE[0].gguf_name}" in present
        halves = any(f"blk.{layer}.{row.gguf_name}" in present for row in _KV_SPLIT)
        kv = _KV_SPLIT if halves and not whole else _KV_WHOLE
        layers.append([*_EVERY_LAYER, *query, *indexer, *kv, *([*_MOE, *bias] if has_experts else _DENSE)])
    return layers


def sizes(config: Any) -> dict[str, int]:
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    v = config.v_head_dim or 0
    expert = getattr(config, "moe_intermediate_size", 0)
    index_heads, index_width = getattr(config, "index_n_heads", 0), getattr(config, "index_head_dim", 0)
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": heads,
        "nope": nope,
        "v": v,
        "kv_lora": config.kv_lora_rank,
        "kv_lora_and_rope": config.kv_lora_rank + rope,
        "heads_qk": heads * (nope + rope),
        "heads_v": heads * v,
        "heads_nope_and_v": heads * (nope + v),
        "index_heads": index_heads,
        "index_width": index_width,
        "index_heads_width": index_heads * index_width,
        "q_lora": config.q_lora_rank or 0,
        "dense": config.intermediate_size,
        "experts": getattr(config, "n_routed_experts", 0),
        "expert": expert,
        "shared": expert * getattr(config, "n_shared_experts", 0),
    }
