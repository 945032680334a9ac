"""Sizes and budgets: how much memory weights take, how much there is, and which module goes where.

The automatic device map gives the GPUs what every token reads, layer after layer, then the routed experts of as many
whole layers as still fit; the other experts and the token embedding lie in RAM. accelerate's infer_auto_device_map
cannot serve: it needs torch and a model made of modules, where there are headers, and keeps no layer's experts apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

from transformers_kt.errors import RuleError
from transformers_kt.planning.costs import FastMemory
from transformers_kt.planning.hardware import Hardware
from transformers_kt.text import LAYER, layer_number

BALANCED = "balanced"
BALANCED_LOW_0 = "balanced_low_0"
SEQUENTIAL = "sequential"
FEWEST = "auto"
AUTOMATIC_DEVICE_MAPS = (FEWEST, BALANCED, BALANCED_LOW_0, SEQUENTIAL)
"""What ``device_map=`` may say to leave the choice to us, as accelerate names it. "auto" is "balanced" over as few GPUs
as hold as much as all would: layers follow each other, so that more GPUs bring memory and no speed."""


_EXPERTS = re.compile(r".*\.experts$")
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens$")


def cpu_expert_layers(
    layers: int, moe_layers: Sequence[int], kt_cpu_layers: int | None, kt_gpu_experts: int | None
) -> int | None:
    """How many layers from the first on keep their routed experts in RAM; None where that is left to what fits.

    ``kt_cpu_layers`` counts as llama.cpp's ``--n-cpu-moe`` does: decoder layers from the first on, dense ones included.
    ``kt_gpu_experts`` counts MoE layers from the last one back, whose experts go to the GPUs.

    Raises `RuleError` for both together, or a number that the model has no layers for.
    """
    if kt_cpu_layers is not None and kt_gpu_experts is not None:
        raise RuleError("kt_cpu_layers= and kt_gpu_experts= say the same thing from two ends; leave one of them out")
    if kt_cpu_layers is not None:
        return _count("kt_cpu_layers", kt_cpu_layers, layers, "decoder layers")
    if kt_gpu_experts is not None:
        count = _count("kt_gpu_experts", kt_gpu_experts, len(moe_layers), "layers with routed experts")
        return moe_layers[-count] if count else layers
    return None


def _count(name: str, value: object, most: int, of_what: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise RuleError(
            f"{name}={value!r}; a whole number from 0 to {most} is accepted: the model has {most} {of_what}"
        )
    return value


def auto_device_map(
    sizes: Mapping[str, int],
    hardware: Hardware,
    needs: FastMemory,
    *,
    mode: str = FEWEST,
    cpu_layers: int | None = None,
    has_slots: bool = False,
) -> dict[str, str]:
    """Module prefix to device, as accelerate has it; the longest prefix decides.

    ``sizes`` has every module that owns tensors, in the order of the forward pass, with its bytes on a GPU. ``mode`` is
    one of AUTOMATIC_DEVICE_MAPS. With ``cpu_layers`` the experts of just the layers before that number stay in RAM,
    whether the others fit or not. What does not fit on the GPUs is on the CPU, from the first layer that does not on.
    With ``has_slots`` all experts stay in RAM where not all fit: slots hold the most chosen ones of every layer, which
    is more of what tokens read than all of a few layers.
    """
    cpu, *gpus = hardware.capacities
    if not gpus:
        return {"": cpu}
    units = _units(sizes, needs)
    free = [max(0, nbytes - needs.buffers) for nbytes in hardware.gpus]
    place_on = partial(_places, units, ring=needs.ring, cpu_layers=cpu_layers, has_slots=has_slots)
    places, with_experts = place_on(free, BALANCED if mode == FEWEST else mode)
    if mode == FEWEST:
        places, with_experts = _places_on_fewest(units, free, place_on, (places, with_experts), has_slots=has_slots)
    device_map = {}
    for unit, place in zip(units, places, strict=True):
        device_map[unit.name] = cpu if place is None else gpus[place]
        if unit.experts and place is not None and unit.name not in with_experts:
            device_map[unit.experts_module] = cpu
    first = device_map[units[0].name] if units else cpu
    for module, nbytes in sizes.items():
        if _EMBEDDING.fullmatch(module):
            device_map[module] = cpu
        elif not nbytes and layer_number(module) is None:
            device_map[module] = first  # rotary tables: computed once, where the first layer is
    return device_map


@dataclass(slots=True)
class _Unit:
    """A decoder layer, or one of the modules after the last. ``fast`` has the layer's share of the KV cache."""

    name: str
    layer: int  # -1 outside the layers
    fast: int
    experts: int = 0
    experts_module: str = ""


def _units(sizes: Mapping[str, int], needs: FastMemory) -> list[_Unit]:
    units: dict[str, _Unit] = {}
    for module, nbytes in sizes.items():
        match = LAYER.search(module)
        if match is None:
            if nbytes and not _EMBEDDING.fullmatch(module):
                units[module] = _Unit(module, -1, nbytes)
            continue
        layer = module[: match.end()]
        unit = units.setdefault(layer, _Unit(layer, int(match[0]), needs.kv_cache_per_layer))
        if _EXPERTS.fullmatch(module):
            unit.experts, unit.experts_module = nbytes, module
        else:
            unit.fast += nbytes
    return list(units.values())


_Places: TypeAlias = "tuple[list[int | None], set[str]]"


def _places(
    units: Sequence[_Unit], free: Sequence[int], mode: str, *, ring: int, cpu_layers: int | None, has_slots: bool
) -> _Places:
    """The GPU of each unit, None for the CPU, and the names of the layers whose experts lie there too."""
    beside_ring = [max(0, nbytes - ring) for nbytes in free]
    if cpu_layers is not None:
        with_experts = {unit.name for unit in units if unit.layer >= cpu_layers}
        are_all_there = all(unit.name in with_experts for unit in units if unit.experts)
        room = free if are_all_there else beside_ring
        return _spread(_costs(units, with_experts), room, mode, may_overflow=True), with_experts
    everything = {unit.name for unit in units}
    places = _spread(_costs(units, everything), free, mode, may_overflow=False)
    if None not in places:
        return places, everything
    places = _spread(_costs(units, ()), beside_ring, mode, may_overflow=False)
    return places, set() if has_slots else _experts_that_fit(units, places, beside_ring)


def _places_on_fewest(
    units: Sequence[_Unit],
    free: Sequence[int],
    place_on: Callable[[Sequence[int], str], _Places],
    on_all: _Places,
    *,
    has_slots: bool,
) -> _Places:
    """As ``place_on`` says on the first few GPUs, as soon as they hold as much as ``on_all``, which is on all of them.
    Slots take what memory there is, unless all experts lie on GPUs anyway."""

    def held(places: Sequence[int | None], with_experts: set[str]) -> tuple[int, int, int]:
        used = [0] * len(free)
        for cost, place in zip(_costs(units, with_experts), places, strict=True):
            if place is not None:
                used[place] += cost
        overfull = sum(max(0, use - nbytes) for use, nbytes in zip(used, free, strict=True))
        return -overfull, len(places) - places.count(None), len(with_experts)

    for count in range(1, len(free)):
        found = place_on(free[:count], BALANCED)
        if held(*found) >= held(*on_all) and (found[1] or not has_slots):
            return found
    return on_all


def _spread(costs: Sequence[int], free: Sequence[int], mode: str, *, may_overflow: bool) -> list[int | None]:
    """The GPU of each unit, in order: GPU 0 takes the first ones. None: it, and so all after it, fit nowhere."""
    places: list[int | None] = []
    ends = list(accumulate(_quotas(sum(costs), free, mode)))
    done = gpu = used = 0
    for cost in costs:
        while gpu < len(free) - 1 and (done + cost / 2 > ends[gpu] or (used + cost > free[gpu] and not may_overflow)):
            gpu, used = gpu + 1, 0
        if used + cost > free[gpu] and not may_overflow:
            if mode != SEQUENTIAL:  # even shares waste what is left at the end of each
                return _spread(costs, free, SEQUENTIAL, may_overflow=False)
            break
        places.append(gpu)
        done, used = done + cost, used + cost
    return places + [None] * (len(costs) - len(places))


def _quotas(total: int, free: Sequence[int], mode: str) -> list[float]:
    """How much each GPU is to take before the next one's turn."""
    if mode == SEQUENTIAL:
        return [float(nbytes) for nbytes in free]
    spared = min(free[0], max(0, total - sum(free[1:]))) if mode == BALANCED_LOW_0 and len(free) > 1 else None
    shared = free if spared is None else free[1:]
    rest = total - (spared or 0)
    quotas = [rest * nbytes / (sum(shared) or 1) for nbytes in shared]
    return quotas if spared is None else [float(spared), *quotas]


def _costs(units: Sequence[_Unit], with_experts: Collection[str]) -> list[int]:
    return [unit.fast + (unit.experts if unit.name in with_experts else 0) for unit in units]


def _experts_that_fit(units: Sequence[_Unit], places: Sequence[int | None], free: Sequence[int]) -> set[str]:
    """Names of the layers whose experts lie on the layer's own GPU: the last ones there, as with `cpu_expert_layers`.

    Experts on another GPU than their layer's would make each token travel twice per layer, to a place where it has to
    wait for its turn; they stay in RAM.
    """
    fitting = set()
    for gpu, nbytes in enumerate(free):
        own = [unit for unit, place in zip(units, places, strict=True) if place == gpu]
        left = nbytes - sum(unit.fast for unit in own)
        for unit in reversed([unit for unit in own if unit.experts]):
            left -= unit.experts
            if left < 0:
                break
            fitting.add(unit.name)
    return fitting
