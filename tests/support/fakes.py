"""Operations in plain torch under the names of the real ones: the stock module, dequantized, outside the registry.

With a file of F32 tensors a model made of them gives the bits of the stock model, so a test of the integration can
compare exactly, whatever the kernels do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transformers_kt.families.registry import family_of
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.integration import from_pretrained, loading
from transformers_kt.planning.operations import OPERATIONS, Operation


class FakeOperation(nn.Module):
    operation: ClassVar[Operation]

    def __init__(self, stock: nn.Module, config: Any, name: str) -> None:
        super().__init__()
        # Not as a submodule: real operations hold handles, no parameters.
        object.__setattr__(self, "stock", stock)
        self.config = config
        self.path = name
        self.calls = 0

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> FakeOperation:
        return cls(copy.deepcopy(module), config, name)

    def load(self, tensors: Mapping[str, TensorInfo], data: Callable[[TensorInfo], npt.NDArray[np.uint8]]) -> int:
        by_module: dict[str, dict[str, TensorInfo]] = {"": {}}
        for key, info in tensors.items():
            module, _, role = key.rpartition(".")
            by_module.setdefault(module, {})[role] = info
        for module, own in by_module.items():
            loading._load_stock(self.stock.get_submodule(module), family_of(self.config), own, data)
        return sum(info.nbytes for info in tensors.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.stock(*args, **kwargs)


class FakeRotary(FakeOperation):
    operation = OPERATIONS["rotary_cpu"]

    def load(self, tensors: Mapping[str, TensorInfo], data: Any) -> int:
        object.__setattr__(self, "stock", type(self.stock)(self.config))
        return self.stock.inv_freq.nbytes


class FakeNorm(FakeOperation):
    """Holds its weight as a parameter, as the real one does."""

    operation = OPERATIONS["norm_cpu"]

    def __init__(self, stock: nn.Module, config: Any, name: str) -> None:
        super().__init__(stock, config, name)
        self.weight = nn.Parameter(torch.empty_like(stock.weight), requires_grad=False)

    def load(self, tensors: Mapping[str, TensorInfo], data: Any) -> int:
        nbytes = super().load(tensors, data)
        self.weight = self.stock.weight
        return nbytes


class FakeLinear(FakeOperation):
    operation = OPERATIONS["linear_cpu"]


class FakeEmbedding(FakeOperation):
    operation = OPERATIONS["embedding_cpu"]


class FakeExperts(FakeOperation):
    operation = OPERATIONS["experts_cpu"]


class FakeMlp(FakeOperation):
    operation = OPERATIONS["mlp_cpu"]


class FakeMoe(FakeOperation):
    operation = OPERATIONS["moe_cpu"]


class FakeAttention(FakeOperation):
    operation = OPERATIONS["attention_cpu"]


_CLASSES = (FakeLinear, FakeEmbedding, FakeExperts, FakeMoe, FakeMlp, FakeAttention, FakeNorm, FakeRotary)
MODULES: dict[str, type[FakeOperation]] = {cls.operation.op: cls for cls in _CLASSES}

REAL_MODULES = from_pretrained._modules
