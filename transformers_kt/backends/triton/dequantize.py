"""Panels to rows of float32, float16 or bfloat16: what products of many tokens multiply with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.triton.gemv import COLUMNS, FLOATS, constants
from transformers_kt.backends.triton.unpack import (
    block_start,
    first_column,
    scale_and_minimum,
    set_words,
    sub_block,
    vector,
    weight,
)


def dequantize(panels: torch.Tensor, type_name: str, rows: int, cols: int, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` (rows, cols) of a float dtype from ``panels`` uint8 (panels, panel bytes). In float32 the bits are
    those of `panels.dequantize`."""
    count = panels.shape[0]
    if type_name in FLOATS:
        grid = (count, triton.cdiv(cols, COLUMNS))
        dequantize_floats[grid](panels.view(FLOATS[type_name]), out, rows, cols, out.stride(0), COLUMNS=COLUMNS)
        return out
    own = constants(type_name)
    blocks = cols // own["ELEMENTS"]
    dequantize_sets[(count, triton.cdiv(blocks, own["BLOCKS"]))](
        panels.view(torch.int32),
        out,
        rows,
        blocks,
        out.stride(0),
        panels.shape[1] // 4,
        **own,
        enable_fp_fusion=False,  # d * sc * q - dmin * m is rounded as the CPU does, product by product
    )
    return out


@triton.jit
def dequantize_floats(panels, out, rows, cols, out_stride, COLUMNS: tl.constexpr):
    panel = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    lane = tl.arange(0, 16)[None, :]
    row = panel * 16 + lane
    mask = column < cols
    values = tl.load(panels + (panel.to(tl.int64) * cols + column) * 16 + lane, mask=mask, other=0.0)
    tl.store(out + row.to(tl.int64) * out_stride + column, values.to(out.dtype.element_ty), mask=mask & (row < rows))


@triton.jit
def dequantize_sets(
    panels,
    out,
    rows,
    blocks,
    out_stride,
    panel_words,
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
    panel = panels.to(tl.pointer_type(tl.uint32), bitcast=True) + tl.program_id(0).to(tl.int64) * panel_words
    part = tl.arange(0, BLOCKS * CHUNKS)[:, None, None]
    set_ = tl.arange(0, SETS)[None, :, None]
    lane = tl.arange(0, 16)[None, None, :]
    block, chunk = tl.program_id(1) * BLOCKS + part // CHUNKS, part % CHUNKS
    mask = block < blocks
    start = block_start(block, blocks, UNITS, SCALE_WORDS, TOGETHER)
    at = panel + start + (HEAD + (chunk * SETS + set_) * SET_UNITS) * 16 + lane
    w0, w1, w2, w3, w4 = set_words(at, mask, SET_UNITS)
    row = tl.program_id(0) * 16 + lane
    to = out + row.to(tl.int64) * out_stride + block * ELEMENTS
    for k in tl.static_range(VECTORS):
        word = vector(w0, w1, w2, w3, w4, k, KIND)
        j = sub_block(chunk, set_, k, KIND)
        scale, minimum = scale_and_minimum(panel, block, start, j, lane, mask, UNITS, SCALE_WORDS, TOGETHER, KIND)
        column = first_column(chunk, set_, k, KIND)
        for i in tl.static_range(4):
            value = scale * weight(word, i, KIND) - minimum
            tl.store(to + column + i, value.to(out.dtype.element_ty), mask=mask & (row < rows))
