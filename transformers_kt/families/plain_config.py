"""The values of a config that planning needs, without transformers, whose configs import torch.

What is not plainly understood is no `PlainConfig`: then the caller takes transformers' own config, which knows it or
words the error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PlainConfig = SimpleNamespace
"""Has ``model_type`` and the attributes of DEFAULTS, under the names of transformers' configs."""

_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# Of transformers' config classes; None where a config without the value is none to plan with.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
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
_MAY_BE_NONE = ("q_lora_rank",)
# Other names of the above, and what makes layers differ from each other.
_OUT_OF_THE_ORDINARY = ("num_experts", "num_local_experts", "per_layer_config", "layer_types", "mlp_layer_types")
_ROPE_TYPES = ("default", "linear", "yarn")
_CONFIG_FILE = "config.json"


def plain_config(facts: Mapping[str, Any]) -> PlainConfig | None:
    """The config that ``facts`` state, as a config.json holds them; None where anything is out of the ordinary."""
    model_type = facts.get("model_type")
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        return None
    rope_type = _rope_type(facts)
    if rope_type is None or any(facts.get(key) is not None for key in _OUT_OF_THE_ORDINARY):
        return None
    values = {}
    for name, default in DEFAULTS[model_type].items():
        values[name] = value = facts.get(name, default)
        if type(value) is not (int if default is None else type(default)) and not (
            value is None and name in _MAY_BE_NONE
        ):
            return None
    if values["hidden_size"] % (values["num_attention_heads"] or 1) and model_type == "deepseek_v2":
        return None  # refused by transformers
    return PlainConfig(model_type=model_type, rope_parameters={"rope_type": rope_type}, **values)


def read_config(name: str, hub: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The content of the config.json of a folder or hub id, or of the JSON file ``name``. None if it cannot be had."""
    try:
        facts = json.loads(_config_file(name, hub).read_text(encoding="utf-8"))
    except Exception:  # whatever the hub raises: transformers will ask again, and has words for it
        return None
    return facts if isinstance(facts, dict) else None


def _config_file(name: str, hub: Mapping[str, Any]) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return path / str(hub.get("subfolder", "")) / _CONFIG_FILE
    from huggingface_hub import hf_hub_download  # half a second, and most models are local

    return Path(hf_hub_download(name, _CONFIG_FILE, **hub))


def _rope_type(facts: Mapping[str, Any]) -> str | None:
    parameters = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        return None
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ROPE_TYPES or (rope_type != "default" and "factor" not in parameters):
        return None
    return str(rope_type)
