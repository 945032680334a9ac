"""Token embeddings looked up in GGUF blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import Self

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules.base import DequantizedWeight, Handle, KtModule, TensorData
from transformers_kt.planning.operations import KERNEL_TYPES, OPERATIONS


class _EmbeddingTable:
    """Rows of blocks; a row is decoded when its token is looked up."""

    def __init__(self, ggml_type: GgmlType, rows: npt.NDArray[np.uint8]) -> None:
        self.ggml_type = ggml_type
        self.rows = rows

    def gather(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.float32]) -> None:
        if int(self.ggml_type) in KERNEL_TYPES:
            _C.embed(int(self.ggml_type), self.rows.reshape(-1), ids, out)
            return
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        out[:] = dequantize(self.rows[ids], GGMLQuantizationType(int(self.ggml_type)))


class KtEmbedding(KtModule, nn.Embedding):
    """``nn.Embedding``: integer ids (...) -> float32 (..., embedding_dim). Takes every type the gguf package knows.

    It is one to libraries that look for it. ``padding_idx`` is None: it only matters to gradients.
    """

    operation = OPERATIONS["embedding_cpu"]

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)  # not that of nn.Embedding, which takes memory
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._is_hf_initialized = True  # transformers fills the weight of any other nn.Embedding
        self._table: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        assert isinstance(module, nn.Embedding)
        return cls(module.num_embeddings, module.embedding_dim)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        tensor = tensors["weight"]
        stored = np.empty(tensor.nbytes, np.uint8)
        data.read_into(tensor, stored)
        self._table = Handle(_EmbeddingTable(tensor.ggml_type, stored.reshape(self.num_embeddings, -1)))
        return tensor.nbytes

    @property
    def table(self) -> _EmbeddingTable:
        assert self._table is not None
        table: _EmbeddingTable = self._table.packed
        return table

    @property
    def weight(self) -> torch.Tensor | None:  # type: ignore[override]
        """float32 (num_embeddings, embedding_dim), dequantized at each call; writing into it is refused."""
        if self._table is None:  # until loaded
            return None
        ids = np.arange(self.num_embeddings, dtype=np.int64)
        values = np.empty((self.num_embeddings, self.embedding_dim), np.float32)
        self.table.gather(ids, values)
        return torch.from_numpy(values).as_subclass(DequantizedWeight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self._table is not None
        out: torch.Tensor = ops.embedding(ids, self._table.number, self.embedding_dim)
        return out

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
