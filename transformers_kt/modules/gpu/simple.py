"""Linear layers, embeddings, norms and rotary tables on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.matrices import DeviceMatrix, upload
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules.base import DequantizedWeight, TensorData, as_float32, float_values, pack_floats
from transformers_kt.modules.embedding import KtEmbedding
from transformers_kt.modules.gpu.base import OnDevice
from transformers_kt.modules.linear import KtLinear
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.rotary import KtRotaryEmbedding
from transformers_kt.planning.operations import OPERATIONS


class KtGpuLinear(OnDevice, KtLinear):
    """`KtLinear` on a GPU. A weight in several tensors is put together as float16."""

    operation = OPERATIONS["linear_gpu"]
    _matrix: DeviceMatrix | None = None

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        if "weight" in tensors:
            self._matrix = self._uploaded(tensors["weight"], data)
        else:
            assert self._merge is not None
            merged = self._merge.join(*(float_values(tensors[role], data(tensors[role])) for role in self._merge.roles))
            shape = (1, self.out_features, self.in_features)
            self._matrix = upload(pack_floats(merged.reshape(shape), GgmlType.F16), self.device)
        return self._matrix.nbytes

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        """float32 (out_features, in_features) on the host, dequantized at each call; writing into it is refused."""
        if self._matrix is None:  # None until loaded, for transformers initializes what nn.Linear has
            return None
        weight: torch.Tensor = self._matrix.dequantized().cpu().as_subclass(DequantizedWeight)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self._matrix is not None
        with self.device.current():
            return self._matrix.multiply(self._taken(x)).cpu()

    def extra_repr(self) -> str:
        type_name = self._matrix.type_name if self._matrix is not None else "not loaded"
        return f"in_features={self.in_features}, out_features={self.out_features}, type={type_name}"


class KtGpuEmbedding(OnDevice, KtEmbedding):
    """`KtEmbedding` on a GPU."""

    operation = OPERATIONS["embedding_gpu"]
    _matrix: DeviceMatrix | None = None

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        self._matrix = self._uploaded(tensors["weight"], data)
        return self._matrix.nbytes

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        """float32 (num_embeddings, embedding_dim) on the host, as `KtEmbedding.weight`."""
        if self._matrix is None:  # until loaded
            return None
        return self._matrix.dequantized().cpu().as_subclass(DequantizedWeight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self._matrix is not None
        with self.device.current():
            rows = self._matrix.gather(self._taken(ids).reshape(-1).long())
            return rows.cpu().reshape(*ids.shape, self.embedding_dim)


class KtGpuRMSNorm(OnDevice, KtRMSNorm):
    """`KtRMSNorm` on a GPU."""

    operation = OPERATIONS["norm_gpu"]

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        self.weight = nn.Parameter(self._floats(tensors, "weight", data), requires_grad=False)
        return self.weight.nbytes

    def on_device(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (..., hidden) -> float32 (..., hidden)"""
        return operations.rms_norm(x, self.weight, self.eps, self.device)

    def add_on_device(self, residual: torch.Tensor, added: torch.Tensor, out: torch.Tensor) -> None:
        """``residual`` float32 (rows, hidden) += ``added``; ``out`` is its norm."""
        operations.add_rms_norm(residual, added, self.weight, self.eps, out, self.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.device.current():
            return self.on_device(self._taken(as_float32(x))).cpu()


class KtGpuRotaryEmbedding(OnDevice, KtRotaryEmbedding):
    """`KtRotaryEmbedding` on a GPU."""

    operation = OPERATIONS["rotary_gpu"]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        with self.device.current():
            inv_freq = self._inv_freq.to(self.device.torch_device)
            return operations.rope_table(self._taken(position_ids), inv_freq, self.scaling).cpu()
