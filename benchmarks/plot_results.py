"""Draws the speeds of a file of results/: one panel for prompts, one for decoding, a bar an engine.

    python benchmarks/plot_results.py benchmarks/results/emerald-rapids-2026-11-28.json docs/speed.png

A bar is the median of a figure's rounds; where only the lowest and highest are known, the middle of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "Prompt of 512 tokens": ("prefill_512_tok_s",),
    "Decoding": ("decode_tok_s", "decode_at_4096_tok_s"),
}
GROUPS = {
    "prefill_512_tok_s": "",
    "decode_tok_s": "empty context",
    "decode_at_4096_tok_s": "4,096 tokens of context",
}
COLORS = ("#0b6e4f", "#b8c4cc", "#8496a3", "#d9a441")
GROUP_WIDTH = 0.84  # of the distance between two groups


def draw(results: dict[str, Any]) -> plt.Figure:
    """Panels of bars; engines keep the order of the file."""
    engines = list(results["engines"])
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(8, 3.6), width_ratios=[len(keys) for keys in PANELS.values()], layout="constrained"
    )
    width = GROUP_WIDTH / len(engines)
    for axis, (title, keys) in zip(axes, PANELS.items(), strict=True):
        for place, (engine, color) in enumerate(zip(engines, COLORS, strict=False)):
            heights = [statistics.median(results["engines"][engine][key]) for key in keys]
            left = [group + (place - (len(engines) - 1) / 2) * width for group in range(len(keys))]
            bars = axis.bar(left, heights, width * 0.94, color=color, label=engine)
            axis.bar_label(bars, fmt="%.3g", fontsize=9, padding=2)
        axis.set_title(title, fontsize=11)
        axis.set_ylabel("tokens/s (higher is better)")
        axis.set_xticks(range(len(keys)), [GROUPS[key] for key in keys])
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(engines), frameon=False, fontsize=9)
    machine = f"{results['cpu'].split(', AVX')[0]}, {results['threads']} cores"
    figure.suptitle(f"{machine}: V2-Lite dimensions, Q4_K_M", fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file of benchmarks/results")
    parser.add_argument("picture", type=Path, help="where to write the picture (.png, .svg)")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8"))).savefig(arguments.picture, dpi=100)


if __name__ == "__main__":
    main()
