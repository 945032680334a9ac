"""What a device computes beside products with matrices, a function each, in plain torch operations.

They run in the order of whatever stream they are called under. None reads a value on the host but `mix_experts`, and it
only for many tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.families.base import Router

_SCORES = 1 << 24
"""Attention scores held at once, 64 MB of float32: as many queries are computed together."""
_FEW_EXPERTS = 64
"""Up to as many choices, a token's choice is looked up on the device; beyond, the host reads them once and computes
each expert for all tokens that chose it."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x`` and ``weight`` float32, the norm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    """``positions`` (...), ``inv_freq`` float32 (d/2,) -> float32 (..., d): cosines, then sines."""
    angles = positions.unsqueeze(-1).float() * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Neighbours in the last axis of ``x`` (..., d), turned by ``table`` (..., d): cosines, then sines."""
    cos, sin = table.chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def swiglu(x: torch.Tensor, gate: DeviceMatrix, up: DeviceMatrix, down: DeviceMatrix) -> torch.Tensor:
    """``x`` (tokens, hidden) -> float32 (tokens, hidden)."""
    return down.multiply(functional.silu(gate.multiply(x)) * up.multiply(x))


def choose_experts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, router: Router
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` float32 (tokens, hidden), ``weight`` float32 (experts, hidden) -> ids int64, weights float32, both
    (tokens, top_k), in ascending order of ids."""
    logits = functional.linear(x, weight)
    scores = logits.sigmoid() if router.sigmoid else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if router.groups > 1:
        groups = choice.view(len(x), router.groups, -1)
        # Sigmoid scores rank groups by their two best experts (arXiv:2412.19437), softmax scores by the best
        # (arXiv:2405.04434).
        ranks = groups.topk(2, dim=-1).values.sum(-1) if router.sigmoid else groups.amax(-1)
        kept = ranks.topk(router.top_groups, dim=-1).indices
        hidden = torch.ones_like(ranks, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(hidden.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(router.top_k, dim=-1).indices.sort(dim=-1).values
    weights = scores.gather(1, ids)
    if router.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * router.scale


def mix_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    down: DeviceMatrix,
) -> torch.Tensor:
    """``x`` (tokens, hidden) through the experts ``ids`` int64 (tokens, top_k), times ``weights`` -> float32."""

    def expert(index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(gate.multiply_chosen(index, rows)) * up.multiply_chosen(index, rows)
        return down.multiply_chosen(index, hidden)

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if ids.numel() <= _FEW_EXPERTS:
        for token in range(len(x)):
            for k in range(ids.shape[1]):
                out[token] += weights[token, k] * expert(ids[token, k : k + 1], x[token : token + 1])[0]
        return out
    for index in torch.unique(ids):
        tokens, places = (ids == index).nonzero(as_tuple=True)
        out.index_add_(0, tokens, weights[tokens, places].unsqueeze(-1) * expert(index.reshape(1), x[tokens]))
    return out


def attend(
    query: torch.Tensor, latents: torch.Tensor, ropes: torch.Tensor, visible: torch.Tensor, device: Device
) -> torch.Tensor:
    """Absorbed MLA: ``query`` (batch, tokens, heads, latent + rope), times the softmax scale, over ``latents`` (batch,
    keys, latent) and ``ropes`` (batch, keys, rope) -> float32 (batch, tokens, heads, latent).

    ``visible`` is int32 (batch, tokens, 2): ranges [start, end) of keys, or bool (batch, tokens, keys). A query that
    sees no key gets zeros.
    """
    batch, tokens, heads, _ = query.shape
    keys, latent_dim = latents.shape[1:]
    if device.has_kernels and tokens == 1 and visible.dtype != torch.bool:
        return _attend_by_kernel(query, latents, ropes, visible)
    out = torch.empty((batch, tokens, heads, latent_dim), dtype=torch.float32, device=query.device)
    step = max(1, _SCORES // (batch * heads * keys))
    key = torch.arange(keys, device=query.device)
    for first in range(0, tokens, step):
        q = query[:, first : first + step].to(latents.dtype)
        seen = visible[:, first : first + step]
        if seen.dtype != torch.bool:
            seen = (key >= seen[..., :1]) & (key < seen[..., 1:])
        rows = q.flatten(1, 2)
        scores = torch.bmm(rows[..., :latent_dim], latents.transpose(1, 2)).float()
        scores += torch.bmm(rows[..., latent_dim:], ropes.transpose(1, 2)).float()
        hidden = ~seen.repeat_interleave(heads, dim=1)
        shares = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).masked_fill_(hidden, 0.0)
        context = torch.bmm(shares.to(latents.dtype), latents).float()
        out[:, first : first + step] = context.view(batch, -1, heads, latent_dim)
    return out


def _attend_by_kernel(
    query: torch.Tensor, latents: torch.Tensor, ropes: torch.Tensor, ranges: torch.Tensor
) -> torch.Tensor:
    from transformers_kt.backends.triton import mla_decode as kernels

    batch, _, heads, _ = query.shape
    keys, latent_dim = latents.shape[1:]
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    splits = kernels.splits_for(batch, heads, keys, processors)
    scratch = query.new_empty(kernels.scratch_floats(batch, heads, latent_dim, splits), dtype=torch.float32)
    out = query.new_empty((batch, heads, latent_dim), dtype=torch.float32)
    of_latents, of_ropes = torch.split(query[:, 0], [latent_dim, ropes.shape[-1]], dim=-1)
    shown = ranges[:, 0].contiguous()
    kernels.mla_decode(of_latents, of_ropes, None, latents, ropes, shown, 1.0, splits, scratch, out)
    return out.unsqueeze(1)
