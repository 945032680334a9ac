"""What the wrappers round ``from_pretrained`` (in `hooks`) call.

They find config and GGUF and hand both back to transformers, with a quantizer that replaces modules in the skeleton and
fills them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.loading_report import LoadStateDictInfo

from transformers_kt.errors import CheckpointNotFoundError, UnsupportedModelError, UnsupportedOperationError
from transformers_kt.families.from_gguf import generation_config_from_gguf, notes_from_gguf, tokenizer_from_gguf
from transformers_kt.families.registry import require_routable
from transformers_kt.families.tensors import check_tensors
from transformers_kt.integration.loaded_model import (
    OBSERVABLE,
    KtGenerationMixin,
    KtModelMixin,
    Reload,
    refuse_pages,
)
from transformers_kt.integration.quantizer import METHOD, KtConfig, LoadJob
from transformers_kt.planning.decision import ModelRequest
from transformers_kt.planning.device_map import PlacementRequest
from transformers_kt.planning.operations import replaced_classes
from transformers_kt.planning.request import HUB_OPTIONS, Call, Request, folder_of
from transformers_kt.planning.stock_model import resolved_config
from transformers_kt.rules import load_rules

if TYPE_CHECKING:
    from transformers_kt.gguf.checkpoint import Checkpoint
    from transformers_kt.integration.loading import Modules

_NOT_FOR_TOKENIZERS = (
    "config",
    "use_fast",
    "tokenizer_type",
    "trust_remote_code",
    "code_revision",
    "device_map",
    "dtype",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_ADAPTER = "adapter_config.json"
_REFUSED_OPTIONS = {
    "quantization_config": "the weights of a GGUF are quantized already",
    "state_dict": "the weights come from the GGUF",
    "distributed_config": "one process computes the whole model",
    "device_mesh": "one process computes the whole model",
    "use_mtp": "the layer that predicts further tokens is not loaded from one",
    "tp_plan": "one process computes the whole model",
    "tp_size": "one process computes the whole model",
}
logger = logging.getLogger(__name__)


def load_auto_model(call: Call, request: Request) -> Any:
    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        mapping = call.cls._model_mapping
        if type(config) not in mapping:
            # Wrappers that probe one class after another look for transformers' own first words.
            raise UnsupportedModelError(
                f"Unrecognized configuration class {type(config)} for this kind of AutoModel: {call.cls.__name__} has "
                f"no model for {type(config).__name__} ({request.name}); load AutoModelForCausalLM, or AutoModel for "
                "the hidden states"
            )
        found: type[PreTrainedModel] = _get_model_class(config, mapping)
        return found

    return _load(model_class, request, call)


def load_model(call: Call, request: Request) -> Any:
    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        cls: type[PreTrainedModel] = call.cls
        if cls.config_class is not type(config):
            raise UnsupportedModelError(
                f"{request.name} is a {config.model_type} model, which {cls.__name__} does not compute; load "
                "AutoModelForCausalLM"
            )
        return cls

    return _load(model_class, request, call)


def load_config(call: Call, request: Request) -> Any:
    options = {key: value for key, value in call.options.items() if key not in ("dtype", "torch_dtype")}
    wants_unused, attention = options.pop("return_unused_kwargs", False), options.pop("attn_implementation", None)
    config, unused = resolved_config(request, None, options)
    config._attn_implementation = attention
    return (config, unused) if wants_unused else config


def load_tokenizer(call: Call, request: Request) -> Any:
    if request.folder is not None and _has_tokenizer(request.folder, request.hub):
        return call.stock(call.cls, request.folder, *call.args, **request.hub, **call.options)
    known = {key: value for key, value in call.options.items() if key not in _NOT_FOR_TOKENIZERS and key[0] != "_"}
    return tokenizer_from_gguf(request.open(), name_or_path=request.gguf, **known)


def load_config_of_class(call: Call, request: Request) -> Any:
    """As `load_config`, for a class of configs that the caller names."""
    if request.folder is not None:
        return call.stock(call.cls, request.folder, *call.args, **request.hub, **call.options)
    loaded = load_config(call, request)
    _require_class(loaded[0] if isinstance(loaded, tuple) else loaded, call, request, "AutoConfig")
    return loaded


def load_tokenizer_of_class(call: Call, request: Request) -> Any:
    """As `load_tokenizer`, for a class of tokenizers that the caller names."""
    if request.folder is not None or (Path(request.gguf).is_dir() and _has_tokenizer(request.gguf, request.hub)):
        return call.stock(call.cls, request.name, *call.args, **request.hub, **call.options)
    tokenizer = load_tokenizer(call, request)
    _require_class(tokenizer, call, request, "AutoTokenizer")
    return tokenizer


def _require_class(loaded: Any, call: Call, request: Request, auto_class: str) -> None:
    if not isinstance(loaded, call.cls):
        raise UnsupportedModelError(
            f"{request.name} makes a {type(loaded).__name__}, which is no {call.cls.__name__}; load {auto_class}"
        )


def load_generation_config(call: Call, request: Request) -> Any:
    """From the folder's file where there is one, or where the folder has the config; else from the GGUF."""
    options = dict(call.options)
    file_name = call.args[0] if call.args else options.pop("config_file_name", None)
    where = request.folder or request.gguf
    if request.folder is not None or (Path(where) / (file_name or "generation_config.json")).is_file():
        return call.stock(call.cls, where, file_name, *call.args[1:], **request.hub, **options)
    stated = generation_config_from_gguf(request.open()).to_diff_dict()
    return call.cls.from_dict(stated, **{key: value for key, value in options.items() if key[0] != "_"})


def refuse_media(call: Call, request: Request) -> Any:
    """What prepares images, sound or video. No model that we load has such a part; a folder may say what it likes."""
    if request.folder is not None:
        return call.stock(call.cls, request.folder, *call.args, **request.hub, **call.options)
    kind = re.sub("([A-Z])", r" \1", call.cls.__name__.removeprefix("Auto")).strip().lower()
    raise CheckpointNotFoundError(  # with transformers' own first words
        f"Can't load {kind} for '{request.name}': a GGUF holds a language model. Its text is prepared by AutoTokenizer "
        "or AutoProcessor"
    )


def _has_tokenizer(folder: str, hub: Mapping[str, Any]) -> bool:
    if not Path(folder).exists():
        return True  # on the hub: transformers will see
    return any((folder_of(folder, hub) / name).is_file() for name in _TOKENIZER_FILES)


def _load(
    model_class: Callable[[PreTrainedConfig], type[PreTrainedModel]],
    request: Request,
    call: Call,
) -> Any:
    """What from_pretrained returns, loaded from the GGUF of ``request``. All checks come before memory is taken."""
    args, options = call.args, dict(call.options)
    for key, reason in _REFUSED_OPTIONS.items():
        if options.pop(key, None) not in (None, False):
            raise UnsupportedOperationError(f"{key}= cannot be combined with a GGUF: {reason}. Leave it out")
    _refuse_adapter(request)
    placement = PlacementRequest.read(
        request.rules, options.pop("device_map", None), options.pop("max_memory", None), **request.kt_options
    )
    _resolve_dtype(options)
    modules = _modules()
    rules = load_rules(request.rules, replaced_classes())
    checkpoint = request.open()
    checkpoint.require_weights()
    given, attention = options.pop("config", None), options.pop("attn_implementation", None)
    trust_remote_code = options.get("trust_remote_code")
    config, rest = resolved_config(request, given, options, checkpoint)
    attention = _stock_attention(attention, config)
    if str(attention).startswith("paged|"):
        refuse_pages(f'attn_implementation="{attention}"')
    config._attn_implementation = attention
    notes = notes_from_gguf(checkpoint) if given is None and request.folder is None else ()
    require_routable(config)
    slots = check_tensors(checkpoint, config)
    asked = ModelRequest(request.title, checkpoint, config, slots, rules, placement, attention, notes)
    result = _kt_class(model_class(config)).from_pretrained(
        None,
        *args,
        config=config,
        state_dict={},
        dtype=torch.float32,
        quantization_config=KtConfig(request.gguf, rules.source, job=LoadJob(asked, modules)),
        **rest,
    )
    model = result[0] if isinstance(result, tuple) else result
    model.kt_reload = Reload.of(call, request)
    _restore_names(model, request.name)
    if rest.get("generation_config") is None and model.can_generate():
        _restore_generation_config(model, request, checkpoint, trust_remote_code, rest)
    return result


def _refuse_adapter(request: Request) -> None:
    """Stock transformers applies an adapter that lies beside the config; to load without it is another model."""
    if request.folder is None or not (found := folder_of(request.folder, request.hub) / _ADAPTER).is_file():
        return
    raise UnsupportedOperationError(
        f"{found}: an adapter in the model's folder is not applied while loading. Move it to a folder of its own, load "
        f'the model with kt_rules="{OBSERVABLE}", which keeps every linear layer, and attach the adapter with '
        "model.load_adapter(folder)"
    )


def _modules() -> Modules:
    # Imported here: they import the models of transformers, which only loading needs.
    from transformers_kt.modules import MODULES
    from transformers_kt.modules.base import require_supported_cpu
    from transformers_kt.modules.mla import ranges_mask

    require_supported_cpu()
    register_attention(METHOD, _refuse_stock_attention, ranges_mask)
    return MODULES


def register_attention(name: str, attention_fn: Callable[..., Any], mask_fn: Callable[..., Any]) -> None:
    """Make ``name`` an ``attn_implementation``: stock attention modules call ``attention_fn``, the model ``mask_fn``.

    Without a mask function of that name transformers makes no masks at all, padding or not, and says nothing.
    """
    AttentionInterface.register(name, attention_fn)
    AttentionMaskInterface.register(name, mask_fn)


def _refuse_stock_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedOperationError(
        f'attn_implementation="{METHOD}" is for models whose attention was replaced at loading; choose "sdpa" or '
        '"eager" for this one'
    )


def _resolve_dtype(options: dict[str, Any]) -> None:
    dtypes = {str(options.pop(key, "auto")).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    if others := sorted(dtypes - {"auto", "None", "float32"}):
        logger.warning("dtype=%s is not used: on the CPU activations are float32, whatever the weights are", others[0])


def _stock_attention(asked: str | None, config: PreTrainedConfig) -> str | None:
    """The attention of transformers that the user wants in place of ours, if any.

    "sdpa" in a config is no request: transformers writes it there by default.
    """
    if asked is None and config._attn_implementation != "sdpa":
        asked = config._attn_implementation
    return None if asked == METHOD else asked


def _restore_names(model: PreTrainedModel, name: str) -> None:
    model.config.name_or_path = name
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = name


def _restore_generation_config(
    model: Any, request: Request, checkpoint: Checkpoint, trust_remote_code: bool | None, options: Mapping[str, Any]
) -> None:
    if request.folder is None or Path(request.folder).is_file():
        model.generation_config = generation_config_from_gguf(checkpoint)
        return
    hub = {**dict.fromkeys(HUB_OPTIONS), "force_download": False, "local_files_only": False, "subfolder": ""}
    model.adjust_generation_fn(
        None,
        options.get("_from_auto", False),
        options.get("_from_pipeline"),
        request.folder,
        **{**hub, **request.hub},
        trust_remote_code=trust_remote_code,
    )
    folder = folder_of(request.folder, request.hub)
    if folder.is_dir() and not (folder / "generation_config.json").is_file():
        # config.json names one token; the file knows all that end a turn.
        stated, of_file = model.generation_config.eos_token_id, generation_config_from_gguf(checkpoint).eos_token_id
        ends = list(dict.fromkeys((*_as_list(stated), *_as_list(of_file))))
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


class _FilledByQuantizer(KtModelMixin):
    @staticmethod
    def _load_pretrained_model(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if hasattr(model, "kt_report"):  # filled: these are the weights of an adapter
            return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        # Nothing is missing: the quantizer fills the model when transformers has set up the buffers that no file holds.
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None


_KT_CLASSES: dict[type[PreTrainedModel], Any] = {}


def _kt_class(model_class: type[PreTrainedModel]) -> Any:
    """``model_class`` with `KtModelMixin`, under its own name: transformers looks classes up by name."""
    if issubclass(model_class, KtModelMixin):
        return model_class
    if model_class not in _KT_CLASSES:
        names = {key: getattr(model_class, key) for key in ("__module__", "__qualname__", "__doc__")}
        generating = (KtGenerationMixin,) if hasattr(model_class, "generate") else ()
        bases = (_FilledByQuantizer, *generating, model_class)
        _KT_CLASSES[model_class] = type(model_class.__name__, bases, names)
    return _KT_CLASSES[model_class]
