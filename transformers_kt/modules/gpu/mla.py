"""Multi-head latent attention on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.expanded_attention import attend_expanded, is_less_work
from transformers_kt.backends.gpu.matrices import DeviceMatrix, upload
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.modules.base import TensorData, as_float32
from transformers_kt.modules.fused.latent_cache import grow_in_place, held_states
from transformers_kt.modules.gpu.base import OnDevice
from transformers_kt.modules.mla import MATRICES, KtMlaAttention
from transformers_kt.modules.rotary import as_rope_table
from transformers_kt.planning.operations import OPERATIONS


class KtGpuMlaAttention(OnDevice, KtMlaAttention):
    """`KtMlaAttention` on a GPU, where its latents lie too: absorbed for few tokens, expanded for prompts."""

    operation = OPERATIONS["attention_gpu"]
    _matrices: Mapping[str, DeviceMatrix]
    _norms: Mapping[str, torch.Tensor]

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        k_b, v_b = (upload(half, self.device) for half in self._pack_kv_b(tensors, data))
        own = {role: self._uploaded(tensors[role], data) for role in MATRICES if role in tensors}
        self._matrices = {**own, "k_b": k_b, "v_b": v_b}
        norms = {role: self._floats(tensors, role, data) for role in ("q_a_layernorm.weight", "kv_a_layernorm.weight")}
        self._norms = {role: weight for role, weight in norms.items() if weight is not None}
        in_matrices = sum(matrix.nbytes for matrix in self._matrices.values())
        return in_matrices + sum(weight.nbytes for weight in self._norms.values())

    def new_keys(self, x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` (batch, tokens, hidden), ``table`` float32 (batch, tokens, rope) -> latents, rotary keys in float32."""
        keys = self._matrices["kv_a_proj_with_mqa.weight"].multiply(x)
        latents, ropes = torch.split(keys, [self.latent_dim, self.rope_dim], dim=-1)
        norm = self._norms["kv_a_layernorm.weight"]
        return operations.rms_norm(latents, norm, self._dims["norm_eps"], self.device), operations.rotate(ropes, table)

    def attend(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        latents: torch.Tensor,
        ropes: torch.Tensor,
        visible: torch.Tensor,
    ) -> torch.Tensor:
        """``x`` (batch, tokens, hidden) over ``latents`` (batch, keys, latent) and ``ropes`` (batch, keys, rope), of
        which ``visible`` says what is seen as in `operations.attend`: float32 (batch, tokens, hidden)."""
        batch, tokens, _hidden = x.shape
        compressed = self._matrices["q_a_proj.weight"].multiply(x) if self._compresses_queries else None
        if compressed is not None:
            norm = self._norms["q_a_layernorm.weight"]
            compressed = operations.rms_norm(compressed, norm, self._dims["norm_eps"], self.device)
        plain, rotary = self._queries(x if compressed is None else compressed)
        if tokens == 1 and visible.dtype != torch.bool:
            values = self._attend_once(plain[:, 0], rotary[:, 0], table[:, 0], latents, ropes, visible[:, 0])
            return self._matrices["o_proj.weight"].multiply(values).unsqueeze(1)
        rotary, scale = operations.rotate(rotary, table), self._dims["softmax_scale"]
        k_b, v_b = self._matrices["k_b"], self._matrices["v_b"]
        if is_less_work(tokens, self.latent_dim, k_b.cols, v_b.rows):
            values = attend_expanded(plain, rotary, latents, ropes, visible, k_b, v_b, scale)
        else:
            absorbed = k_b.multiply_each(plain.flatten(0, 1)).view(batch, tokens, plain.shape[2], -1)
            contexts = operations.attend(torch.cat((absorbed, rotary), dim=-1) * scale, latents, ropes, visible)
            values = v_b.multiply_each(contexts.flatten(0, 1))
        return self._matrices["o_proj.weight"].multiply(values.reshape(batch, tokens, -1))

    def step(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        ranges: torch.Tensor,
        latents: torch.Tensor,
        ropes: torch.Tensor,
    ) -> torch.Tensor:
        """One new token a row, all on the device: ``x`` (rows, hidden), ``table`` float32 (rows, rope). Its keys are
        appended to ``latents`` (rows, capacity, latent) and ``ropes`` (rows, capacity, rope) at int32 ``lengths``
        (rows,), then it attends to those that int32 ``ranges`` (rows, 2) shows. Float32 (rows, hidden)."""
        x = x.to(self.device.activations)
        compressed = self._matrices["q_a_proj.weight"].multiply(x) if self._compresses_queries else None
        normed = operations.norm_rope_append(
            compressed,
            self._norms.get("q_a_layernorm.weight"),
            self._matrices["kv_a_proj_with_mqa.weight"].multiply(x),
            self._norms["kv_a_layernorm.weight"],
            self._dims["norm_eps"],
            table,
            lengths,
            latents,
            ropes,
            self.device,
        )
        plain, rotary = self._queries(x if normed is None else normed)
        values = self._attend_once(plain, rotary, table, latents, ropes, ranges)
        return self._matrices["o_proj.weight"].multiply(values)

    @property
    def _compresses_queries(self) -> bool:
        return "q_a_proj.weight" in self._matrices

    def _queries(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` (..., hidden), or what queries are compressed to -> (..., heads, nope), (..., heads, rope)."""
        role = "q_b_proj.weight" if self._compresses_queries else "q_proj.weight"
        query = self._matrices[role].multiply(x).view(*x.shape[:-1], self._dims["heads"], -1)
        nope, rotary = torch.split(query, [self._dims["nope_dim"], self.rope_dim], dim=-1)
        return nope, rotary

    def _attend_once(
        self,
        plain: torch.Tensor,
        rotary: torch.Tensor,
        table: torch.Tensor,
        latents: torch.Tensor,
        ropes: torch.Tensor,
        ranges: torch.Tensor,
    ) -> torch.Tensor:
        """Of queries (rows, heads, nope) and (rows, heads, rope), not turned yet: float32 (rows, heads x value)."""
        absorbed = self._matrices["k_b"].multiply_each(plain)
        scale = self._dims["softmax_scale"]
        contexts = operations.attend_once(absorbed, rotary, table, latents, ropes, ranges, scale, self.device)
        return self._matrices["v_b"].multiply_each(contexts).flatten(1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        cache = past_key_values if cache is None else cache
        with self.device.current():
            x = self._taken(as_float32(hidden_states))
            table = self._taken(as_rope_table(position_embeddings, len(x)))
            latents, ropes = self.new_keys(x, table)
            latents, ropes, visible = self.cached_keys(latents, ropes, attention_mask, cache)
            return self.attend(x, table, latents, ropes, self._taken(visible)).cpu(), None

    def cached_keys(
        self, latents: torch.Tensor, ropes: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As on the CPU; the cache keeps its dtype and its place, which for a new one is the device."""
        if cache is not None:
            grow_in_place(cache, self.layer_idx)
        held = held_states(cache, self.layer_idx)
        dtype, device = (self.device.activations, latents.device) if held is None else (held.dtype, held.device)
        kept = (latents.to(device, dtype), ropes.to(device, dtype))
        latents, ropes, visible = super().cached_keys(kept[0], kept[1], attention_mask, cache)
        here = self.device.torch_device, self.device.activations
        return latents.to(*here), ropes.to(*here), visible
