"""Matrices on a device: the bytes of the CPU's packed matrices, and products with them.

A product is one kernel in Triton where a device has kernels and the rows are few, else panels are dequantized, a chunk
at a time, and torch multiplies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import transformers_kt._C as _C
from transformers_kt.backends.gpu import plain
from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.panels import LAYOUTS, PANEL_ROWS, dequantize
from transformers_kt.backends.gpu.whole_blocks import make_codebook

_CHUNK_VALUES = 1 << 26
"""Weights that a kernel dequantizes at once: 128 MB of bfloat16."""


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

    def multiply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` (..., cols) of any float dtype times the only matrix -> float32 (..., rows); into ``out`` (tokens,
        rows), with any stride of tokens, if there is one."""
        product = self._product(self.panels[0], x.reshape(-1, self.cols), out)
        return product.reshape(*x.shape[:-1], self.rows)

    def multiply_at(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, cols) times matrix ``index`` -> float32 (tokens, rows)."""
        return self._product(self.panels[index], x)

    def multiply_chosen(self, index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, cols) times the matrix that ``index``, int64 (1,) on the device, names -> float32 (tokens,
        rows). The host reads no index.
        """
        return self._product(self.panels.index_select(0, index)[0], x)

    def multiply_each(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (tokens, count, cols), a matrix to each of its rows -> float32 (tokens, count, rows)."""
        x = x.to(self.device.activations)
        out = torch.empty((*x.shape[:2], self.rows), dtype=torch.float32, device=x.device)
        if not self.has_kernels:
            return plain.linear_per_head(self.panels, self.type_name, x, out)
        from transformers_kt.backends.triton import gemv

        if len(x) <= gemv.MOST_ROWS:
            return gemv.gemv_per_head(self.panels, self.type_name, x, out)
        weights = self.weights(0, len(self.panels))
        return out.copy_(torch.bmm(x.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1))

    def weights(self, first: int, stop: int) -> torch.Tensor:
        """(stop - first, rows, cols) of matrices ``first`` to ``stop``, in the dtype of activations."""
        (count, each, _), panels = self.panels[first:stop].shape, self.panels[first:stop].flatten(0, 1)
        rows = count * each * PANEL_ROWS
        if self.has_kernels:
            weights = self._weights(panels, rows)
        else:
            weights = dequantize(panels, self.type_name, rows, self.cols).to(self.device.activations)
        return weights.view(count, each * PANEL_ROWS, self.cols)[:, : self.rows]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, cols): the rows that ``rows``, int64 (n,) on the device, names. Whole panels are decoded."""
        panels = self.panels[0][rows // PANEL_ROWS]
        values = dequantize(panels, self.type_name, len(rows) * PANEL_ROWS, self.cols)
        at = torch.arange(len(rows), device=rows.device) * PANEL_ROWS + rows % PANEL_ROWS
        return values[at]

    def dequantized(self) -> torch.Tensor:
        """float32 (rows, cols) of the only matrix."""
        return dequantize(self.panels[0], self.type_name, self.rows, self.cols)

    @property
    def has_kernels(self) -> bool:
        """In Triton, for this type: others take the plain forms."""
        if not self.device.has_kernels:
            return False
        from transformers_kt.backends.triton.unpack import KINDS

        return self.type_name in KINDS

    def _product(self, panels: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` (tokens, cols) times the matrix of ``panels`` -> float32 (tokens, rows)."""
        x = x.to(self.device.activations).contiguous()
        if out is None:
            out = torch.empty((len(x), self.rows), dtype=torch.float32, device=x.device)
        if not self.has_kernels:
            return plain.linear(panels, self.type_name, x, out)
        from transformers_kt.backends.triton import gemm, gemv

        if len(x) <= gemv.MOST_ROWS:
            splits = gemv.splits_for(self.type_name, len(panels), self.cols)
            partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device) if splits > 1 else None
            return gemv.gemv(panels, self.type_name, x, out, partial)
        if len(x) <= gemm.MOST_ROWS and x.dtype == torch.bfloat16:
            return gemm.gemm(panels, self.type_name, x, out)
        step = max(1, _CHUNK_VALUES // (self.cols * PANEL_ROWS))
        for first in range(0, len(panels), step):
            start, stop = first * PANEL_ROWS, min((first + step) * PANEL_ROWS, self.rows)
            out[:, start:stop] = torch.mm(x, self._weights(panels[first : first + step], stop - start).t())
        return out

    def _weights(self, panels: torch.Tensor, rows: int) -> torch.Tensor:
        """(rows, cols) in the dtype of activations, by a kernel."""
        from transformers_kt.backends.triton import dequantize as kernels

        out = torch.empty((rows, self.cols), dtype=self.device.activations, device=panels.device)
        return kernels.dequantize(panels, self.type_name, rows, self.cols, out)


def upload(matrix: _C.PackedMatrix, device: Device) -> DeviceMatrix:
    """The panels of ``matrix`` on ``device``, one matrix after another through ordinary memory. What is read on another
    stream has to follow torch's.

    Raises OutOfMemoryError.
    """
    make_codebook(matrix.type_name, device.torch_device)
    layout = LAYOUTS[matrix.type_name]
    shape = (-(-matrix.rows // PANEL_ROWS), layout.panel_bytes(matrix.cols))
    panels = device.empty((matrix.count, *shape), torch.uint8)
    staged = np.empty(shape, np.uint8)
    for index in range(matrix.count):
        matrix.read_panels(index, staged)
        panels[index].copy_(torch.from_numpy(staged))
    return DeviceMatrix(device, matrix.type_name, panels, matrix.rows, matrix.cols)
