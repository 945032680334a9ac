"""Rotary position embeddings as one table per forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typing_extensions import Self

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.backends.gpu.device import Device
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.modules.base import KtModule, TensorData
from transformers_kt.planning.operations import OPERATIONS


class KtRotaryEmbedding(KtModule):
    """position_ids (batch, tokens) -> float32 (batch, tokens, qk_rope_head_dim): cosines, then sines.

    Frequencies and the YaRN factor on cosines and sines (arXiv:2309.00071; the ratio of mscale and mscale_all_dim) are
    those of transformers' own initialisation.
    """

    operation = OPERATIONS["rotary_cpu"]

    def __init__(self, inv_freq: torch.Tensor, scaling: float) -> None:
        super().__init__()
        # Not a buffer: the skeleton this lives in is materialized from the meta device, which would empty it.
        self._inv_freq = inv_freq
        self.scaling = scaling

    def table(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """For positions (...) -> float32 (number of positions, rope_dim)."""
        table = np.empty((positions.size, 2 * len(self._inv_freq)), np.float32)
        _C.rope_table(positions.reshape(-1), self._inv_freq.numpy(), self.scaling, table)
        return table

    def frequencies_on(self, device: Device) -> torch.Tensor:
        """float32 (rope_dim / 2,) in memory of a GPU."""
        return device.empty(self._inv_freq.shape, torch.float32).copy_(self._inv_freq)

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        stock: Any = module
        rope_type = config.rope_parameters["rope_type"]
        initialize = ROPE_INIT_FUNCTIONS.get(rope_type, stock.compute_default_rope_parameters)
        with torch.device("cpu"):
            inv_freq, scaling = initialize(config, device=torch.device("cpu"))
        return cls(inv_freq.to(torch.float32).contiguous(), float(scaling))

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        return 0

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        table: torch.Tensor = ops.rope_table(position_ids, self._inv_freq, self.scaling)
        return table


def as_rope_table(position_embeddings: torch.Tensor | tuple[torch.Tensor, torch.Tensor], batch: int) -> torch.Tensor:
    """Any of transformers' forms as a table (batch, tokens, rope_dim).

    These are (cos, sin), each half twice; complex numbers; or a table already.
    """
    if isinstance(position_embeddings, tuple):
        cos, sin = position_embeddings
        half = cos.shape[-1] // 2
        table = torch.cat((cos[..., :half], sin[..., :half]), dim=-1).to(torch.float32)
    elif position_embeddings.is_complex():
        table = torch.cat((position_embeddings.real, position_embeddings.imag), dim=-1).to(torch.float32)
    else:
        table = position_embeddings
    return table if table.shape[0] == batch else table.expand(batch, -1, -1)
