"""From compressed queries and keys to the cache: two norms, RoPE of the shared key, and the appending, in one kernel.

A row has two programs, of which one norms its query and one sees to its key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.triton.norm import rms_normed


def norm_rope_append(
    query: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    query_out: torch.Tensor | None,
    key: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    rope_table: torch.Tensor,
    lengths: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
) -> None:
    """`plain.norm_rope_append`. The caches have room: a position behind their end would be written all the same."""
    batch, rows = len(latents), len(key)
    if query is None or query_norm is None or query_out is None:
        query, query_norm, query_out, programs = key, key_norm, key, 1
    else:
        programs = 2
    latent_dim, rope_dim = latents.shape[-1], ropes.shape[-1]
    norm_rope_append_kernel[(rows, programs)](
        query,
        query_norm,
        query_out,
        key,
        key_norm,
        rope_table,
        lengths,
        latents,
        ropes,
        rows // batch,
        eps,
        query.shape[1],
        latent_dim,
        rope_dim,
        query.stride(0),
        query_out.stride(0),
        key.stride(0),
        rope_table.stride(0),
        lengths.stride(0),
        latents.stride(0),
        latents.stride(1),
        ropes.stride(0),
        ropes.stride(1),
        QUERY=triton.next_power_of_2(query.shape[1]),
        LATENT=triton.next_power_of_2(latent_dim),
        PAIRS=triton.next_power_of_2(rope_dim // 2),
    )


@triton.jit
def norm_rope_append_kernel(
    query,
    query_norm,
    query_out,
    key,
    key_norm,
    rope_table,
    lengths,
    latents,
    ropes,
    tokens,
    eps,
    query_dim,
    latent_dim,
    rope_dim,
    query_stride,
    query_out_stride,
    key_stride,
    table_stride,
    lengths_stride,
    latents_batch,
    latents_key,
    ropes_batch,
    ropes_key,
    QUERY: tl.constexpr,
    LATENT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.program_id(1) == 1:
        _norm(query + row * query_stride, query_norm, query_out + row * query_out_stride, query_dim, eps, QUERY)
    else:
        sequence = row // tokens
        at = (tl.load(lengths + sequence * lengths_stride) + row % tokens).to(tl.int64)
        to = latents + sequence.to(tl.int64) * latents_batch + at * latents_key
        _norm(key + row * key_stride, key_norm, to, latent_dim, eps, LATENT)
        pair = tl.arange(0, PAIRS)
        mask = 2 * pair < rope_dim
        own = key + row * key_stride + latent_dim + 2 * pair
        even = tl.load(own, mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(own + 1, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(rope_table + row * table_stride + pair, mask=mask, other=0.0)
        sin = tl.load(rope_table + row * table_stride + rope_dim // 2 + pair, mask=mask, other=0.0)
        turned = ropes + sequence.to(tl.int64) * ropes_batch + at * ropes_key + 2 * pair
        tl.store(turned, (even * cos - odd * sin).to(ropes.dtype.element_ty), mask=mask)
        tl.store(turned + 1, (odd * cos + even * sin).to(ropes.dtype.element_ty), mask=mask)


@triton.jit
def _norm(x, weight, out, cols, eps, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    mask = column < cols
    values = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    normed = rms_normed(values, tl.load(weight + column, mask=mask, other=0.0), cols, eps)
    tl.store(out + column, normed.to(out.dtype.element_ty), mask=mask)
