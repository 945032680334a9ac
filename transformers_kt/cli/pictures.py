"""Pictures that commands draw, without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def new_figure(columns: int) -> tuple[Any, Sequence[Any]]:
    """A figure with ``columns`` axes beside each other, 800 pixels wide for one or two at 100 dpi."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if columns < 3 else 4 * columns, 4.2), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    return figure, axes
