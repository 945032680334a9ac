"""The choice of experts from router logits, written with the activations into pinned memory for the CPU.

A row's first program chooses, its others copy the activations. Experts of a group are a row of a tile, so that maxima
of groups are maxima of rows; groups and their experts are padded to powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from transformers_kt.backends.gpu.plain import Resident, Staging
from transformers_kt.families.base import Router

COPIED = 1024
"""Activations that a program copies: 32 to a lane of its only warp. A choice among 256 experts is 8 to a lane."""


def router_stage(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    router: Router,
    x: torch.Tensor,
    staging: Staging,
    resident: Resident | None = None,
) -> None:
    """`plain.router_stage`. The pinned memory is written where it lies."""
    (rows, experts), hidden = logits.shape, x.shape[1]
    own = Resident(staging.ids, staging.ids, staging.weights) if resident is None else resident
    router_stage_kernel[(rows, 1 + triton.cdiv(hidden, COPIED))](
        logits,
        logits if bias is None else bias,
        x,
        *staging,
        *own,
        experts,
        hidden,
        logits.stride(0),
        x.stride(0),
        router.scale,
        HAS_BIAS=bias is not None,
        HAS_SLOTS=resident is not None,
        SIGMOID=router.sigmoid,
        NORMALIZE=router.normalize,
        GROUPS=router.groups,
        TOP_GROUPS=router.top_groups,
        TOP_K=router.top_k,
        PADDED_GROUPS=triton.next_power_of_2(router.groups),
        PADDED_SIZE=triton.next_power_of_2(experts // router.groups),
        COPIED=COPIED,
        num_warps=1,
    )


@triton.jit
def router_stage_kernel(
    logits,
    bias,
    x,
    staged_x,
    staged_ids,
    staged_weights,
    slots,
    resident_ids,
    resident_weights,
    experts,
    hidden,
    logits_stride,
    x_stride,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    COPIED: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.program_id(1) > 0:
        column = (tl.program_id(1) - 1) * COPIED + tl.arange(0, COPIED)
        mask = column < hidden
        values = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(staged_x + row * hidden + column, values, mask=mask)
    else:
        size = experts // GROUPS
        group = tl.arange(0, PADDED_GROUPS)
        within = tl.arange(0, PADDED_SIZE)[None, :]
        expert = group[:, None] * size + within
        is_there = (group[:, None] < GROUPS) & (within < size)
        logit = tl.load(logits + row * logits_stride + expert, mask=is_there, other=float("-inf"))
        if SIGMOID:
            score = 1.0 / (1.0 + tl.exp(-logit))
        else:
            score = tl.exp(logit - tl.max(tl.max(logit, axis=1), axis=0))
            score = score / tl.sum(tl.sum(score, axis=1), axis=0)
        choice = score
        if HAS_BIAS:
            choice += tl.load(bias + expert, mask=is_there, other=0.0)
        choice = tl.where(is_there & (choice == choice), choice, float("-inf"))  # NaN is chosen last
        if GROUPS > 1:
            of_group = tl.max(choice, axis=1)
            if SIGMOID:  # the sum of the two best
                best = tl.min(tl.where(choice == of_group[:, None], within, PADDED_SIZE), axis=1)
                of_group += tl.max(tl.where(within == best[:, None], float("-inf"), choice), axis=1)
            is_left = group < GROUPS
            for _ in tl.static_range(TOP_GROUPS):
                is_left = is_left & (group != first_largest(of_group, group, is_left))
            choice = tl.where(is_left[:, None], float("-inf"), choice)
        ALL: tl.constexpr = PADDED_GROUPS * PADDED_SIZE
        expert, choice, score = tl.reshape(expert, (ALL,)), tl.reshape(choice, (ALL,)), tl.reshape(score, (ALL,))
        is_there = tl.reshape(is_there, (ALL,))
        is_left = is_there
        for _ in tl.static_range(TOP_K):
            is_left = is_left & (expert != first_largest(choice, expert, is_left))
        is_chosen = is_there & (is_left == 0)
        weight = score
        if NORMALIZE:
            weight = weight / (tl.sum(tl.where(is_chosen, score, 0.0), axis=0) + 1e-20)
        weight *= scale
        to = row * TOP_K + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
        id_ = expert
        if HAS_SLOTS:
            slot = tl.load(slots + expert, mask=is_chosen, other=-1)
            tl.store(resident_ids + to, slot, mask=is_chosen)
            tl.store(resident_weights + to, weight, mask=is_chosen)
            id_ = tl.where(slot >= 0, -1, expert)
        tl.store(staged_ids + to, id_, mask=is_chosen)
        tl.store(staged_weights + to, weight, mask=is_chosen)


@triton.jit
def first_largest(values, index, is_left):
    """The lowest ``index`` among the largest ``values`` that are left."""
    largest = tl.max(tl.where(is_left, values, float("-inf")), axis=0)
    return tl.min(tl.where(is_left & (values == largest), index, 1 << 30), axis=0)
