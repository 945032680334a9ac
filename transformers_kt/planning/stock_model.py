"""The stock model that a request names: its config, and the skeleton of it on the meta device."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from transformers_kt.errors import KtError, UnsupportedModelError
from transformers_kt.families.from_gguf import config_from_gguf, config_values
from transformers_kt.families.registry import families, family_of_type, language_model
from transformers_kt.planning.request import MOOT_OPTIONS, Request

if TYPE_CHECKING:
    from transformers_kt.gguf.checkpoint import Checkpoint


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock causal language model of ``config`` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def resolved_config(
    request: Request, given: Any, options: Mapping[str, Any], checkpoint: Checkpoint | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
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
        try:
            config = _config_from_dict(facts, folder)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}{_runs_alone(request, checkpoint)}") from None
    else:
        config = config_from_gguf(request.open() if checkpoint is None else checkpoint)
    # How the weights lie in the safetensors of the folder, such as fp8, is of no concern to a GGUF.
    vars(config).pop("quantization_config", None)
    rest = {}
    for key, value in options.items():
        if hasattr(config, key):
            setattr(config, key, value)
        else:
            rest[key] = value
    config.name_or_path = request.name
    return config, rest


def _runs_alone(request: Request, checkpoint: Checkpoint | None) -> str:
    """What to say where the folder's config is of no family and the GGUF beside it makes one."""
    try:
        config_values(request.open() if checkpoint is None else checkpoint)
    except KtError:
        return ""
    return f'. The GGUF states all that is needed: leave the folder out, from_pretrained("{request.gguf}")'


def _is_foreign(config: PreTrainedConfig) -> bool:
    """Whether the config's class came with the model, as remote code, and is not transformers' own."""
    known = (model_type for family in families() for model_type in family.model_types)
    return type(config) not in [CONFIG_MAPPING[model_type] for model_type in known if model_type in CONFIG_MAPPING]


def _config_from_dict(facts: Mapping[str, Any], where: str) -> PreTrainedConfig:
    facts = language_model(facts)
    model_type = facts.get("model_type")
    family_of_type(model_type, where)
    config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(facts))
    return config
