"""Panels to rows of float32, float16 or bfloat16: what products of many tokens multiply with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.triton.gemv import as_stored
from transformers_kt.backends.triton.unpack import (
    KINDS,
    block_start,
    first_column,
    scale_and_minimum,
    set_words,
    vector,
    weight,
)


def dequantize(panels: torch.Tensor, type_name: str, rows: int, cols: int, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` (rows, cols) of a float dtype from ``panels`` uint8 (panels, panel bytes). In float32 the bits are
    those of `panels.dequantize`."""
    stored, kind = as_stored(panels, type_name), KINDS[type_name]
    blocks = cols // kind.columns
    dequantize_kernel[(len(panels), triton.cdiv(blocks, kind.blocks))](
        stored,
        out,
        rows,
        blocks,
        out.stride(0),
        stored.shape[1],
        KIND=kind,
        enable_fp_fusion=False,  # d * sc * q - dmin * m is rounded as the CPU does, product by product
    )
    return out


@triton.jit
def dequantize_kernel(panels, out, rows, blocks, out_stride, panel_size, KIND: tl.constexpr):
    panel = panels + tl.program_id(0).to(tl.int64) * panel_size
    if KIND.chunks == 0:
        column = tl.program_id(1) * KIND.blocks + tl.arange(0, KIND.blocks)[:, None]
        lane = tl.arange(0, 16)[None, :]
        row = tl.program_id(0) * 16 + lane
        values = tl.load(panel + column * 16 + lane, mask=column < blocks, other=0.0)
        to = out + row.to(tl.int64) * out_stride + column
        tl.store(to, values.to(out.dtype.element_ty), mask=(column < blocks) & (row < rows))
    else:
        words = panel.to(tl.pointer_type(tl.uint32), bitcast=True)
        part = tl.arange(0, KIND.blocks * KIND.chunks)[:, None, None]
        set_ = tl.arange(0, KIND.sets)[None, :, None]
        lane = tl.arange(0, 16)[None, None, :]
        block, chunk = tl.program_id(1) * KIND.blocks + part // KIND.chunks, part % KIND.chunks
        mask = block < blocks
        start = block_start(block, blocks, KIND)
        at = words + start + (KIND.head + (chunk * KIND.sets + set_) * KIND.set_units) * 16 + lane
        w0, w1, w2, w3, w4 = set_words(at, mask, KIND)
        row = tl.program_id(0) * 16 + lane
        to = out + row.to(tl.int64) * out_stride + block * KIND.columns
        for k in tl.static_range(KIND.vectors):
            word = vector(w0, w1, w2, w3, w4, k, KIND)
            scale, minimum = scale_and_minimum(words, block, start, chunk, set_, k, lane, mask, KIND)
            column = first_column(chunk, set_, k, KIND)
            for i in tl.static_range(4):
                value = scale * weight(word, i, KIND) - minimum
                tl.store(to + column + i, value.to(out.dtype.element_ty), mask=mask & (row < rows))
