"""Random matrices of every type, as stored in a file and in the panels that the extension makes of them."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

import transformers_kt._C as _C
from transformers_kt.backends.gpu.panels import LAYOUTS, PANEL_ROWS

NUMBERS: dict[str, int] = {entry[0]: entry[1] for entry in _C.weight_types()}
# The upper bytes of a block's f16 scales: below 0x3c they are finite and no larger than 1.
_SCALE_BYTES = {
    "Q4_0": [1],
    "Q5_0": [1],
    "Q8_0": [1],
    "Q4_K": [1, 3],
    "Q5_K": [1, 3],
    "Q6_K": [209],
    "IQ4_NL": [1],
    "IQ4_XS": [1],
    "Q2_K": [81, 83],
    "Q3_K": [109],
    "Q4_1": [1, 3],
    "Q5_1": [1, 3],
    "MXFP4": [],
    **{name: [1] for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")},
    "IQ1_M": [55],  # of the four that hold a quarter of the scale each, the one with the highest bits
    "TQ1_0": [53],
    "TQ2_0": [65],
    "NVFP4": [],
}


def random_values(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32, normally distributed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored_rows(name: str, rows: int, cols: int) -> npt.NDArray[np.uint8]:
    """uint8 (rows, row bytes): random blocks of the type, with finite scales."""
    layout, rng = LAYOUTS[name], np.random.default_rng(cols + rows)
    if layout.block_elements == 1:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        quantized: Any = gguf.quantize(values, gguf.GGMLQuantizationType(NUMBERS[name]))
        return quantized.view(np.uint8).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows, cols // layout.block_elements, layout.block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[..., 0] %= 160  # a power of two up to 2^32, denormal ones among them
    scales = _SCALE_BYTES[name]
    blocks[..., scales] = rng.integers(0, 0x3C, (*blocks.shape[:2], len(scales)), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def packed_panels(name: str, stored: npt.NDArray[np.uint8], cols: int) -> torch.Tensor:
    """uint8 (panels, panel bytes)."""
    matrix = _C.PackedMatrix(NUMBERS[name], 1, len(stored), cols)
    matrix.pack(0, stored.reshape(-1))
    panels = np.empty((-(-len(stored) // PANEL_ROWS), LAYOUTS[name].panel_bytes(cols)), np.uint8)
    matrix.read_panels(0, panels)
    return torch.from_numpy(panels)


def decoded_rows(name: str, stored: npt.NDArray[np.uint8], cols: int) -> torch.Tensor:
    """float32 (rows, cols) of the rows of the file, by the extension."""
    values = np.empty((len(stored), cols), np.float32)
    _C.dequantize(NUMBERS[name], stored.reshape(-1), values)
    return torch.from_numpy(values)
