"""What a plan costs: bytes of weights, KV cache and buffers on each device, and bytes read per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers_kt.families.registry import family_of
from transformers_kt.planning.assignments import Assignment
from transformers_kt.planning.hardware import Bandwidths, Hardware
from transformers_kt.planning.operations import keys_as_floats
from transformers_kt.planning.report import DeviceUse, PlanRow
from transformers_kt.rules.devices import CPU, gpu_name

if TYPE_CHECKING:
    from transformers_kt.families.base import TensorSlot
    from transformers_kt.gguf.reader import TensorInfo
    from transformers_kt.planning.gpu_experts import GpuExperts

# What CUDA itself takes on a card once a process computes there: context, libraries, workspaces, captured steps. The
# cache that is counted is the one that the model keeps, and the buffers of a step of eight tokens lie within those of a
# prompt.
_CUDA_BYTES = 512 << 20
# Work buffers are for this many tokens at once, what generate(prefill_chunk_size=512) keeps longer prompts to.
PREFILL_TOKENS = 512
DEFAULT_CONTEXT = 32768
"""Tokens that GPUs keep room for where nothing is said, up to what the model takes."""
RING_SLOTS = 3
"""Through which experts in RAM go to a GPU for a long prompt: one is computed, one filled, and one between them."""
_RING_SLOT_BYTES = 192 << 20  # 8 experts of 25 MB: the copy of one takes a millisecond, a launch some microseconds
_RING_SLOTS_IN_GPU = 64  # at least: on a small card attention is worth more there
_CPU_FLOAT_BYTES = 4  # activations, cache and stock modules: float32 on the CPU, 16 bits on a GPU
_GPU_FLOAT_BYTES = 2
_EXPERT_ROLES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class FastMemory:
    """What each GPU needs besides weights, in bytes."""

    kv_cache_per_layer: int
    buffers: int  # of each GPU that is used
    ring: int = 0  # of each GPU with layers whose experts lie in RAM


class Costs:
    """Sizes that follow from config and context."""

    def __init__(self, config: Any, context: int) -> None:
        family = family_of(config)
        dims = family.dims(config)
        self.active_share: float = dims.top_k / max(1, dims.experts)
        self.cache_values: int = context * dims.cache_values  # per layer
        self.keys_from = f".{family.keys_from}"
        self.work_values: int = min(context, PREFILL_TOKENS) * dims.work_values + dims.vocab
        self.on_gpus = FastMemory(self.cache_values * _GPU_FLOAT_BYTES, self.buffers(gpu_name(0)))

    def kv_cache(self, device: str) -> int:
        """Bytes per layer, for each token of the context."""
        return self.cache_values * _float_bytes(device)

    def buffers(self, device: str) -> int:
        return self.work_values * _float_bytes(device) + (0 if device == CPU else _CUDA_BYTES)


def _float_bytes(device: str) -> int:
    return _CPU_FLOAT_BYTES if device == CPU else _GPU_FLOAT_BYTES


def ring_bytes(experts: Iterable[tuple[int, int]], gpus: Sequence[int]) -> int:
    """What the ring takes on each of ``gpus``: of each layer the bytes of one expert, and how many it has. A slot holds
    some whole ones."""
    at_most = min(_RING_SLOT_BYTES, min(gpus, default=0) // _RING_SLOTS_IN_GPU)
    return RING_SLOTS * max((nbytes * min(count, max(1, at_most // nbytes)) for nbytes, count in experts), default=0)


def gpu_bytes(slots: Iterable[TensorSlot], tensors: Mapping[str, TensorInfo], config: Any) -> dict[str, int]:
    """Module path -> bytes of its tensors on a GPU."""
    sizes: dict[str, int] = {}
    for slot in slots:
        role = f"{slot.module.rpartition('.')[2]}.{slot.role}"  # as the operation of the outer module has it
        sizes[slot.module] = sizes.get(slot.module, 0) + keys_as_floats(role, tensors[slot.gguf_name], config)
    return sizes


def plan_row(config: Any, assignment: Assignment, costs: Costs) -> PlanRow:
    entry, operation = assignment.entry, assignment.operation
    parts: dict[str, int] = {}
    read = 0.0
    for role, info in assignment.tensors.items():
        key = f"{entry.module}.{role}"
        nbytes = operation.tensor_bytes(role, info, config, entry.device)
        part = _part(key)
        parts[part] = parts.get(part, 0) + nbytes
        read += nbytes * _read_share(key, info.shape, costs)
    types = tuple(sorted({info.ggml_type.name for info in assignment.tensors.values()}))
    return PlanRow(entry.module, entry.op, entry.device, types, sum(parts.values()), int(read), entry.rule, parts)


def _read_share(key: str, shape: Sequence[int], costs: Costs) -> float:
    """How much of a tensor one token reads: the active experts, one row of the embedding, all of others."""
    if _is_routed(key):
        return costs.active_share
    return 1 / shape[0] if _module_of(key).endswith("embed_tokens") else 1.0


def _part(key: str) -> str:
    """Which of PARTS a tensor belongs to."""
    if _is_routed(key):
        return "routed experts"
    if ".mlp." in key:
        return "dense and shared experts"
    is_outside = _module_of(key).rpartition(".")[2] in ("embed_tokens", "lm_head")
    return "embedding and head" if is_outside else "attention"


def _is_routed(key: str) -> bool:
    return key.rpartition(".")[2] in _EXPERT_ROLES


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def device_uses(
    assignments: Sequence[Assignment],
    rows: Sequence[PlanRow],
    hardware: Hardware,
    speeds: Bandwidths,
    costs: Costs,
    gpu_experts: GpuExperts,
) -> tuple[DeviceUse, ...]:
    kv_caches = dict.fromkeys(hardware.capacities, 0)
    for assignment in assignments:
        entry = assignment.entry
        # Where attention is in pieces, its cache lies where the keys are made.
        layers = sum(f"{entry.module}.{key}".endswith(costs.keys_from) for key in assignment.tensors)
        kv_caches[entry.device] += layers * costs.kv_cache(entry.device)
    uses = []
    for device, capacity in hardware.capacities.items():
        own = [row for row in rows if row.device == device]
        uses.append(
            DeviceUse(
                device,
                capacity,
                weights=sum(row.nbytes for row in own),
                kv_cache=kv_caches[device],
                expert_slots=gpu_experts.nbytes(device),
                buffers=costs.buffers(device) + gpu_experts.ring.get(device, 0) if own or device == CPU else 0,
                read_per_token=sum(row.read_per_token for row in own),
                bandwidth=speeds.ram if device == CPU else speeds.gpu,
            )
        )
    return tuple(uses)
