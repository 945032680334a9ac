"""Feed-forward modules on a GPU: a dense MLP, routed experts, and the whole MoE block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.modules.base import TensorData, as_float32
from transformers_kt.modules.experts import KtExperts, KtMlp, KtMoe
from transformers_kt.modules.gpu.base import OnDevice
from transformers_kt.planning.operations import OPERATIONS

_PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class KtGpuMlp(OnDevice, KtMlp):
    """`KtMlp` on a GPU."""

    operation = OPERATIONS["mlp_gpu"]
    _matrices: Sequence[DeviceMatrix]

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        self._matrices = [self._uploaded(tensors[part], data) for part in _PARTS]
        return sum(matrix.nbytes for matrix in self._matrices)

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> float32 (tokens, hidden)"""
        return operations.swiglu(x, *self._matrices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.device.current():
            return self.on_device(self._taken(as_float32(x)).reshape(-1, x.shape[-1])).cpu().reshape(x.shape)


class KtGpuExperts(OnDevice, KtExperts):
    """`KtExperts` on a GPU."""

    operation = OPERATIONS["experts_gpu"]
    _matrices: Sequence[DeviceMatrix]

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        self._matrices = [self._uploaded(tensors[part], data) for part in ("gate", "up", "down")]
        return sum(matrix.nbytes for matrix in self._matrices)

    def on_device(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden), int32 and float32 (tokens, top_k) -> float32 (tokens, hidden)"""
        return operations.mix_experts(x, ids, weights, *self._matrices)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        with self.device.current():
            taken = map(self._taken, (as_float32(hidden_states), top_k_index.int(), as_float32(top_k_weights)))
            return self.on_device(*taken).cpu().to(hidden_states.dtype)


class KtGpuMoe(OnDevice, KtMoe):
    """`KtMoe` on a GPU."""

    operation = OPERATIONS["moe_gpu"]
    gate: torch.Tensor
    bias: torch.Tensor | None
    _experts: Sequence[DeviceMatrix]
    _shared: Sequence[DeviceMatrix]

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        self.gate = self._floats(tensors, "gate.weight", data)
        self.bias = self._floats(tensors, "gate.e_score_correction_bias", data)
        self._experts = [self._uploaded(tensors[f"experts.{part}"], data) for part in ("gate", "up", "down")]
        shared = [f"shared_experts.{part}" for part in _PARTS]
        self._shared = [self._uploaded(tensors[role], data) for role in shared if role in tensors]
        floats = [each for each in (self.gate, self.bias) if each is not None]
        return sum(each.nbytes for each in (*floats, *self._experts, *self._shared))

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (tokens, hidden) -> float32 (tokens, hidden)"""
        rows, hidden, top_k = *x.shape, self._router.top_k
        block = torch.empty(Staging.words(rows, hidden, top_k), dtype=torch.float32, device=x.device)
        chosen = Staging.of(block, rows, hidden, top_k)
        operations.stage(x, self.gate, self.bias, self._router, chosen, self.device)
        out = operations.mix_experts(x, chosen.ids, chosen.weights, *self._experts)
        return out + operations.swiglu(x, *self._shared) if self._shared else out

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with self.device.current():
            x = self._taken(as_float32(hidden_states)).reshape(-1, hidden_states.shape[-1])
            return self.on_device(x).cpu().reshape(hidden_states.shape)
