"""Pictures that commands draw, without a screen."""

from __future__ import annotations

from typing import Any


def new_figure(count: int, *, stacked: bool = False) -> tuple[Any, list[Any]]:
    """A figure with ``count`` axes beside each other, or on top of each other; 800 pixels wide at 100 dpi."""
    from matplotlib.figure import Figure

    rows, columns = (count, 1) if stacked else (1, count)
    figure = Figure(figsize=(8, 1 + 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes
