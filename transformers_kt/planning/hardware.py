"""The machine to plan for: memory that is free, in all control groups and on the GPUs, and how fast it is read."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import transformers_kt._C as _C
from transformers_kt.errors import InputError, OutOfMemoryError, RuleError
from transformers_kt.planning.bandwidth import ram_bandwidth
from transformers_kt.rules.devices import CPU, gpu_name, gpu_number
from transformers_kt.text import format_bytes

_UNIT_BYTES = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# What is there where a driver of NVIDIA, of AMD, or of either under WSL is loaded.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# Bytes per second, if not stated. Eight channels of DDR4 or two of fast DDR5 read about 100 GB/s, a graphics card
# with 24 GB some 900.
_ASSUMED_RAM_BANDWIDTH = 100e9
_ASSUMED_GPU_BANDWIDTH = 900e9
_MEASURED_BYTES = 1 << 28
_MEASURED_ROUNDS = 3
RAM, GPUS = "RAM", "GPUs"  # in notes
FAKE_GPUS = "TRANSFORMERS_KT_FAKE_GPUS"
"""The environment variable that puts fakes in the place of GPUs: their sizes, as "24GiB,24GiB"."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """``nbytes`` that can still be taken before ``source`` (a noun phrase) objects."""

    nbytes: int
    source: str


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes that weights, cache and buffers may take: on each GPU, in the order of their numbers, and in RAM."""

    gpus: tuple[int, ...]
    ram: int

    @property
    def capacities(self) -> dict[str, int]:
        """Device to bytes, "cpu" first."""
        return {CPU: self.ram, **{gpu_name(number): nbytes for number, nbytes in enumerate(self.gpus)}}


# Not accelerate.utils.convert_file_size_to_int: importing it imports torch, which plans go without.
def parse_bytes(size: int | str, what: str) -> int:
    """``size`` in bytes, or text such as "24GiB" or "512 GB". Raises `RuleError`, naming ``what``, for others."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2].upper() not in _UNIT_BYTES:
        raise RuleError(f"{what} is {size!r}; bytes or a size such as '24GiB' or '512GB' is accepted")
    return int(float(match[1]) * _UNIT_BYTES[match[2].upper()])


def free_memory(root: Path = Path("/")) -> MemoryLimit:
    """The tightest of what the machine, each control group of this process (version 1 or 2) and its own limits leave.

    Page cache counts as free: the kernel gives it up. ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    machine = MemoryLimit(psutil.virtual_memory().available, "free memory of this machine")
    return min((machine, *_cgroup_limits(root), *_process_limits(root)), key=lambda limit: limit.nbytes)


def require_memory(needed: int, title: str, limit: MemoryLimit) -> None:
    """Raise `OutOfMemoryError`, with the numbers, if ``needed`` bytes for the weights of ``title`` pass ``limit``."""
    if needed > limit.nbytes:
        raise OutOfMemoryError(
            f"the weights of {title} take {format_bytes(needed)}, but {format_bytes(limit.nbytes)} is available "
            f"({limit.source}): {format_bytes(needed - limit.nbytes)} too little. Nothing was loaded. Free memory, "
            "raise the limit, or take a smaller quantization"
        )


def described_hardware(
    gpus: Sequence[int | str] | None, ram: int | str | None, max_memory: Mapping[str, int]
) -> Hardware:
    if isinstance(gpus, str):
        gpus = [gpus]
    here = free_gpu_memory() if gpus is None else ()
    if here:
        sizes = here
    elif gpus is None:  # max_memory alone can describe a machine
        numbers = [number for number in map(gpu_number, max_memory) if number is not None]
        sizes = tuple(max_memory.get(gpu_name(number), 0) for number in range(max(numbers, default=-1) + 1))
    else:
        sizes = tuple(parse_bytes(size, f"gpus[{number}]") for number, size in enumerate(gpus))
    if ram is None:
        return Hardware(sizes, max_memory.get(CPU, free_memory().nbytes))
    return Hardware(sizes, parse_bytes(ram, "ram"))


def fake_gpu_memory() -> tuple[int, ...] | None:
    """Bytes of each GPU that `FAKE_GPUS` names; None where it is not set. Says loudly, once, that they are none."""
    sizes = os.environ.get(FAKE_GPUS)
    if not sizes:
        return None
    found = tuple(parse_bytes(size, FAKE_GPUS) for size in sizes.split(","))
    _warn_of_fakes(sizes)
    return found


@functools.cache
def _warn_of_fakes(sizes: str) -> None:
    logger.warning(
        "%s=%s: GPUs are FAKES, computed by torch on the CPU, to try placements and to test. Answers are right, speed "
        "says nothing",
        FAKE_GPUS,
        sizes,
    )


def free_gpu_memory() -> tuple[int, ...]:
    """Bytes free on each GPU of this machine, or of the fakes in their place."""
    fakes = fake_gpu_memory()
    if fakes is not None:
        return fakes
    is_driverless = sys.platform == "linux" and not any(map(os.path.exists, _GPU_DRIVERS))
    if is_driverless and "torch" not in sys.modules:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))


class Bandwidths(NamedTuple):
    """Bytes per second, and which of them were not stated: "assumed" or "measured" -> of what."""

    ram: float
    gpu: float
    unstated: Mapping[str, Sequence[str]]


def read_bandwidths(bandwidth: float | Sequence[float] | str | None) -> Bandwidths:
    if bandwidth is None:
        return Bandwidths(_ASSUMED_RAM_BANDWIDTH, _ASSUMED_GPU_BANDWIDTH, {"assumed": (RAM, GPUS)})
    if bandwidth == "measure":
        of_ram = ram_bandwidth(usable_cpus()[: _C.thread_count()])
        if free_gpu_memory():
            return Bandwidths(of_ram, _measured_gpu_bandwidth(), {"measured on this machine": (RAM, GPUS)})
        unstated = {"measured on this machine": (RAM,), "assumed": (GPUS,)}
        return Bandwidths(of_ram, _ASSUMED_GPU_BANDWIDTH, unstated)
    try:
        given = [bandwidth] if isinstance(bandwidth, int | float) else bandwidth
        numbers = [float(number) for number in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
        raise InputError(
            f"bandwidth={bandwidth!r}; GB/s of RAM (400), of RAM and each GPU (400, 936), or 'measure' is accepted"
        )
    if len(numbers) == 1:
        return Bandwidths(1e9 * numbers[0], _ASSUMED_GPU_BANDWIDTH, {"assumed": (GPUS,)})
    return Bandwidths(1e9 * numbers[0], 1e9 * numbers[1], {})


def usable_cpus() -> list[int]:
    """The CPUs that this process may use: one of each physical core first, then their siblings."""
    nodes: Any = _C.topology()["nodes"]
    cores = [core for _, cores in nodes for core in cores]
    return [cpu for turn in zip_longest(*cores) for cpu in turn if cpu is not None]


def _measured_gpu_bandwidth() -> float:
    """Bytes per second that torch reads in a sum on the first GPU, the best of a few rounds."""
    import torch

    values = torch.ones(_MEASURED_BYTES // 4, dtype=torch.float32, device=gpu_name(0))
    times = []
    for _ in range(_MEASURED_ROUNDS):
        start = time.perf_counter()
        values.sum().item()
        times.append(time.perf_counter() - start)
    return _MEASURED_BYTES / min(times)


# The line of proc/self/limits, that of proc/self/status which says how much of it is taken, and what sets it.
_PROCESS_LIMITS = (
    ("Max address space", "VmSize", "address space of this process, ulimit -v"),
    ("Max data size", "VmData", "data size of this process, ulimit -d"),
    # Counts only where the process locks its memory, all that it will ever map then.
    ("Max locked memory", "VmLck", "locked memory of this process, ulimit -l"),
)
# What loading maps beside the weights: the piece that is read and its float32 values, stacks and heaps of threads.
_MAPPED_WHILE_LOADING = 64 << 20
# Matrices begin on pages of 2 MiB and end within one: of the 300 of a model of 10 GB, 1.1 GB are never touched.
_MAPPED_PER_BYTE = 1.125


def _process_limits(root: Path) -> Iterator[MemoryLimit]:
    try:
        limits = (root / "proc/self/limits").read_text()
        status = (root / "proc/self/status").read_text()
    except OSError:
        return
    for line, taken_line, source in _PROCESS_LIMITS:
        limit = re.search(rf"^{line}\s+(\d+)\s", limits, re.MULTILINE)  # the soft one; "unlimited" is none
        taken = re.search(rf"^{taken_line}:\s+(\d+) kB", status, re.MULTILINE)
        if limit is None or taken is None or (taken_line == "VmLck" and int(taken[1]) == 0):
            continue
        left = int(limit[1]) - 1024 * int(taken[1]) - _MAPPED_WHILE_LOADING
        yield MemoryLimit(max(0, int(left / _MAPPED_PER_BYTE)), source)


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """What one version of control groups calls its files."""

    folder: str
    limits: tuple[str, ...]
    used: str
    page_cache: tuple[str, ...]  # keys of memory.stat


_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _CgroupFiles(
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),  # past the second the kernel slows the process down until it seems to hang
    "memory.current",
    ("inactive_file", "active_file"),
)


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
            yield from _read_limits(folder, files)
            if folder == mount:
                break


def _read_limits(folder: Path, files: _CgroupFiles) -> Iterator[MemoryLimit]:
    try:
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(key, 0)) for key in files.page_cache)
    except (OSError, ValueError):
        return
    for name in files.limits:
        try:
            most = int((folder / name).read_text())  # v2 writes "max" where there is none
        except (OSError, ValueError):
            continue
        yield MemoryLimit(max(0, most - max(0, used - cached)), f"memory limit of control group {folder}, {name}")
