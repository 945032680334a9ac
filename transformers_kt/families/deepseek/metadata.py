"""The config of a DeepSeek model from GGUF metadata alone.

What the keys mean follows from the converter that writes them and has changed twice: since 2025-04 the plain
``attention.key_length`` and ``value_length`` describe the latent attention (kv_lora_rank + rope, kv_lora_rank) with
``head_count_kv`` 1, and ``*_mla`` the decompressed heads; before, the plain ones described the heads. Expert groups are
stated since 2025-10 only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from transformers_kt.gguf.facts import MOST_CONTEXT, MOST_LAYERS, MOST_WIDTH, USE_A_FOLDER, Facts
from transformers_kt.gguf.reader import TensorInfo

_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func
# Far beyond what YaRN is used with, so that no power or logarithm of them overflows.
_MOST_ROPE_FACTOR = 1e6
_MOST_ROPE_BASE = 1e30

_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
_ROUTER = re.compile(r"blk\.(\d{1,6})\.ffn_gate_inp\.weight")


class _Routing(NamedTuple):
    gating: int
    hidden_size: int
    experts: int
    experts_per_token: int


class _Published(NamedTuple):
    """Of a model's config.json, what its files may predate."""

    groups: tuple[int, int]  # n_group, topk_group
    weights_scale: float
    weights_norm: bool
    freq_base: float
    mscale: float | None  # None: no YaRN
    beta_fast: float


# llama.cpp runs files without groups or scale as it can; the models were trained with them, so this is what
# transformers computes from the folder.
_PUBLISHED = {
    # DeepSeek-V2, V2.5, Coder-V2
    _Routing(_SOFTMAX, 5120, 160, 6): _Published((8, 3), 16.0, False, 10000.0, 0.707, 32.0),
    # DeepSeek-V2-Lite, Coder-V2-Lite
    _Routing(_SOFTMAX, 2048, 64, 6): _Published((1, 1), 1.0, False, 10000.0, 0.707, 32.0),
    # DeepSeek-V3, R1
    _Routing(_SIGMOID, 7168, 256, 8): _Published((8, 4), 2.5, True, 10000.0, 1.0, 32.0),
    # Kimi-K2
    _Routing(_SIGMOID, 7168, 384, 8): _Published((1, 1), 2.827, True, 50000.0, 1.0, 1.0),
    # GLM-4.7-Flash
    _Routing(_SIGMOID, 2048, 64, 4): _Published((1, 1), 1.8, True, 1000000.0, None, 32.0),
    # Moonlight
    _Routing(_SIGMOID, 2048, 64, 6): _Published((1, 1), 2.446, True, 50000.0, None, 32.0),
    # tiny-r1, which this package brings
    _Routing(_SIGMOID, 256, 8, 2): _Published((4, 2), 2.5, True, 10000.0, 1.0, 32.0),
}

# Keys that change the computation in ways transformers' DeepSeek models do not know, with the values that do not.
_NEUTRAL_VALUES = {
    "attention.temperature_scale": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
}


def config_values(facts: Facts) -> dict[str, Any]:
    """The content of a config.json. Sigmoid routing makes a "deepseek_v3", softmax routing a "deepseek_v2": that is
    what the two model classes compute, whatever the model was called."""
    facts.told = {} if facts.tensors is None else dict(_told_by_tensors(facts.tensors))
    facts.require_neutral(_NEUTRAL_VALUES)
    routing = None if _is_dense(facts) else _routing(facts)
    published = None if routing is None else _PUBLISHED.get(routing)
    experts = _NO_EXPERTS if routing is None else {**_model_type(facts, routing), **_experts(facts, routing)}
    return {
        **experts,
        **_sizes(facts, published, has_experts=routing is not None),
        **_attention(facts),
        "tie_word_embeddings": bool(facts.tensors) and "output.weight" not in (facts.tensors or ()),
        **facts.token_ids(),
    }


_NO_EXPERTS = {"model_type": "youtu", "architectures": ["YoutuForCausalLM"], "rope_interleave": True}
"""Of Youtu-LLM, the one model without experts that transformers has; it computes as V3 does."""


def _model_type(facts: Facts, routing: _Routing) -> dict[str, Any]:
    published = _PUBLISHED.get(routing)
    if routing.gating == _SIGMOID:
        norm = bool(facts.default_for("expert_weights_norm", False, published and published.weights_norm))
        if facts.architecture == "deepseek32":
            return {
                "model_type": "deepseek_v32",
                "architectures": ["DeepseekV32ForCausalLM"],
                "norm_topk_prob": facts.boolean("expert_weights_norm", default=norm),
                "index_n_heads": facts.integer("attention.indexer.head_count", most=MOST_WIDTH),
                "index_head_dim": facts.integer("attention.indexer.key_length", most=MOST_WIDTH),
                "index_topk": facts.integer("attention.indexer.top_k", most=MOST_CONTEXT),
            }
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "norm_topk_prob": facts.boolean("expert_weights_norm", default=norm),
            "rope_interleave": True,
            "num_mtp_layers": 0,  # the class default is 1, and the prediction layers are not loaded
        }
    if facts.architecture == "deepseek32":
        raise facts.unsupported("expert_gating_func", routing.gating, "2 (sigmoid), with an indexer,")
    norm = facts.boolean("expert_weights_norm", default=False)
    if norm:
        facts.remarks.append(
            f"The GGUF has the weights of a token's experts normalized ({facts.prefix}expert_weights_norm). "
            "transformers' DeepSeek-V2 does not do that, whatever its config says, so neither is it done here; "
            "llama.cpp does."
        )
    n_group, _ = _groups(facts, routing)
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "norm_topk_prob": norm,
        "topk_method": "greedy" if n_group == 1 else "group_limited_greedy",
    }


def _sizes(facts: Facts, published: _Published | None, *, has_experts: bool) -> dict[str, Any]:
    layers = _layer_count(facts)
    context_length = facts.integer("context_length", most=MOST_CONTEXT)
    dense = facts.integer("leading_dense_block_count", least=0, most=layers, default=0)
    return {
        **({"first_k_dense_replace": dense} if has_experts else {}),
        "vocab_size": facts.vocab_size(),
        "hidden_size": facts.integer("embedding_length", most=MOST_WIDTH),
        "intermediate_size": facts.integer("feed_forward_length", most=MOST_WIDTH),
        "num_hidden_layers": layers,
        "max_position_embeddings": context_length,
        "rope_parameters": _rope_parameters(facts, context_length, published),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", above=0.0),
    }


def _experts(facts: Facts, routing: _Routing) -> dict[str, Any]:
    n_group, topk_group = _groups(facts, routing)
    published = _PUBLISHED.get(routing)
    scale = facts.default_for("expert_weights_scale", 1.0, published and published.weights_scale)
    return {
        "moe_intermediate_size": facts.integer("expert_feed_forward_length", most=MOST_WIDTH),
        "n_shared_experts": facts.integer("expert_shared_count", most=MOST_WIDTH),
        "n_routed_experts": routing.experts,
        "num_experts_per_tok": routing.experts_per_token,
        "n_group": n_group,
        "topk_group": topk_group,
        "routed_scaling_factor": facts.number("expert_weights_scale", default=scale, above=0.0),
    }


def _attention(facts: Facts) -> dict[str, Any]:
    heads = facts.integer("attention.head_count", most=MOST_WIDTH)
    rope_dim = facts.integer("rope.dimension_count", most=MOST_WIDTH)
    if rope_dim % 2:
        raise facts.nonsense("rope.dimension_count", rope_dim, "an even number")
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
    routing = _Routing(_gating(facts), hidden_size, experts, facts.integer("expert_used_count", most=experts))
    if routing.gating == _SOFTMAX and routing not in _PUBLISHED:
        facts.default_for("expert_gating_func", "1, softmax,")
    return routing


def _is_dense(facts: Facts) -> bool:
    """Whether no layer has experts: by the tensors, else by the count of layers that have none."""
    if facts.integer("expert_count", least=0, most=MOST_WIDTH, default=0) > 0:
        return False
    if facts.tensors:
        return not any(map(_ROUTER.fullmatch, facts.tensors))
    most = facts.integer("block_count", most=MOST_LAYERS)
    return facts.integer("leading_dense_block_count", least=0, most=most, default=0) == most


def _told_by_tensors(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int]]:
    """Keys, without their prefix, and the values that names and shapes of ``tensors`` tell."""

    def shape(name: str, dims: int) -> tuple[int, ...] | None:
        info = tensors.get(name)
        return info.shape if info is not None and len(info.shape) == dims else None

    numbers = [int(match[1]) for match in map(_BLOCK.match, tensors) if match]
    if numbers:
        yield "block_count", max(numbers) + 1
    if embedding := shape("token_embd.weight", 2):
        yield "embedding_length", embedding[1]
    if dense := shape("blk.0.ffn_gate.weight", 2):
        yield "feed_forward_length", dense[0]
    if query := shape("blk.0.attn_q_a_norm.weight", 1):
        yield "attention.q_lora_rank", query[0]
    if latent := shape("blk.0.attn_kv_a_norm.weight", 1):
        yield "attention.kv_lora_rank", latent[0]
        if (both := shape("blk.0.attn_kv_a_mqa.weight", 2)) and both[0] > latent[0]:
            rope_dim = both[0] - latent[0]
            yield "rope.dimension_count", rope_dim
            if (keys := shape("blk.0.attn_k_b.weight", 3)) and (values := shape("blk.0.attn_v_b.weight", 3)):
                yield "attention.head_count", keys[0]
                yield "attention.key_length_mla", keys[2] + rope_dim
                yield "attention.value_length_mla", values[1]
    routers = [int(match[1]) for match in map(_ROUTER.fullmatch, tensors) if match]
    if not routers:
        return
    first = min(routers)
    yield "leading_dense_block_count", first
    if down := shape(f"blk.{first}.ffn_down_exps.weight", 3):
        yield "expert_count", down[0]
        yield "expert_feed_forward_length", down[2]
        if (shared := shape(f"blk.{first}.ffn_down_shexp.weight", 2)) and shared[1] % down[2] == 0:
            yield "expert_shared_count", shared[1] // down[2]


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
    if any(".nextn." in name for name in facts.tensors):
        facts.remarks.append(
            f"The layers that predict further tokens, from blk.{layers} on, are not loaded: transformers' models of "
            "this kind have none."
        )
    return layers


def _head_dims(facts: Facts, heads: int, rope_dim: int) -> tuple[int, int]:
    """(key width with rope, value width) of one decompressed head."""
    kv_heads = facts.integer("attention.head_count_kv", most=heads, default=heads)
    if kv_heads not in (1, heads):
        raise facts.unsupported("attention.head_count_kv", kv_heads, f"1 or {heads}")
    has_split_keys = "attention.key_length_mla" in facts.told
    suffix = "_mla" if facts.has("attention.key_length_mla") or has_split_keys else ""
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
        published = _PUBLISHED.get(routing)
        n_group, topk_group = facts.default_for("expert_group_count", (1, 1), published and published.groups)
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


def _rope_parameters(facts: Facts, context_length: int, published: _Published | None) -> dict[str, Any]:
    base = facts.default_for("rope.freq_base", 10000.0, published and published.freq_base)
    # With a base of 1 all pairs of a head turn alike, and YaRN divides by its logarithm.
    theta = facts.number("rope.freq_base", default=base, above=1.0, most=_MOST_ROPE_BASE)
    factor = facts.number("rope.scaling.factor", default=1.0, above=0.0, most=_MOST_ROPE_FACTOR)
    kind = facts.metadata.get(facts.prefix + "rope.scaling.type", "none")
    if not isinstance(kind, str):
        raise facts.nonsense("rope.scaling.type", kind, "none, linear or yarn")
    if kind == "none" and factor == 1.0:
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        accepted = f"none (without a factor; here {factor}), linear or yarn"
        raise facts.unsupported("rope.scaling.type", kind, accepted)
    if factor < 1.0:
        raise facts.nonsense("rope.scaling.factor", factor, "a number of at least 1")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    original = facts.default_for("rope.scaling.original_context_length", context_length)
    beta_fast = facts.default_for("rope.scaling.yarn_beta_fast", 32.0, published and published.beta_fast)
    beta_slow = facts.default_for("rope.scaling.yarn_beta_slow", 1.0, published and 1.0)
    beta = {"above": 1 / _MOST_ROPE_FACTOR, "most": _MOST_ROPE_FACTOR}
    parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": facts.integer(
            "rope.scaling.original_context_length", most=MOST_CONTEXT, default=original
        ),
        "beta_fast": facts.number("rope.scaling.yarn_beta_fast", default=beta_fast, **beta),
        "beta_slow": facts.number("rope.scaling.yarn_beta_slow", default=beta_slow, **beta),
    }
    # The converter stores a tenth of mscale_all_dim and leaves out mscale, which equals it in every DeepSeek model
    # (0.707 in V2, 1.0 in V3): cos and sin stay unscaled, the softmax scale takes mscale_all_dim's factor squared.
    # Without it the model has neither; then cos and sin are scaled by the factor alone, as in DeepSeek's own code.
    mscale_all_dim = published and published.mscale
    if facts.has("rope.scaling.yarn_log_multiplier"):
        mscale_all_dim = round(10.0 * facts.number("rope.scaling.yarn_log_multiplier", most=_MOST_ROPE_FACTOR), 6)
        if published is None or published.mscale != mscale_all_dim:
            facts.remarks.append(
                f"Of YaRN's two factors the GGUF states mscale_all_dim alone, {mscale_all_dim:g}; the same is taken "
                f"for mscale, as in every DeepSeek release. {USE_A_FOLDER}."
            )
    elif mscale_all_dim is None and facts.tensors:
        # The first V2 files lack the key and mean 0.707; a model without the scaling lacks it rightly. Logits of one
        # taken for the other are off by several units.
        raise facts.nonsense("rope.scaling.yarn_log_multiplier", None, "with YaRN, a number (0 for no such scaling)")
    if mscale_all_dim:
        parameters |= {"mscale": mscale_all_dim, "mscale_all_dim": mscale_all_dim}
    return parameters
