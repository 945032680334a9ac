"""What a device computes beside products with matrices, a function each: by a kernel in Triton, or in plain torch.

They run in the order of whatever stream they are called under. None reads a value on the host but `mix_experts`, and it
only for many tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from transformers_kt.backends.gpu import plain
from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.plain import Resident, Staging
from transformers_kt.families.base import Router

_SCORES = 1 << 24
"""Attention scores held at once, 64 MB of float32: as many queries are computed together."""
FEW_CHOICES = 64
"""Up to as many, an expert is looked up on the device for each; beyond, the host reads which there are, once, and each
is computed for all tokens that chose it."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, device: Device) -> torch.Tensor:
    """``x`` and ``weight`` float32, the norm over the last axis."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    if device.has_kernels:
        from transformers_kt.backends.triton import norm as kernels

        return kernels.rms_norm(rows, weight, eps, out).view(x.shape)
    return plain.rms_norm(rows, weight, eps, out).view(x.shape)


def add_rms_norm(
    residual: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, device: Device
) -> None:
    """``residual`` float32 (rows, n) += ``added``, in place; ``out`` = its norm."""
    if device.has_kernels:
        from transformers_kt.backends.triton import norm as kernels

        kernels.add_rms_norm(residual, [added], weight, eps, out)
    else:
        plain.add_rms_norm(residual, [added], weight, eps, out)


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float) -> torch.Tensor:
    """``positions`` (...), ``inv_freq`` float32 (d/2,) -> float32 (..., d): cosines, then sines."""
    angles = positions.unsqueeze(-1).float() * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scaling


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``x`` (batch, tokens, ..., d), each token turned by its row of ``table`` (batch, tokens, d): float32."""
    return plain.rotated(x.flatten(0, 1), table.flatten(0, 1)).view(x.shape)


def swiglu(x: torch.Tensor, gate: DeviceMatrix, up: DeviceMatrix, down: DeviceMatrix) -> torch.Tensor:
    """``x`` (tokens, hidden) -> float32 (tokens, hidden)."""
    device, width = gate.device, gate.rows
    x = x.to(device.activations)
    both = torch.empty((len(x), 2 * width), dtype=torch.float32, device=x.device)
    gate.multiply(x, both[:, :width])
    up.multiply(x, both[:, width:])
    out = torch.empty((len(x), width), dtype=device.activations, device=x.device)
    if device.has_kernels:
        from transformers_kt.backends.triton import swiglu as kernels

        return down.multiply(kernels.swiglu(both, out))
    return down.multiply(plain.swiglu(both, out))


def stage(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    router: Router,
    staging: Staging,
    device: Device,
    resident: Resident | None = None,
) -> None:
    """Choose experts for ``x`` float32 (tokens, hidden), with ``weight`` float32 (experts, hidden), and write what
    computes them needs to ``staging``, in pinned memory or on the device; of those in slots to ``resident``."""
    logits = functional.linear(x, weight)
    if device.has_kernels:
        from transformers_kt.backends.triton import router_stage as kernels

        kernels.router_stage(logits, bias, router, x, staging, resident)
    else:
        plain.router_stage(logits, bias, router, x, staging, resident)


def expert(x: torch.Tensor, index: int, gate: DeviceMatrix, up: DeviceMatrix, down: DeviceMatrix) -> torch.Tensor:
    """``x`` (tokens, hidden) through expert ``index`` -> float32 (tokens, hidden)."""
    return down.multiply_at(index, functional.silu(gate.multiply_at(index, x)) * up.multiply_at(index, x))


def mix_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    down: DeviceMatrix,
) -> torch.Tensor:
    """``x`` (tokens, hidden) through the experts ``ids`` int32 (tokens, top_k), times ``weights`` -> float32.

    An id of -1 adds nothing.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if ids.numel() <= FEW_CHOICES and up.type_name == gate.type_name:
        hidden = torch.empty((*ids.shape, gate.rows), dtype=torch.float32, device=x.device)
        types = (gate.type_name, down.type_name)
        arguments = (gate.panels, up.panels, down.panels, types, x, Resident(ids, ids, weights), hidden, out)
        if gate.has_kernels and down.has_kernels:
            from transformers_kt.backends.triton import grouped_experts as kernels

            return kernels.grouped_experts(*arguments)
        return plain.grouped_experts(*arguments)
    if ids.numel() <= FEW_CHOICES:
        for token in range(len(x)):
            row = x[token : token + 1]
            for index, weight in zip(torch.split(ids[token].long(), 1), weights[token], strict=True):
                own = index.clamp(min=0)
                hidden = functional.silu(gate.multiply_chosen(own, row)) * up.multiply_chosen(own, row)
                out[token] += torch.where(index >= 0, weight * down.multiply_chosen(own, hidden)[0], 0.0)
        return out
    for index in torch.unique(ids[ids >= 0]):
        tokens, places = (ids == index).nonzero(as_tuple=True)
        rows, own = x[tokens], index.reshape(1)
        hidden = functional.silu(gate.multiply_chosen(own, rows)) * up.multiply_chosen(own, rows)
        out.index_add_(0, tokens, weights[tokens, places].unsqueeze(-1) * down.multiply_chosen(own, hidden))
    return out


def norm_rope_append(
    query: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key: torch.Tensor,
    key_norm: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    lengths: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    device: Device,
) -> torch.Tensor | None:
    """`plain.norm_rope_append`; the normed query, in the dtype of activations, if there is one."""
    out = None if query is None else torch.empty(query.shape, dtype=device.activations, device=query.device)
    arguments = (query, query_norm, out, key, key_norm, eps, table, lengths, latents, ropes)
    if device.has_kernels:
        from transformers_kt.backends.triton import norm_rope_append as kernels

        kernels.norm_rope_append(*arguments)
    else:
        plain.norm_rope_append(*arguments)
    return out


def attend_once(
    query: torch.Tensor,
    query_rope: torch.Tensor,
    table: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    ranges: torch.Tensor,
    scale: float,
    device: Device,
) -> torch.Tensor:
    """Absorbed MLA of one token a sequence: `plain.mla_decode`, with ranges that are read on the device alone. Behind
    the keys that they show there may be anything, also NaN. Float32 (rows, heads, latent)."""
    (rows, heads, latent_dim), keys = query.shape, latents.shape[1]
    out = query.new_empty((rows, heads, latent_dim), dtype=torch.float32)
    if not device.has_kernels:
        return plain.mla_decode(query, query_rope, table, latents, ropes, ranges, scale, 1, out, out)
    from transformers_kt.backends.triton import mla_decode as kernels

    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    splits = kernels.splits_for(rows, heads, keys, processors)
    scratch = query.new_empty(kernels.scratch_floats(rows, heads, latent_dim, splits), dtype=torch.float32)
    return kernels.mla_decode(query, query_rope, table, latents, ropes, ranges, scale, splits, scratch, out)


def attend(query: torch.Tensor, latents: torch.Tensor, ropes: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Absorbed MLA: ``query`` (batch, tokens, heads, latent + rope), times the softmax scale, over ``latents`` (batch,
    keys, latent) and ``ropes`` (batch, keys, rope) -> float32 (batch, tokens, heads, latent).

    ``visible`` is int32 (batch, tokens, 2): ranges [start, end) of keys, or bool (batch, tokens, keys). A query that
    sees no key gets zeros.
    """
    batch, tokens, heads, _ = query.shape
    keys, latent_dim = latents.shape[1:]
    out = torch.empty((batch, tokens, heads, latent_dim), dtype=torch.float32, device=query.device)
    step = max(1, _SCORES // (batch * heads * keys))
    for first in range(0, tokens, step):
        q = query[:, first : first + step].to(latents.dtype)
        hidden = ~seen_keys(visible[:, first : first + step], keys).repeat_interleave(heads, dim=1)
        rows = q.flatten(1, 2)
        scores = torch.bmm(rows[..., :latent_dim], latents.transpose(1, 2)).float()
        scores += torch.bmm(rows[..., latent_dim:], ropes.transpose(1, 2)).float()
        shares = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1).masked_fill_(hidden, 0.0)
        context = torch.bmm(shares.to(latents.dtype), latents).float()
        out[:, first : first + step] = context.view(batch, -1, heads, latent_dim)
    return out


def seen_keys(visible: torch.Tensor, keys: int) -> torch.Tensor:
    """``visible`` as of `attend` -> bool (batch, tokens, keys)."""
    if visible.dtype == torch.bool:
        return visible
    key = torch.arange(keys, device=visible.device)
    return (key >= visible[..., :1]) & (key < visible[..., 1:])
