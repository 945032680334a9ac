"""What all GGUF-backed modules have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import Self

import transformers_kt._C as _C
from transformers_kt.backends.handles import register_object
from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.planning.operations import Operation

PIECE_BYTES = 4 << 20
"""Of a large tensor, about as many bytes are read at a time, while those before are packed. J37 has the figures."""


class TensorData(Protocol):
    """Reads bytes ``start`` to ``end`` of a tensor, all of them by default: uint8, one-dimensional, read-only."""

    def __call__(self, info: TensorInfo, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]: ...


class KtModule(nn.Module):
    """A module whose weights are GGUF blocks outside torch.

    It is made from the stock module it replaces while that is on the meta device, told which tensors it gets, and
    filled once. Its outputs are float32, whatever dtype comes in.
    """

    operation: ClassVar[Operation]
    """What it computes, from which tensors. Whether it can is checked before it is made."""

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        """Makes the replacement of `module`, found at path `name`."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        """Packs the weights; returns the bytes of memory they take."""
        raise NotImplementedError

    @property
    def matrices(self) -> list[_C.PackedMatrix]:
        """The loaded matrices, shared with copies of this module."""
        packed = [value.packed for value in vars(self).values() if isinstance(value, Handle)]
        of_each = ([each] if isinstance(each, _C.PackedMatrix) else getattr(each, "matrices", []) for each in packed)
        return [matrix for matrices in of_each for matrix in matrices]


def require_supported_cpu() -> None:
    """Raises UnsupportedCpuError, naming the missing flag, where this CPU cannot run the kernels chosen for it."""
    _C.isa()


def float_values(tensor: TensorInfo, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """`tensor` dequantized from its bytes to float32, in its shape, by the gguf package: any type, small tensors."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = dequantize(blocks.reshape(-1), GGMLQuantizationType(int(tensor.ggml_type)))
    return np.array(values, dtype=np.float32).reshape(tensor.shape)


def _read_ahead(
    tensor: TensorInfo, data: TensorData, ranges: Sequence[tuple[int, int]]
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of each range. One thread reads the next, and waits for the disk, while all others pack."""
    with ThreadPoolExecutor(1) as ahead:
        try:
            upcoming = ahead.submit(data, tensor, *ranges[0])
        except RuntimeError:  # no thread may be started (RLIMIT_NPROC)
            yield from (data(tensor, *each) for each in ranges)
            return
        for following in [*ranges[1:], None]:
            stored = upcoming.result()
            if following is not None:
                upcoming = ahead.submit(data, tensor, *following)
            yield stored


def pack_matrices(tensor: TensorInfo, data: TensorData) -> _C.PackedMatrix:
    """Packs a tensor (rows, cols) or (count, rows, cols) as it stands in the file."""
    rows, cols = tensor.shape[-2:]
    count = tensor.shape[0] if len(tensor.shape) == 3 else 1
    matrix = _C.PackedMatrix(int(tensor.ggml_type), count, rows, cols)
    row_bytes = tensor.nbytes // (count * rows)
    rows_at_once = PIECE_BYTES // row_bytes
    # Whole matrices, or whole panels of one.
    indices = max(1, rows_at_once // rows)
    rows_each = rows if rows_at_once >= rows else max(1, rows_at_once // _C.PANEL_ROWS) * _C.PANEL_ROWS
    pieces = []
    for index in range(0, count, indices):
        for row in range(0, rows, rows_each):
            start = index * rows + row
            end = start + min(indices, count - index) * min(rows_each, rows - row)
            pieces.append((index, row, start * row_bytes, end * row_bytes))
    read = _read_ahead(tensor, data, [piece[2:] for piece in pieces])
    for (index, row, _, _), stored in zip(pieces, read, strict=True):
        matrix.pack(index, stored, row)
    return matrix


def pack_floats(values: npt.NDArray[np.float32], ggml_type: GgmlType) -> _C.PackedMatrix:
    """Packs float32 (count, rows, cols) as F32 or F16."""
    matrix = _C.PackedMatrix(int(ggml_type), *values.shape)
    matrix.pack_floats(np.ascontiguousarray(values))
    return matrix


class Handle:
    """A packed object together with the number by which operators find it."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.number = register_object(packed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return self  # weights do not change: a copy of a model shares them


class DequantizedWeight(torch.Tensor):
    """The values of a packed weight, to read. Writing, as to merge adapters, is refused: it would change a copy."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name in ("__set__", "__setitem__")) and isinstance(args[0], cls):
            raise UnsupportedOperationError(
                "the weight of a GGUF-backed module can be read but not changed; keep the module as torch's with "
                "kt_rules (op: torch), or leave adapters unmerged"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def as_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float32 else x.to(torch.float32)
