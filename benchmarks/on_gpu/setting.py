"""The device that sections measure on, and how they time what runs there."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import measuring
import torch

from transformers_kt.backends.gpu.device import Device, Event, Work
from transformers_kt.backends.gpu.devices import devices
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.panels import LAYOUTS, PANEL_ROWS

from .report import Report

T = TypeVar("T")
_ROUNDS = 7
_ROUND_S = 0.01
"""A round repeats until it takes as long: starting and waiting cost some 20 microseconds together."""
_FAKE_BYTES = 1 << 30
_FINITE = 0x3B
"""Bits of random bytes that are kept: no 16-bit float made of them has the exponent of infinity or NaN."""


class Setting(NamedTuple):
    device: Device
    is_fake: bool
    report: Report

    def size(self, real: T, tiny: T) -> T:
        """``real`` on a GPU, ``tiny`` where the script itself is tried."""
        return tiny if self.is_fake else real

    def seconds(self, works: Sequence[Work], *, is_captured: bool = True) -> float:
        """Of one of ``works``, which run in order, again and again: as one graph, or launched one by one.

        The median of several rounds. With as many copies of what they read as pass the L2 cache, each reads memory.
        """
        stream, done = self.device.stream(), self.device.event()
        graph = self.device.capture(lambda: [work() for work in works]) if is_captured else None

        def start() -> None:
            if graph is not None:
                graph.launch(stream)
                return
            for work in works:
                stream.launch(work)

        def all_of(repeats: int) -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                start()
            stream.record(done)
            done.synchronize()
            return time.perf_counter() - begin

        stream.follow_torch()
        repeats = 1 if self.is_fake else max(1, round(_ROUND_S / min(all_of(1), all_of(1))))
        return statistics.median(all_of(repeats) for _ in range(self.size(_ROUNDS, 1))) / repeats / len(works)

    def copies(self, nbytes: int) -> int:
        """How many things of ``nbytes`` are four times the L2 cache, so that none is there when its turn comes."""
        if self.is_fake:
            return 2
        cache: int = torch.cuda.get_device_properties(self.device.torch_device).L2_cache_size
        return -(-4 * cache // nbytes) + 1

    def matrix(self, type_name: str, rows: int, cols: int) -> DeviceMatrix:
        """Random bytes, of which all scales are finite."""
        shape = (1, -(-rows // PANEL_ROWS), LAYOUTS[type_name].panel_bytes(cols))
        panels = self.device.empty(shape, torch.uint8).random_(0, 256)
        return DeviceMatrix(self.device, type_name, panels.bitwise_and_(_FINITE), rows, cols)

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normally distributed, on the device; in the dtype of activations unless said otherwise."""
        return self.device.empty(shape, self.device.activations if dtype is None else dtype).normal_()

    def sleep(self, seconds: float) -> Work:
        """Work that keeps the device busy for about as long and the memory idle."""
        if self.is_fake:
            return lambda: time.sleep(seconds)
        tried = 10_000_000  # cycles of a clock that CUDA no longer tells
        taken = self.seconds([lambda: torch.cuda._sleep(tried)])
        return lambda: torch.cuda._sleep(round(tried * seconds / taken))


def setting_for(report: Report, *, is_fake: bool) -> Setting:
    """The first GPU, or a fake one with the kernels of Triton, interpreted, where that is installed."""
    if is_fake:
        has_kernels = importlib.util.find_spec("triton") is not None
        device: Device = FakeDevice(0, _FAKE_BYTES, has_kernels=has_kernels)
    else:
        found = devices()
        if not found:
            raise SystemExit("torch sees no GPU here: nothing can be measured. --fake tries the script without one")
        device = next(iter(found.values()))
    report.describe({**machine(device, is_fake=is_fake), **measuring.machine()})
    return Setting(device, is_fake, report)


def machine(device: Device, *, is_fake: bool) -> dict[str, Any]:
    """What a reader must know of the GPU."""
    if is_fake:
        return {"gpu": "FAKE: figures mean nothing"}
    properties = torch.cuda.get_device_properties(device.torch_device)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "L2 bytes": properties.L2_cache_size,
        "memory bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "has kernels": device.has_kernels,
    }


def waited(event: Event) -> float:
    """Seconds that this thread waits for ``event``."""
    begin = time.perf_counter()
    event.synchronize()
    return time.perf_counter() - begin


def median_of(call: Callable[[], float], rounds: int) -> float:
    return statistics.median(call() for _ in range(rounds))
