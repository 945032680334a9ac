"""What a user asks of placement: ``device_map=`` and ``max_memory=`` in accelerate's terms, and options of our own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from transformers_kt.errors import RuleError, UnsupportedOperationError
from transformers_kt.planning.expert_profile import ExpertProfile
from transformers_kt.planning.gpu_experts import SlotRequest, read_stream_tokens
from transformers_kt.planning.hardware import Hardware, MemoryLimit, parse_bytes
from transformers_kt.planning.placement import AUTOMATIC_DEVICE_MAPS
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU, DEVICES_ACCEPTED, gpu_name, parse_device
from transformers_kt.text import listed, longest_prefix, nearest


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a call says of devices beside its rules: one of AUTOMATIC_DEVICE_MAPS or a map, limits, numbers, and whether
    GPUs may capture decode steps."""

    device_map: str | Mapping[str, str] | None
    max_memory: Mapping[str, int]
    kt_cpu_layers: int | None
    kt_gpu_experts: int | None
    slots: SlotRequest
    profile: ExpertProfile | None
    stream_tokens: int | None
    """Tokens of a prompt from which on its experts go to a GPU; 0 for never, None for what suits the model."""
    kt_cuda_graph: bool = True

    @classmethod
    def read(
        cls,
        kt_rules: Any,
        device_map: Any,
        max_memory: Any,
        *,
        kt_cpu_layers: Any = None,
        kt_gpu_experts: Any = None,
        kt_expert_slots: Any = None,
        kt_expert_profile: Any = None,
        kt_prefill_stream_tokens: Any = None,
        kt_cuda_graph: Any = None,
    ) -> Self:
        """Raises `RuleError` for unknown or contradictory values, `UnsupportedOperationError` for disk, and what
        `ExpertProfile.read` raises."""
        profile = None if kt_expert_profile is None else ExpertProfile.read(kt_expert_profile)
        if kt_cuda_graph is not None and type(kt_cuda_graph) is not bool:
            raise RuleError(
                f"kt_cuda_graph={kt_cuda_graph!r}; True (the default) is accepted, and False, which launches the work "
                "of a decode step piece by piece"
            )
        request = cls(
            read_device_map(device_map),
            read_max_memory(max_memory),
            kt_cpu_layers,
            kt_gpu_experts,
            SlotRequest.read(kt_expert_slots, has_profile=profile is not None),
            profile,
            read_stream_tokens(kt_prefill_stream_tokens),
            True if kt_cuda_graph is None else kt_cuda_graph,
        )
        number = next((key for key in ("kt_cpu_layers", "kt_gpu_experts") if getattr(request, key) is not None), None)
        if number is not None and not (isinstance(kt_rules, str) and kt_rules == AUTO):
            raise RuleError(f'{number}= shapes the placement of kt_rules="auto", but rules are given; leave one out')
        if number is not None and isinstance(request.device_map, Mapping):
            raise RuleError(f"{number}= shapes the automatic placement, but device_map= names devices; leave one out")
        return request

    def limited(self, hardware: Hardware) -> Hardware:
        """``hardware`` with no more memory than ``max_memory`` allows. As in accelerate, a GPU it leaves out is out of
        use, the CPU is not."""
        if not self.max_memory:
            return hardware
        gpus = tuple(min(self.max_memory.get(gpu_name(i), 0), nbytes) for i, nbytes in enumerate(hardware.gpus))
        return Hardware(gpus, min(self.max_memory.get(CPU, hardware.ram), hardware.ram))

    def tightest(self, free: MemoryLimit) -> MemoryLimit:
        """``free``, or the limit that ``max_memory`` sets on RAM where that is less."""
        allowed = self.max_memory.get(CPU)
        return free if allowed is None or allowed >= free.nbytes else MemoryLimit(allowed, 'max_memory["cpu"]')


def read_device_map(device_map: Any) -> str | dict[str, str] | None:
    """One of AUTOMATIC_DEVICE_MAPS, or module prefix -> device ("cpu", "cuda:0"); None where none is given.

    Raises `RuleError` for what names no device, `UnsupportedOperationError` for weights on disk.
    """
    if device_map is None or (isinstance(device_map, str) and device_map in AUTOMATIC_DEVICE_MAPS):
        return device_map
    if isinstance(device_map, Mapping):
        if not all(isinstance(prefix, str) for prefix in device_map):
            raise RuleError(f"device_map={device_map!r}: the keys of a device map are names of modules")
        return {prefix: device_name(device, f"device_map[{prefix!r}]") for prefix, device in device_map.items()}
    return {"": device_name(device_map, "device_map")}


def device_name(device: Any, what: str) -> str:
    """ "cpu" or "cuda:0" for a number, a name, or a torch.device."""
    if device == "disk":
        raise UnsupportedOperationError(
            f"{what} is 'disk', but weights of a GGUF are held in memory. Name a device, and take a smaller file if it "
            "is too big for it"
        )
    torch = sys.modules.get("torch")  # a torch.device exists only once torch is imported
    name = parse_device(str(device) if torch is not None and isinstance(device, torch.device) else device)
    if name is None:
        accepted = ", ".join(repr(mode) for mode in AUTOMATIC_DEVICE_MAPS)
        raise RuleError(
            f"{what} is {device!r}; {DEVICES_ACCEPTED} is accepted, and device_map= itself also takes {accepted} and a "
            "dict of such devices"
        )
    return name


def require_coverage(device_map: Mapping[str, str], modules: Iterable[str], owners: Iterable[str]) -> None:
    """Raise `RuleError` unless every one of ``owners`` lies below a key, and every key is one of ``modules``.

    ``modules`` are the paths of all modules of the model, ``owners`` of those that have tensors of their own.
    """
    known = set(modules)
    for prefix in device_map:
        if prefix and prefix not in known:
            raise RuleError(f"device_map names {prefix!r}, but the model has no such module{nearest(prefix, known)}")
    if left := [owner for owner in owners if longest_prefix(owner, device_map) is None]:
        raise RuleError(f'device_map says nothing of {listed(left)}; add them, or "" for all that is not named')


def read_max_memory(max_memory: Any) -> dict[str, int]:
    """Device -> bytes that may be taken there. Raises `RuleError` for what is no such mapping."""
    if max_memory is None:
        return {}
    if not isinstance(max_memory, Mapping):
        raise RuleError(f"max_memory={max_memory!r}; a dict such as {{0: '24GiB', 'cpu': '512GiB'}} is accepted")
    return {
        device_name(device, "a key of max_memory"): parse_bytes(limit, f"max_memory[{device!r}]")
        for device, limit in max_memory.items()
    }
