"""Sizes and budgets: how much memory weights take, how much there is, and which module goes where.

The automatic device map gives the GPUs what every token reads, layer after layer, then the routed experts of as many
whole layers as still fit; the other experts and the token embedding lie in RAM.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import psutil

from transformers_kt.errors import OutOfMemoryError, RuleError

CPU = "cpu"
BALANCED = "balanced"
BALANCED_LOW_0 = "balanced_low_0"
SEQUENTIAL = "sequential"
AUTOMATIC_DEVICE_MAPS = ("auto", BALANCED, BALANCED_LOW_0, SEQUENTIAL)
"""What ``device_map=`` may say to leave the choice to us, as accelerate names it. "auto" is "balanced"."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_UNIT_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")

_LAYER = re.compile(r"(.*\blayers\.(\d+))\.")
_EXPERTS = re.compile(r".*\.experts$")
_EMBEDDING = re.compile(r"(.*\.)?embed_tokens$")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """``nbytes`` that can still be taken before ``source`` (a noun phrase) objects."""

    nbytes: int
    source: str


def format_bytes(nbytes: int) -> str:
    """Three digits and a decimal unit, as file managers show sizes: 4.10 GB."""
    size = float(nbytes)
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{nbytes} bytes" if unit == 0 else f"{size:#.3g}".rstrip(".") + f" {_UNITS[unit]}"


def parse_bytes(size: int | str, what: str) -> int:
    """``size`` in bytes, or text such as "24GiB" or "512 GB". Raises `RuleError`, naming ``what``, for others."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNIT_BYTES:
        raise RuleError(f"{what} is {size!r}; bytes or a size such as '24GiB' or '512GB' is accepted")
    return int(float(match[1]) * _UNIT_BYTES[match[2].upper()])


def free_memory(root: Path = Path("/")) -> MemoryLimit:
    """The tightest of what the machine and each control group of this process (version 1 or 2) leave free.

    Page cache counts as free: the kernel gives it up. ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    limits = [MemoryLimit(psutil.virtual_memory().available, "free memory of this machine"), *_cgroup_limits(root)]
    return min(limits, key=lambda limit: limit.nbytes)


def require_memory(needed: int, title: str, limit: MemoryLimit) -> None:
    """Raise `OutOfMemoryError`, with the numbers, if ``needed`` bytes for the weights of ``title`` pass ``limit``."""
    if needed > limit.nbytes:
        raise OutOfMemoryError(
            f"the weights of {title} take {format_bytes(needed)}, but {format_bytes(limit.nbytes)} is available "
            f"({limit.source}): {format_bytes(needed - limit.nbytes)} too little. Nothing was loaded. Free memory, "
            "raise the limit, or take a smaller quantization"
        )


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes that weights, cache and buffers may take: on each GPU, in the order of their numbers, and in RAM."""

    gpus: tuple[int, ...]
    ram: int

    @property
    def capacities(self) -> dict[str, int]:
        """Device to bytes, "cpu" first."""
        return {CPU: self.ram, **{f"cuda:{number}": nbytes for number, nbytes in enumerate(self.gpus)}}


@dataclass(frozen=True, slots=True)
class FastMemory:
    """What each GPU needs besides weights, in bytes."""

    kv_cache_per_layer: int
    buffers: int  # of each GPU that is used


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


def layer_number(module: str) -> int:
    """The decoder layer that ``module`` lies in; -1 outside the layers."""
    match = _LAYER.match(module + ".")
    return -1 if match is None else int(match[2])


def auto_device_map(
    sizes: Mapping[str, int],
    hardware: Hardware,
    needs: FastMemory,
    *,
    mode: str = BALANCED,
    cpu_layers: int | None = None,
) -> dict[str, str]:
    """Module prefix to device, as accelerate has it; the longest prefix decides.

    ``sizes`` has every module that owns tensors, in the order of the forward pass, with its bytes on a GPU. ``mode`` is
    one of AUTOMATIC_DEVICE_MAPS. With ``cpu_layers`` the experts of just the layers before that number stay in RAM,
    whether the others fit or not. What does not fit on the GPUs is on the CPU, from the first layer that does not on.
    """
    if not hardware.gpus:
        return {"": CPU}
    units = _units(sizes, needs)
    free = [max(0, nbytes - needs.buffers) for nbytes in hardware.gpus]
    if cpu_layers is not None:
        on_gpu = {unit.name for unit in units if unit.layer >= cpu_layers}
        places = _spread(_costs(units, on_gpu), free, mode, may_overflow=True)
    else:
        on_gpu = {unit.name for unit in units}
        places = _spread(_costs(units, on_gpu), free, mode, may_overflow=False)
        if None in places:
            places = _spread(_costs(units, ()), free, mode, may_overflow=False)
            on_gpu = _experts_that_fit(units, places, free)
    device_map = {}
    for unit, place in zip(units, places, strict=True):
        device = CPU if place is None else f"cuda:{place}"
        device_map[unit.name] = device
        if unit.experts and device != CPU and unit.name not in on_gpu:
            device_map[unit.experts_module] = CPU
    first = device_map[units[0].name] if units else CPU
    for module in sizes:
        if _EMBEDDING.fullmatch(module):
            device_map[module] = CPU
        elif not sizes[module] and not _LAYER.match(module):
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
        match = _LAYER.match(module)
        if match is None:
            if nbytes and not _EMBEDDING.fullmatch(module):
                units[module] = _Unit(module, -1, nbytes)
            continue
        unit = units.setdefault(match[1], _Unit(match[1], int(match[2]), needs.kv_cache_per_layer))
        if _EXPERTS.fullmatch(module):
            unit.experts, unit.experts_module = nbytes, module
        else:
            unit.fast += nbytes
    return list(units.values())


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


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """What one version of control groups calls its files."""

    folder: str
    limit: str
    used: str
    page_cache: tuple[str, ...]  # keys of memory.stat


_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _CgroupFiles("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = _V1 if controllers else _V2
        mount = root / files.folder
        group = mount / path.lstrip("/")
        # In a container the path is often the host's while the mount shows the container's group alone: the walk up
        # then passes folders that do not exist and ends at the mount itself, which is the right one.
        for folder in (group, *group.parents):
            if (limit := _read_limit(folder, files)) is not None:
                yield limit
            if folder == mount:
                break


def _read_limit(folder: Path, files: _CgroupFiles) -> MemoryLimit | None:
    try:
        most = int((folder / files.limit).read_text())  # v2 writes "max" where there is none
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(key, 0)) for key in files.page_cache)
    except (OSError, ValueError):
        return None
    return MemoryLimit(max(0, most - max(0, used - cached)), f"memory limit of control group {folder}")
