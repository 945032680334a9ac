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

from transformers_kt.families.registry import families, language_model

PlainConfig = SimpleNamespace
"""Has ``model_type`` and what `PlainConfigs.defaults` names, under the names of transformers' configs."""

_LAYERS_DIFFER = ("per_layer_config", "layer_types", "mlp_layer_types")
_ROPE_TYPES = ("default", "linear", "yarn")
_CONFIG_FILE = "config.json"


def plain_config(facts: Mapping[str, Any]) -> PlainConfig | None:
    """The config that ``facts`` state, as a config.json holds them; None where anything is out of the ordinary."""
    facts = language_model(facts)
    model_type = facts.get("model_type")
    plain = next((family.plain for family in families() if model_type in family.model_types), None)
    if plain is None or not isinstance(model_type, str) or model_type not in plain.defaults:
        return None
    rope_type = _rope_type(facts)
    if rope_type is None or any(facts.get(key) is not None for key in (*plain.other_names, *_LAYERS_DIFFER)):
        return None
    values = {}
    for name, default in plain.defaults[model_type].items():
        values[name] = value = facts.get(name, default)
        if type(value) is not (int if default is None else type(default)) and not (
            value is None and name in plain.may_be_none
        ):
            return None
    if plain.refused(model_type, values):
        return None
    return PlainConfig(model_type=model_type, rope_parameters={"rope_type": rope_type}, **values)


def read_config(name: str, hub: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The content of the config.json of a folder or hub id, or of the JSON file ``name``. None if it cannot be had."""
    try:
        facts = json.loads(_config_file(name, hub).read_text(encoding="utf-8"))
    except Exception:  # whatever the hub raises: transformers asks again and explains it
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
