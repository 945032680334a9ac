"""Products of a matrix in panels with 9 to 16 activation rows, on tensor cores.

A vector of a set holds 4 columns: for each, a tile of 32 columns x 16 rows is unpacked and multiplied at once with
those columns of the activations. Weights are rounded to the dtype of the activations, as where a matrix is dequantized
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.triton.gemv import as_stored, warps
from transformers_kt.backends.triton.unpack import (
    KINDS,
    block_start,
    first_column,
    scale_and_minimum,
    set_words,
    vector,
    weight,
)

MOST_ROWS = 16
_STAGES = {"Q2_K": 3}
"""Others 2: with Triton's usual three, Q4_0 and MXFP4 spill 8 bytes on sm_89; with two, Q2_K spills 16."""
_WARPS = {"Q3_K": 4}
"""Where other products spill with so few, and this one with as many as they take."""


def warps_and_stages(type_name: str) -> dict[str, int]:
    """How the kernel is compiled."""
    return {"num_warps": _WARPS.get(type_name, warps(type_name)), "num_stages": _STAGES.get(type_name, 2)}


def gemm(panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (tokens, rows) = ``x`` bfloat16 (tokens, cols) times the matrix, for at most 16 tokens.

    Sums are float32.
    """
    stored, kind, (tokens, rows) = as_stored(panels, type_name), KINDS[type_name], out.shape
    gemm_kernel[(len(panels),)](
        stored,
        x,
        out,
        tokens,
        rows,
        x.shape[1] // kind.columns,
        stored.shape[1],
        x.stride(0),
        out.stride(0),
        TOKENS=MOST_ROWS,
        KIND=kind,
        **warps_and_stages(type_name),
    )
    return out


@triton.jit
def gemm_kernel(
    panels,
    x,
    out,
    tokens,
    rows,
    blocks,
    panel_size,
    x_stride,
    out_stride,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
):
    panel = panels + tl.program_id(0).to(tl.int64) * panel_size
    token = tl.arange(0, TOKENS)[:, None]
    own = x + token * x_stride
    dtype = x.dtype.element_ty
    total = tl.zeros((TOKENS, 16), tl.float32)
    if KIND.chunks == 0:
        lane = tl.arange(0, 16)[None, :]
        for first in range(0, blocks, KIND.blocks):
            column = first + tl.arange(0, KIND.blocks)
            w = tl.load(panel + column[:, None] * 16 + lane, mask=column[:, None] < blocks, other=0.0)
            present = (token < tokens) & (column[None, :] < blocks)
            a = tl.load(own + column[None, :], mask=present, other=0.0)
            total = tl.dot(a, w.to(dtype), total, input_precision="ieee")
    else:
        words = panel.to(tl.pointer_type(tl.uint32), bitcast=True)
        part = tl.arange(0, KIND.blocks * KIND.chunks)[:, None, None]
        set_ = tl.arange(0, KIND.sets)[None, :, None]
        lane = tl.arange(0, 16)[None, None, :]
        chunk = part % KIND.chunks
        TILE: tl.constexpr = KIND.blocks * KIND.chunks * KIND.sets
        for first in range(0, blocks, KIND.blocks):
            block = first + part // KIND.chunks
            mask = block < blocks
            start = block_start(block, blocks, KIND)
            at = words + start + (KIND.head + (chunk * KIND.sets + set_) * KIND.set_units) * 16 + lane
            w0, w1, w2, w3, w4 = set_words(at, mask, KIND)
            for k in tl.static_range(KIND.vectors):
                word = vector(w0, w1, w2, w3, w4, k, KIND)
                scale, minimum = scale_and_minimum(words, block, start, chunk, set_, k, lane, mask, KIND)
                column = tl.reshape(block * KIND.columns + first_column(chunk, set_, k, KIND), (1, TILE))
                present = (token < tokens) & (column < blocks * KIND.columns)
                for i in tl.static_range(4):
                    w = tl.reshape(scale * weight(word, i, KIND) - minimum, (TILE, 16))
                    a = tl.load(own + column + i, mask=present, other=0.0)
                    total = tl.dot(a, w.to(dtype), total, input_precision="ieee")
    row = tl.program_id(0) * 16 + tl.arange(0, 16)[None, :]
    to = out + token * out_stride + row
    tl.store(to, total.to(out.dtype.element_ty), mask=(token < tokens) & (row < rows))
