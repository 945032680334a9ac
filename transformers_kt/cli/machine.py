"""What `doctor` and `bench` say of the machine: facts that are read, and speeds that are measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

import transformers_kt._C as _C
from transformers_kt.gguf.reader import GgmlType
from transformers_kt.planning.bandwidth import ReadableMemory
from transformers_kt.planning.hardware import free_memory, usable_cpus

_DISTRIBUTION = "transformers-kt-experts"
_DISK_BYTES = 256 << 20
_DECODE_S, _PRODUCTS_S = 0.5, 0.1
# In Q4_K, the type of most matrices of most files: 552 MB, past any cache that a few cores hold on to, and enough to
# time prefetch strategies.
_EXPERTS, _TOP_K, _HIDDEN, _INTERMEDIATE = 104, 6, 2048, 1536
_Q4_K_BLOCK = 256
# 1.2 MB, which lies in the L2 cache of one core or two, for as many tokens as a prompt is computed in.
_SMALL_ROWS, _SMALL_COLS, _TOKENS = 1024, 2048, 512
_GPU_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "total_mib": "memory.total",
    "free_mib": "memory.free",
    "pcie_generation": "pcie.link.gen.max",
    "pcie_lanes": "pcie.link.width.max",
}


@dataclass(frozen=True, slots=True)
class Package:
    """``wanted`` are the versions that this package takes, as pip has it."""

    name: str
    version: str | None
    wanted: str
    fits: bool


class HandOff(NamedTuple):
    """How a GPU that torch sees works with the CPU; ``has_kernels`` are those in Triton."""

    gpu: str
    is_fake: bool
    has_kernels: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts. Sizes are in bytes; ``quota`` is in CPUs, 0 where there is none; ``gpus`` have the keys of nvidia-smi."""

    cpu: str
    features: tuple[str, ...]
    isa: str
    isas: tuple[str, ...]
    cores: int
    cpus: int
    all_cpus: int
    nodes: int
    quota: float
    threads: int
    ram: int
    free_ram: int
    free_ram_source: str
    swap: int
    swap_used: int
    huge_pages: str
    gpus: tuple[dict[str, str], ...]
    hand_offs: tuple[HandOff, ...]
    packages: tuple[Package, ...]
    python: str


def machine() -> Machine:
    topology: dict[str, Any] = _C.topology()
    cores = [core for _, cores in topology["nodes"] for core in cores]
    free, swap = free_memory(), psutil.swap_memory()
    return Machine(
        cpu=cpu_name(),
        features=tuple(_C.cpu_features().split()),
        isa=_C.isa(),
        isas=tuple(_C.supported_isas()),
        cores=len(cores),
        cpus=len(usable_cpus()),
        all_cpus=psutil.cpu_count() or 0,
        nodes=len(topology["nodes"]),
        quota=float(topology["quota"]),
        threads=_C.thread_count(),
        ram=psutil.virtual_memory().total,
        free_ram=free.nbytes,
        free_ram_source=free.source,
        swap=swap.total,
        swap_used=swap.used,
        huge_pages=_huge_pages(),
        gpus=_gpus(),
        hand_offs=_hand_offs(),
        packages=_packages(),
        python=platform.python_version(),
    )


class Rate(NamedTuple):
    threads: int
    bytes_per_s: float


def read_rates() -> list[Rate]:
    """What RAM gives to 1, 2, 4, ... threads, up to one for each CPU, and to one for each core."""
    cpus, memory = usable_cpus(), ReadableMemory()
    cores = sum(len(cores) for _, cores in _nodes())
    counts = {1 << power for power in range(len(cpus).bit_length())} | {cores, len(cpus)}
    return [Rate(count, memory.bandwidth(cpus[:count])) for count in sorted(counts) if count <= len(cpus)]


class DecodeRates:
    """Bytes of weights per second that our kernels multiply with one token, by the threads that are set.

    Of six experts at a time, as many as a layer of a small model takes, with the prefetch strategy that loading would
    choose: on a Zen 5 it made 1.4 times the speed of the vendor's. Memory that is shared with others changes its speed
    from one second to the next: so `sample` is to be called between other measurements, and the median of all counts.
    """

    def __init__(self) -> None:
        gate, up = (_matrix(_EXPERTS, _INTERMEDIATE, _HIDDEN) for _ in range(2))
        down = _matrix(_EXPERTS, _HIDDEN, _INTERMEDIATE)
        _C.tune_prefetch([gate, up, down])
        self._experts, self._generator = _C.Experts(gate, up, down), np.random.default_rng(0)
        self._x, self._out = _activations(1, _HIDDEN), np.empty((1, _HIDDEN), np.float32)
        self._weights = np.full((1, _TOP_K), 1 / _TOP_K, np.float32)
        self._bytes_per_token = (gate.nbytes + up.nbytes + down.nbytes) * _TOP_K / _EXPERTS

    def sample(self) -> list[float]:
        """One rate a token, for half a second."""
        return [self._bytes_per_token / seconds for seconds in _samples(self._token, _DECODE_S)]

    def _token(self) -> None:
        chosen = self._generator.choice(_EXPERTS, (1, _TOP_K), replace=False)
        self._experts.forward_routed(self._x, chosen, self._weights, self._out)


def product_rate() -> float:
    """Multiplications and additions of bytes a second that our kernels do, the best: 512 tokens, weights in a cache."""
    matrix = _matrix(1, _SMALL_ROWS, _SMALL_COLS)
    x, out = _activations(_TOKENS, _SMALL_COLS), np.empty((_TOKENS, _SMALL_ROWS), np.float32)
    return 2 * _TOKENS * _SMALL_ROWS * _SMALL_COLS / min(_samples(lambda: _C.linear(matrix, x, out), _PRODUCTS_S))


def disk_rate(file: Path) -> float | None:
    """Bytes per second at which the end of ``file`` comes from its disk; None where the cache cannot be left out."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        count = min(size, _DISK_BYTES)
        os.posix_fadvise(opened.fileno(), size - count, count, os.POSIX_FADV_DONTNEED)
        opened.seek(size - count)
        buffer = bytearray(8 << 20)
        start = time.perf_counter()
        while opened.readinto(buffer):
            pass
        return count / (time.perf_counter() - start)


def _nodes() -> list[tuple[int, list[list[int]]]]:
    nodes: Any = _C.topology()["nodes"]
    return list(nodes)


def _matrix(count: int, rows: int, cols: int) -> _C.PackedMatrix:
    """``count`` matrices of the same random weights in Q4_K."""
    matrix = _C.PackedMatrix(int(GgmlType.Q4_K), count, rows, cols)
    block_bytes = next(nbytes for name, _, _, nbytes in _C.weight_types() if name == GgmlType.Q4_K.name)
    blocks = np.random.default_rng(0).integers(0, 256, (rows * cols // _Q4_K_BLOCK, block_bytes), dtype=np.uint8)
    blocks[:, :4] = np.array([0.01, 0.01], np.float16).view(np.uint8)  # the scales of a block
    for index in range(count):
        matrix.pack(index, blocks.reshape(-1))
    return matrix


def _activations(tokens: int, cols: int) -> Any:
    return np.random.default_rng(0).standard_normal((tokens, cols)).astype(np.float32)


def _samples(call: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, for so many seconds."""
    call()  # wakes the threads
    samples: list[float] = []
    while sum(samples) < seconds:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _huge_pages() -> str:
    """ "always", "madvise" or "never", as the system is set; "unknown" where it does not say."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen[1] if chosen else "unknown"


def _gpus() -> tuple[dict[str, str], ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = f"--query-gpu={','.join(_GPU_FIELDS.values())}"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return tuple(dict(zip(_GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(_GPU_FIELDS))


def _hand_offs() -> tuple[HandOff, ...]:
    from transformers_kt.backends.gpu.devices import devices
    from transformers_kt.backends.gpu.fake import FakeDevice

    return tuple(HandOff(name, isinstance(gpu, FakeDevice), gpu.has_kernels) for name, gpu in devices().items())


def _packages() -> tuple[Package, ...]:
    """What this package needs, and what is installed of it."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires(_DISTRIBUTION) or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue  # of an extra
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        found.append(Package(wanted.name, version, str(wanted.specifier), fits))
    return tuple(found)
