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
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from transformers_kt import loading
from transformers_kt.errors import UnsupportedTypeError
from transformers_kt.gguf.reader import GgmlType, TensorInfo

TYPE_WITHOUT_KERNEL = GgmlType.Q8_K
ROLES_OF = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class FakeOperation(nn.Module):
    op: ClassVar[str]
    replaces: ClassVar[tuple[type[nn.Module], ...]]

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

    def roles(self) -> set[str]:
        roles = set()
        for name in self.stock.state_dict():
            module, _, parameter = name.rpartition(".")
            prefix = f"{module}." if module else ""
            roles.update(prefix + role for role in ROLES_OF.get(parameter, (parameter,)))
            if f"{self.path}.{module}".rstrip(".").endswith("kv_b_proj"):
                roles.update({prefix + "k_b", prefix + "v_b"})
        return roles

    def check(self, tensors: Mapping[str, TensorInfo]) -> None:
        for role, info in tensors.items():
            if info.ggml_type == TYPE_WITHOUT_KERNEL:
                raise UnsupportedTypeError(
                    f"{info.path}: tensor {info.name} ({role} of {self.path}) has type {info.ggml_type.name}, for "
                    f"which {self.op} has no kernel; accepted: every other"
                )

    def memory_needed(self, tensors: Mapping[str, TensorInfo]) -> int:
        return sum(info.nbytes for info in tensors.values())

    def load(self, tensors: Mapping[str, TensorInfo], data: Callable[[TensorInfo], npt.NDArray[np.uint8]]) -> int:
        by_module: dict[str, dict[str, TensorInfo]] = {"": {}}
        for key, info in tensors.items():
            module, _, role = key.rpartition(".")
            by_module.setdefault(module, {})[role] = info
        for module, own in by_module.items():
            loading._load_stock(self.stock.get_submodule(module), own, data)
        return self.memory_needed(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.stock(*args, **kwargs)


class FakeRotary(FakeOperation):
    op = "rotary_cpu"
    replaces = (v2.DeepseekV2RotaryEmbedding, v3.DeepseekV3RotaryEmbedding)

    def load(self, tensors: Mapping[str, TensorInfo], data: Any) -> int:
        object.__setattr__(self, "stock", type(self.stock)(self.config))
        return self.stock.inv_freq.nbytes


class FakeNorm(FakeOperation):
    """Holds its weight as a parameter, as the real one does."""

    op = "norm_cpu"
    replaces = (v2.DeepseekV2RMSNorm, v3.DeepseekV3RMSNorm)

    def __init__(self, stock: nn.Module, config: Any, name: str) -> None:
        super().__init__(stock, config, name)
        self.weight = nn.Parameter(torch.empty_like(stock.weight), requires_grad=False)

    def load(self, tensors: Mapping[str, TensorInfo], data: Any) -> int:
        nbytes = super().load(tensors, data)
        self.weight = self.stock.weight
        return nbytes


class FakeLinear(FakeOperation):
    op = "linear_cpu"
    replaces = (nn.Linear,)


class FakeEmbedding(FakeOperation):
    op = "embedding_cpu"
    replaces = (nn.Embedding,)


class FakeExperts(FakeOperation):
    op = "experts_cpu"
    replaces = (v2.DeepseekV2Experts, v3.DeepseekV3Experts)


class FakeMlp(FakeOperation):
    op = "mlp_cpu"
    replaces = (v2.DeepseekV2MLP, v3.DeepseekV3MLP)


class FakeMoe(FakeOperation):
    op = "moe_cpu"
    replaces = (v2.DeepseekV2Moe, v3.DeepseekV3MoE)


class FakeAttention(FakeOperation):
    op = "attention_cpu"
    replaces = (v2.DeepseekV2Attention, v3.DeepseekV3Attention)


_CLASSES = (FakeLinear, FakeEmbedding, FakeExperts, FakeMoe, FakeMlp, FakeAttention, FakeNorm, FakeRotary)
OPERATIONS: dict[str, type[FakeOperation]] = {cls.op: cls for cls in _CLASSES}
