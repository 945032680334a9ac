"""transformers' config of a DeepSeek model from GGUF metadata alone.

What the keys mean follows from the converter that writes them and has changed twice: since 2025-04 the plain
``attention.key_length`` and ``value_length`` describe the latent attention (kv_lora_rank + rope, kv_lora_rank) with
``head_count_kv`` 1, and ``*_mla`` the decompressed heads; before, the plain ones described the heads. Expert groups are
stated since 2025-10 only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.facts import NO_TOKEN
from transformers_kt.gguf.reader import GgufFile, StringArray, TensorInfo

if TYPE_CHECKING:
    from transformers import DeepseekV2Config, DeepseekV3Config, GenerationConfig

ARCHITECTURES = ("deepseek2",)

_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func

# Far above any model, far below where a product of two would trouble anyone.
_MOST_WIDTH = 1 << 20
_MOST_LAYERS = 1 << 12
_MOST_VOCAB = 1 << 24
_MOST_CONTEXT = 1 << 31


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


def config_from_gguf(
    source: Checkpoint | GgufFile | Mapping[str, Any],
) -> DeepseekV2Config | DeepseekV3Config:
    """The config of the model in ``source``. Metadata alone will do; with tensors, doubts are settled by them.

    Sigmoid routing makes a `DeepseekV3Config`, softmax routing a `DeepseekV2Config`: that is what the two model classes
    compute, whatever the model was called.

    Raises `UnsupportedModelError` for another architecture or a feature those classes lack, `GgufFormatError` for
    metadata that is missing or makes no sense.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import DeepseekV2Config, DeepseekV3Config

    values = config_values(source)
    config_class = {cls.model_type: cls for cls in (DeepseekV2Config, DeepseekV3Config)}[values.pop("model_type")]
    try:
        return config_class(**values)
    except StrictDataclassError as error:
        raise GgufFormatError(f"{_Facts(source).name}: the metadata makes no valid config: {error}") from error


def config_values(source: Checkpoint | GgufFile | Mapping[str, Any]) -> dict[str, Any]:
    """What `config_from_gguf` states, as a config.json would have it, without transformers. Raises as that does, but
    not for what transformers alone refuses."""
    facts = _Facts(source)
    hidden_size = facts.integer("embedding_length", most=_MOST_WIDTH)
    heads = facts.integer("attention.head_count", most=_MOST_WIDTH)
    rope_dim = facts.integer("rope.dimension_count", most=_MOST_WIDTH)
    key_dim, value_dim = _head_dims(facts, heads, rope_dim)
    layers = _layer_count(facts)
    gating = _gating(facts)
    experts = facts.integer("expert_count", most=_MOST_WIDTH)
    experts_per_token = facts.integer("expert_used_count", most=experts)
    n_group, topk_group = _groups(facts, _Routing(gating, hidden_size, experts, experts_per_token))
    context_length = facts.integer("context_length", most=_MOST_CONTEXT)
    for key, neutral in _NEUTRAL_VALUES.items():
        if (found := facts.number(key, default=neutral)) != neutral:
            raise facts.unsupported(key, found, f"{neutral}, or no such key")

    common: dict[str, Any] = {
        "vocab_size": _vocab_size(facts),
        "hidden_size": hidden_size,
        "intermediate_size": facts.integer("feed_forward_length", most=_MOST_WIDTH),
        "moe_intermediate_size": facts.integer("expert_feed_forward_length", most=_MOST_WIDTH),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        # The files state 1 (latent attention seen as multi-query) or the head count; transformers wants the latter.
        "num_key_value_heads": heads,
        "n_shared_experts": facts.integer("expert_shared_count", most=_MOST_WIDTH),
        "n_routed_experts": experts,
        "num_experts_per_tok": experts_per_token,
        "n_group": n_group,
        "topk_group": topk_group,
        "routed_scaling_factor": facts.number("expert_weights_scale", default=1.0, above=0.0),
        "kv_lora_rank": facts.integer("attention.kv_lora_rank", most=_MOST_WIDTH),
        "q_lora_rank": _q_lora_rank(facts),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
        "first_k_dense_replace": facts.integer("leading_dense_block_count", least=0, most=layers, default=0),
        "max_position_embeddings": context_length,
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", above=0.0),
        "rope_parameters": _rope_parameters(facts, context_length),
        "tie_word_embeddings": facts.tensors is not None and "output.weight" not in facts.tensors,
        "attention_bias": False,
        **_token_ids(facts),
    }
    normalized = facts.boolean("expert_weights_norm", default=False)
    if gating == _SIGMOID:
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "norm_topk_prob": normalized,
            "rope_interleave": True,
            "num_mtp_layers": 0,  # the class default is 1, and the prediction layers are not loaded
            **common,
        }
    if normalized:
        # transformers' V2 router has no such step and would silently leave it out.
        raise facts.unsupported("expert_weights_norm", True, "false, with softmax routing")
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "norm_topk_prob": False,
        "topk_method": "greedy" if n_group == 1 else "group_limited_greedy",
        **common,
    }


def generation_config_from_gguf(source: Checkpoint | GgufFile | Mapping[str, Any]) -> GenerationConfig:
    """The token ids that start, end and pad generation. Every id that ends a turn is an end."""
    from transformers import GenerationConfig

    return GenerationConfig(**_token_ids(_Facts(source)))


class _Facts:
    """The metadata below one architecture's prefix, each value checked for its type and range."""

    def __init__(self, source: Checkpoint | GgufFile | Mapping[str, Any]) -> None:
        self.tensors: Mapping[str, TensorInfo] | None = None
        self.name = "the GGUF metadata"
        if isinstance(source, (Checkpoint, GgufFile)):
            self.metadata: Mapping[str, Any] = source.metadata
            self.tensors = source.tensors
            self.name = str(source.path)
        else:
            self.metadata = source
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.name}: general.architecture is {architecture!r}; {', '.join(ARCHITECTURES)} (DeepSeek V2, V3, "
                "R1 and models built like them) is accepted"
            )
        self.prefix = f"{architecture}."

    def integer(self, key: str, *, least: int = 1, most: int, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.nonsense(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, *, default: float | None = None, above: float = -math.inf) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.nonsense(key, value, "a finite number" + (f" above {above}" if math.isfinite(above) else ""))
        return _shortest(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.nonsense(key, value, "true or false")
        return value

    def token_id(self, which: str) -> int | None:
        key = f"tokenizer.ggml.{which}_token_id"
        value = self.metadata.get(key, -1)
        if type(value) is not int or not (0 <= value < _MOST_VOCAB or value in NO_TOKEN):
            raise GgufFormatError(f"{self.name}: {key} is {value!r}; a token id is accepted")
        return None if value in NO_TOKEN else value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def nonsense(self, key: str, found: object, accepted: str) -> GgufFormatError:
        if found is None:
            return GgufFormatError(f"{self.name}: {self.prefix}{key} is missing; {accepted} is expected")
        return GgufFormatError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def unsupported(self, key: str, found: object, accepted: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def _value(self, key: str, default: float | None) -> Any:
        return self.metadata.get(self.prefix + key, default)


def _shortest(value: float) -> float:
    """The decimal that was meant: files hold 32-bit floats, where 1e-06 reads as 9.999999974752427e-07."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)


def _layer_count(facts: _Facts) -> int:
    """Decoder layers, without those for multi-token prediction, which files count, drop or leave uncounted."""
    stated = facts.integer("block_count", most=_MOST_LAYERS)
    prediction = facts.integer("nextn_predict_layers", least=0, most=stated - 1, default=0)
    if facts.tensors is None:
        return stated - prediction
    layers = stated
    while layers > 1 and any(name.startswith(f"blk.{layers - 1}.nextn.") for name in facts.tensors):
        layers -= 1
    while layers > stated - prediction and f"blk.{layers - 1}.attn_norm.weight" not in facts.tensors:
        layers -= 1
    return layers


def _head_dims(facts: _Facts, heads: int, rope_dim: int) -> tuple[int, int]:
    """(key width with rope, value width) of one decompressed head."""
    kv_heads = facts.integer("attention.head_count_kv", most=heads, default=heads)
    if kv_heads not in (1, heads):
        raise facts.unsupported("attention.head_count_kv", kv_heads, f"1 or {heads}")
    suffix = "_mla" if facts.has("attention.key_length_mla") else ""
    key_dim = facts.integer(f"attention.key_length{suffix}", least=rope_dim + 1, most=_MOST_WIDTH)
    return key_dim, facts.integer(f"attention.value_length{suffix}", most=_MOST_WIDTH)


def _q_lora_rank(facts: _Facts) -> int | None:
    if facts.tensors is not None and "blk.0.attn_q.weight" in facts.tensors:
        return None
    return facts.integer("attention.q_lora_rank", least=0, most=_MOST_WIDTH, default=0) or None


def _gating(facts: _Facts) -> int:
    # Files of V2 and of some sigmoid-routed models lack the key; only the latter have the correction bias.
    has_bias = any(name.endswith(".exp_probs_b.bias") for name in facts.tensors or ())
    gating = facts.integer("expert_gating_func", least=0, most=255, default=0) or (_SIGMOID if has_bias else _SOFTMAX)
    if gating not in (_SOFTMAX, _SIGMOID):
        raise facts.unsupported("expert_gating_func", gating, "1 (softmax) or 2 (sigmoid)")
    return gating


def _groups(facts: _Facts, routing: _Routing) -> tuple[int, int]:
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


def _rope_parameters(facts: _Facts, context_length: int) -> dict[str, Any]:
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
            "rope.scaling.original_context_length", most=_MOST_CONTEXT, default=context_length
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


def _vocab_size(facts: _Facts) -> int:
    if facts.tensors is not None and "token_embd.weight" in facts.tensors:
        return facts.tensors["token_embd.weight"].shape[0]
    if facts.has("vocab_size"):
        return facts.integer("vocab_size", most=_MOST_VOCAB)
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, (StringArray, list)):
        raise facts.nonsense("vocab_size", None, "that key, tokenizer.ggml.tokens or the tensor token_embd.weight")
    return len(tokens)


def _token_ids(facts: _Facts) -> dict[str, Any]:
    ends = [facts.token_id(which) for which in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(token for token in ends if token is not None))
    return {
        "bos_token_id": facts.token_id("bos"),
        "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
        "pad_token_id": facts.token_id("padding"),
    }
