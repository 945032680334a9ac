"""Products of a matrix in panels with 1 to 8 activation rows: bound by memory, so that each word is read once.

A program takes a panel of 16 rows and every ``SPLITS``-th run of blocks. Small matrices (the largest models' kv_a is 36
panels) need the splits to fill a GPU; their partial sums are added by a second kernel in a fixed order, without
atomics, so that the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.triton.unpack import (
    FLOATS,
    KINDS,
    block_start,
    first_column,
    scale_and_minimum,
    set_words,
    vector,
    weight,
)

MOST_ROWS = 8
_DTYPES = dict(zip(FLOATS, (torch.float32, torch.float16, torch.bfloat16), strict=True))
_WARPS = {"Q5_0": 8, "Q5_1": 8, "Q3_K": 8}
"""Where four spill: the 8 vectors of a set are unpacked at once."""
_PADDED = dict.fromkeys(
    [("Q5_0", 4), ("Q3_K", 4), ("Q5_K", 2), ("Q5_K", 4), ("Q6_K", 4), ("IQ4_NL", 4), ("MXFP4", 4)], MOST_ROWS
)
"""Where the kernel for 8 tokens does, for it does not spill: these do, 8 bytes (IQ4_NL, sm_90) to 656 (Q5_K for 2,
sm_89). MXFP4 unpacks as IQ4_NL does."""
_FEWEST_PROGRAMS = 256
"""Of a matrix with fewer panels, programs share the columns too: each of them is a fraction of a GPU's processors."""


def splits_for(type_name: str, panels: int, cols: int) -> int:
    """How many programs share the columns of each of ``panels``, no more than there are runs of blocks."""
    kind = KINDS[type_name]
    runs = -(-cols // (kind.columns * kind.blocks))
    return min(-(-_FEWEST_PROGRAMS // panels), runs)


def gemv(
    panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor, partial: torch.Tensor | None = None
) -> torch.Tensor:
    """``out`` float32 or bfloat16 (tokens, rows) = ``x`` float32 or bfloat16 (tokens, cols) times the matrix, for at
    most 8 tokens.

    ``partial`` float32 (splits, tokens, rows) is scratch for as many splits; without it one program does a panel.
    Nothing is allocated. Sums are float32.
    """
    if partial is None:
        return gemv_per_head(panels.unsqueeze(0), type_name, x.unsqueeze(1), out.unsqueeze(1)).squeeze(1)
    (tokens, rows), splits = out.shape, len(partial)
    _launch(panels, type_name, x, partial, (len(panels), splits, 1), (tokens, rows), (x.stride(0), 0), (rows, 0))
    values = tokens * rows
    add_splits[(triton.cdiv(values, 1024),)](partial, out, values, rows, splits, out.stride(0), SIZE=1024)
    return out


def gemv_per_head(panels: torch.Tensor, type_name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out`` (tokens, heads, rows) = ``x`` (tokens, heads, cols), a matrix of ``panels`` (heads, panels, bytes) each,
    for at most 8 tokens. Any strides but the last.
    """
    (heads, count, _), (tokens, _, rows) = panels.shape, out.shape
    strides = (x.stride(0), x.stride(1)), (out.stride(0), out.stride(1))
    _launch(panels, type_name, x, out, (count, 1, heads), (tokens, rows), *strides)
    return out


def _launch(
    panels: torch.Tensor,
    type_name: str,
    x: torch.Tensor,
    to: torch.Tensor,
    grid: tuple[int, int, int],
    sizes: tuple[int, int],
    x_strides: tuple[int, int],
    out_strides: tuple[int, int],
) -> None:
    stored, kind = as_stored(panels, type_name), KINDS[type_name]
    gemv_kernel[grid](
        stored,
        x,
        to,
        *sizes,
        x.shape[-1] // kind.columns,
        stored.shape[-1],
        *x_strides,
        *out_strides,
        TOKENS=padded_tokens(type_name, sizes[0]),
        KIND=kind,
        num_warps=warps(type_name),
    )


def as_stored(panels: torch.Tensor, type_name: str) -> torch.Tensor:
    """uint8 panels as what kernels load: words of 4 bytes, or the values of a float type."""
    return panels.view(_DTYPES.get(type_name, torch.int32))


def padded_tokens(type_name: str, tokens: int) -> int:
    """The tokens that the kernel is compiled for: a power of two."""
    padded: int = triton.next_power_of_2(tokens)
    return _PADDED.get((type_name, padded), padded)


def warps(type_name: str) -> int:
    return _WARPS.get(type_name, 4)


@triton.jit
def add_splits(partial, out, values, rows, splits, out_stride, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < values
    total = tl.zeros((SIZE,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * values + at, mask=mask, other=0.0)
    tl.store(out + at // rows * out_stride + at % rows, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gemv_kernel(
    panels,
    x,
    out,
    tokens,
    rows,
    blocks,
    panel_size,
    x_stride,
    x_head_stride,
    out_stride,
    out_head_stride,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
):
    panel_id, split, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sums = panel_sums(
        panels + (head * tl.num_programs(0) + panel_id).to(tl.int64) * panel_size,
        x + head * x_head_stride,
        x_stride,
        tokens,
        split,
        tl.num_programs(1),
        blocks,
        TOKENS,
        KIND,
    )
    token = tl.arange(0, TOKENS)[:, None]
    row = panel_id * 16 + tl.arange(0, 16)[None, :]
    to = out + head * out_head_stride + (split * tokens + token) * out_stride + row
    tl.store(to, sums.to(out.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit
def panel_sums(
    panel,
    x,
    x_stride,
    tokens,
    split,
    splits,
    blocks,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
):
    """float32 (TOKENS, 16): the rows of ``panel`` times ``x``, over every ``splits``-th run of blocks."""
    if KIND.chunks == 0:
        return _float_sums(panel, x, x_stride, tokens, split, splits, blocks, TOKENS, KIND.blocks)
    else:
        words = panel.to(tl.pointer_type(tl.uint32), bitcast=True)
        part = tl.arange(0, KIND.blocks * KIND.chunks)[:, None, None]
        set_ = tl.arange(0, KIND.sets)[None, :, None]
        lane = tl.arange(0, 16)[None, None, :]
        token = tl.arange(0, TOKENS)[:, None, None, None]
        chunk = part % KIND.chunks
        total = tl.zeros((TOKENS, KIND.blocks * KIND.chunks, KIND.sets, 16), tl.float32)
        for first in range(split * KIND.blocks, blocks, splits * KIND.blocks):
            block = first + part // KIND.chunks
            mask = block < blocks
            start = block_start(block, blocks, KIND)
            at = words + start + (KIND.head + (chunk * KIND.sets + set_) * KIND.set_units) * 16 + lane
            w0, w1, w2, w3, w4 = set_words(at, mask, KIND)
            for k in tl.static_range(KIND.vectors):
                word = vector(w0, w1, w2, w3, w4, k, KIND)
                scale, minimum = scale_and_minimum(words, block, start, chunk, set_, k, lane, mask, KIND)
                column = block * KIND.columns + first_column(chunk, set_, k, KIND)
                own = x + token * x_stride + column[None]
                present = (token < tokens) & mask[None]
                product = tl.zeros((TOKENS, KIND.blocks * KIND.chunks, KIND.sets, 16), tl.float32)
                activations = tl.zeros((TOKENS, KIND.blocks * KIND.chunks, KIND.sets, 1), tl.float32)
                for i in tl.static_range(4):
                    a = tl.load(own + i, mask=present, other=0.0).to(tl.float32)
                    product += weight(word, i, KIND)[None] * a
                    activations += a
                total += scale[None] * product - minimum[None] * activations
        return tl.sum(tl.sum(total, axis=1), axis=1)


@triton.jit
def _float_sums(panel, x, x_stride, tokens, split, splits, cols, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.arange(0, TOKENS)[:, None, None]
    lane = tl.arange(0, 16)[None, None, :]
    total = tl.zeros((TOKENS, COLUMNS, 16), tl.float32)
    for first in range(split * COLUMNS, cols, splits * COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :, None]
        w = tl.load(panel + column * 16 + lane, mask=column < cols, other=0.0).to(tl.float32)
        a = tl.load(x + token * x_stride + column, mask=(token < tokens) & (column < cols), other=0.0).to(tl.float32)
        total += w * a
    return tl.sum(total, axis=1)
