"""A picture of what a profile has seen: kernels and copies of each stream of the GPU, experts of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch.autograd import DeviceType

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_SHOWN = 1 / 3
"""Of the time, the last part: the first token of a profile pays for its start."""
_COLOURS = {"CPU experts": "#dd8452", "copies": "#c44e52"}
_KERNELS = "#4c72b0"


def draw(profile: Any, title: str, path: Path) -> float:
    """Write the picture; the share of the time shown in which the GPU worked."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for event in profile.events():
        span = (event.time_range.start, event.time_range.end - event.time_range.start)
        if event.name == "experts":
            if event.device_type == DeviceType.CPU:
                rows.setdefault("CPU experts", []).append(span)
        elif event.device_type == DeviceType.CUDA:
            kind = "copies" if event.name.startswith("Mem") else f"stream {event.device_resource_id}"
            rows.setdefault(kind, []).append(span)
    if not rows:
        return 0.0
    end = max(start + length for spans in rows.values() for start, length in spans)
    begin = end - _SHOWN * (end - min(start for spans in rows.values() for start, _ in spans))
    figure, axes = plt.subplots(figsize=(14, 1.2 + 0.5 * len(rows)), layout="constrained")
    for place, (name, spans) in enumerate(sorted(rows.items())):
        shown = [((start - begin) / 1e3, length / 1e3) for start, length in spans if start >= begin]
        axes.broken_barh(shown, (place - 0.4, 0.8), facecolors=_COLOURS.get(name, _KERNELS))
    axes.set_yticks(range(len(rows)), sorted(rows))
    axes.set_xlabel("ms")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    on_gpu = [span for name, spans in rows.items() if name != "CPU experts" for span in spans]
    return covered(on_gpu, begin, end) / (end - begin)


def covered(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """How much of ``begin`` to ``end`` some of ``spans`` (start, length) cover."""
    total, at = 0.0, begin
    for start, length in sorted(spans):
        total += max(0.0, min(start + length, end) - max(start, at))
        at = max(at, min(start + length, end))
    return total
