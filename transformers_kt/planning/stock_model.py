"""The stock model that a request names: its config, and the skeleton of it on the meta device."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedConfig, PreTrainedModel

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families.deepseek.config import config_from_gguf
from transformers_kt.planning.request import MOOT_OPTIONS, Request

if TYPE_CHECKING:
    from transformers_kt.gguf.checkpoint import Checkpoint

_CONFIG_CLASSES = {cls.model_type: cls for cls in (DeepseekV2Config, DeepseekV3Config)}


def skeleton(config: DeepseekV2Config | DeepseekV3Config) -> PreTrainedModel:
    """The stock causal language model of ``config`` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def resolved_config(
    request: Request, given: Any, options: Mapping[str, Any], checkpoint: Checkpoint | None = None
) -> tuple[DeepseekV2Config | DeepseekV3Config, dict[str, Any]]:
    """The config, with those ``options`` applied that name its attributes, and the other options."""
    options = {key: value for key, value in options.items() if key not in MOOT_OPTIONS}
    folder = request.folder
    if given is not None and not isinstance(given, PreTrainedConfig):
        folder = os.fspath(given)
    config: Any
    if isinstance(given, PreTrainedConfig):
        config = _config_from_dict(given.to_dict(), request.name) if _is_foreign(given) else copy.deepcopy(given)
    elif folder is not None:
        facts, _ = PreTrainedConfig.get_config_dict(folder, **request.hub)
        config = _config_from_dict(facts, folder)
    else:
        config = config_from_gguf(request.open() if checkpoint is None else checkpoint)
    # DeepSeek's config.json says fp8, which is how the weights lie in its safetensors.
    vars(config).pop("quantization_config", None)
    rest = {}
    for key, value in options.items():
        if hasattr(config, key):
            setattr(config, key, value)
        else:
            rest[key] = value
    config.name_or_path = request.name
    return config, rest


def _is_foreign(config: PreTrainedConfig) -> bool:
    """Whether the config's class came with the model, as remote code, and is not transformers' own."""
    return type(config) not in _CONFIG_CLASSES.values()


def _config_from_dict(facts: Mapping[str, Any], where: str) -> DeepseekV2Config | DeepseekV3Config:
    model_type = facts.get("model_type")
    if model_type not in _CONFIG_CLASSES:
        raise UnsupportedModelError(
            f"{where}: the config's model_type is {model_type!r}; {' and '.join(_CONFIG_CLASSES)} are accepted"
        )
    config: DeepseekV2Config | DeepseekV3Config = _CONFIG_CLASSES[model_type].from_dict(dict(facts))
    return config
