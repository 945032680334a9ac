"""Config and quantizer of a GGUF-backed model, as transformers' registries of quantization methods want them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.families.tree import ModelTree, tree_of
from transformers_kt.integration import loading
from transformers_kt.integration.loaded_model import InputGuard, refuse_training
from transformers_kt.integration.loading import KtReport
from transformers_kt.planning import assignments, costs, hardware
from transformers_kt.planning.device_map import PlacementWish, device_refusal
from transformers_kt.rules import AUTO, DeviceMap, Plan, RuleList
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from transformers_kt.families.tensors import TensorSlot
    from transformers_kt.gguf.checkpoint import Checkpoint
    from transformers_kt.integration.loading import Modules
    from transformers_kt.planning.operations import Operation

METHOD = "kt"  # quant_method, and the name of our attention in transformers' registries
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


@dataclass(slots=True)
class LoadJob:
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
            model.config._attn_implementation = METHOD
        job.assignments = assignments.assign_tensors(plan, tree, job.slots, job.checkpoint.tensors)
        assignments.require_supported(tree, model.config, job.assignments, job.operations)
        recorded = _recorded_modules(model)
        loading.apply_plan(model, job.assignments, job.modules)
        job.lost_outputs = tuple(key for key, count in _recorded_modules(model).items() if count < recorded[key])
        assignments.check_types(job.assignments, job.operations)
        needed = assignments.memory_needed(job.assignments, job.operations, model.config)
        hardware.require_memory(needed, job.title, job.wish.tightest(hardware.free_memory()))
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # Both ends of a tie are filled from the file; there may be no parameter left to tie.
                module.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers_kt.integration.tune_prefetch import choose_look_ahead
        from transformers_kt.modules.fused.base_model import join_base_models
        from transformers_kt.modules.fused.decoder_layer import join_decoder_layers

        job, self._job = self._job, None
        assert job is not None
        total = sum(assignment.stored_bytes for assignment in job.assignments)
        description = f"Loading {job.title} ({format_bytes(total)})"
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
            model.hf_device_map = dict(job.device_map or {"": hardware.CPU})

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


def _plan_on_the_cpu(tree: ModelTree, layers: int, job: LoadJob) -> Plan:
    """The plan, and in ``job`` the device map. Raises where the plan names another device than the CPU."""
    # No GPU is offered to the automatic placement: transformers would dispatch over the devices of the map, but the
    # operations of this version compute on the CPU.
    no_gpus = hardware.Hardware((), hardware.free_memory().nbytes)
    is_auto = job.rules.source == AUTO
    tensors = job.checkpoint.tensors
    job.device_map = job.wish.settled(is_auto, tree, layers, job.slots, tensors, no_gpus, costs.FastMemory(0, 0))
    plan = assignments.settled_plan(tree, job.rules, job.operations, job.attention, job.device_map)
    elsewhere = next((entry for entry in plan.entries if entry.device != hardware.CPU), None)
    present = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if elsewhere is not None:
        reason = (
            "but this version computes on the CPU only"
            if elsewhere.device in present
            else f"which is not there: this machine has {', '.join([hardware.CPU, *present])}"
        )
        raise device_refusal(
            plan, elsewhere, job.device_map is not None, f'{reason}. device_map="cpu" runs the same plan on the CPU'
        )
    if is_auto and present:
        logger.info("all of %s is on the CPU: this version leaves %s unused", job.title, ", ".join(present))
    return plan


def _recorded_modules(model: Any) -> dict[str, int]:
    """Each output that transformers records by hooks, such as output_attentions, to how many modules give it."""
    counts = {}
    for key, recorder in (model._can_record_outputs or {}).items():
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            counts[f"output_{key}"] = sum(isinstance(module, target) for module in model.modules())
    return counts
