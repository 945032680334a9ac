"""The sizes of a DeepSeek model, and its config as it is read without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families.base import Dims, MlaDims, PlainConfigs, Router

_DENSE = ("youtu",)
"""Model types without experts: V3's attention, and MLPs."""

# ---- Sizes of a config -----------------------------------------------------------------------------------------------


def dims(config: Any) -> Dims:
    if config.model_type == "deepseek_v2" and config.num_experts_per_tok is None:  # the default of its class
        raise UnsupportedModelError(
            "the config has no num_experts_per_tok; state how many experts compute a token, as the config.json of the "
            "model does"
        )
    nope, rope, latent, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim
    # The residual stream, its normed copy and the outputs of both halves of the layer; queries, queries in the space of
    # latents, what attention gives there and per head; both intermediates of the widest MLP.
    attention = config.num_attention_heads * ((nope + rope) + (latent + rope) + latent + (value or 0))
    has_experts = config.model_type not in _DENSE
    active = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts) if has_experts else 0
    widest = max(config.intermediate_size, active)
    return Dims(
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        experts=config.n_routed_experts if has_experts else 0,
        top_k=config.num_experts_per_tok if has_experts else 0,
        # A latent, a rotary key and, with an indexer, its key.
        cache_values=latent + rope + getattr(config, "index_head_dim", 0),
        work_values=4 * config.hidden_size + attention + 2 * widest,
    )


def mla(config: Any) -> MlaDims:
    return MlaDims(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        latent=config.kv_lora_rank,
    )


def sparse_layers(config: Any) -> tuple[bool, ...]:
    """Which layers have experts."""
    layers = range(config.num_hidden_layers)
    if config.model_type in _DENSE:
        return tuple(False for _ in layers)
    # Two classes go by the list of kinds alone; GLM's does not even make it from the first_k_dense_replace in its
    # config.json.
    if config.model_type in ("glm4_moe_lite", "deepseek_v32"):
        kinds = getattr(config, "mlp_layer_types", None)
        return tuple(kinds[layer] == "sparse" if kinds else layer > 0 for layer in layers)
    return tuple(layer >= (config.first_k_dense_replace or 0) for layer in layers)


def router(config: Any) -> Router:
    is_sigmoid = config.model_type != "deepseek_v2"
    is_limited = is_sigmoid or config.topk_method == "group_limited_greedy"
    return Router(
        sigmoid=is_sigmoid,
        groups=config.n_group if is_limited else 1,
        top_groups=config.topk_group if is_limited else 1,
        top_k=config.num_experts_per_tok,
        # transformers' DeepseekV2TopkRouter has no normalization, whatever norm_topk_prob says.
        normalize=is_sigmoid and bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
    )


# ---- Configs read without transformers -------------------------------------------------------------------------------

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2": {
        **_COMMON,
        "first_k_dense_replace": 0,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_attention_heads": 32,
        "num_experts_per_tok": None,
        "num_hidden_layers": 32,
        "topk_method": "greedy",
        "vocab_size": 102400,
    },
    "deepseek_v3": {
        **_COMMON,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "rope_interleave": True,
        "vocab_size": 129280,
    },
    "glm4_moe_lite": {
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "max_position_embeddings": 202752,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_attention_heads": 20,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 47,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "rope_interleave": True,
        "v_head_dim": 256,
        "vocab_size": 154880,
    },
}


def _is_refused(model_type: str, values: Mapping[str, Any]) -> bool:
    """As by transformers."""
    return model_type == "deepseek_v2" and values["hidden_size"] % (values["num_attention_heads"] or 1) != 0


PLAIN = PlainConfigs(
    _DEFAULTS,
    may_be_none=("q_lora_rank",),
    other_names=("num_experts", "num_local_experts"),
    refused=_is_refused,
)
