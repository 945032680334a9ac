"""The seam to transformers; the only file that imports its internals.

A thin wrapper round ``from_pretrained`` finds config and GGUF and hands both back to transformers, with a quantizer
that replaces modules in the skeleton and fills them. Calls without our arguments pass through untouched.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_kt import loading, placement
from transformers_kt.device_map import PlacementWish, device_refusal
from transformers_kt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    RuleError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from transformers_kt.gguf.checkpoint import Checkpoint, open_checkpoint
from transformers_kt.gguf.config import config_from_gguf, generation_config_from_gguf
from transformers_kt.gguf.names import TensorSlot, check_tensors
from transformers_kt.gguf.tokenizer import tokenizer_from_gguf
from transformers_kt.loaded_model import InputGuard, KtGenerationMixin, KtModelMixin, refuse_training
from transformers_kt.loading import KtReport
from transformers_kt.rules import AUTO, DeviceMap, KtRules, Plan, RuleList, load_rules, make_plan

if TYPE_CHECKING:
    from transformers_kt.rules import Operations

_METHOD = "kt"  # quant_method, and the name of our attention in transformers' registries
_ATTENTION_OP = "attention_cpu"
_ROTARY_OP = "rotary_cpu"
_CONFIG_CLASSES = {cls.model_type: cls for cls in (DeepseekV2Config, DeepseekV3Config)}
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

# Where from_pretrained looks for files. A GGUF is found by its own path, in a repository of its own.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_GGUF_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")  # and revision, in the same repository
_PLACEMENT_NUMBERS = ("kt_cpu_layers", "kt_gpu_experts")
_SOURCE_OPTIONS = (
    "pretrained_model_name_or_path",
    "gguf_path",
    "gguf_file",
    "kt_rules",
    *_PLACEMENT_NUMBERS,
    *_HUB_OPTIONS,
)
# Of no meaning here: which code to run is settled by the GGUF's architecture, how to save memory by the plan.
_MOOT_OPTIONS = ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash", "low_cpu_mem_usage")
_REFUSED_OPTIONS = {
    "quantization_config": "the weights of a GGUF are quantized already",
    "state_dict": "the weights come from the GGUF",
    "distributed_config": "one process computes the whole model",
    "device_mesh": "one process computes the whole model",
    "tp_plan": "one process computes the whole model",
    "tp_size": "one process computes the whole model",
}

_WRAPPED = "_wrapped_by_transformers_kt"

logger = logging.getLogger(__name__)


def install() -> None:
    """Register config and quantizer with transformers and wrap ``from_pretrained``. A second call changes nothing."""
    _register(AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, KtConfig)
    _register(AUTO_QUANTIZER_MAPPING, register_quantizer, KtHfQuantizer)
    _wrap(PreTrainedModel, _load_model)
    # Every Auto class has its own copy of from_pretrained.
    for auto_class in vars(modeling_auto).values():
        if isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass):
            _wrap(auto_class, _load_auto_model)
    _wrap(AutoConfig, _load_config)
    _wrap(AutoTokenizer, _load_tokenizer)


def register_attention(name: str, attention_fn: Callable[..., Any], mask_fn: Callable[..., Any]) -> None:
    """Make ``name`` an ``attn_implementation``: stock attention modules call ``attention_fn``, the model ``mask_fn``.

    Without a mask function of that name transformers makes no masks at all, padding or not, and says nothing.
    """
    AttentionInterface.register(name, attention_fn)
    AttentionMaskInterface.register(name, mask_fn)


def _register(mapping: dict[str, Any], register: Callable[[str], Callable[[type], type]], cls: type) -> None:
    registered = mapping.get(_METHOD)
    if registered is not None and f"{registered.__module__}.{registered.__name__}" == f"{__name__}.{cls.__name__}":
        del mapping[_METHOD]  # this class, or what it was before this module was reloaded
    register(_METHOD)(cls)


# --- Arguments -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    """What a call of from_pretrained asks of us.

    ``folder`` is the folder or hub id that has the config, None where the GGUF is all there is; ``hub`` says how to get
    files from there, ``gguf_hub`` how to get the GGUF. ``numbers`` are kt_cpu_layers and kt_gpu_experts.
    """

    folder: str | None
    gguf: str
    rules: KtRules
    numbers: tuple[Any, ...]
    hub: dict[str, Any]
    gguf_hub: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder or self.gguf

    def open(self) -> Checkpoint:
        return open_checkpoint(self.gguf, **self.gguf_hub)


def _request(name: Any, options: Mapping[str, Any]) -> _Request | None:
    """What ``from_pretrained(name, **options)`` asks of us; None if nothing."""
    gguf_path, rules, gguf_file = (options.get(key) for key in ("gguf_path", "kt_rules", "gguf_file"))
    numbers = tuple(options.get(key) for key in _PLACEMENT_NUMBERS)
    if all(given is None for given in (gguf_path, rules, *numbers)) and not _is_gguf_alone(name):
        return None
    hub = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
    gguf_hub = {key: hub[key] for key in _GGUF_HUB_OPTIONS if key in hub}
    name = None if name is None else os.fspath(name)
    folder = name if name is not None and _has_config(name, hub) else None
    if gguf_path is not None:
        gguf = os.fspath(gguf_path)
        if name is not None and folder is None and Path(name).is_file() and name != gguf:
            raise CheckpointError(f"two GGUF files are named, {name} and gguf_path={gguf}; name one of them")
    else:
        gguf = _gguf_at(name, gguf_file, hub)
        if "revision" in hub:
            gguf_hub["revision"] = hub["revision"]
        if gguf_file is not None and not Path(gguf).exists():
            folder = None  # for transformers, too, gguf_file= is the source of config and tokenizer
    return _Request(folder, gguf, AUTO if rules is None else rules, numbers, hub, gguf_hub)


def _gguf_at(name: str | None, gguf_file: str | None, hub: Mapping[str, Any]) -> str:
    """Where the GGUF is when ``name`` has to lead to it."""
    if name is not None:
        path = Path(name)
        if gguf_file is not None:
            return str(_folder(name, hub) / gguf_file) if path.is_dir() else f"{name}:{gguf_file}"
        if path.exists() or ":" in name:
            return name
    raise CheckpointNotFoundError(
        f"there is no GGUF: {name} is no local file or folder. Name the weights with gguf_path= (a file, a folder, or "
        'hub "org/repo:file.gguf")'
    )


def _is_gguf_alone(name: Any) -> bool:
    """Whether ``name`` can be nothing but a GGUF: such a file, or a folder with one and without config."""
    if not isinstance(name, str | os.PathLike):
        return False
    path = Path(name)
    if path.suffix == ".gguf":
        return path.is_file()
    return path.is_dir() and not (path / "config.json").exists() and next(path.glob("*.gguf"), None) is not None


def _has_config(name: str, hub: Mapping[str, Any]) -> bool:
    path = Path(name)
    if path.is_dir():
        return (_folder(name, hub) / "config.json").is_file()
    if path.is_file():
        return path.suffix == ".json"
    return ":" not in name  # a hub id, not a GGUF on the hub


def _folder(name: str, hub: Mapping[str, Any]) -> Path:
    return Path(name, hub.get("subfolder", ""))


# --- For plans -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A model that could be loaded: headers only."""

    title: str
    config: DeepseekV2Config | DeepseekV3Config
    checkpoint: Checkpoint
    slots: list[TensorSlot]


def open_source(name: Any, options: Mapping[str, Any]) -> Source:
    """What ``from_pretrained(name, **options)`` would load. Raises as that does."""
    request = _request(name, {"kt_rules": AUTO, **options})
    assert request is not None  # kt_rules is there
    checkpoint = request.open()
    config, unknown = _resolve_config(request, None, _without(options, _SOURCE_OPTIONS), checkpoint)
    if unknown:
        raise TypeError(f"plan() got unexpected arguments: {', '.join(unknown)}")
    return Source(_title(request), config, checkpoint, check_tensors(checkpoint, config))


def skeleton(config: DeepseekV2Config | DeepseekV3Config) -> PreTrainedModel:
    """The stock model of ``config`` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


# --- The wrapper -----------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of from_pretrained: ``stock(cls, name, *args, **options)``, without the options that `_Request` has."""

    stock: Callable[..., Any]  # the function that was there before ours
    cls: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def _without(options: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}


def _wrap(owner: type, load: Callable[[_Call, _Request], Any]) -> None:
    """Let ``load`` answer those calls of ``owner.from_pretrained`` that concern us."""
    bound = vars(owner).get("from_pretrained")
    if bound is None or hasattr(bound.__func__, _WRAPPED):
        return
    stock = bound.__func__

    @functools.wraps(stock)
    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        request = _request(args[0] if args else options.get("pretrained_model_name_or_path"), options)
        if request is None:
            return stock(cls, *args, **options)
        return load(_Call(stock, cls, args[1:], _without(options, _SOURCE_OPTIONS)), request)

    setattr(from_pretrained, _WRAPPED, True)
    owner.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]


def _load_auto_model(call: _Call, request: _Request) -> Any:
    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        mapping = call.cls._model_mapping
        if type(config) not in mapping:
            raise UnsupportedModelError(
                f"{call.cls.__name__} has no model for {type(config).__name__} ({request.name}); load "
                "AutoModelForCausalLM, or AutoModel for the hidden states"
            )
        found: type[PreTrainedModel] = _get_model_class(config, mapping)
        return found

    return _load(model_class, request, call.args, call.options)


def _load_model(call: _Call, request: _Request) -> Any:
    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        cls: type[PreTrainedModel] = call.cls
        if cls.config_class is not type(config):
            raise UnsupportedModelError(
                f"{request.name} is a {config.model_type} model, which {cls.__name__} does not compute; load "
                "AutoModelForCausalLM"
            )
        return cls

    return _load(model_class, request, call.args, call.options)


def _load_config(call: _Call, request: _Request) -> Any:
    options = {key: value for key, value in call.options.items() if key not in ("dtype", "torch_dtype")}
    wants_unused, attention = options.pop("return_unused_kwargs", False), options.pop("attn_implementation", None)
    config, unused = _resolve_config(request, None, options)
    config._attn_implementation = attention
    return (config, unused) if wants_unused else config


def _load_tokenizer(call: _Call, request: _Request) -> Any:
    if request.folder is not None and _has_tokenizer(request.folder, request.hub):
        return call.stock(call.cls, request.folder, *call.args, **request.hub, **call.options)
    known = {key: value for key, value in call.options.items() if key not in _NOT_FOR_TOKENIZERS and key[0] != "_"}
    return tokenizer_from_gguf(request.open(), name_or_path=request.gguf, **known)


def _has_tokenizer(folder: str, hub: Mapping[str, Any]) -> bool:
    if not Path(folder).exists():
        return True  # on the hub: transformers will see
    return any((_folder(folder, hub) / name).is_file() for name in _TOKENIZER_FILES)


# --- Loading ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """What the quantizer needs to know of the call that it serves."""

    checkpoint: Checkpoint
    slots: list[TensorSlot]
    rules: RuleList
    operations: Operations
    title: str
    attention: str | None  # the attn_implementation that is to stand in place of ours
    wish: PlacementWish
    device_map: DeviceMap | None = None
    notes: tuple[str, ...] = ()
    assignments: list[loading.Assignment] = field(default_factory=list)
    lost_outputs: tuple[str, ...] = ()


def _load(
    model_class: Callable[[PreTrainedConfig], type[PreTrainedModel]],
    request: _Request,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """What from_pretrained returns, loaded from the GGUF of ``request``. All checks come before memory is taken."""
    for key, reason in _REFUSED_OPTIONS.items():
        if options.get(key) is not None:
            raise UnsupportedOperationError(f"{key}= cannot be combined with a GGUF: {reason}. Leave it out")
    wish = PlacementWish.read(
        request.rules, options.pop("device_map", None), options.pop("max_memory", None), *request.numbers
    )
    _settle_dtype(options)
    operations = _operations()
    rules = load_rules(request.rules, operations)
    checkpoint = request.open()
    given, attention = options.pop("config", None), options.pop("attn_implementation", None)
    trust_remote_code = options.get("trust_remote_code")
    config, rest = _resolve_config(request, given, options, checkpoint)
    config._attn_implementation = attention = _stock_attention(attention, config)
    job = _Job(checkpoint, check_tensors(checkpoint, config), rules, operations, _title(request), attention, wish)
    result = _kt_class(model_class(config)).from_pretrained(
        None,
        *args,
        config=config,
        state_dict={},
        dtype=torch.float32,
        quantization_config=KtConfig(request.gguf, rules.source, job=job),
        **rest,
    )
    model = result[0] if isinstance(result, tuple) else result
    _restore_names(model, request.name)
    if rest.get("generation_config") is None and model.can_generate():
        _restore_generation_config(model, request, checkpoint, trust_remote_code, rest)
    return result


def _operations() -> Operations:
    # Here, for the modules import the models of transformers, which nobody needs who loads none.
    from transformers_kt.modules import OPERATIONS
    from transformers_kt.modules.attention import ranges_mask
    from transformers_kt.modules.base import require_supported_cpu

    require_supported_cpu()
    register_attention(_METHOD, _refuse_stock_attention, ranges_mask)
    operations: Operations = OPERATIONS
    return operations


def _refuse_stock_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedOperationError(
        f'attn_implementation="{_METHOD}" is for models whose attention was replaced at loading; choose "sdpa" or '
        '"eager" for this one'
    )


def _settle_dtype(options: dict[str, Any]) -> None:
    dtypes = {str(options.pop(key, "auto")).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    if others := sorted(dtypes - {"auto", "None", "float32"}):
        logger.warning("dtype=%s is not used: on the CPU activations are float32, whatever the weights are", others[0])


def _resolve_config(
    request: _Request, given: Any, options: Mapping[str, Any], checkpoint: Checkpoint | None = None
) -> tuple[DeepseekV2Config | DeepseekV3Config, dict[str, Any]]:
    """The config, with those ``options`` applied that name its attributes, and the other options."""
    options = {key: value for key, value in options.items() if key not in _MOOT_OPTIONS}
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


def _title(request: _Request) -> str:
    return Path(os.path.abspath(request.name)).name.removesuffix(".gguf")


def _stock_attention(asked: str | None, config: PreTrainedConfig) -> str | None:
    """The attention of transformers that the user wants in place of ours, if any.

    "sdpa" in a config is no wish: it is what transformers writes there by default.
    """
    if asked is None and config._attn_implementation != "sdpa":
        asked = config._attn_implementation
    return None if asked == _METHOD else asked


def _restore_names(model: PreTrainedModel, name: str) -> None:
    model.config.name_or_path = name
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = name


def _restore_generation_config(
    model: Any, request: _Request, checkpoint: Checkpoint, trust_remote_code: bool | None, options: Mapping[str, Any]
) -> None:
    if request.folder is None or Path(request.folder).is_file():
        model.generation_config = generation_config_from_gguf(checkpoint)
        return
    hub = {**dict.fromkeys(_HUB_OPTIONS), "force_download": False, "local_files_only": False, "subfolder": ""}
    model.adjust_generation_fn(
        None,
        options.get("_from_auto", False),
        options.get("_from_pipeline"),
        request.folder,
        **{**hub, **request.hub},
        trust_remote_code=trust_remote_code,
    )


class KtConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``model.config.quantization_config`` says of a model whose weights lie in a GGUF."""

    def __init__(
        self, gguf_path: str = "", kt_rules: str = AUTO, *, job: _Job | None = None, quant_method: str = _METHOD
    ) -> None:
        self.quant_method = quant_method
        self.gguf_path = gguf_path
        self.kt_rules = kt_rules
        self._job = job

    def take_job(self) -> _Job | None:
        job, self._job = self._job, None
        return job

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "gguf_path": self.gguf_path, "kt_rules": self.kt_rules}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class KtHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the modules of the skeleton by the plan, and fills the model from the checkpoint."""

    def __init__(self, quantization_config: KtConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._job = quantization_config.take_job()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._job is None:
            raise UnsupportedOperationError(
                'this config.json says quant_method "kt": the weights lie in a GGUF file. Name it with gguf_path='
            )

    def update_device_map(self, device_map: Any) -> dict[str, torch.device]:
        return {"": torch.device("cpu")}  # also under torch.set_default_device("cuda")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        job = self._job
        assert job is not None
        plan = _plan_on_the_cpu(model, job)
        job.notes = plan.notes
        if plan.notes:
            logger.warning("%s does not do all that its rules say:\n%s", job.title, "\n".join(plan.notes))
        if plan.uses(_ATTENTION_OP) and not _keeps_attention(model, plan, job.operations):
            # Masks in our own short form. Where stock attention shares them they stay as transformers makes them,
            # which our attention reads too.
            model.config._attn_implementation = _METHOD
        job.assignments = loading.assign_tensors(plan, model, job.slots, job.checkpoint.tensors)
        recorded = _recorded_modules(model)
        loading.apply_plan(model, job.assignments, job.operations)
        job.lost_outputs = tuple(key for key, count in _recorded_modules(model).items() if count < recorded[key])
        loading.check_types(model, job.assignments, job.operations)
        needed = loading.memory_needed(model, job.assignments, job.operations)
        placement.require_memory(needed, job.title, job.wish.tightest(placement.free_memory()))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Both ends of a tie are filled from the file; there may be no parameter left to tie.
                module.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers_kt.modules.decoder_layer import join_decoder_layers

        job, self._job = self._job, None
        assert job is not None
        total = sum(assignment.stored_bytes for assignment in job.assignments)
        description = f"Loading {job.title} ({placement.format_bytes(total)})"
        with transformers_logging.tqdm(total=total, desc=description, unit="B", unit_scale=True) as bar:
            rows = loading.fill(model, job.assignments, job.operations, job.checkpoint, bar)
        join_decoder_layers(model)
        model.kt_report = KtReport(job.title, job.rules.source, rows, job.notes)
        guard = InputGuard(model.config, job.lost_outputs)
        model.base_model.register_forward_pre_hook(guard, with_kwargs=True)
        if job.wish.device_map is not None or torch.accelerator.is_available():
            # Else pipeline() moves the model to the accelerator. Not set without need: with it, pipeline(device="cpu")
            # is refused, here as for every model that was loaded with a device_map.
            model.hf_device_map = dict(job.device_map or {"": placement.CPU})

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        # transformers asks before it says, in words of its own, that adapters would help; they would not.
        refuse_training("training")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> NoReturn:
        raise UnsupportedOperationError(
            "dequantize() is not supported after loading; keep modules as stock float32 with kt_rules (op: torch)"
        )


def _plan_on_the_cpu(model: PreTrainedModel, job: _Job) -> Plan:
    """The plan, and in ``job`` the device map. Raises where the plan names another device than the CPU."""
    # No GPU is offered to the automatic placement: transformers would dispatch over the devices of the map, but the
    # operations of this version compute on the CPU.
    no_gpus = placement.Hardware((), placement.free_memory().nbytes)
    is_auto = job.rules.source == AUTO
    tensors = job.checkpoint.tensors
    job.device_map = job.wish.settled(is_auto, model, job.slots, tensors, no_gpus, placement.FastMemory(0, 0))
    plan = settled_plan(model, job.rules, job.operations, job.attention, job.device_map)
    elsewhere = next((entry for entry in plan.entries if entry.device != placement.CPU), None)
    present = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if elsewhere is not None:
        reason = (
            "but this version computes on the CPU only"
            if elsewhere.device in present
            else f"which is not there: this machine has {', '.join([placement.CPU, *present])}"
        )
        raise device_refusal(
            plan, elsewhere, job.device_map is not None, f'{reason}. device_map="cpu" runs the same plan on the CPU'
        )
    if is_auto and present:
        logger.info("all of %s is on the CPU: this version leaves %s unused", job.title, ", ".join(present))
    return plan


def settled_plan(
    model: PreTrainedModel, rules: RuleList, operations: Operations, attention: str | None, device_map: DeviceMap | None
) -> Plan:
    """The plan for the skeleton ``model``, after settling what attention and its neighbours must agree on.

    ``attention`` is the attn_implementation that is to stand in place of ours, None for ours.
    """
    not_by_itself = [_ATTENTION_OP, _ROTARY_OP] if attention else []
    plan = make_plan(model, rules, operations, not_by_itself, device_map=device_map)
    if attention and plan.uses(_ATTENTION_OP):
        raise RuleError(
            f"{plan.source} gives attention to {_ATTENTION_OP}, but attn_implementation={attention!r} asks for "
            "transformers' own; leave one of them out"
        )
    if plan.uses(_ROTARY_OP) and _keeps_attention(model, plan, operations):
        # Its one table of cosines and sines is nothing that stock attention could read.
        plan = make_plan(model, rules, operations, [*not_by_itself, _ROTARY_OP], device_map=device_map)
        if plan.uses(_ROTARY_OP):
            raise RuleError(
                f"{plan.source} gives rotary embeddings to {_ROTARY_OP}, which feeds {_ATTENTION_OP} only, and keeps "
                "some attention stock; keep the rotary embedding (op: torch) as well"
            )
    return plan


def _keeps_attention(model: nn.Module, plan: Plan, operations: Operations) -> bool:
    """Whether some attention of the skeleton stays stock."""
    stock = operations[_ATTENTION_OP].replaces
    in_all = sum(isinstance(module, stock) for module in model.modules())
    return in_all > sum(entry.op == _ATTENTION_OP for entry in plan.entries)


# --- The class of a loaded model -------------------------------------------------------------------------------------


class _FilledByQuantizer(KtModelMixin):
    @staticmethod
    def _load_pretrained_model(*args: Any, **kwargs: Any) -> tuple[LoadStateDictInfo, None]:
        # Nothing is missing: the quantizer fills the model when transformers has set up the buffers that no file holds.
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None


_KT_CLASSES: dict[type[PreTrainedModel], Any] = {}


def _kt_class(model_class: type[PreTrainedModel]) -> Any:
    """``model_class`` with `KtModelMixin`, under its own name: transformers looks classes up by name."""
    if issubclass(model_class, _FilledByQuantizer):
        return model_class
    if model_class not in _KT_CLASSES:
        names = {key: getattr(model_class, key) for key in ("__module__", "__qualname__", "__doc__")}
        generating = (KtGenerationMixin,) if hasattr(model_class, "generate") else ()
        bases = (_FilledByQuantizer, *generating, model_class)
        _KT_CLASSES[model_class] = type(model_class.__name__, bases, names)
    return _KT_CLASSES[model_class]


def _recorded_modules(model: Any) -> dict[str, int]:
    """Each output that transformers records by hooks, such as output_attentions, to how many modules give it."""
    counts = {}
    for key, recorder in (model._can_record_outputs or {}).items():
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            counts[f"output_{key}"] = sum(isinstance(module, target) for module in model.modules())
    return counts
