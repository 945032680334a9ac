"""Config and quantizer of a GGUF-backed model, as transformers' registries of quantization methods want them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.families.tree import tree_of
from transformers_kt.integration import loading
from transformers_kt.integration.loaded_model import InputGuard, refuse_training
from transformers_kt.integration.loading import KtReport
from transformers_kt.integration.replaced_classes import ReplacedClasses
from transformers_kt.planning import hardware
from transformers_kt.planning.costs import FastMemory
from transformers_kt.planning.decision import Decision, Machine, ModelRequest, decide
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU, gpu_name
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from transformers_kt.integration.loading import Modules

METHOD = "kt"  # quant_method, and the name of our attention in transformers' registries
_NO_NEEDS = FastMemory(kv_cache_per_layer=0, buffers=0)  # of GPUs, on which nothing is placed
logger = logging.getLogger(__name__)


def install() -> None:
    """Register config and quantizer with transformers. A second call changes nothing."""
    _register(AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, KtConfig)
    _register(AUTO_QUANTIZER_MAPPING, register_quantizer, KtHfQuantizer)


def _register(mapping: dict[str, Any], register: Callable[[str], Callable[[type], type]], cls: type) -> None:
    registered = mapping.get(METHOD)
    if registered is cls:
        return
    if registered is not None and f"{registered.__module__}.{registered.__name__}" == f"{__name__}.{cls.__name__}":
        del mapping[METHOD]  # what this class was before this module was reloaded
    register(METHOD)(cls)


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What the quantizer needs to know of the call that it serves: the model, and the classes of our operations."""

    request: ModelRequest
    modules: Modules


class KtConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``model.config.quantization_config`` says of a model whose weights lie in a GGUF."""

    def __init__(
        self, gguf_path: str = "", kt_rules: str = AUTO, *, job: LoadJob | None = None, quant_method: str = METHOD
    ) -> None:
        self.quant_method = quant_method
        self.gguf_path = gguf_path
        self.kt_rules = kt_rules
        self._job = job

    def take_job(self) -> LoadJob | None:
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
        self._decision: Decision | None = None
        self._lost_outputs: tuple[str, ...] = ()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self._job is None:
            raise UnsupportedOperationError(
                'this config.json says quant_method "kt": the weights lie in a GGUF file. Name it with gguf_path='
            )

    def update_device_map(self, device_map: Any) -> dict[str, torch.device]:
        return {"": torch.device("cpu")}  # also under torch.set_default_device("cuda")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert self._job is not None
        request = self._job.request
        machine = _machine()
        decision = self._decision = decide(request, tree_of(model), machine, _NO_NEEDS)
        _log(decision, machine, request.title)
        decision.require_loadable(request.title, request.placement.tightest(hardware.free_memory()))
        if decision.all_attention_is_ours:
            # Masks in our own short form. Where stock attention shares them they stay as transformers makes them,
            # which our attention reads too.
            model.config._attn_implementation = METHOD
        recorded = _recorded_modules(model)
        self._replaced = ReplacedClasses(model, decision.assignments)
        self._parameters = sum(parameter.numel() for parameter in model.parameters())  # of the stock skeleton
        loading.apply_plan(model, decision.assignments, self._job.modules)
        self._lost_outputs = tuple(key for key, count in _recorded_modules(model).items() if count < recorded[key])
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Both ends of a tie are filled from the file; there may be no parameter left to tie.
                module.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers_kt.integration.tune_prefetch import tune_prefetch
        from transformers_kt.modules.fused.base_model import fuse_base_models
        from transformers_kt.modules.fused.decoder_layer import fuse_decoder_layers

        job, self._job = self._job, None
        decision, self._decision = self._decision, None
        assert job is not None
        assert decision is not None
        request, total = job.request, decision.stored_bytes
        description = f"Loading {request.title} ({format_bytes(total)})"
        with transformers_logging.tqdm(total=total, desc=description, unit="B", unit_scale=True) as bar:
            rows = loading.fill(model, decision.assignments, request.checkpoint, bar)
        fuse_decoder_layers(model)
        fuse_base_models(model)
        model.kt_report = KtReport(request.title, decision.plan.source, rows, decision.notes, tune_prefetch(model))
        model.kt_parameters = self._parameters
        guard = InputGuard(model.config, self._lost_outputs, self._replaced)
        model.base_model.register_forward_pre_hook(guard, with_kwargs=True)
        if request.placement.device_map is not None or torch.accelerator.is_available():
            # Else pipeline() moves the model to the accelerator. Not set without need: with it, pipeline(device="cpu")
            # is refused, here as for every model that was loaded with a device_map.
            model.hf_device_map = dict(decision.device_map or {"": CPU})

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        # transformers asks before it suggests adapters, which would not help.
        refuse_training("training")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> NoReturn:
        raise UnsupportedOperationError(
            "dequantize() is not supported after loading; keep modules as stock float32 with kt_rules (op: torch)"
        )


def _machine() -> Machine:
    """This machine. transformers would dispatch over the GPUs of a device map, but the operations of this version
    compute on the CPU: automatic placement is offered none."""
    gpus = tuple(map(gpu_name, range(torch.cuda.device_count())))
    on_the_cpu = hardware.Hardware((), hardware.free_memory().nbytes)
    return Machine(on_the_cpu, "this machine has", 'device_map="cpu" runs the same plan on the CPU', gpus)


def _log(decision: Decision, machine: Machine, title: str) -> None:
    if decision.file_notes:
        logger.warning("%s:\n%s", title, "\n".join(decision.file_notes))
    if decision.plan.notes:
        logger.warning("%s does not do all that its rules say:\n%s", title, "\n".join(decision.plan.notes))
    if decision.plan.source == AUTO and machine.unused:
        logger.info("all of %s is on the CPU: this version leaves %s unused", title, ", ".join(machine.unused))


def _recorded_modules(model: Any) -> dict[str, int]:
    """Each output that transformers records by hooks, such as output_attentions, to how many modules give it."""
    counts = {}
    for key, recorder in (model._can_record_outputs or {}).items():
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            counts[f"output_{key}"] = sum(isinstance(module, target) for module in model.modules())
    return counts
