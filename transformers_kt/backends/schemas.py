"""Torch operators ``kt::*``: what each takes and gives, on any device.

Each operator is a schema and a fake (shapes for tracing). Its kernels stand in a module per device, which registers
them under the operator's name. Weights stay outside torch: an operator takes the handle of a packed object (`handles`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from transformers_kt.backends.library import kt_library

_library = kt_library("DEF")


def computes_at_once() -> bool:
    """Whether a call runs its operator at once: nothing compiles, exports, traces or dispatches it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def _define(schema: str, fake: Callable[..., Any]) -> Any:
    name = schema.split("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"kt::{name}", fake, lib=_library)
    return getattr(torch.ops.kt, name).default


def _fake_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # whatever the layout of x, as the kernels do


linear = _define(
    "linear(Tensor x, int handle, int rows) -> Tensor",
    lambda x, handle, rows: x.new_empty((*x.shape[:-1], rows)),
)
"""``x`` float32 (..., cols) times the registered ``PackedMatrix`` (rows, cols) -> float32 (..., rows)."""

rms_norm = _define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: _fake_like(x))
"""``x`` float32 (..., n), ``weight`` float32 (n,) -> float32 (..., n)."""

embedding = _define(
    "embedding(Tensor ids, int handle, int hidden) -> Tensor",
    lambda ids, handle, hidden: ids.new_empty((*ids.shape, hidden), dtype=torch.float32),
)
"""``ids`` integers of any shape -> float32 (*ids.shape, hidden); IndexError for an id outside the vocabulary."""

mlp = _define("mlp(Tensor x, int handle) -> Tensor", lambda x, handle: _fake_like(x))
"""``x`` float32 (..., hidden) through the registered ``Experts`` of count 1."""

routed_experts = _define(
    "routed_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, int handle) -> Tensor",
    lambda x, top_k_index, top_k_weights, handle: _fake_like(x),
)
"""``x`` float32 (tokens, hidden), indices int (tokens, top_k), weights float (tokens, top_k) -> (tokens, hidden).

An index of -1 costs nothing and adds nothing; IndexError for others that name no expert.
"""

moe = _define(
    "moe(Tensor x, int handle, int experts) -> (Tensor, Tensor)",
    lambda x, handle, experts: (_fake_like(x), x.new_empty((x.numel() // x.shape[-1], experts))),
)
"""``x`` float32 (..., hidden) -> (same shape, router logits (tokens, experts)) through the registered ``MoeBlock``."""

rope_table = _define(
    "rope_table(Tensor position_ids, Tensor inv_freq, float scaling) -> Tensor",
    lambda position_ids, inv_freq, scaling: inv_freq.new_empty((*position_ids.shape, 2 * inv_freq.shape[0])),
)
"""``position_ids`` int (...), ``inv_freq`` float32 (d/2,) -> float32 (..., d): cosines, then sines."""

mla_project_keys = _define(
    "mla_project_keys(Tensor x, Tensor rope_table, int handle, int latent_dim, int rope_dim) -> (Tensor, Tensor)",
    lambda x, rope_table, handle, latent_dim, rope_dim: (
        x.new_empty((*x.shape[:-1], latent_dim)),
        x.new_empty((*x.shape[:-1], rope_dim)),
    ),
)
"""``x`` float32 (batch, tokens, hidden) -> latents (..., latent_dim), rotary keys (..., rope_dim)."""

mla_attend = _define(
    "mla_attend(Tensor x, Tensor rope_table, Tensor latents, Tensor ropes, Tensor visible, int handle) -> Tensor",
    lambda x, rope_table, latents, ropes, visible, handle: _fake_like(x),
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
)
"""`mla_project_keys` of the norm of ``x``, with ``input_norm`` float32 (hidden,) and a registered ``DecoderLayer``."""

layer_forward = _define(
    "layer_forward(Tensor x, Tensor input_norm, Tensor post_norm, Tensor rope_table, Tensor latents, Tensor ropes,"
    " Tensor visible, int handle) -> Tensor",
    lambda x, input_norm, post_norm, rope_table, latents, ropes, visible, handle: _fake_like(x),
)
"""A whole decoder layer but for the cache: arguments as of `mla_attend`, norms float32 (hidden,)."""

layer_append_and_forward = _define(
    "layer_append_and_forward(Tensor x, Tensor input_norm, Tensor post_norm, Tensor rope_table, Tensor(a!) latents,"
    " Tensor(b!) ropes, Tensor visible, int handle) -> Tensor",
    lambda x, input_norm, post_norm, rope_table, latents, ropes, visible, handle: _fake_like(x),
)
"""`layer_forward`, after the keys of ``x`` were written to the last rows of ``latents`` and ``ropes``."""
