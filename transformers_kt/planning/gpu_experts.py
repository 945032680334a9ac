"""Experts that lie in RAM and are computed by a GPU too: those in slots of its memory, and those of long prompts.

Both are for layers whose experts alone lie in RAM. A slot holds one expert; so many in each layer are what
``kt_expert_slots=`` says, or what fits. Long prompts need a ring of slots on each such GPU, as `costs` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from transformers_kt.errors import RuleError, UnsupportedOperationError
from transformers_kt.planning.costs import FastMemory, ring_bytes
from transformers_kt.planning.hardware import Hardware, parse_bytes
from transformers_kt.planning.operations import ATTENTION, OPERATIONS
from transformers_kt.planning.tables import grouped
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU
from transformers_kt.text import format_bytes, layer_number

if TYPE_CHECKING:
    from transformers_kt.planning.assignments import Assignment

_ON_CPU = OPERATIONS["experts_cpu"]


@dataclass(frozen=True, slots=True)
class SlotRequest:
    """``each``: experts of every layer, or ``nbytes`` on every GPU; what is left where both are None."""

    each: int | None
    nbytes: int | None

    @classmethod
    def read(cls, kt_expert_slots: Any, *, has_profile: bool = False) -> Self:
        """Raises `RuleError` for what is neither a number, nor a size, nor "auto"."""
        if kt_expert_slots is None:
            return cls(None if has_profile else 0, None)
        if isinstance(kt_expert_slots, str):
            is_auto = kt_expert_slots == AUTO
            return cls(None, None if is_auto else parse_bytes(kt_expert_slots, "kt_expert_slots"))
        if type(kt_expert_slots) is not int or kt_expert_slots < 0:
            raise RuleError(
                f"kt_expert_slots={kt_expert_slots!r}; a number of experts for each layer, a size on each GPU such as "
                "'4GiB', or 'auto' is accepted"
            )
        return cls(kt_expert_slots, None)

    @property
    def is_auto(self) -> bool:
        return self.each is None and self.nbytes is None

    @property
    def asks(self) -> bool:
        return self.each != 0 and self.nbytes != 0


def read_stream_tokens(kt_prefill_stream_tokens: Any) -> int | None:
    """Raises `RuleError` for what is no number of tokens."""
    value = kt_prefill_stream_tokens
    if value is None or (type(value) is int and value >= 0):
        return value
    raise RuleError(
        f"kt_prefill_stream_tokens={value!r}; the fewest tokens of a prompt whose experts go to the GPU, or 0 for "
        "never, is accepted"
    )


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """What of a layer's ``experts`` in RAM lies in slots on ``device`` too."""

    module: str
    device: str
    slots: int
    experts: int
    nbytes: int  # of one expert


@dataclass(frozen=True, slots=True)
class GpuExperts:
    """``layers`` are all whose experts lie in RAM and everything else on a GPU, those without slots included.
    ``ring`` is what long prompts need, by device."""

    layers: tuple[LayerSlots, ...] = ()
    ring: Mapping[str, int] = field(default_factory=dict)

    def nbytes(self, device: str) -> int:
        """Bytes of the slots on ``device``."""
        return sum(layer.slots * layer.nbytes for layer in self.layers if layer.device == device)

    @property
    def notes(self) -> tuple[str, ...]:
        """How many experts lie in slots, equal layers at once."""
        with_slots = [layer for layer in self.layers if layer.slots]
        return tuple(
            f"{name}: {rows[0].slots} of {rows[0].experts} experts{' of each' if len(rows) > 1 else ''} lie in slots "
            f"on {rows[0].device} too ({format_bytes(sum(row.slots * row.nbytes for row in rows))})."
            for name, rows in grouped(with_slots, lambda row: (row.device, row.slots, row.experts))
        )


def place_gpu_experts(
    request: SlotRequest,
    streams: bool,
    assignments: Sequence[Assignment],
    weights: Mapping[str, int],
    hardware: Hardware,
    needs: FastMemory,
) -> GpuExperts:
    """Slots for the layers of ``assignments``, whose ``weights`` lie on devices already.

    Raises `RuleError` for more slots than experts, or a size that gives no layer one; `UnsupportedOperationError` where
    there is no GPU.
    """
    if request.asks and not request.is_auto and not hardware.gpus:
        said = request.each if request.nbytes is None else format_bytes(request.nbytes)
        raise UnsupportedOperationError(
            f"kt_expert_slots={said} puts routed experts into the memory of GPUs, but there is none to use. Leave it "
            "out: everything is on the CPU then"
        )
    layers = _layers_beside_gpus(assignments)
    attention = [a.entry.device for a in assignments if a.operation.kind == ATTENTION]
    found: list[LayerSlots] = []
    ring = {}
    for device in dict.fromkeys(layer.device for layer in layers):
        own = [layer for layer in layers if layer.device == device]
        if streams:
            ring[device] = ring_bytes(((layer.nbytes, layer.experts) for layer in own), hardware.gpus)
        used = weights[device] + attention.count(device) * needs.kv_cache_per_layer + needs.buffers
        left = hardware.capacities[device] - used - ring.get(device, 0)
        slots = _slots(request, own, left)
        found += [LayerSlots(each.module, device, slots, each.experts, each.nbytes) for each in own]
    return GpuExperts(tuple(found), ring)


def _layers_beside_gpus(assignments: Iterable[Assignment]) -> list[LayerSlots]:
    """Layers whose experts alone lie in RAM, without slots yet."""
    by_module = {assignment.entry.module: assignment for assignment in assignments}
    attention = {
        layer_number(module): each.entry.device
        for module, each in by_module.items()
        if each.operation.kind == ATTENTION
    }
    layers = []
    for module, each in by_module.items():
        device = attention.get(layer_number(module), CPU)
        gate = by_module.get(f"{module.rpartition('.')[0]}.gate")
        if each.operation is not _ON_CPU or device == CPU or gate is None or gate.entry.device != device:
            continue
        experts = next(iter(each.tensors.values())).shape[0]
        layers.append(LayerSlots(module, device, 0, experts, each.stored_bytes // experts))
    return layers


def _slots(request: SlotRequest, layers: Sequence[LayerSlots], left: int) -> int:
    """In each of the ``layers`` of a GPU."""
    experts, one_of_each = layers[0].experts, sum(layer.nbytes for layer in layers)
    if request.each is not None:
        if request.each > experts:
            raise RuleError(
                f"kt_expert_slots={request.each}; a number from 0 to {experts} is accepted: a layer has {experts} "
                "experts"
            )
        return request.each
    if request.nbytes is not None and 0 < request.nbytes < one_of_each:
        raise RuleError(
            f"kt_expert_slots is {format_bytes(request.nbytes)}, but one expert of each of the {len(layers)} layers on "
            f"{layers[0].device} takes {format_bytes(one_of_each)}. Give more, or a number of experts for each layer"
        )
    return min(experts, max(0, math.floor((left if request.nbytes is None else request.nbytes) / one_of_each)))
