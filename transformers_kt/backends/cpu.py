"""The operators ``kt::*`` on the CPU: numpy views of their tensors, handed to ``_C``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import transformers_kt._C as _C
from transformers_kt.backends import schemas
from transformers_kt.backends.handles import object_of
from transformers_kt.backends.library import kt_library
from transformers_kt.errors import UnsupportedOperationError


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperationError(
            "a gradient was asked for, but GGUF-backed modules compute forward passes only: "
            "call under torch.no_grad() or detach the input"
        )
    return tensor.contiguous().numpy(force=tensor.requires_grad)


def _rows(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return _array(tensor).reshape(-1, tensor.shape[-1])


def _like_rows(tensor: torch.Tensor, width: int) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    out = torch.empty((*tensor.shape[:-1], width), dtype=torch.float32)
    return out, out.numpy().reshape(-1, width)


def _linear(x: torch.Tensor, handle: int, rows: int) -> torch.Tensor:
    out, view = _like_rows(x, rows)
    _C.linear(object_of(handle), _rows(x), view)
    return out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    _C.rms_norm(_rows(x), _array(weight), eps, view)
    return out


def _embedding(ids: torch.Tensor, handle: int, hidden: int) -> torch.Tensor:
    out = torch.empty((*ids.shape, hidden), dtype=torch.float32)
    object_of(handle).gather(_array(ids.to(torch.int64)).reshape(-1), out.numpy().reshape(-1, hidden))
    return out


def _mlp(x: torch.Tensor, handle: int) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    object_of(handle).forward_mlp(_rows(x), view)
    return out


def _routed_experts(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int
) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    indices = _array(top_k_index.to(torch.int64))
    object_of(handle).forward_routed(_rows(x), indices, _array(top_k_weights.to(torch.float32)), view)
    return out


def _moe(x: torch.Tensor, handle: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, view = _like_rows(x, x.shape[-1])
    rows = _rows(x)
    logits = torch.empty((rows.shape[0], experts), dtype=torch.float32)
    object_of(handle).forward(rows, view, logits.numpy())
    return out, logits


def _rope_table(position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    dim = 2 * inv_freq.shape[0]
    table = torch.empty((*position_ids.shape, dim), dtype=torch.float32)
    positions = _array(position_ids.to(torch.int64)).reshape(-1)
    _C.rope_table(positions, _array(inv_freq), scaling, table.numpy().reshape(-1, dim))
    return table


def _mla_project_keys(
    x: torch.Tensor, rope_table: torch.Tensor, handle: int, latent_dim: int, rope_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    latents, latent_view = _like_rows(x, latent_dim)
    ropes, rope_view = _like_rows(x, rope_dim)
    object_of(handle).project_keys(_rows(x), _rows(rope_table), latent_view, rope_view)
    return latents, ropes


def seen(visible: torch.Tensor) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.uint8] | None]:
    """`visible` as either ranges or a mask."""
    seen = _array(visible)
    return (None, seen.view(np.uint8)) if visible.dtype == torch.bool else (seen, None)


def _mla_attend(
    x: torch.Tensor,
    rope_table: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    visible: torch.Tensor,
    handle: int,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    caches = latents.numpy(), ropes.numpy()
    object_of(handle).attend(_array(x), _rows(rope_table), *caches, *seen(visible), out.numpy())
    return out


def _layer_project_keys(
    x: torch.Tensor, input_norm: torch.Tensor, rope_table: torch.Tensor, handle: int, latent_dim: int, rope_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    latents, latent_view = _like_rows(x, latent_dim)
    ropes, rope_view = _like_rows(x, rope_dim)
    object_of(handle).project_keys(_rows(x), _array(input_norm), _rows(rope_table), latent_view, rope_view)
    return latents, ropes


def _layer_forward(
    x: torch.Tensor,
    input_norm: torch.Tensor,
    post_norm: torch.Tensor,
    rope_table: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    visible: torch.Tensor,
    handle: int,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norms, caches = (_array(input_norm), _array(post_norm)), (latents.numpy(), ropes.numpy())
    object_of(handle).forward(_array(x), *norms, _rows(rope_table), *caches, *seen(visible), out.numpy())
    return out


def _layer_append_and_forward(
    x: torch.Tensor,
    input_norm: torch.Tensor,
    post_norm: torch.Tensor,
    rope_table: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    visible: torch.Tensor,
    handle: int,
) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norms, caches = (_array(input_norm), _array(post_norm)), (latents.numpy(), ropes.numpy())
    object_of(handle).append_and_forward(_array(x), *norms, _rows(rope_table), *caches, *seen(visible), out.numpy())
    return out


_library = kt_library("IMPL")
for _operator, _kernel in {
    schemas.linear: _linear,
    schemas.rms_norm: _rms_norm,
    schemas.embedding: _embedding,
    schemas.mlp: _mlp,
    schemas.routed_experts: _routed_experts,
    schemas.moe: _moe,
    schemas.rope_table: _rope_table,
    schemas.mla_project_keys: _mla_project_keys,
    schemas.mla_attend: _mla_attend,
    schemas.layer_project_keys: _layer_project_keys,
    schemas.layer_forward: _layer_forward,
    schemas.layer_append_and_forward: _layer_append_and_forward,
}.items():
    _library.impl(_operator, _kernel, "CPU")
