"""Torch operators ``kt::*`` over the C++ kernels.

Each operator is a schema, a fake (shapes for tracing) and a kernel that hands numpy views of its tensors to ``_C``.
Weights stay outside torch: a module registers its packed object here and passes the handle. An object lives as long as
the module that registered it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import transformers_kt._C as _C
from transformers_kt.errors import UnsupportedOperationError

_library: Any = torch.library.Library("kt", "DEF")  # type: ignore[no-untyped-call]
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


def register_object(packed: object) -> int:
    """Returns a handle for `packed`, valid while the caller keeps `packed` alive."""
    handle = next(_next_handle)
    _objects[handle] = packed
    return handle


def _object(handle: int) -> Any:
    found = _objects.get(handle)
    if found is None:
        raise RuntimeError(f"weights with handle {handle} are gone: the module that held them was deleted")
    return found


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise UnsupportedOperationError(
            "a gradient was asked for, but GGUF-backed modules compute forward passes only: "
            "call under torch.no_grad() or detach the input"
        )
    return tensor.contiguous().numpy(force=tensor.requires_grad)


def computes_at_once() -> bool:
    """Whether operators run when they are called: nobody compiles, exports or traces, or otherwise looks at each."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def _define(schema: str, fake: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"kt::{name}", fake, lib=_library)
    return getattr(torch.ops.kt, name).default


def _fake_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # whatever the layout of x, as the kernels do


def _rows(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return _array(tensor).reshape(-1, tensor.shape[-1])


def _like_rows(tensor: torch.Tensor, width: int) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    out = torch.empty((*tensor.shape[:-1], width), dtype=torch.float32)
    return out, out.numpy().reshape(-1, width)


def _linear(x: torch.Tensor, handle: int, rows: int) -> torch.Tensor:
    out, view = _like_rows(x, rows)
    _C.linear(_object(handle), _rows(x), view)
    return out


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    _C.rms_norm(_rows(x), _array(weight), eps, view)
    return out


def _embedding(ids: torch.Tensor, handle: int, hidden: int) -> torch.Tensor:
    out = torch.empty((*ids.shape, hidden), dtype=torch.float32)
    _object(handle).gather(_array(ids.to(torch.int64)).reshape(-1), out.numpy().reshape(-1, hidden))
    return out


def _mlp(x: torch.Tensor, handle: int) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    _object(handle).forward_mlp(_rows(x), view)
    return out


def _routed_experts(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int
) -> torch.Tensor:
    out, view = _like_rows(x, x.shape[-1])
    indices = _array(top_k_index.to(torch.int64))
    _object(handle).forward_routed(_rows(x), indices, _array(top_k_weights.to(torch.float32)), view)
    return out


def _moe(x: torch.Tensor, handle: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    out, view = _like_rows(x, x.shape[-1])
    rows = _rows(x)
    logits = torch.empty((rows.shape[0], experts), dtype=torch.float32)
    _object(handle).forward(rows, view, logits.numpy())
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
    _object(handle).project_keys(_rows(x), _rows(rope_table), latent_view, rope_view)
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
    _object(handle).attend(_array(x), _rows(rope_table), *caches, *seen(visible), out.numpy())
    return out


def _layer_project_keys(
    x: torch.Tensor, input_norm: torch.Tensor, rope_table: torch.Tensor, handle: int, latent_dim: int, rope_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    latents, latent_view = _like_rows(x, latent_dim)
    ropes, rope_view = _like_rows(x, rope_dim)
    _object(handle).project_keys(_rows(x), _array(input_norm), _rows(rope_table), latent_view, rope_view)
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
    _object(handle).forward(_array(x), *norms, _rows(rope_table), *caches, *seen(visible), out.numpy())
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
    layer = _C.DecoderStack([_object(handle)], [_array(input_norm), _array(post_norm)])
    caches = _C.KeyBuffers([latents.numpy()], [ropes.numpy()])
    layer.append_and_forward(_array(x), _rows(rope_table), caches, latents.shape[1], *seen(visible), out.numpy())
    return out


linear = _define(
    "linear(Tensor x, int handle, int rows) -> Tensor",
    lambda x, handle, rows: x.new_empty((*x.shape[:-1], rows)),
    _linear,
)
"""``x`` float32 (..., cols) times the registered ``PackedMatrix`` (rows, cols) -> float32 (..., rows)."""

rms_norm = _define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: _fake_like(x), _rms_norm
)
"""``x`` float32 (..., n), ``weight`` float32 (n,) -> float32 (..., n)."""

embedding = _define(
    "embedding(Tensor ids, int handle, int hidden) -> Tensor",
    lambda ids, handle, hidden: ids.new_empty((*ids.shape, hidden), dtype=torch.float32),
    _embedding,
)
"""``ids`` integers of any shape -> float32 (*ids.shape, hidden); IndexError for an id outside the vocabulary."""

mlp = _define("mlp(Tensor x, int handle) -> Tensor", lambda x, handle: _fake_like(x), _mlp)
"""``x`` float32 (..., hidden) through the registered ``Experts`` of count 1."""

routed_experts = _define(
    "routed_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, int handle) -> Tensor",
    lambda x, top_k_index, top_k_weights, handle: _fake_like(x),
    _routed_experts,
)
"""``x`` float32 (tokens, hidden), indices int (tokens, top_k), weights float (tokens, top_k) -> (tokens, hidden)."""

moe = _define(
    "moe(Tensor x, int handle, int experts) -> (Tensor, Tensor)",
    lambda x, handle, experts: (_fake_like(x), x.new_empty((x.numel() // x.shape[-1], experts))),
    _moe,
)
"""``x`` float32 (..., hidden) -> (same shape, router logits (tokens, experts)) through the registered ``MoeBlock``."""

rope_table = _define(
    "rope_table(Tensor position_ids, Tensor inv_freq, float scaling) -> Tensor",
    lambda position_ids, inv_freq, scaling: inv_freq.new_empty((*position_ids.shape, 2 * inv_freq.shape[0])),
    _rope_table,
)
"""``position_ids`` int (...), ``inv_freq`` float32 (d/2,) -> float32 (..., d): cosines, then sines."""

mla_project_keys = _define(
    "mla_project_keys(Tensor x, Tensor rope_table, int handle, int latent_dim, int rope_dim) -> (Tensor, Tensor)",
    lambda x, rope_table, handle, latent_dim, rope_dim: (
        x.new_empty((*x.shape[:-1], latent_dim)),
        x.new_empty((*x.shape[:-1], rope_dim)),
    ),
    _mla_project_keys,
)
"""``x`` float32 (batch, tokens, hidden) -> latents (..., latent_dim), rotary keys (..., rope_dim)."""

mla_attend = _define(
    "mla_attend(Tensor x, Tensor rope_table, Tensor latents, Tensor ropes, Tensor visible, int handle) -> Tensor",
    lambda x, rope_table, latents, ropes, visible, handle: _fake_like(x),
    _mla_attend,
)
"""``x`` float32 (batch, tokens, hidden) over latents (batch, keys, latent_dim) and ropes (batch, keys, rope_dim).

``visible`` is int32 (batch, tokens, 2): ranges [start, end) of keys, or bool (batch, tokens, keys).
"""

layer_project_keys = _define(
    "layer_project_keys(Tensor x, Tensor input_norm, Tensor rope_table, int handle, int latent_dim, int rope_dim)"
    " -> (Tensor, Tensor)",
    lambda x, input_norm, rope_table, handle, latent_dim, rope_dim: (
        x.new_empty((*x.shape[:-1], latent_dim)),
        x.new_empty((*x.shape[:-1], rope_dim)),
    ),
    _layer_project_keys,
)
"""`mla_project_keys` of the norm of ``x``, with ``input_norm`` float32 (hidden,) and a registered ``DecoderLayer``."""

layer_forward = _define(
    "layer_forward(Tensor x, Tensor input_norm, Tensor post_norm, Tensor rope_table, Tensor latents, Tensor ropes,"
    " Tensor visible, int handle) -> Tensor",
    lambda x, input_norm, post_norm, rope_table, latents, ropes, visible, handle: _fake_like(x),
    _layer_forward,
)
"""A whole decoder layer but for the cache: arguments as of `mla_attend`, norms float32 (hidden,)."""

layer_append_and_forward = _define(
    "layer_append_and_forward(Tensor x, Tensor input_norm, Tensor post_norm, Tensor rope_table, Tensor(a!) latents,"
    " Tensor(b!) ropes, Tensor visible, int handle) -> Tensor",
    lambda x, input_norm, post_norm, rope_table, latents, ropes, visible, handle: _fake_like(x),
    _layer_append_and_forward,
)
"""`layer_forward`, after the keys of ``x`` were written to the last rows of ``latents`` and ``ropes``."""
