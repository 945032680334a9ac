"""Linear layers over GGUF blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from transformers_kt.backends import schemas as ops
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules.base import (
    Handle,
    KtModule,
    TensorData,
    as_float32,
    float_values,
    pack_floats,
    pack_matrices,
)
from transformers_kt.planning.operations import OPERATIONS


class KtLinear(KtModule):
    """``nn.Linear`` without bias: float32 (..., in_features) -> float32 (..., out_features).

    A ``kv_b_proj`` whose file holds it split into ``attn_k_b`` and ``attn_v_b`` is put together again in float32: the
    split form stores its key half transposed, so its blocks run along the other axis.
    """

    operation = OPERATIONS["linear_cpu"]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._weight: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        assert isinstance(module, nn.Linear)
        return cls(module.in_features, module.out_features)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        if "weight" in tensors:
            matrix = pack_matrices(tensors["weight"], data)
        else:
            keys = float_values(tensors["k_b"], data(tensors["k_b"])).transpose(0, 2, 1)
            values = float_values(tensors["v_b"], data(tensors["v_b"]))
            merged = np.concatenate([keys, values], axis=1)
            matrix = pack_floats(merged.reshape(1, self.out_features, self.in_features), GgmlType.F32)
        self._weight = Handle(matrix)
        return int(matrix.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self._weight is not None
        out: torch.Tensor = ops.linear(as_float32(x), self._weight.number, self.out_features)
        return out

    def extra_repr(self) -> str:
        type_name = self._weight.packed.type_name if self._weight is not None else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, type={type_name}"
