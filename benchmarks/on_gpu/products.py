"""Products with matrices of DeepSeek-V3 as models compute them: few tokens by kernels, many dequantized and multiplied.

Beside them what memory gives at best, a copy, and the same product in bfloat16 by torch. Weights come from memory, not
from the L2 cache; products follow each other in one graph, as in a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from transformers_kt.backends.gpu import plain
from transformers_kt.backends.gpu.panels import LAYOUTS

from .setting import Setting

SHAPES = {
    "kv_a": (576, 7168),
    "q_a": (1536, 7168),
    "q_b": (24576, 1536),
    "o": (7168, 16384),
    "shared gate": (2048, 7168),
    "shared down": (7168, 2048),
    "dense gate": (18432, 7168),
    "head": (129280, 7168),
}
_TINY = {"tiny": (20, 256)}
FIRST_TYPES = ("Q4_K", "Q6_K", "Q8_0")
"""Those that published files of the largest models consist of: measured in every shape and for several tokens."""
_SHAPES_OF_OTHERS = ("q_a", "o")
_TOKENS = (1, 4, 8)
_MANY = (16, 64, 512, 4096)


def measure(setting: Setting) -> None:
    peak = copy_peak(setting)
    setting.report.add("Memory", {"what": "copy within the GPU, read + written", "GB/s": peak / 1e9})
    for type_name, name, tokens in cases(setting):
        _measure_few(setting, type_name, name, tokens, peak)
    for type_name in FIRST_TYPES[: setting.size(2, 1)]:
        for name in setting.size(("q_a", "o"), ("tiny",)):
            for tokens in setting.size(_MANY, (20,)):
                _measure_many(setting, type_name, name, tokens)


def cases(setting: Setting) -> Iterator[tuple[str, str, int]]:
    """Type, shape, tokens: first what matters most."""
    if setting.is_fake:
        yield from (("Q4_K", "tiny", tokens) for tokens in (1, 3))
        return
    yield from ((type_name, name, 1) for type_name in FIRST_TYPES for name in SHAPES)
    yield from (
        (type_name, name, tokens) for type_name in FIRST_TYPES for name in _SHAPES_OF_OTHERS for tokens in _TOKENS[1:]
    )
    others = [name for name in LAYOUTS if name not in FIRST_TYPES]
    yield from ((type_name, name, 1) for type_name in others for name in _SHAPES_OF_OTHERS)


def shape_of(name: str) -> tuple[int, int]:
    """Rows and columns."""
    return {**SHAPES, **_TINY}[name]


def copy_peak(setting: Setting) -> float:
    """Bytes per second, read and written."""
    nbytes = setting.size(1 << 30, 1 << 16)
    source, to = (setting.device.empty((nbytes,), torch.uint8) for _ in range(2))
    return 2 * nbytes / setting.seconds([lambda: to.copy_(source)])


def _measure_few(setting: Setting, type_name: str, name: str, tokens: int, peak: float) -> None:
    rows, cols = shape_of(name)
    nbytes = rows * LAYOUTS[type_name].panel_bytes(cols) // 16
    matrices = [setting.matrix(type_name, rows, cols) for _ in range(setting.copies(nbytes))]
    x = setting.values(tokens, cols)
    seconds = setting.seconds([partial(matrix.multiply, x) for matrix in matrices])
    row: dict[str, Any] = {"type": type_name, "matrix": name, "rows x columns": f"{rows} x {cols}", "tokens": tokens}
    row |= {"us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9, "of copy": nbytes / seconds / peak}
    if type_name == FIRST_TYPES[0]:
        row["bfloat16, us"] = _plain_product(setting, rows, cols, x) * 1e6
    setting.report.add("Products of few tokens", row)


def _plain_product(setting: Setting, rows: int, cols: int, x: torch.Tensor) -> float:
    weights = [setting.values(rows, cols) for _ in range(setting.copies(2 * rows * cols))]
    return setting.seconds([partial(torch.mm, x, each.t()) for each in weights])


def _measure_many(setting: Setting, type_name: str, name: str, tokens: int) -> None:
    """What a model does for so many tokens, the same by way of a dequantized matrix, and the product alone."""
    rows, cols = shape_of(name)
    matrix, x, weights = setting.matrix(type_name, rows, cols), setting.values(tokens, cols), setting.values(rows, cols)
    form: Any = plain
    if setting.device.has_kernels:
        from transformers_kt.backends.triton import dequantize as form

    def dequantize_and_multiply() -> None:
        form.dequantize(matrix.panels[0], type_name, rows, cols, weights)
        torch.mm(x, weights.t())

    row: dict[str, Any] = {"type": type_name, "matrix": name, "tokens": tokens}
    row["us"] = setting.seconds([partial(matrix.multiply, x)]) * 1e6
    row["dequantized first, us"] = setting.seconds([dequantize_and_multiply]) * 1e6
    row["bfloat16, us"] = _plain_product(setting, rows, cols, x) * 1e6
    row["bfloat16, TFLOPS"] = 2 * tokens * rows * cols / row["bfloat16, us"] / 1e6
    setting.report.add("Products of many tokens", row)
