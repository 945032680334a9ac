"""One decision about a model: what computes each module, where, from which tensors, in how much memory.

`plan` prints it, loading applies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers_kt.errors import RuleError, UnsupportedOperationError, UnsupportedTypeError
from transformers_kt.families.registry import family_of
from transformers_kt.planning.assignments import Assignment, assign_tensors, first_of, keeps_attention, resolve_plan
from transformers_kt.planning.costs import gpu_bytes, ring_bytes
from transformers_kt.planning.device_map import require_coverage
from transformers_kt.planning.gpu_experts import GpuExperts, place_gpu_experts
from transformers_kt.planning.hardware import MemoryLimit, require_memory
from transformers_kt.planning.operations import ATTENTION
from transformers_kt.planning.placement import auto_device_map, cpu_expert_layers
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU
from transformers_kt.text import layer_number

if TYPE_CHECKING:
    from transformers_kt.families.base import TensorSlot
    from transformers_kt.families.tree import ModelTree
    from transformers_kt.gguf.checkpoint import Checkpoint
    from transformers_kt.planning.costs import FastMemory
    from transformers_kt.planning.device_map import PlacementRequest
    from transformers_kt.planning.hardware import Hardware
    from transformers_kt.rules import DeviceMap, Plan, RuleList


NO_GRAPHS = "kt_cuda_graph=False: GPUs launch a decode step piece by piece"


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A model that is asked for, opened and read: all that a decision needs beside its tree and the machine.

    ``slots`` are those that the tensors of ``checkpoint`` fill. ``attention`` is the attn_implementation that is to
    stand in place of ours, None for ours. ``notes`` say what of the model was taken for granted.
    """

    title: str
    checkpoint: Checkpoint
    config: Any
    slots: Sequence[TensorSlot]
    rules: RuleList
    placement: PlacementRequest
    attention: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """The devices to decide for.

    What is said of a device that is not there begins with ``presence`` ("this machine has") and ends with ``remedy``.
    """

    hardware: Hardware
    presence: str
    remedy: str

    def objection(self, device: str) -> str | None:
        """Why nothing can be put on ``device``, and what to do; None where it can."""
        usable = self.hardware.capacities
        if device in usable:
            return None
        return f"which is not there: {self.presence} {', '.join(usable)}. {self.remedy}"


@dataclass(frozen=True, slots=True)
class Decision:
    """What loading a model does. ``device_map`` is None where rules alone decide about devices.

    ``weight_bytes`` are what the weights take, by device. ``problems`` say which types no operation takes, once for
    each operation: a plan reports them, loading raises the first.
    """

    plan: Plan
    device_map: DeviceMap | None
    assignments: tuple[Assignment, ...]
    weight_bytes: Mapping[str, int]
    problems: tuple[UnsupportedTypeError, ...]
    all_attention_is_ours: bool
    gpu_experts: GpuExperts
    file_notes: tuple[str, ...] = ()
    uses_graphs: bool = True

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the file was taken for granted, what rules ask for that becomes something else or nothing, what GPUs
        do otherwise than by default, and which experts lie in slots."""
        graphs = () if self.uses_graphs or not self.gpus else (NO_GRAPHS,)
        return (*self.file_notes, *self.plan.notes, *graphs, *self.gpu_experts.notes)

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from the checkpoint."""
        return sum(assignment.stored_bytes for assignment in self.assignments)

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs that something lies on."""
        return tuple(sorted(device for device in self.weight_bytes if device != CPU))

    def require_loadable(self, title: str, free: MemoryLimit, on_gpus: Mapping[str, int]) -> None:
        """Raise the first of ``problems``, or `OutOfMemoryError` where the weights do not fit into ``free`` RAM or what
        ``on_gpus`` has of each GPU."""
        for problem in self.problems:
            raise problem
        require_memory(self.weight_bytes.get(CPU, 0), title, free)
        for gpu in self.gpus:
            limit = MemoryLimit(on_gpus[gpu], f"memory of {gpu}")
            needed = self.weight_bytes[gpu] + self.gpu_experts.nbytes(gpu)
            require_memory(needed, f"the part of {title} on {gpu}", limit)


def decide(request: ModelRequest, tree: ModelTree, machine: Machine, needs: FastMemory) -> Decision:
    """The decision about the model of ``tree``; ``needs`` is the room to leave on each GPU.

    Raises `RuleError`, `UnsupportedModelError` or `UnsupportedOperationError` where what is asked for cannot be. Reads
    no weights.
    """
    family = family_of(request.config)
    device_map = _resolve_device_map(request, tree, machine.hardware, needs)
    plan = resolve_plan(tree, request.rules, request.attention, device_map)
    _require_devices(plan, machine, by_map=device_map is not None)
    assignments = tuple(assign_tensors(plan, tree, family, request.slots, request.checkpoint.tensors))
    for assignment in assignments:
        assignment.require_supported(tree, request.config)
    weights = _weight_bytes(assignments, request.config)
    asked = request.placement
    if asked.profile is not None:
        asked.profile.require_fits(request.title, _experts_of_layers(request))
    streams = asked.stream_tokens != 0
    return Decision(
        plan,
        device_map,
        assignments,
        weights,
        _unsupported_types(assignments),
        first_of(plan, ATTENTION) is not None and not keeps_attention(tree, plan),
        place_gpu_experts(asked.slots, streams, assignments, weights, machine.hardware, needs),
        request.notes,
        request.placement.kt_cuda_graph,
    )


def _experts_of_layers(request: ModelRequest) -> dict[int, int]:
    """Decoder layer -> how many routed experts it has, of those that have some."""
    experts = family_of(request.config).dims(request.config).experts
    layers = (layer_number(slot.module) for slot in request.slots if slot.module.endswith(".experts"))
    return dict.fromkeys(sorted({layer for layer in layers if layer is not None}), experts)


def _resolve_device_map(
    request: ModelRequest, tree: ModelTree, hardware: Hardware, needs: FastMemory
) -> DeviceMap | None:
    """The device map; None where rules alone decide.

    Raises `RuleError` if the map leaves out modules or names others, or a number is none that the model has layers for;
    `UnsupportedOperationError` where experts are to lie on GPUs that are not there.
    """
    placement, family = request.placement, family_of(request.config)
    owners = [path for path, node in tree.modules() if node.owns_tensors]
    if isinstance(placement.device_map, Mapping):
        require_coverage(placement.device_map, (path for path, _ in tree.modules()), owners)
        return dict(placement.device_map)
    if request.rules.source != AUTO:
        return None
    experts = _experts_of_layers(request)
    cpu_layers = cpu_expert_layers(
        family.dims(request.config).layers, list(experts), placement.kt_cpu_layers, placement.kt_gpu_experts
    )
    if placement.kt_gpu_experts and not hardware.gpus:
        raise UnsupportedOperationError(
            f"kt_gpu_experts={placement.kt_gpu_experts} puts routed experts on GPUs, but there is none to use. Leave "
            "it out: everything is on the CPU then"
        )
    stored = gpu_bytes(request.slots, request.checkpoint.tensors, request.config)
    sizes = {owner: stored.get(owner, stored.get(f"model.{owner}", 0)) for owner in owners}
    if placement.stream_tokens != 0:
        of_layers = [nbytes for module, nbytes in stored.items() if module.endswith(".experts")]
        count = max(experts.values(), default=1)
        needs = replace(needs, ring=ring_bytes(((nbytes // count, count) for nbytes in of_layers), hardware.gpus))
    mode, has_slots = placement.device_map or AUTO, placement.slots.asks
    return auto_device_map(sizes, hardware, needs, mode=mode, cpu_layers=cpu_layers, has_slots=has_slots)


def _require_devices(plan: Plan, machine: Machine, by_map: bool) -> None:
    """Raise for the first entry on a device that cannot be used: an error that says who put it there.

    `RuleError` with file, rule and line where a rule did, `UnsupportedOperationError` where a device map did.
    """
    for entry in plan.entries:
        objection = machine.objection(entry.device)
        if objection is None:
            continue
        said = f"puts {entry.module} on {entry.device}, {objection}"
        if by_map:
            raise UnsupportedOperationError(f"device_map {said}")
        who = plan.label(entry)
        if who is None:
            who = f"{plan.source}, where KTransformers' files put a module without a rule,"
        raise RuleError(f"{who} {said}")


def _weight_bytes(assignments: Iterable[Assignment], config: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for assignment in assignments:
        device = assignment.entry.device
        found[device] = found.get(device, 0) + assignment.memory_needed(config)
    return found


def _unsupported_types(assignments: Iterable[Assignment]) -> tuple[UnsupportedTypeError, ...]:
    problems: dict[str, UnsupportedTypeError] = {}  # one per type: 58 layers would say the same
    for assignment in assignments:
        try:
            assignment.check_types()
        except UnsupportedTypeError as error:
            types = {info.ggml_type for info in assignment.tensors.values()}
            # Without the frames of this loop, which whoever keeps the decision would keep too.
            problems.setdefault(f"{assignment.entry.op} {sorted(types)}", error.with_traceback(None))
    return tuple(problems.values())
