"""Multi-head latent attention on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import causal_mask_function, sdpa_mask
from typing_extensions import Self

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.errors import InputError
from transformers_kt.families.registry import mla_of
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
from transformers_kt.modules.fused.cache_argument import require_cache_argument
from transformers_kt.modules.fused.latent_cache import grow_in_place
from transformers_kt.modules.rotary import as_rope_table
from transformers_kt.planning.operations import KERNEL_TYPES, OPERATIONS, is_wide

_NORMS = ("q_a_layernorm.weight", "kv_a_layernorm.weight")
MATRICES = ("q_proj.weight", "q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "o_proj.weight")


class KtMlaAttention(KtModule):
    """Absorbed MLA (arXiv:2405.04434, section 2.1.2) over transformers' latent cache.

    Works with any ``Cache`` that hands back latents (batch, 1, keys, kv_lora_rank) and rotary keys
    (batch, 1, keys, qk_rope_head_dim), which is what transformers' own attention stores.
    """

    operation = OPERATIONS["attention_cpu"]

    def __init__(self, dims: Mapping[str, Any], layer_idx: int, name: str) -> None:
        super().__init__()
        self._dims = dict(dims)
        self.layer_idx = layer_idx
        self._name = name
        self._attention: Handle | None = None

    @classmethod
    def from_module(cls, module: nn.Module, config: Any, name: str) -> Self:
        require_cache_argument(type(module))
        stock: Any = module
        mla = mla_of(config)
        dims = {
            "hidden": mla.hidden,
            "heads": mla.heads,
            "nope_dim": mla.nope,
            "rope_dim": mla.rope,
            "latent_dim": mla.latent,
            "value_dim": mla.value,
            "softmax_scale": stock.scaling,
            "norm_eps": stock.kv_a_layernorm.variance_epsilon,
        }
        return cls(dims, stock.layer_idx, name)

    def load(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
        packed = {role: pack_matrices(tensors[role], data) for role in MATRICES if role in tensors}
        norms = {role: float_values(tensors[role], data(tensors[role])) for role in _NORMS if role in tensors}
        k_b, v_b = self._pack_kv_b(tensors, data)
        attention = _C.MlaAttention(
            **self._dims,
            q_a=packed.get("q_a_proj.weight"),
            q_a_norm=norms.get("q_a_layernorm.weight"),
            q=packed["q_b_proj.weight" if "q_a_proj.weight" in packed else "q_proj.weight"],
            kv_a=packed["kv_a_proj_with_mqa.weight"],
            kv_a_norm=norms["kv_a_layernorm.weight"],
            k_b=k_b,
            v_b=v_b,
            o=packed["o_proj.weight"],
        )
        self._attention = Handle(attention)
        return sum(int(matrix.nbytes) for matrix in (*packed.values(), k_b, v_b))

    def _pack_kv_b(self, tensors: Mapping[str, TensorInfo], data: TensorData) -> tuple[Any, Any]:
        """Key half per head (kv_lora_rank, qk_nope_head_dim), value half per head (v_head_dim, kv_lora_rank)."""
        if "kv_b_proj.k_b" in tensors:
            return self._pack_keys(tensors["kv_b_proj.k_b"], data), pack_matrices(tensors["kv_b_proj.v_b"], data)
        tensor = tensors["kv_b_proj.weight"]
        heads, nope, value, latent = (self._dims[key] for key in ("heads", "nope_dim", "value_dim", "latent_dim"))
        blocks = data(tensor)
        # Absorbing needs the key half transposed, against the direction of its blocks. float16 holds the dequantized
        # values of a quantized file to 2^-12 of their size; requantizing to 8 bits would lose sixteen times that.
        keys = float_values(tensor, blocks).reshape(heads, nope + value, latent)[:, :nope]
        k_b = pack_floats(keys.transpose(0, 2, 1), GgmlType.F32 if is_wide(tensor) else GgmlType.F16)
        v_b = _C.PackedMatrix(int(tensor.ggml_type), heads, value, latent)
        rows = blocks.reshape(heads, nope + value, -1)
        for head in range(heads):
            v_b.pack(head, rows[head, nope:].reshape(-1))
        return k_b, v_b

    def _pack_keys(self, tensor: TensorInfo, data: TensorData) -> Any:
        if int(tensor.ggml_type) in KERNEL_TYPES:
            return pack_matrices(tensor, data)
        return pack_floats(float_values(tensor, data(tensor)), GgmlType.F16)

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
        x, handle = as_float32(hidden_states), self.weights.number
        table = as_rope_table(position_embeddings, len(x))
        latents, ropes = ops.mla_project_keys(x, table, handle, self.latent_dim, self.rope_dim)
        latents, ropes, visible = self.cached_keys(latents, ropes, attention_mask, cache)
        out: torch.Tensor = ops.mla_attend(x, table, latents, ropes, visible, handle)
        return out, None

    @property
    def weights(self) -> Handle:
        """The loaded weights."""
        assert self._attention is not None
        return self._attention

    @property
    def latent_dim(self) -> int:
        return int(self._dims["latent_dim"])

    @property
    def rope_dim(self) -> int:
        return int(self._dims["rope_dim"])

    def cached_keys(
        self, latents: torch.Tensor, ropes: torch.Tensor, attention_mask: torch.Tensor | None, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents and rotary keys (batch, keys, ...), old and new, and what of them is visible.

        ``latents`` and ``ropes`` are the new ones; they are put into the cache, if there is one.
        """
        tokens, earlier = latents.shape[1], 0
        if cache is not None:
            earlier = int(cache.get_seq_length(self.layer_idx)) if attention_mask is None else 0
            grow_in_place(cache, self.layer_idx)
            try:
                cached = cache.update(latents.unsqueeze(1), ropes.unsqueeze(1), self.layer_idx)
            except RuntimeError as error:
                self._refuse_other_keys(cache, error)
                raise
            latents, ropes = (as_float32(states).squeeze(1) for states in cached)
        return latents, ropes, self.visible_keys(attention_mask, latents, tokens, earlier)

    def _refuse_other_keys(self, cache: Any, error: RuntimeError) -> None:
        """Raise `InputError` if the cache holds keys of another kind of attention, as prefix tuning makes them."""
        layers = getattr(cache, "layers", ())
        keys = getattr(layers[self.layer_idx], "keys", None) if self.layer_idx < len(layers) else None
        if isinstance(keys, torch.Tensor) and (keys.shape[1], keys.shape[-1]) != (1, self.latent_dim):
            raise InputError(
                f"the cache holds keys of shape {tuple(keys.shape)} for {self._name}, which keeps latents (batch, 1, "
                f"keys, {self.latent_dim}). Keys of one size for all heads, as PEFT's prefix tuning makes them, are "
                "none of this attention, nor of stock transformers'; prompt tuning puts embeddings before the text"
            ) from error

    def visible_keys(
        self, attention_mask: torch.Tensor | None, latents: torch.Tensor, tokens: int, earlier: int
    ) -> torch.Tensor:
        """What ``tokens`` queries see of ``latents`` (batch, keys, ...), the first ``earlier`` keys being older."""
        batch, keys, _width = latents.shape
        if attention_mask is None:
            return causal_ranges(earlier, batch, tokens)
        return visible_keys(attention_mask, batch, tokens, keys, self._name)


def causal_ranges(cached_keys: int, batch: int, tokens: int) -> torch.Tensor:
    """What no mask means, as int32 ranges (batch, tokens, 2). Static caches hand back more keys than there are yet."""
    ends = torch.arange(cached_keys + 1, cached_keys + tokens + 1, dtype=torch.int32)
    return torch.stack((torch.zeros_like(ends), ends), dim=-1).expand(batch, tokens, 2)


def visible_keys(mask: torch.Tensor, batch: int, tokens: int, keys: int, name: str) -> torch.Tensor:
    """Any attention mask as int32 ranges (batch, tokens, 2) or bool (batch, tokens, keys).

    Raises InputError for a mask that weighs keys instead of hiding them, or differs between heads.
    """
    if mask.dtype == torch.int32:
        return mask[:, 0]
    if mask.shape[1] != 1:
        raise InputError(
            f"{name}: the attention mask has shape {tuple(mask.shape)}; this attention takes one mask for all heads, "
            "(batch, 1, queries, keys). Load with attn_implementation='eager' for masks that differ between heads"
        )
    mask = mask[:, 0, :, :keys]
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            raise InputError(
                f"{name}: the attention mask of shape {tuple(mask.shape)} holds values between 0 and -inf; this "
                "attention can hide keys (-inf or False) but not weigh them. Load with attn_implementation='eager' for "
                "such masks"
            )
        mask = ~hidden
    return mask.expand(batch, tokens, keys)


def ranges_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask function of this attention for transformers' mask registry.

    Returns int32 (batch, 1, q_length, 2): the keys [start, end) each query sees. Padding in the middle of a sequence,
    packed sequences and custom mask functions give a bool (batch, 1, q_length, kv_length) instead. Both have four
    dimensions: ``generate`` makes masks for static caches ahead, and the forward pass takes only 4D ones as made.
    """
    ends = torch.arange(1, q_length + 1, dtype=torch.int32) + (q_offset - kv_offset)
    ends = ends.to(torch.int32).expand(batch_size, q_length)
    starts = torch.zeros_like(ends)
    plain = mask_function is causal_mask_function
    if attention_mask is not None:
        # As transformers reads it: what a mask does not reach is hidden, what it has beyond the keys is nothing.
        missing = max(0, kv_offset + kv_length - attention_mask.shape[-1])
        attention_mask = nn.functional.pad(attention_mask.to(torch.bool), (0, missing))[:, : kv_offset + kv_length]
    if plain and attention_mask is not None and not bool(attention_mask.all()):
        shown = attention_mask[:, kv_offset:].to(torch.int32)
        counts = shown.sum(dim=-1)
        first = shown.argmax(dim=-1)
        last = shown.shape[-1] - shown.flip(-1).argmax(dim=-1)
        plain = bool(((last - first == counts) | (counts == 0)).all())
        starts = torch.where(counts > 0, first, last).to(torch.int32)[:, None].expand(batch_size, q_length)
        ends = torch.minimum(ends, last.to(torch.int32)[:, None])
    if plain:
        return torch.stack((starts, ends), dim=-1).unsqueeze(1)
    kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask
