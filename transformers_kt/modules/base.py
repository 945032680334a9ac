"""What all GGUF-backed modules have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


class TensorData(Protocol):
    """Reads tensors, and looks them over for damage."""

    def __call__(self, info: TensorInfo, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes ``start`` to ``end`` of a tensor, all of them by default: uint8, one-dimensional, read-only."""

    def read_into(self, info: TensorInfo, out: npt.NDArray[np.uint8]) -> None:
        """All of a tensor to ``out``, uint8 (bytes,), on all threads."""

    def pack(self, info: TensorInfo, matrix: _C.PackedMatrix) -> None:
        """All of a tensor to ``matrix``, on all threads: the way for large ones."""


class NotPickledAlone:
    """A part of a model that can be copied, but not pickled: its weights lie outside torch, its class was made here."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedOperationError(
            f"a {type(self).__name__} cannot be pickled by itself: its weights are blocks of a GGUF. Pickle the whole "
            "model, which loads them again in the other process, or load the model there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> Any:
        copied: Any = type(self).__new__(type(self))
        copied.__setstate__(dict(vars(self)))
        return copied


class KtModule(NotPickledAlone, nn.Module):
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


def pack_matrices(tensor: TensorInfo, data: TensorData) -> _C.PackedMatrix:
    """Packs a tensor (rows, cols) or (count, rows, cols) as it stands in the file."""
    rows, cols = tensor.shape[-2:]
    count = tensor.shape[0] if len(tensor.shape) == 3 else 1
    matrix = _C.PackedMatrix(int(tensor.ggml_type), count, rows, cols)
    data.pack(tensor, matrix)
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
