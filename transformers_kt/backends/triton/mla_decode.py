"""Absorbed MLA over cached latents for few query tokens: the keys are split over programs, then merged.

A latent is key and value at once: a tile of them is loaded once, multiplied transposed for the scores and again for the
context. Softmax is kept online per split (maximum, sum, context); a second kernel merges splits in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 16
"""Query heads of a program: the smallest tile of a tensor core."""
KEYS = 16
"""Keys of a tile. 32 latents of 512 bfloat16 in two stages would pass the 99 KiB of consumer cards."""


def scratch_floats(rows: int, heads: int, latent_dim: int, splits: int) -> int:
    """Elements of the scratch that `mla_decode` needs for ``rows`` tokens: context, maximum and sum of each split."""
    return rows * splits * heads * (latent_dim + 2)


def splits_for(rows: int, heads: int, keys: int, processors: int) -> int:
    """How many programs share the keys of a head, so that twice as many run as there are processors."""
    wanted: int = 2 * processors // max(1, rows * triton.cdiv(heads, HEADS))
    most: int = triton.cdiv(keys, 4 * KEYS)
    return max(1, min(wanted, most))


def mla_decode(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    rope_table: torch.Tensor | None,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    ranges: torch.Tensor,
    scale: float,
    splits: int,
    scratch: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`plain.mla_decode`, with ``scratch`` float32 of `scratch_floats` elements."""
    (rows, heads, latent_dim), batch, rope_dim = query.shape, len(latents), ropes.shape[-1]
    table = query if rope_table is None else rope_table
    constants = {"LATENT": triton.next_power_of_2(max(16, latent_dim))}
    mla_splits[(batch, triton.cdiv(rows // batch * heads, HEADS), splits)](
        query,
        query_rope,
        table,
        latents,
        ropes,
        ranges,
        scratch,
        scale,
        rows // batch,
        heads,
        latent_dim,
        rope_dim,
        query.stride(0),
        query.stride(1),
        query_rope.stride(0),
        query_rope.stride(1),
        table.stride(0),
        ranges.stride(0),
        latents.stride(0),
        latents.stride(1),
        ropes.stride(0),
        ropes.stride(1),
        HAS_TABLE=rope_table is not None,
        ROPE=triton.next_power_of_2(max(16, rope_dim)),
        TILE_HEADS=HEADS,
        TILE_KEYS=KEYS,
        **constants,
    )
    mla_merge[(rows, heads)](scratch, out, heads, latent_dim, splits, out.stride(0), out.stride(1), **constants)
    return out


@triton.jit
def mla_splits(
    query,
    query_rope,
    rope_table,
    latents,
    ropes,
    ranges,
    scratch,
    scale,
    tokens,
    heads,
    latent_dim,
    rope_dim,
    query_stride,
    query_head_stride,
    query_rope_stride,
    query_rope_head_stride,
    table_stride,
    ranges_stride,
    latents_batch,
    latents_key,
    ropes_batch,
    ropes_key,
    HAS_TABLE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    batch, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    # The heads of a sequence's tokens, one after another: a tile may have those of two tokens.
    number = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    is_head = number < tokens * heads
    row, head = batch * tokens + number // heads, number % heads
    first = tl.load(ranges + row * ranges_stride, mask=is_head, other=1 << 30)
    end = tl.load(ranges + row * ranges_stride + 1, mask=is_head, other=0)
    lowest, highest = tl.min(first, axis=0), tl.max(end, axis=0)
    latent, rope, key_of_tile = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE_KEYS)
    # Runs of whole tiles, so that a split starts on a tile whatever the length.
    tiles = (highest - lowest + TILE_KEYS - 1) // TILE_KEYS
    share = (tiles + splits - 1) // splits * TILE_KEYS
    start, stop = lowest + split * share, min(lowest + (split + 1) * share, highest)

    dtype = latents.dtype.element_ty
    own_query = query + row[:, None] * query_stride + head[:, None] * query_head_stride + latent[None, :]
    q_latent = tl.load(own_query, mask=is_head[:, None] & (latent[None, :] < latent_dim), other=0.0).to(dtype)
    is_rope = is_head[:, None] & (rope[None, :] < rope_dim)
    own_rope = query_rope + row[:, None] * query_rope_stride + head[:, None] * query_rope_head_stride
    q_rope = tl.load(own_rope + rope[None, :], mask=is_rope, other=0.0).to(tl.float32)
    if HAS_TABLE:
        neighbour = tl.load(own_rope + (rope ^ 1)[None, :], mask=is_rope, other=0.0).to(tl.float32)
        turn = rope_table + row[:, None] * table_stride + rope[None, :] // 2
        cos = tl.load(turn, mask=is_rope, other=0.0)
        sin = tl.load(turn + rope_dim // 2, mask=is_rope, other=0.0)
        q_rope = q_rope * cos + tl.where(rope[None, :] % 2 == 0, -sin, sin) * neighbour
    q_rope = q_rope.to(dtype)

    largest = tl.full((TILE_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_HEADS,), tl.float32)
    context = tl.zeros((TILE_HEADS, LATENT), tl.float32)
    for tile in range(start, stop, TILE_KEYS):
        key = tile + key_of_tile
        is_key = key < stop
        at = latents + batch.to(tl.int64) * latents_batch + key[:, None].to(tl.int64) * latents_key + latent[None, :]
        k_latent = tl.load(at, mask=is_key[:, None] & (latent[None, :] < latent_dim), other=0.0)
        at = ropes + batch.to(tl.int64) * ropes_batch + key[:, None].to(tl.int64) * ropes_key + rope[None, :]
        k_rope = tl.load(at, mask=is_key[:, None] & (rope[None, :] < rope_dim), other=0.0)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision="ieee")
        scores += tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
        is_seen = is_key[None, :] & (key[None, :] >= first[:, None]) & (key[None, :] < end[:, None])
        scores = tl.where(is_seen, scores * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # of a token that sees none of these keys
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        context = context * shrink[:, None] + tl.dot(weights.to(dtype), k_latent, input_precision="ieee")
        largest = larger

    states = scratch + ((row * splits + split) * heads + head) * (latent_dim + 2)
    tl.store(states, largest, mask=is_head)
    tl.store(states + 1, total, mask=is_head)
    is_latent = is_head[:, None] & (latent[None, :] < latent_dim)
    tl.store(states[:, None] + 2 + latent[None, :], context, mask=is_latent)


@triton.jit
def mla_merge(scratch, out, heads, latent_dim, splits, out_stride, out_head_stride, LATENT: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    latent = tl.arange(0, LATENT)
    present = latent < latent_dim
    largest = float("-inf")
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(scratch + ((row * splits + split) * heads + head) * (latent_dim + 2)))
    base = tl.where(largest == float("-inf"), 0.0, largest)  # of a token that sees no key
    total = 0.0
    context = tl.zeros((LATENT,), tl.float32)
    for split in range(splits):
        state = scratch + ((row * splits + split) * heads + head) * (latent_dim + 2)
        share = tl.exp(tl.load(state) - base)  # 0 for a split that had no key
        total += tl.load(state + 1) * share
        context += tl.load(state + 2 + latent, mask=present, other=0.0) * share
    to = out + row * out_stride + head * out_head_stride + latent
    context = context / tl.where(total == 0.0, 1.0, total)
    tl.store(to, context.to(out.dtype.element_ty), mask=present)
