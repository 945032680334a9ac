"""Experts that lie in slots of the GPU's memory, for the tokens that chose them: two kernels, whatever was chosen.

A program of the first takes a panel of gate and up for one choice of one token, one of the second a panel of down for a
token, whose choices it adds in their order. Choices of experts without a slot cost a load. Two tokens with the same
expert read it twice, the second time mostly from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.gpu.plain import Resident
from transformers_kt.backends.triton.gemv import as_stored, panel_sums, warps
from transformers_kt.backends.triton.unpack import KINDS


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
    """`plain.grouped_experts` for few tokens; ``hidden`` and ``out`` are contiguous in their last two dimensions."""
    (tokens, top_k), (_, cols), intermediate = resident.ids.shape, x.shape, hidden.shape[-1]
    stored = [as_stored(each, name) for each, name in zip((gate, up, down), (types[0], *types), strict=True)]
    gate_up_kernel[(gate.shape[1], tokens * top_k)](
        *stored[:2],
        x,
        resident.ids,
        hidden,
        top_k,
        intermediate,
        cols // KINDS[types[0]].columns,
        stored[0].shape[2],
        x.stride(0),
        KIND=KINDS[types[0]],
        num_warps=warps(types[0]),
    )
    down_kernel[(down.shape[1], tokens)](
        stored[2],
        hidden,
        resident.ids,
        resident.weights,
        out,
        top_k,
        cols,
        intermediate // KINDS[types[1]].columns,
        stored[2].shape[2],
        hidden.stride(1),
        out.stride(0),
        KIND=KINDS[types[1]],
        num_warps=warps(types[1]),
    )
    return out


@triton.jit
def gate_up_kernel(
    gate,
    up,
    x,
    ids,
    hidden,
    top_k,
    intermediate,
    blocks,
    panel_size,
    x_stride,
    KIND: tl.constexpr,
):
    panel, choice = tl.program_id(0), tl.program_id(1)
    slot = tl.load(ids + choice)
    if slot < 0:
        return
    at = (slot.to(tl.int64) * tl.num_programs(0) + panel) * panel_size
    own = x + choice // top_k * x_stride
    g = panel_sums(gate + at, own, 0, 1, 0, 1, blocks, 1, KIND)
    u = panel_sums(up + at, own, 0, 1, 0, 1, blocks, 1, KIND)
    row = panel * 16 + tl.arange(0, 16)[None, :]
    value = g / (1.0 + tl.exp(-g)) * u
    tl.store(hidden + choice * intermediate + row, value.to(hidden.dtype.element_ty), mask=row < intermediate)


@triton.jit
def down_kernel(
    down,
    hidden,
    ids,
    weights,
    out,
    top_k,
    cols,
    blocks,
    panel_size,
    hidden_stride,
    out_stride,
    KIND: tl.constexpr,
):
    panel, token = tl.program_id(0), tl.program_id(1)
    total = tl.zeros((1, 16), tl.float32)
    for k in range(top_k):
        choice = token * top_k + k
        slot = tl.load(ids + choice)
        if slot >= 0:
            own = down + (slot.to(tl.int64) * tl.num_programs(0) + panel) * panel_size
            sums = panel_sums(own, hidden + choice * hidden_stride, 0, 1, 0, 1, blocks, 1, KIND)
            total += tl.load(weights + choice) * sums
    row = panel * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=row < cols)
