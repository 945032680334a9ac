"""Every operation of a layer on a GPU in plain torch: slow, right, and on any device that torch knows.

Kernels in Triton take the same arguments and are held to these. Both fill tensors that the caller made, so that a
captured step has fixed addresses, and read no value on the host. A row is a token; the rows of a sequence stand
together. Floating-point arguments are float32 or bfloat16 unless said otherwise; sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from transformers_kt.backends.gpu import panels as layouts
from transformers_kt.backends.gpu.panels import PANEL_ROWS
from transformers_kt.families.base import Router

_CHUNK_VALUES = 1 << 24
"""Weights that are dequantized at once: 64 MiB, where a head of 129,280 x 7,168 would take 3.7 GB."""


class Staging(NamedTuple):
    """What the CPU's experts need of a layer, as views of one block of pinned memory."""

    x: torch.Tensor
    """float32 (rows, hidden)"""
    ids: torch.Tensor
    """int32 (rows, top_k)"""
    weights: torch.Tensor
    """float32 (rows, top_k)"""

    @staticmethod
    def words(rows: int, hidden: int, top_k: int) -> int:
        """Float32 elements of the block."""
        return rows * (hidden + 2 * top_k)

    @classmethod
    def of(cls, block: torch.Tensor, rows: int, hidden: int, top_k: int) -> Staging:
        """Views of ``block``, float32 of at least `words` elements."""
        sizes = [rows * hidden, rows * top_k, rows * top_k]
        x, ids, weights = torch.split(block[: sum(sizes)], sizes)
        return cls(x.view(rows, hidden), ids.view(torch.int32).view(rows, top_k), weights.view(rows, top_k))


class Resident(NamedTuple):
    """Experts of a layer that lie in the GPU's memory, and what of a step goes to them."""

    slots: torch.Tensor
    """int32 (experts,): the slot of an expert, or -1"""
    ids: torch.Tensor
    """int32 (rows, top_k), written by `router_stage`: slots, or -1 for an expert that the CPU computes"""
    weights: torch.Tensor
    """float32 (rows, top_k), written by `router_stage`"""


def dequantize(panels: torch.Tensor, type_name: str, rows: int, cols: int, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` (rows, cols) of a float dtype from ``panels`` uint8 (panels, panel bytes)."""
    out.copy_(layouts.dequantize(panels, type_name, rows, cols))
    return out


def linear(
    panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor, partial: torch.Tensor | None = None
) -> torch.Tensor:
    """``out`` (tokens, rows) = ``x`` (tokens, cols) times the matrix in ``panels`` uint8 (panels, panel bytes).

    ``partial`` is scratch of kernels that split the columns; it is left alone here.
    """
    rows, cols = out.shape[1], x.shape[1]
    count = max(1, _CHUNK_VALUES // (PANEL_ROWS * cols))
    for first in range(0, len(panels), count):
        start = first * PANEL_ROWS
        stop = min(start + count * PANEL_ROWS, rows)
        weights = layouts.dequantize(panels[first : first + count], type_name, stop - start, cols)
        out[:, start:stop] = functional.linear(x.float(), weights)
    return out


def linear_per_head(panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (tokens, heads, rows) = ``x`` (tokens, heads, cols), a matrix of ``panels`` (heads, panels, bytes) each.

    The two products that absorb keys and values into the latent. Any strides but the last.
    """
    heads, count, _ = panels.shape
    weights = layouts.dequantize(panels.flatten(0, 1), type_name, heads * count * PANEL_ROWS, x.shape[-1])
    by_head = weights.view(heads, count * PANEL_ROWS, -1)[:, : out.shape[-1]]
    out.copy_(torch.einsum("thc,hrc->thr", x.float(), by_head))
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """``out`` (rows, n) = ``x`` (rows, n) over the root of its mean square, times ``weight`` float32 (n,)."""
    values = x.float()
    out.copy_(values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight)
    return out


def add_rms_norm(
    residual: torch.Tensor, added: Sequence[torch.Tensor], weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """``residual`` float32 (rows, n) += up to two results of its shape, in place; ``out`` = its norm.

    One of them may lie in pinned memory: the routed experts' result, which the first kernel of the next layer reads.
    """
    for each in added:
        residual += each.to(residual.device, non_blocking=True)
    return rms_norm(residual, weight, eps, out)


def rotated(x: torch.Tensor, rope_table: torch.Tensor) -> torch.Tensor:
    """Interleaved RoPE: neighbours of ``x`` (rows, ..., n) turned by ``rope_table`` float32 (rows, n).

    A table holds n / 2 cosines, then as many sines, with whatever factor YaRN puts on them.
    """
    table = rope_table.reshape(len(x), *(1 for _ in x.shape[1:-1]), x.shape[-1])
    cos, sin = table.chunk(2, dim=-1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


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
    """Norm the compressed query and key, turn the shared rotary key, append both parts of the key to the cache.

    ``query`` (rows, q_lora) is normed with ``query_norm`` float32 (q_lora,) into ``query_out``; all three are None
    where queries are not compressed. ``key`` (rows, latent + rope), ``key_norm`` float32 (latent,), ``rope_table``
    float32 (rows, rope) as of `rotated`. Token t of sequence b becomes key ``lengths[b]`` + t, with int32 ``lengths``
    (batch,) read on the device, of ``latents`` (batch, capacity, latent) and ``ropes`` (batch, capacity, rope).
    """
    if query is not None and query_norm is not None and query_out is not None:
        rms_norm(query, query_norm, eps, query_out)
    (batch, _, latent), tokens = latents.shape, len(key) // len(latents)
    sequence = torch.arange(batch, device=key.device).repeat_interleave(tokens)
    token = torch.arange(tokens, device=key.device).repeat(batch)
    at = (sequence, lengths.long()[sequence] + token)
    latents[at] = rms_norm(key[:, :latent], key_norm, eps, key.new_empty((len(key), latent), dtype=latents.dtype))
    ropes[at] = rotated(key[:, latent:], rope_table).to(ropes.dtype)


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
    """``out`` (rows, heads, latent) = softmax(``scale`` query keys) latents, over the keys that ``ranges`` shows.

    ``query`` (rows, heads, latent), absorbed; ``query_rope`` (rows, heads, rope), turned here by ``rope_table`` float32
    (rows, rope) if there is one; ``latents`` (batch, keys, latent) and ``ropes`` (batch, keys, rope) of one dtype.
    ``ranges`` int32 (rows, 2) has each row's first key and one after its last, and is read on the device: a captured
    call goes on to work while they grow. A row that sees no key gets zeros. Any strides but the last. ``splits`` and
    ``scratch`` are for kernels.
    """
    batch, keys, _ = latents.shape
    turned = query_rope if rope_table is None else rotated(query_rope, rope_table)
    whole = torch.cat((query.float(), turned.float()), dim=-1)
    whole = whole.reshape(batch, -1, query.shape[1], whole.shape[-1])
    key = torch.arange(keys, device=latents.device)
    first, end = ranges.reshape(batch, -1, 2, 1).unbind(2)
    is_seen = (key >= first) & (key < end)  # (batch, tokens, keys)
    by_any = is_seen.any(1).unsqueeze(-1)
    values = torch.where(by_any, latents.float(), 0.0)  # a cache holds anything behind its keys, also NaN
    shown = torch.cat((values, torch.where(by_any, ropes.float(), 0.0)), dim=-1)
    scores = torch.einsum("bthd,bkd->bthk", whole, shown) * scale
    is_hidden = ~is_seen.unsqueeze(2)
    weights = scores.masked_fill(is_hidden, float("-inf")).softmax(-1).masked_fill(is_hidden, 0.0)
    out.copy_(torch.einsum("bthk,bkl->bthl", weights, values).reshape(out.shape))
    return out


def router_stage(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    router: Router,
    x: torch.Tensor,
    staging: Staging,
    resident: Resident | None = None,
) -> None:
    """Choose each row's experts as the CPU's router does, and write what the CPU needs of them to pinned memory.

    ``logits`` float32 (rows, experts), ``bias`` float32 (experts,) for the choice alone, ``x`` float32 (rows, hidden).
    Experts are staged in ascending order; of equal scores the lower index is chosen. NaN is chosen last, so that
    indices are distinct and in range whatever the logits; a row of NaN gets the first experts with weights of NaN.
    An expert with a slot in ``resident`` is staged as -1.
    """
    rows, experts = logits.shape
    scores = logits.sigmoid() if router.sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    choice = torch.where(choice.isnan(), float("-inf"), choice)
    if router.groups > 1:
        groups = choice.view(rows, router.groups, -1)
        of_group = groups.topk(2, dim=-1).values.sum(-1) if router.sigmoid else groups.amax(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, _largest(of_group, router.top_groups), True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(rows, experts)
    chosen = _largest(choice, router.top_k).sort(-1).values
    weights = scores.gather(1, chosen)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * router.scale
    ids = chosen.to(torch.int32)
    if resident is not None:
        slots = resident.slots[chosen]
        resident.ids.copy_(slots)
        resident.weights.copy_(weights)
        ids = torch.where(slots >= 0, -1, ids)
    staging.x.copy_(x, non_blocking=True)
    staging.ids.copy_(ids, non_blocking=True)
    staging.weights.copy_(weights, non_blocking=True)


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest of each row; of equal ones the lower index, which topk does not promise."""
    return values.sort(stable=True, dim=-1, descending=True).indices[..., :count]


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (rows, n) = silu(gate) * up, with ``gate_up`` (rows, 2 n) as gate and up side by side."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(functional.silu(gate) * up)
    return out


def grouped_experts(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    types: tuple[str, str],
    x: torch.Tensor,
    resident: Resident,
    hidden: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """``out`` (tokens, cols) = sum over a token's resident experts of weight * down(silu(gate x) * up x); 0 for none.

    ``gate`` and ``up`` uint8 (slots, panels, panel bytes) are of the first of ``types``, ``down`` of the second; ``x``
    (tokens, cols); ``hidden`` (tokens, top_k, intermediate) is scratch.
    """
    (tokens, cols), intermediate = x.shape, hidden.shape[-1]
    out.zero_()
    for token in range(tokens):
        for k in range(resident.ids.shape[1]):
            slot = resident.ids[token, k]
            own = [each.index_select(0, slot.clamp(min=0).view(1).long())[0] for each in (gate, up, down)]
            gate_up = [layouts.dequantize(each, types[0], intermediate, cols) for each in own[:2]]
            between = swiglu(
                functional.linear(x[token : token + 1].float(), torch.cat(gate_up)), hidden[token, k : k + 1]
            )
            result = functional.linear(between.float(), layouts.dequantize(own[2], types[1], cols, intermediate))[0]
            out[token] += torch.where(slot >= 0, resident.weights[token, k] * result, 0.0)
    return out
