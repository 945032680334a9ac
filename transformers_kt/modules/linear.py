"""Linear layers over GGUF blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from transformers_kt.backends import schemas as ops
from transformers_kt.families.base import Merge
from transformers_kt.families.registry import family_of
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules.base import (
    DequantizedWeight,
    Handle,
    KtModule,
    TensorData,
    as_float32,
    float_values,
    pack_floats,
    pack_matrices,
)
from transformers_kt.modules.gathering import computed
from transformers_kt.planning.operations import OPERATIONS


class KtLinear(KtModule, nn.Linear):
    """``nn.Linear`` without bias: float32 (..., in_features) -> float32 (..., out_features).

    It is one to libraries that look for linear layers: PEFT's LoRA adds its product to the packed one.

    A weight that its file holds in several tensors is put together in float32: of the halves of ``kv_b_proj`` one is
    stored transposed, so its blocks run along the other axis.
    """

    operation = OPERATIONS["linear_cpu"]
    gathers = False
    """Whether calls of several threads may be computed as one: those of a model's head, once a token."""

    def __init__(self, in_features: int, out_features: int, merge: Merge | None = None) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which takes memory
        self.register_parameter("bias", None)
        self._merge = merge
        self.in_features = in_features
        self.out_features = out_features
        self._weight: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        assert isinstance(module, nn.Linear)
        return cls(module.in_features, module.out_features, family_of(config).merges.get("weight"))

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        if "weight" in tensors:
            matrix = pack_matrices(tensors["weight"], data)
        else:
            assert self._merge is not None
            parts = [float_values(tensors[role], data(tensors[role])) for role in self._merge.roles]
            merged = self._merge.join(*parts)
            matrix = pack_floats(merged.reshape(1, self.out_features, self.in_features), GgmlType.F32)
        self._weight = Handle(matrix)
        return int(matrix.nbytes)

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        """float32 (out_features, in_features), dequantized at each call; writing into it is refused.

        Columns are products with unit vectors, which int8 holds to the last bits of float32.
        """
        if self._weight is None:  # None until loaded, for transformers initializes what nn.Linear has
            return None
        columns = [self(torch.eye(self.in_features)[first : first + 256]) for first in range(0, self.in_features, 256)]
        values: torch.Tensor = torch.cat(columns).T.contiguous().as_subclass(DequantizedWeight)
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joins_others = self.gathers and ops.computes_at_once()
        out: torch.Tensor = computed(self._products, x) if joins_others else self._product(x)
        return out

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        assert self._weight is not None
        out: torch.Tensor = ops.linear(as_float32(x), self._weight.number, self.out_features)
        return out

    def _products(self, xs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if len(xs) == 1:
            return [self._product(xs[0])]
        rows = [x.reshape(-1, self.in_features) for x in xs]
        out = torch.split(self._product(torch.cat(rows)), [len(each) for each in rows])
        return [each.reshape(*x.shape[:-1], self.out_features) for each, x in zip(out, xs, strict=True)]

    def extra_repr(self) -> str:
        type_name = self._weight.packed.type_name if self._weight is not None else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, type={type_name}"
