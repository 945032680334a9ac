"""The sizes of a DeepSeek model, and its config from GGUF metadata alone.

What the keys mean follows from the converter that writes them and has changed twice: since 2025-04 the plain
``attention.key_length`` and ``value_length`` describe the latent attention (kv_lora_rank + rope, kv_lora_rank) with
``head_count_kv`` 1, and ``*_mla`` the decompressed heads; before, the plain ones described the heads. Expert groups are
stated since 2025-10 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families.base import Dims, MlaDims, PlainConfigs, Router
from transformers_kt.gguf.facts import MOST_CONTEXT, MOST_LAYERS, MOST_WIDTH, Facts

_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func


class _Routing(NamedTuple):
    gating: int
    hidden_size: int
    experts: int
    experts_per_token: int


# (n_group, topk_group) of the models whose files may predate the keys, from their config.json. llama.cpp runs such
# files without groups; the models were trained with them, so this is what transformers computes from the folder.
_GROUPS_OF_OLD_FILES = {
    _Routing(_SOFTMAX, 5120, 160, 6): (8, 3),  # DeepSeek-V2, V2.5, Coder-V2
    _Routing(_SIGMOID, 7168, 256, 8): (8, 4),  # DeepSeek-V3, R1
}

# Keys that change the computation in ways transformers' DeepSeek models do not know, with the values that do not.
_NEUTRAL_VALUES = {
    "attention.temperature_scale": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
}


# ---- Sizes of a config -----------------------------------------------------------------------------------------------


def dims(config: Any) -> Dims:
    if config.num_experts_per_tok is None:  # the default of V2's config class
        raise UnsupportedModelError(
            "the config has no num_experts_per_tok; state how many experts compute a token, as the config.json of the "
            "model does"
        )
    nope, rope, latent, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank, config.v_head_dim
    # The residual stream, its normed copy and the outputs of both halves of the layer; queries, queries in the space of
    # latents, what attention gives there and per head; both intermediates of the widest MLP.
    attention = config.num_attention_heads * ((nope + rope) + (latent + rope) + latent + (value or 0))
    active = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    widest = max(config.intermediate_size, active)
    return Dims(
        layers=config.num_hidden_layers,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        cache_values=latent + rope,  # a latent and a rotary key
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


def router(config: Any) -> Router:
    is_v3 = config.model_type == "deepseek_v3"
    is_limited = is_v3 or config.topk_method == "group_limited_greedy"
    return Router(
        sigmoid=is_v3,
        groups=config.n_group if is_limited else 1,
        top_groups=config.topk_group if is_limited else 1,
        top_k=config.num_experts_per_tok,
        # transformers' DeepseekV2TopkRouter has no normalization, whatever norm_topk_prob says.
        normalize=is_v3 and bool(config.norm_topk_prob),
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

# ---- Metadata of a GGUF ----------------------------------------------------------------------------------------------


def config_values(facts: Facts) -> dict[str, Any]:
    """The content of a config.json. Sigmoid routing makes a "deepseek_v3", softmax routing a "deepseek_v2": that is
    what the two model classes compute, whatever the model was called."""
    facts.require_neutral(_NEUTRAL_VALUES)
    routing = _routing(facts)
    return {
        **_model_type(facts, routing),
        **_sizes(facts),
        **_experts(facts, routing),
        **_attention(facts),
        "tie_word_embeddings": facts.tensors is not None and "output.weight" not in facts.tensors,
        **facts.token_ids(),
    }


def _model_type(facts: Facts, routing: _Routing) -> dict[str, Any]:
    normalized = facts.boolean("expert_weights_norm", default=False)
    if routing.gating == _SIGMOID:
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "norm_topk_prob": normalized,
            "rope_interleave": True,
            "num_mtp_layers": 0,  # the class default is 1, and the prediction layers are not loaded
        }
    if normalized:
        # transformers' V2 router has no such step and would silently leave it out.
        raise facts.unsupported("expert_weights_norm", True, "false, with softmax routing")
    n_group, _ = _groups(facts, routing)
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "norm_topk_prob": False,
        "topk_method": "greedy" if n_group == 1 else "group_limited_greedy",
    }


def _sizes(facts: Facts) -> dict[str, Any]:
    layers = _layer_count(facts)
    context_length = facts.integer("context_length", most=MOST_CONTEXT)
    return {
        "vocab_size": facts.vocab_size(),
        "hidden_size": facts.integer("embedding_length", most=MOST_WIDTH),
        "intermediate_size": facts.integer("feed_forward_length", most=MOST_WIDTH),
        "num_hidden_layers": layers,
        "first_k_dense_replace": facts.integer("leading_dense_block_count", least=0, most=layers, default=0),
        "max_position_embeddings": context_length,
        "rope_parameters": _rope_parameters(facts, context_length),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", above=0.0),
    }


def _experts(facts: Facts, routing: _Routing) -> dict[str, Any]:
    n_group, topk_group = _groups(facts, routing)
    return {
        "moe_intermediate_size": facts.integer("expert_feed_forward_length", most=MOST_WIDTH),
        "n_shared_experts": facts.integer("expert_shared_count", most=MOST_WIDTH),
        "n_routed_experts": routing.experts,
        "num_experts_per_tok": routing.experts_per_token,
        "n_group": n_group,
        "topk_group": topk_group,
        "routed_scaling_factor": facts.number("expert_weights_scale", default=1.0, above=0.0),
    }


def _attention(facts: Facts) -> dict[str, Any]:
    heads = facts.integer("attention.head_count", most=MOST_WIDTH)
    rope_dim = facts.integer("rope.dimension_count", most=MOST_WIDTH)
    key_dim, value_dim = _head_dims(facts, heads, rope_dim)
    return {
        "num_attention_heads": heads,
        # The files state 1 (latent attention seen as multi-query) or the head count; transformers wants the latter.
        "num_key_value_heads": heads,
        "kv_lora_rank": facts.integer("attention.kv_lora_rank", most=MOST_WIDTH),
        "q_lora_rank": _q_lora_rank(facts),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "attention_bias": False,
    }


def _routing(facts: Facts) -> _Routing:
    hidden_size = facts.integer("embedding_length", most=MOST_WIDTH)
    experts = facts.integer("expert_count", most=MOST_WIDTH)
    return _Routing(_gating(facts), hidden_size, experts, facts.integer("expert_used_count", most=experts))


def _layer_count(facts: Facts) -> int:
    """Decoder layers, without those for multi-token prediction, which files count, drop or leave uncounted."""
    stated = facts.integer("block_count", most=MOST_LAYERS)
    prediction = facts.integer("nextn_predict_layers", least=0, most=stated - 1, default=0)
    if facts.tensors is None:
        return stated - prediction
    layers = stated
    while layers > 1 and any(name.startswith(f"blk.{layers - 1}.nextn.") for name in facts.tensors):
        layers -= 1
    while layers > stated - prediction and f"blk.{layers - 1}.attn_norm.weight" not in facts.tensors:
        layers -= 1
    return layers


def _head_dims(facts: Facts, heads: int, rope_dim: int) -> tuple[int, int]:
    """(key width with rope, value width) of one decompressed head."""
    kv_heads = facts.integer("attention.head_count_kv", most=heads, default=heads)
    if kv_heads not in (1, heads):
        raise facts.unsupported("attention.head_count_kv", kv_heads, f"1 or {heads}")
    suffix = "_mla" if facts.has("attention.key_length_mla") else ""
    key_dim = facts.integer(f"attention.key_length{suffix}", least=rope_dim + 1, most=MOST_WIDTH)
    return key_dim, facts.integer(f"attention.value_length{suffix}", most=MOST_WIDTH)


def _q_lora_rank(facts: Facts) -> int | None:
    if facts.tensors is not None and "blk.0.attn_q.weight" in facts.tensors:
        return None
    return facts.integer("attention.q_lora_rank", least=0, most=MOST_WIDTH, default=0) or None


def _gating(facts: Facts) -> int:
    # Files of V2 and of some sigmoid-routed models lack the key; only the latter have the correction bias.
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in facts.tensors or ())
    gating = facts.integer("expert_gating_func", least=0, most=255, default=0) or (_SIGMOID if has_bias else _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise facts.unsupported("expert_gating_func", gating, "1 (softmax) or 2 (sigmoid)")
    return gating


def _groups(facts: Facts, routing: _Routing) -> tuple[int, int]:
    """(n_group, topk_group): 1, 1 where routing is not limited to groups."""
    if facts.has("expert_group_count"):
        n_group = facts.integer("expert_group_count", least=0, most=routing.experts) or 1
        topk_group = facts.integer("expert_group_used_count", least=0, most=n_group, default=1) or 1
    else:
        n_group, topk_group = _GROUPS_OF_OLD_FILES.get(routing, (1, 1))
    if n_group == 1:
        return 1, 1
    per_group = routing.experts // n_group
    # Sigmoid routing ranks a group by the sum of its two best experts.
    if routing.experts % n_group or per_group < 2 or topk_group * per_group < routing.experts_per_token:
        raise facts.nonsense(
            "expert_group_count",
            n_group,
            f"a number that splits {routing.experts} experts into equal groups of at least 2, {topk_group} of which "
            f"hold the {routing.experts_per_token} experts of a token,",
        )
    return n_group, topk_group


def _rope_parameters(facts: Facts, context_length: int) -> dict[str, Any]:
    theta = facts.number("rope.freq_base", default=10000.0, above=0.0)
    factor = facts.number("rope.scaling.factor", default=1.0, above=0.0)
    kind = facts.metadata.get(facts.prefix + "rope.scaling.type", "none")
    if not isinstance(kind, str):
        raise facts.nonsense("rope.scaling.type", kind, "none or yarn")
    if kind == "none" and factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "yarn":
        raise facts.unsupported("rope.scaling.type", kind, f"none (without a factor; here {factor}) or yarn")
    if factor < 1.0:
        raise facts.nonsense("rope.scaling.factor", factor, "a number of at least 1")
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": facts.integer(
            "rope.scaling.original_context_length", most=MOST_CONTEXT, default=context_length
        ),
        "beta_fast": facts.number("rope.scaling.yarn_beta_fast", default=32.0, above=0.0),
        "beta_slow": facts.number("rope.scaling.yarn_beta_slow", default=1.0, above=0.0),
    }
    # The converter stores a tenth of mscale_all_dim and leaves out mscale, which equals it in every DeepSeek model
    # (0.707 in V2, 1.0 in V3): cos and sin stay unscaled, the softmax scale takes mscale_all_dim's factor squared.
    # Without the key the model has neither; then cos and sin are scaled by the factor alone, as in DeepSeek's own code.
    mscale_all_dim = round(10.0 * facts.number("rope.scaling.yarn_log_multiplier", default=0.0), 6)
    if mscale_all_dim:
        parameters |= {"mscale": mscale_all_dim, "mscale_all_dim": mscale_all_dim}
    return parameters
