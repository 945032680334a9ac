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

import transformers_kt._C as _C
from transformers_kt.backends.gpu.devices import devices
from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.families.registry import dims_of
from transformers_kt.families.tree import tree_of
from transformers_kt.integration import loading
from transformers_kt.integration.loaded_model import InputGuard, refuse_training
from transformers_kt.integration.loading import KtReport
from transformers_kt.integration.replaced_classes import ReplacedClasses
from transformers_kt.planning import hardware
from transformers_kt.planning.costs import DEFAULT_CONTEXT, Costs
from transformers_kt.planning.decision import Decision, Machine, ModelRequest, decide
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from transformers_kt.integration.loading import Modules

METHOD = "kt"  # quant_method, and the name of our attention in transformers' registries
_COSTS = {
    "madvise": "weights lie in pages of 4 KiB, not of 2 MiB, so that reading them takes longer",
    "mbind": "weights may lie in the memory of another node than their threads",
    "sched_setaffinity": "threads may leave the node whose weights they read",
}
"""Of a system call that is optional."""
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
        machine = _machine(request)
        costs = Costs(request.config, min(DEFAULT_CONTEXT, dims_of(request.config).context))
        decision = self._decision = decide(request, tree_of(model), machine, costs.on_gpus)
        _log(decision, request.title)
        free = request.placement.tightest(hardware.free_memory())
        decision.require_loadable(request.title, free, machine.hardware.capacities)
        if decision.all_attention_is_ours:
            # Masks in our own short form. Where stock attention shares them they stay as transformers makes them,
            # which our attention reads too.
            model.config._attn_implementation = METHOD
        recorded = _recorded_modules(model)
        self._replaced = ReplacedClasses(model, decision.assignments)
        self._parameters = sum(parameter.numel() for parameter in model.parameters())  # of the stock skeleton
        loading.apply_plan(model, decision.assignments, self._job.modules, devices())
        self._lost_outputs = tuple(key for key, count in _recorded_modules(model).items() if count < recorded[key])
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Both ends of a tie are filled from the file; there may be no parameter left to tie.
                module.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers_kt.integration.tune_prefetch import tune_prefetch
        from transformers_kt.modules.fused.base_model import fuse_base_models
        from transformers_kt.modules.fused.decoder_layer import fuse_decoder_layers
        from transformers_kt.modules.fused.hybrid_model import fuse_hybrid_models
        from transformers_kt.modules.gpu.ram_experts import share_with_gpus

        job, self._job = self._job, None
        decision, self._decision = self._decision, None
        assert job is not None
        assert decision is not None
        request, total = job.request, decision.stored_bytes
        description = f"Loading {request.title} ({format_bytes(total)})"
        with transformers_logging.tqdm(total=total, desc=description, unit="B", unit_scale=True) as bar:
            rows = loading.fill(model, decision.assignments, request.checkpoint, bar, devices())
        share_with_gpus(
            model, decision.gpu_experts, request.placement.profile, request.placement.stream_tokens, devices()
        )
        fuse_decoder_layers(model)
        fuse_base_models(model)
        fuse_hybrid_models(model, uses_graphs=request.placement.kt_cuda_graph)
        notes = (*decision.notes, *_notes_of_gpus(decision))
        kernels = tune_prefetch(model)
        slower = tuple(f"the system refuses {call}: {_COSTS[call]}" for call in _C.refused_calls())
        model.kt_report = KtReport(request.title, decision.plan.source, rows, (*notes, *slower), kernels)
        model.kt_parameters = self._parameters
        guard = InputGuard(model.config, self._lost_outputs, self._replaced)
        model.base_model.register_forward_pre_hook(guard, with_kwargs=True)
        if request.placement.device_map is not None or torch.accelerator.is_available():
            # Else pipeline() moves the model to the accelerator. Not set without need: with it, pipeline(device="cpu")
            # is refused, here as for every model that was loaded with a device_map.
            model.hf_device_map = _device_map_of_torch(decision)

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


def _machine(request: ModelRequest) -> Machine:
    """This machine, as far as the request allows it to be used."""
    gpus = tuple(device.free_bytes() for device in devices().values())
    here = request.placement.limited(hardware.Hardware(gpus, hardware.free_memory().nbytes))
    return Machine(here, "this machine has", 'device_map="cpu" runs the same plan on the CPU')


def _device_map_of_torch(decision: Decision) -> dict[str, str]:
    """Modules to devices of torch, for those who look where inputs go: the CPU first, where ids are looked up."""
    placed = decision.device_map or {entry.module: entry.device for entry in decision.plan.entries}
    if set(placed.values()) == {CPU}:
        return dict(decision.device_map or {"": CPU})
    there = devices()
    found = {module: str(there[device].torch_device) if device != CPU else CPU for module, device in placed.items()}
    return dict(sorted(found.items(), key=lambda item: item[1] != CPU))


def _log(decision: Decision, title: str) -> None:
    if decision.file_notes:
        logger.warning("%s:\n%s", title, "\n".join(decision.file_notes))
    if decision.plan.notes:
        logger.warning("%s does not do all that its rules say:\n%s", title, "\n".join(decision.plan.notes))
    for note in _notes_of_gpus(decision):
        logger.warning("%s: %s", title, note)


def _notes_of_gpus(decision: Decision) -> list[str]:
    """That results differ from the CPU's is said, never silent."""
    if not decision.gpus:
        return []
    fakes = " (FAKES, computed by torch on the CPU)" if hardware.fake_gpu_memory() is not None else ""
    return [
        f"{', '.join(decision.gpus)}{fakes}: GPUs round otherwise than the CPU. "
        'device_map="cpu" gives the same bits on every machine.'
    ]


def _recorded_modules(model: Any) -> dict[str, int]:
    """Each output that transformers records by hooks, such as output_attentions, to how many modules give it."""
    counts = {}
    for key, recorder in (model._can_record_outputs or {}).items():
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            counts[f"output_{key}"] = sum(isinstance(module, target) for module in model.modules())
    return counts
