"""Products of a matrix in panels with 9 to 16 activation rows, on tensor cores.

A vector of a set holds 4 columns: for each, a tile of 32 columns x 16 rows is unpacked and multiplied at once with
those columns of the activations. Weights are rounded to the dtype of the activations, as where a matrix is dequantized
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.gpu.panels import LAYOUTS
from transformers_kt.backends.triton.gemv import as_stored, constants, warps
from transformers_kt.backends.triton.unpack import (
    block_start,
    first_column,
    scale_and_minimum,
    set_words,
    sub_block,
    vector,
    weight,
)

MOST_ROWS = 16
STAGES = 2
"""With Triton's usual three, Q4_0 and MXFP4 spill 8 bytes on sm_89."""


def gemm(panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (tokens, rows) = ``x`` bfloat16 (tokens, cols) times the matrix, for at most 16 tokens.

    Sums are float32.
    """
    stored, (tokens, rows) = as_stored(panels, type_name), out.shape
    gemm_kernel[(len(panels),)](
        stored,
        x,
        out,
        tokens,
        rows,
        x.shape[1] // LAYOUTS[type_name].block_elements,
        stored.shape[1],
        x.stride(0),
        out.stride(0),
        TOKENS=MOST_ROWS,
        **constants(type_name),
        num_warps=warps(type_name),
        num_stages=STAGES,
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
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
    CHUNKS: tl.constexpr,
    SETS: tl.constexpr,
    SET_UNITS: tl.constexpr,
    VECTORS: tl.constexpr,
    HEAD: tl.constexpr,
    UNITS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    panel = panels + tl.program_id(0).to(tl.int64) * panel_size
    token = tl.arange(0, TOKENS)[:, None]
    own = x + token * x_stride
    dtype = x.dtype.element_ty
    total = tl.zeros((TOKENS, 16), tl.float32)
    if KIND == "floats":
        lane = tl.arange(0, 16)[None, :]
        for first in range(0, blocks, BLOCKS):
            column = first + tl.arange(0, BLOCKS)
            w = tl.load(panel + column[:, None] * 16 + lane, mask=column[:, None] < blocks, other=0.0)
            present = (token < tokens) & (column[None, :] < blocks)
            a = tl.load(own + column[None, :], mask=present, other=0.0)
            total = tl.dot(a, w.to(dtype), total, input_precision="ieee")
    else:
        words = panel.to(tl.pointer_type(tl.uint32), bitcast=True)
        part = tl.arange(0, BLOCKS * CHUNKS)[:, None, None]
        set_ = tl.arange(0, SETS)[None, :, None]
        lane = tl.arange(0, 16)[None, None, :]
        chunk = part % CHUNKS
        TILE: tl.constexpr = BLOCKS * CHUNKS * SETS
        for first in range(0, blocks, BLOCKS):
            block = first + part // CHUNKS
            mask = block < blocks
            start = block_start(block, blocks, UNITS, SCALE_WORDS, TOGETHER)
            at = words + start + (HEAD + (chunk * SETS + set_) * SET_UNITS) * 16 + lane
            w0, w1, w2, w3, w4 = set_words(at, mask, SET_UNITS)
            for k in tl.static_range(VECTORS):
                word = vector(w0, w1, w2, w3, w4, k, KIND)
                scale, minimum = scale_and_minimum(
                    words, block, start, sub_block(chunk, set_, k, KIND), lane, mask, UNITS, SCALE_WORDS, TOGETHER, KIND
                )
                column = tl.reshape(block * ELEMENTS + first_column(chunk, set_, k, KIND), (1, TILE))
                present = (token < tokens) & (column < blocks * ELEMENTS)
                for i in tl.static_range(4):
                    w = tl.reshape(scale * weight(word, i, KIND) - minimum, (TILE, 16))
                    a = tl.load(own + column + i, mask=present, other=0.0)
                    total = tl.dot(a, w.to(dtype), total, input_precision="ieee")
    row = tl.program_id(0) * 16 + tl.arange(0, 16)[None, :]
    to = out + token * out_stride + row
    tl.store(to, total.to(out.dtype.element_ty), mask=(token < tokens) & (row < rows))
