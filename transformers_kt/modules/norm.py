"""RMSNorm with a fixed order of additions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from transformers_kt.backends import schemas as ops
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.modules.base import KtModule, TensorData, as_float32, float_values
from transformers_kt.planning.operations import OPERATIONS


class KtRMSNorm(KtModule):
    """Root mean square norm (arXiv:1910.07467): float32 (..., hidden) -> float32 (..., hidden)."""

    operation = OPERATIONS["norm_cpu"]

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        # A real parameter, so that model.dtype and model.device have something to look at.
        self.weight = nn.Parameter(torch.empty(hidden, dtype=torch.float32), requires_grad=False)
        self.eps = eps

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        stock: Any = module
        return cls(stock.weight.shape[0], stock.variance_epsilon)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        values = torch.from_numpy(float_values(tensors["weight"], data(tensors["weight"])))
        self.weight = nn.Parameter(values, requires_grad=False)
        return values.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ops.rms_norm(as_float32(x), self.weight, self.eps)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
