"""The seam to transformers; the only file that imports its internals.

What the wrapper round ``from_pretrained`` (in `hooks`) calls finds config and GGUF and hands both back to transformers,
with a quantizer that replaces modules in the skeleton and fills them.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_kt import assignments, loading, placement
from transformers_kt.device_map import PlacementWish, device_refusal
from transformers_kt.errors import UnsupportedModelError, UnsupportedOperationError
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.config import config_from_gguf, generation_config_from_gguf
from transformers_kt.gguf.names import TensorSlot, check_tensors
from transformers_kt.gguf.tokenizer import tokenizer_from_gguf
from transformers_kt.loaded_model import InputGuard, KtGenerationMixin, KtModelMixin, refuse_training
from transformers_kt.loading import KtReport
from transformers_kt.model_tree import ModelTree, tree_of
from transformers_kt.request import HUB_OPTIONS, MOOT_OPTIONS, Call, Request, folder_of
from transformers_kt.rules import AUTO, DeviceMap, Plan, RuleList, load_rules

if TYPE_CHECKING:
    from transformers_kt.loading import Modules
    from transformers_kt.operations import Operation

_METHOD = "kt"  # quant_method, and the name of our attention in transformers' registries
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

_REFUSED_OPTIONS = {
    "quantization_config": "the weights of a GGUF are quantized already",
    "state_dict": "the weights come from the GGUF",
    "distributed_config": "one process computes the whole model",
    "device_mesh": "one process computes the whole model",
    "tp_plan": "one process computes the whole model",
    "tp_size": "one process computes the whole model",
}

logger = logging.getLogger(__name__)


def install() -> None:
    """Register config and quantizer with transformers. A second call changes nothing."""
    _register(AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, KtConfig)
    _register(AUTO_QUANTIZER_MAPPING, register_quantizer, KtHfQuantizer)


def skeleton(config: DeepseekV2Config | DeepseekV3Config) -> PreTrainedModel:
    """The stock causal language model of ``config`` on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def register_attention(name: str, attention_fn: Callable[..., Any], mask_fn: Callable[..., Any]) -> None:
    """Make ``name`` an ``attn_implementation``: stock attention modules call ``attention_fn``, the model ``mask_fn``.

    Without a mask function of that name transformers makes no masks at all, padding or not, and says nothing.
    """
    AttentionInterface.register(name, attention_fn)
    AttentionMaskInterface.register(name, mask_fn)


def _register(mapping: dict[str, Any], register: Callable[[str], Callable[[type], type]], cls: type) -> None:
    registered = mapping.get(_METHOD)
    if registered is cls:
        return
    if registered is not None and f"{registered.__module__}.{registered.__name__}" == f"{__name__}.{cls.__name__}":
        del mapping[_METHOD]  # what this class was before this module was reloaded
    register(_METHOD)(cls)


# --- What the wrapper calls ------------------------------------------------------------------------------------------


def load_auto_model(call: Call, request: Request) -> Any:
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


def load_model(call: Call, request: Request) -> Any:
    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        cls: type[PreTrainedModel] = call.cls
        if cls.config_class is not type(config):
            raise UnsupportedModelError(
                f"{request.name} is a {config.model_type} model, which {cls.__name__} does not compute; load "
                "AutoModelForCausalLM"
            )
        return cls

    return _load(model_class, request, call.args, call.options)


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


def _has_tokenizer(folder: str, hub: Mapping[str, Any]) -> bool:
    if not Path(folder).exists():
        return True  # on the hub: transformers will see
    return any((folder_of(folder, hub) / name).is_file() for name in _TOKENIZER_FILES)


# --- Loading ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Job:
    """What the quantizer needs to know of the call that it serves."""

    checkpoint: Checkpoint
    slots: list[TensorSlot]
    rules: RuleList
    modules: Modules
    title: str
    attention: str | None  # the attn_implementation that is to stand in place of ours
    wish: PlacementWish
    device_map: DeviceMap | None = None
    notes: tuple[str, ...] = ()
    assignments: list[assignments.Assignment] = field(default_factory=list)
    lost_outputs: tuple[str, ...] = ()

    @property
    def operations(self) -> dict[str, Operation]:
        return {name: module.operation for name, module in self.modules.items()}


def _load(
    model_class: Callable[[PreTrainedConfig], type[PreTrainedModel]],
    request: Request,
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
    modules = _modules()
    rules = load_rules(request.rules, modules)
    checkpoint = request.open()
    given, attention = options.pop("config", None), options.pop("attn_implementation", None)
    trust_remote_code = options.get("trust_remote_code")
    config, rest = resolved_config(request, given, options, checkpoint)
    config._attn_implementation = attention = _stock_attention(attention, config)
    job = _Job(checkpoint, check_tensors(checkpoint, config), rules, modules, request.title, attention, wish)
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


def _modules() -> Modules:
    # Here, for they import the models of transformers, which nobody needs who loads none.
    from transformers_kt.modules import MODULES
    from transformers_kt.modules.attention import ranges_mask
    from transformers_kt.modules.base import require_supported_cpu

    require_supported_cpu()
    register_attention(_METHOD, _refuse_stock_attention, ranges_mask)
    return MODULES


def _refuse_stock_attention(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedOperationError(
        f'attn_implementation="{_METHOD}" is for models whose attention was replaced at loading; choose "sdpa" or '
        '"eager" for this one'
    )


def _settle_dtype(options: dict[str, Any]) -> None:
    dtypes = {str(options.pop(key, "auto")).removeprefix("torch.") for key in ("dtype", "torch_dtype")}
    if others := sorted(dtypes - {"auto", "None", "float32"}):
        logger.warning("dtype=%s is not used: on the CPU activations are float32, whatever the weights are", others[0])


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
        tree = tree_of(model)
        plan = _plan_on_the_cpu(tree, model.config.num_hidden_layers, job)
        job.notes = plan.notes
        if plan.notes:
            logger.warning("%s does not do all that its rules say:\n%s", job.title, "\n".join(plan.notes))
        if plan.uses(assignments.ATTENTION_OP) and not assignments.keeps_attention(tree, plan, job.operations):
            # Masks in our own short form. Where stock attention shares them they stay as transformers makes them,
            # which our attention reads too.
            model.config._attn_implementation = _METHOD
        job.assignments = assignments.assign_tensors(plan, tree, job.slots, job.checkpoint.tensors)
        assignments.require_supported(tree, model.config, job.assignments, job.operations)
        recorded = _recorded_modules(model)
        loading.apply_plan(model, job.assignments, job.modules)
        job.lost_outputs = tuple(key for key, count in _recorded_modules(model).items() if count < recorded[key])
        assignments.check_types(job.assignments, job.operations)
        needed = assignments.memory_needed(job.assignments, job.operations, model.config)
        placement.require_memory(needed, job.title, job.wish.tightest(placement.free_memory()))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Both ends of a tie are filled from the file; there may be no parameter left to tie.
                module.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers_kt.modules.base_model import join_base_models
        from transformers_kt.modules.decoder_layer import join_decoder_layers
        from transformers_kt.modules.look_ahead import choose_look_ahead

        job, self._job = self._job, None
        assert job is not None
        total = sum(assignment.stored_bytes for assignment in job.assignments)
        description = f"Loading {job.title} ({placement.format_bytes(total)})"
        with transformers_logging.tqdm(total=total, desc=description, unit="B", unit_scale=True) as bar:
            rows = loading.fill(model, job.assignments, job.modules, job.checkpoint, bar)
        join_decoder_layers(model)
        join_base_models(model)
        model.kt_report = KtReport(job.title, job.rules.source, rows, job.notes, choose_look_ahead(model))
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


def _plan_on_the_cpu(tree: ModelTree, layers: int, job: _Job) -> Plan:
    """The plan, and in ``job`` the device map. Raises where the plan names another device than the CPU."""
    # No GPU is offered to the automatic placement: transformers would dispatch over the devices of the map, but the
    # operations of this version compute on the CPU.
    no_gpus = placement.Hardware((), placement.free_memory().nbytes)
    is_auto = job.rules.source == AUTO
    tensors = job.checkpoint.tensors
    job.device_map = job.wish.settled(is_auto, tree, layers, job.slots, tensors, no_gpus, placement.FastMemory(0, 0))
    plan = assignments.settled_plan(tree, job.rules, job.operations, job.attention, job.device_map)
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
