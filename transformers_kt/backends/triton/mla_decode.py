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


def scratch_floats(batch: int, heads: int, latent_dim: int, splits: int) -> int:
    """Elements of the scratch that `mla_decode` needs: context, maximum and sum of each split."""
    return batch * splits * heads * (latent_dim + 2)


def splits_for(batch: int, heads: int, keys: int, processors: int) -> int:
    """How many programs share the keys of a head, so that twice as many run as there are processors."""
    wanted: int = 2 * processors // max(1, batch * triton.cdiv(heads, HEADS))
    most: int = triton.cdiv(keys, 4 * KEYS)
    return max(1, min(wanted, most))


def mla_decode(
    query: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    ranges: torch.Tensor,
    splits: int,
    scratch: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """``out`` (batch, heads, latent) = softmax(query keys) latents, over the keys that ``ranges`` shows.

    ``query`` (batch, heads, latent + rope), times the softmax scale already; ``latents`` (batch, keys, latent) and
    ``ropes`` (batch, keys, rope) of one dtype, of any strides but the last; ``ranges`` int32 (batch, 2), first key and
    one after the last, at least one key; ``scratch`` float32 of `scratch_floats` elements. Lengths are read on the
    device: a captured call goes on to work while they grow.
    """
    batch, heads, _ = query.shape
    latent_dim, rope_dim = latents.shape[-1], ropes.shape[-1]
    grid = (batch, triton.cdiv(heads, HEADS), splits)
    constants = {"LATENT": triton.next_power_of_2(max(16, latent_dim))}
    mla_splits[grid](
        query,
        latents,
        ropes,
        ranges,
        scratch,
        heads,
        latent_dim,
        rope_dim,
        query.stride(0),
        query.stride(1),
        latents.stride(0),
        latents.stride(1),
        ropes.stride(0),
        ropes.stride(1),
        ROPE=triton.next_power_of_2(max(16, rope_dim)),
        TILE_HEADS=HEADS,
        TILE_KEYS=KEYS,
        **constants,
    )
    mla_merge[(batch, heads)](scratch, out, heads, latent_dim, splits, out.stride(0), out.stride(1), **constants)
    return out


@triton.jit
def mla_splits(
    query,
    latents,
    ropes,
    ranges,
    scratch,
    heads,
    latent_dim,
    rope_dim,
    query_batch,
    query_head,
    latents_batch,
    latents_key,
    ropes_batch,
    ropes_key,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    batch, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    latent, rope, key_of_tile = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE_KEYS)
    first, end = tl.load(ranges + 2 * batch), tl.load(ranges + 2 * batch + 1)
    # Runs of whole tiles, so that a split starts on a tile whatever the length.
    tiles = (end - first + TILE_KEYS - 1) // TILE_KEYS
    own = (tiles + splits - 1) // splits * TILE_KEYS
    start, stop = first + split * own, min(first + (split + 1) * own, end)

    dtype = latents.dtype.element_ty
    own_query = query + batch * query_batch + head[:, None] * query_head
    is_head = head[:, None] < heads
    q_latent = tl.load(own_query + latent[None, :], mask=is_head & (latent[None, :] < latent_dim), other=0.0).to(dtype)
    is_rope = is_head & (rope[None, :] < rope_dim)
    q_rope = tl.load(own_query + latent_dim + rope[None, :], mask=is_rope, other=0.0).to(dtype)

    largest = tl.full((TILE_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_HEADS,), tl.float32)
    context = tl.zeros((TILE_HEADS, LATENT), tl.float32)
    for tile in range(start, stop, TILE_KEYS):
        key = tile + key_of_tile
        seen = key < stop
        at = latents + batch.to(tl.int64) * latents_batch + key[:, None].to(tl.int64) * latents_key + latent[None, :]
        k_latent = tl.load(at, mask=seen[:, None] & (latent[None, :] < latent_dim), other=0.0)
        at = ropes + batch.to(tl.int64) * ropes_batch + key[:, None].to(tl.int64) * ropes_key + rope[None, :]
        k_rope = tl.load(at, mask=seen[:, None] & (rope[None, :] < rope_dim), other=0.0)
        scores = tl.dot(q_latent, tl.trans(k_latent), input_precision="ieee")
        scores += tl.dot(q_rope, tl.trans(k_rope), input_precision="ieee")
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        context = context * shrink[:, None] + tl.dot(weights.to(dtype), k_latent, input_precision="ieee")
        largest = larger

    row = (batch * splits + split) * heads + head
    states = scratch + row * (latent_dim + 2)
    tl.store(states, largest, mask=head < heads)
    tl.store(states + 1, total, mask=head < heads)
    tl.store(states[:, None] + 2 + latent[None, :], context, mask=is_head & (latent[None, :] < latent_dim))


@triton.jit
def mla_merge(scratch, out, heads, latent_dim, splits, out_batch, out_head, LATENT: tl.constexpr):
    batch, head = tl.program_id(0), tl.program_id(1)
    latent = tl.arange(0, LATENT)
    present = latent < latent_dim
    largest = float("-inf")
    for split in range(splits):
        largest = tl.maximum(largest, tl.load(scratch + ((batch * splits + split) * heads + head) * (latent_dim + 2)))
    total = 0.0
    context = tl.zeros((LATENT,), tl.float32)
    for split in range(splits):
        state = scratch + ((batch * splits + split) * heads + head) * (latent_dim + 2)
        share = tl.exp(tl.load(state) - largest)  # 0 for a split that had no key
        total += tl.load(state + 1) * share
        context += tl.load(state + 2 + latent, mask=present, other=0.0) * share
    to = out + batch * out_batch + head * out_head + latent
    tl.store(to, (context / total).to(out.dtype.element_ty), mask=present)
