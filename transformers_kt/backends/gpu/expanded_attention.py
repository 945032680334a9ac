"""Attention of prompts: keys and values of a few heads at a time are expanded from latents, then torch attends.

Absorbed attention multiplies each query with whole latents, twice; expanded keys and values are a quarter as wide, and
expanding them costs once what it costs for a few queries. So from some hundred tokens on this is less work, and all of
it in large products and in torch's fused attention.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.operations import seen_keys

_EXPANDED_BYTES = 1 << 27
"""Of keys and values at once, so that a plan's buffers for 512 tokens hold them: of the largest models 6 heads over
32,768 keys, or 50 over 4,096."""
_SCORES = 1 << 26
"""Scores at once. Fused kernels keep none; where torch has none for the shape, these are 256 MB of float32."""


def is_less_work(tokens: int, latent_dim: int, nope_dim: int, value_dim: int) -> bool:
    """Whether expanding takes fewer multiplications than absorbing, for a key of a head and ``tokens`` queries."""
    return tokens * (2 * latent_dim - nope_dim - value_dim) > latent_dim * (nope_dim + value_dim)


def attend_expanded(
    plain: torch.Tensor,
    rotary: torch.Tensor,
    latents: torch.Tensor,
    ropes: torch.Tensor,
    visible: torch.Tensor,
    k_b: DeviceMatrix,
    v_b: DeviceMatrix,
    scale: float,
) -> torch.Tensor:
    """Queries ``plain`` (batch, tokens, heads, nope) and ``rotary`` (batch, tokens, heads, rope), turned, over
    ``latents`` (batch, keys, latent) and ``ropes`` (batch, keys, rope) -> float32 (batch, tokens, heads, value).

    ``k_b`` has a matrix (latent, nope) and ``v_b`` one (value, latent) for each head. ``visible`` is that of
    `operations.attend`; a query that sees no key gets zeros.
    """
    (batch, tokens, heads, nope), keys, rope = plain.shape, latents.shape[1], ropes.shape[-1]
    width, value, dtype = nope + rope, v_b.rows, latents.dtype
    group = min(heads, max(1, _EXPANDED_BYTES // (batch * keys * (width + value) * dtype.itemsize)))
    step = max(1, _SCORES // (batch * group * keys))
    out = torch.empty((batch, tokens, heads, value), dtype=torch.float32, device=plain.device)
    for first in range(0, heads, group):
        own = slice(first, min(heads, first + group))
        count = own.stop - own.start
        expanded = torch.empty((batch, keys, count, width), dtype=dtype, device=plain.device)
        of_keys = k_b.weights(own.start, own.stop).transpose(1, 2).reshape(count * nope, -1)
        expanded[..., :nope] = functional.linear(latents, of_keys).view(batch, keys, count, nope)
        expanded[..., nope:] = ropes.unsqueeze(2)
        of_values = v_b.weights(own.start, own.stop).reshape(count * value, -1)
        values = functional.linear(latents, of_values).view(batch, keys, count, value)
        for start in range(0, tokens, step):
            those = slice(start, start + step)
            query = torch.cat((plain[:, those, own], rotary[:, those, own]), dim=-1).to(dtype)
            seen = seen_keys(visible[:, those], keys).unsqueeze(1)
            context = functional.scaled_dot_product_attention(
                query.transpose(1, 2), expanded.transpose(1, 2), values.transpose(1, 2), attn_mask=seen, scale=scale
            )
            context = context.masked_fill(~seen.any(-1, keepdim=True), 0.0)
            out[:, those, own] = context.transpose(1, 2).float()
    return out
