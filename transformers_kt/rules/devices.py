"""Names of devices in rules and device maps."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_KIND = r"(cpu|cuda|xpu|npu|mps)"
_DEVICE = re.compile(_KIND + r"(?::(0|[1-9]\d{0,2}))?")
_SPREAD = re.compile(_KIND + r"\*(\d{1,3})")

CPU = "cpu"
BACKENDS = ("cpu", "gpu")
"""Who computes an operation: on the CPU, on a GPU. What stays transformers' own has neither."""
DEVICES_ACCEPTED = '"cpu", "cuda", "cuda:1" or the number of a GPU'


class Spread(NamedTuple):
    """ "cuda*4": the first ``devices`` devices of a kind, over which layers are split evenly and in order."""

    kind: str
    devices: int

    def device(self, index: int, layers: int) -> str:
        """The device of layer ``index`` (from 0) of ``layers``; an index below or beyond goes with its neighbour."""
        index = min(max(index, 0), layers - 1)
        return f"{self.kind}:{index * self.devices // layers}"


def gpu_name(number: int) -> str:
    """The device of a GPU, as plans write it: "cuda:1"."""
    return f"cuda:{number}"


def gpu_number(device: str) -> int | None:
    """The number of a GPU that `gpu_name` wrote; None for another device."""
    kind, _, number = device.partition(":")
    return int(number) if kind == "cuda" else None


def backend_of(device: str) -> str:
    """Which of BACKENDS computes on ``device``."""
    on_cpu, on_gpu = BACKENDS
    return on_cpu if device == CPU else on_gpu


def parse_device(value: Any) -> str | None:
    """A device in the one way that plans write it: "cpu", or kind and index: "cuda" is "cuda:0". None if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return gpu_name(value) if 0 <= value < 1000 else None
    match = _DEVICE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    return CPU if match[1] == CPU else f"{match[1]}:{match[2] or 0}"


def parse_spread(value: Any) -> str | Spread | None:
    """A device, or a `Spread`; over no devices that is the CPU, over one it is that one. None if it is neither."""
    match = _SPREAD.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[1] == CPU:
        return parse_device(value)
    count = int(match[2])
    return CPU if count == 0 else f"{match[1]}:0" if count == 1 else Spread(match[1], count)
