"""RMS norm of rows, after results were added to them: a program a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WARPS = 8


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """`plain.rms_norm`."""
    return _launch(x, (), weight, eps, out)


def add_rms_norm(
    residual: torch.Tensor, added: Sequence[torch.Tensor], weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """`plain.add_rms_norm`; pinned memory is read where it lies, with nothing copied before."""
    return _launch(residual, added, weight, eps, out)


def _launch(
    x: torch.Tensor, added: Sequence[torch.Tensor], weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    rows, cols = x.shape
    first, second = (*added, x, x)[:2]
    rms_norm_kernel[(rows,)](
        x,
        first,
        second,
        weight,
        out,
        cols,
        eps,
        x.stride(0),
        first.stride(0),
        second.stride(0),
        out.stride(0),
        ADDED=len(added),
        SIZE=triton.next_power_of_2(cols),
        num_warps=WARPS,
    )
    return out


@triton.jit
def rms_norm_kernel(
    x,
    first,
    second,
    weight,
    out,
    cols,
    eps,
    x_stride,
    first_stride,
    second_stride,
    out_stride,
    ADDED: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, SIZE)
    mask = column < cols
    values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADDED >= 1:
        values += tl.load(first + row * first_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADDED >= 2:
        values += tl.load(second + row * second_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADDED >= 1:
        tl.store(x + row * x_stride + column, values, mask=mask)
    normed = rms_normed(values, tl.load(weight + column, mask=mask, other=0.0), cols, eps)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rms_normed(values, weight, cols, eps):
    """``values`` float32 (SIZE,), 0 from ``cols`` on, over their root mean square, times ``weight``."""
    return values * (1.0 / tl.sqrt(tl.sum(values * values, axis=0) / cols + eps)) * weight
