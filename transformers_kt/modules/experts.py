"""Feed-forward modules: routed experts alone, a dense MLP, and the whole MoE block in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.families.base import Router
from transformers_kt.families.registry import dims_of, family_of
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


def _pack_experts(tensors: Mapping[str, TensorInfo], roles: tuple[str, str, str], data: TensorData) -> tuple[Any, int]:
    gate, up, down = (pack_matrices(tensors[role], data) for role in roles)
    return _C.Experts(gate, up, down), gate.nbytes + up.nbytes + down.nbytes


class KtExperts(KtModule):
    """Routed experts, called as transformers' MoE blocks call theirs: (tokens, hidden), indices, weights."""

    operation = OPERATIONS["experts_cpu"]

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._experts: Handle | None = None
        self.on_gpu: Any = None
        """`gpu.ram_experts.RamExperts` where a GPU computes some of them too: it is given them after loading."""

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        stock: Any = module
        return cls(stock.num_experts)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        experts, nbytes = _pack_experts(tensors, ("gate", "up", "down"), data)
        self._experts = Handle(experts)
        return nbytes

    @property
    def routed(self) -> _C.Experts:
        """The loaded weights."""
        assert self._experts is not None
        routed: _C.Experts = self._experts.packed
        return routed

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        assert self._experts is not None
        out: torch.Tensor = ops.routed_experts(
            as_float32(hidden_states), top_k_index, top_k_weights, self._experts.number
        )
        return out.to(hidden_states.dtype)


class KtMlp(KtModule):
    """The SwiGLU MLP of dense layers and shared experts: float32 (..., hidden) -> float32 (..., hidden)."""

    operation = OPERATIONS["mlp_cpu"]

    def __init__(self) -> None:
        super().__init__()
        self._mlp: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        return cls()

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        mlp, nbytes = _pack_experts(tensors, ("gate_proj.weight", "up_proj.weight", "down_proj.weight"), data)
        self._mlp = Handle(mlp)
        return nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ops.mlp(as_float32(x), self.weights.number)
        return out

    @property
    def weights(self) -> Handle:
        """The loaded weights."""
        assert self._mlp is not None
        return self._mlp


class KtMoe(KtModule):
    """Router, routed experts and shared experts of a layer in one call: (..., hidden) -> (..., hidden)."""

    operation = OPERATIONS["moe_cpu"]

    def __init__(self, router: Router, num_experts: int) -> None:
        super().__init__()
        self._router = router
        self.num_experts = num_experts
        self._block: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        router = family_of(config).router
        assert router is not None
        return cls(router(config), dims_of(config).experts)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        # float32 whatever the file has: routing decides by small differences, and the matrix is small.
        router = pack_floats(float_values(tensors["gate.weight"], data(tensors["gate.weight"]))[None], GgmlType.F32)
        bias = tensors.get("gate.e_score_correction_bias")
        routed, nbytes = _pack_experts(tensors, ("experts.gate", "experts.up", "experts.down"), data)
        shared, shared_nbytes = None, 0
        if "shared_experts.gate_proj.weight" in tensors:
            roles = ("gate", "up", "down")
            names = tuple(f"shared_experts.{part}_proj.weight" for part in roles)
            shared, shared_nbytes = _pack_experts(tensors, (names[0], names[1], names[2]), data)
        bias_values = None if bias is None else float_values(bias, data(bias))
        self._block = Handle(_C.MoeBlock(router, bias_values, routed, shared, **asdict(self._router)))
        return int(router.nbytes + nbytes + shared_nbytes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        out, _logits = ops.moe(as_float32(hidden_states), self.weights.number, self.num_experts)
        return out

    @property
    def weights(self) -> Handle:
        """The loaded weights."""
        assert self._block is not None
        return self._block

    @property
    def routed(self) -> _C.Experts:
        """The loaded weights of the routed experts."""
        block: _C.MoeBlock = self.weights.packed
        return block.routed
