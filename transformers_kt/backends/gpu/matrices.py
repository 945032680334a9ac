"""Matrices on a device: the bytes of the CPU's packed matrices, and products with them.

A product is one kernel in Triton where a device has kernels and the rows are few, else panels are dequantized, a chunk
at a time, and torch multiplies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import transformers_kt._C as _C
from transformers_kt.backends.gpu import panels as plain
from transformers_kt.backends.gpu.device import Device

_CHUNK = 1 << 22
"""Weights dequantized at once. The plain form keeps some ten tensors of their size, 160 MB in all."""
_CHUNK_OF_KERNELS = 1 << 26
"""The same with kernels, which write the 16-bit result alone: 128 MB."""
_FEWEST_PANELS = 256
"""Of a matrix with fewer, a kernel's programs share the columns too: each of these is a fraction of a GPU's SMs."""


class DeviceMatrix:
    """``count`` matrices of ``rows`` x ``cols``: ``panels`` uint8 (count, panels, panel bytes) on ``device``."""

    def __init__(self, device: Device, type_name: str, panels: torch.Tensor, rows: int, cols: int) -> None:
        self.device = device
        self.type_name = type_name
        self.panels = panels
        self.rows = rows
        self.cols = cols

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceMatrix:
        return self  # weights do not change: a copy of a model shares them

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., cols) of any float dtype times the only matrix -> float32 (..., rows)."""
        return self._product(self.panels[0], x.reshape(-1, self.cols)).reshape(*x.shape[:-1], self.rows)

    def multiply_chosen(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, cols) times the matrix that ``index``, int64 (1,) on the device, names -> float32 (tokens,
        rows). The host reads no index.
        """
        return self._product(self.panels.index_select(0, index)[0], x)

    def multiply_each(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (count, tokens, cols), each times its own matrix -> float32 (count, tokens, rows)."""
        count, each, nbytes = self.panels.shape
        padded = each * plain.PANEL_ROWS
        weights = self._weights(self.panels.view(count * each, nbytes), count * padded)
        weights = weights.view(count, padded, self.cols)[:, : self.rows]
        return torch.bmm(x.to(weights.dtype), weights.transpose(1, 2)).float()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, cols): the rows that ``rows``, int64 (n,) on the device, names. Whole panels are decoded."""
        panels = self.panels[0][rows // plain.PANEL_ROWS]
        values = plain.dequantize(panels, self.type_name, len(rows) * plain.PANEL_ROWS, self.cols)
        at = torch.arange(len(rows), device=rows.device) * plain.PANEL_ROWS + rows % plain.PANEL_ROWS
        return values[at]

    def dequantized(self) -> torch.Tensor:
        """float32 (rows, cols) of the only matrix."""
        return plain.dequantize(self.panels[0], self.type_name, self.rows, self.cols)

    @property
    def _has_kernels(self) -> bool:
        """In Triton, for this type: others take the plain form."""
        if not self.device.has_kernels:
            return False
        from transformers_kt.backends.triton.gemv import FLOATS
        from transformers_kt.backends.triton.unpack import KINDS

        return self.type_name in FLOATS or self.type_name in KINDS

    def _product(self, panels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, cols) times the matrix of ``panels`` -> float32 (tokens, rows)."""
        x = x.to(self.device.activations)
        if self._has_kernels:
            from transformers_kt.backends.triton.gemv import MOST_ROWS

            if len(x) <= MOST_ROWS:
                return self._product_of_few(panels, x)
        chunk = _CHUNK_OF_KERNELS if self._has_kernels else _CHUNK
        step = max(1, chunk // (self.cols * plain.PANEL_ROWS))
        parts = []
        for first in range(0, len(panels), step):
            own = panels[first : first + step]
            rows = min(len(own) * plain.PANEL_ROWS, self.rows - first * plain.PANEL_ROWS)
            parts.append(torch.mm(x, self._weights(own, rows).t()).float())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _product_of_few(self, panels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        from transformers_kt.backends.triton.gemv import gemv

        out = torch.empty((len(x), self.rows), dtype=torch.float32, device=x.device)
        splits = -(-_FEWEST_PANELS // len(panels))
        partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device) if splits > 1 else None
        return gemv(panels, self.type_name, x.contiguous(), out, partial)

    def _weights(self, panels: torch.Tensor, rows: int) -> torch.Tensor:
        """(rows, cols) in the dtype of activations."""
        dtype = self.device.activations
        if not self._has_kernels:
            return plain.dequantize(panels, self.type_name, rows, self.cols).to(dtype)
        from transformers_kt.backends.triton import dequantize as kernels

        out = torch.empty((rows, self.cols), dtype=dtype, device=panels.device)
        return kernels.dequantize(panels, self.type_name, rows, self.cols, out)


def upload(matrix: _C.PackedMatrix, device: Device) -> DeviceMatrix:
    """The panels of ``matrix`` on ``device``, one matrix after another through ordinary memory. What is read on another
    stream has to follow torch's.

    Raises OutOfMemoryError.
    """
    layout = plain.LAYOUTS[matrix.type_name]
    shape = (-(-matrix.rows // plain.PANEL_ROWS), layout.panel_bytes(matrix.cols))
    panels = device.empty((matrix.count, *shape), torch.uint8)
    staged = np.empty(shape, np.uint8)
    for index in range(matrix.count):
        matrix.read_panels(index, staged)
        panels[index].copy_(torch.from_numpy(staged))
    return DeviceMatrix(device, matrix.type_name, panels, matrix.rows, matrix.cols)
