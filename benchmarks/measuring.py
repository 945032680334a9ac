"""What the benchmarks share: the limits of the machine, interleaved samples, and how results are kept.

Limits come from limits.cpp, which is compiled here with the machine's own compiler, and are sampled in the same rounds
as what is compared with them: memory that is shared with others is as fast in one minute as it is.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers_kt

READ_BYTES = 512 << 20  # well past any cache that a few cores can hold on to
SAMPLE_SECONDS = 0.02
_SOURCE = Path(__file__).with_name("limits.cpp")
_PACKAGES = ("torch", "transformers")


class Limits:
    """Samples of read bandwidth (GB/s), byte dot products (1e9 operations/s) and float32 multiply-adds (GFLOPS).

    ``missing`` says what could not be measured and why; the samples concerned are NaN.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.missing: list[str] = []
        self._library = _compiled(self.missing)
        self._rounds = 1 << 16
        if self._library is None:
            return
        cpus = _spread_cpus()
        chosen = (ctypes.c_int * threads)(*(cpus[i % len(cpus)] for i in range(threads)))
        if self._library.limits_prepare(READ_BYTES, chosen, threads) != 0:
            raise MemoryError(f"{READ_BYTES >> 20} MiB are needed to measure the read bandwidth")
        while self._rounds < 1 << 30 and self._fma_seconds() < SAMPLE_SECONDS:
            self._rounds *= 2
        if math.isnan(self.dot_gops()):
            self.missing.append("byte dot products: this CPU has neither VNNI nor AVX2")

    def _fma_seconds(self) -> float:
        start = time.perf_counter()
        self.fma_gflops()
        return time.perf_counter() - start

    def read_gb_per_s(self) -> float:
        return self._library.limits_read_gb_per_s(self.threads) if self._library else math.nan

    def dot_gops(self) -> float:
        gops = self._library.limits_dot_gops(self.threads, self._rounds) if self._library else 0.0
        return gops or math.nan

    def fma_gflops(self) -> float:
        return self._library.limits_fma_gflops(self.threads, self._rounds) if self._library else math.nan

    @property
    def samplers(self) -> dict[str, Callable[[], float]]:
        return {"read_gb_per_s": self.read_gb_per_s, "dot_gops": self.dot_gops, "fma_gflops": self.fma_gflops}


def _compiled(missing: list[str]) -> Any:
    compiler = next(
        filter(None, (shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))), None
    )
    if compiler is None:
        missing.append("all limits: no C++ compiler (c++, g++, clang++ or $CXX)")
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        done = subprocess.run([compiler, *flags, _SOURCE, "-o", target], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            missing.append(f"all limits: {compiler} could not compile {_SOURCE.name}: {done.stderr.strip()[:500]}")
            return None
        library = ctypes.CDLL(str(target))
    library.limits_prepare.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    library.limits_read_gb_per_s.argtypes = [ctypes.c_int]
    library.limits_dot_gops.argtypes = library.limits_fma_gflops.argtypes = [ctypes.c_int, ctypes.c_int64]
    for function in (library.limits_read_gb_per_s, library.limits_dot_gops, library.limits_fma_gflops):
        function.restype = ctypes.c_double
    return library


def _spread_cpus() -> list[int]:
    """The CPUs this process may use: one of each physical core first."""
    seen: dict[str, int] = {}

    def turn(cpu: int) -> int:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = path.read_text() if path.exists() else str(cpu)
        seen[core] = seen.get(core, -1) + 1
        return seen[core]

    return sorted(sorted(os.sched_getaffinity(0)), key=turn)


def calls_per_sample(call: Callable[[], object]) -> int:
    """How many calls take SAMPLE_SECONDS, at least one. The first, which wakes the threads, is not counted."""
    call()
    start = time.perf_counter()
    calls = 0
    while time.perf_counter() - start < SAMPLE_SECONDS:
        call()
        calls += 1
    return calls


def in_turns(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """`rounds` samples of each, one of each per round; a round before them warms up and is dropped."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds + 1):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: values[1:] for name, values in samples.items()}


def median(values: Sequence[float]) -> float:
    """NaN where one of the values is (a limit that could not be measured)."""
    return math.nan if any(math.isnan(value) for value in values) else statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median: how far to trust the median."""
    return (max(values) - min(values)) / median(values)


def share(part: float, whole: float) -> str:
    """A percentage, or "-" where one of the two is unknown."""
    return "-" if math.isnan(part / whole) else f"{part / whole:.0%}"


def least_seconds(nbytes: float, operations: float, read_gb_per_s: float, peak_gops: float) -> float:
    """What reading `nbytes` or computing `operations` takes at least, whichever is longer; NaN for an unknown limit."""
    if math.isnan(read_gb_per_s) or math.isnan(peak_gops):
        return math.nan
    return max(nbytes / read_gb_per_s, operations / peak_gops) / 1e9


def machine() -> dict[str, Any]:
    """What a reader must know of where numbers come from."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "transformers_kt": transformers_kt.__version__,
    }


def save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Writes `results` as JSON; NaN (not measured) becomes null."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without_nan(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [without_nan(inner) for inner in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    if path is not None:
        path.write_text(json.dumps(without_nan(results), indent=1) + "\n")


def figure(columns: int) -> Any:
    """A matplotlib figure and its axes in one row, drawn without a screen."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'transformers-kt-experts[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.5 * columns, 4.5), squeeze=False, layout="constrained")
