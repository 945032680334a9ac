"""Finds the prefetch strategy with which the weights of a loaded model stream fastest on this machine."""

from __future__ import annotations

from torch import nn

import transformers_kt._C as _C
from transformers_kt.modules.base import KtModule
from transformers_kt.modules.experts import KtExperts, KtMoe
from transformers_kt.modules.gpu.base import OnDevice


def tune_prefetch(model: nn.Module) -> str:
    """Time the strategies over the routed experts, set the fastest on all matrices of ``model``; the kernels in words.

    A quarter of a second; no result changes. Experts of less than 0.5 GB, which caches may hold, are not timed: every
    matrix then keeps what suits the CPU's vendor.
    """
    ours = [module for module in model.modules() if isinstance(module, KtExperts | KtMoe)]
    experts = [module.routed for module in ours if not isinstance(module, OnDevice)]
    timed = [matrix for each in experts for matrix in each.matrices]
    speeds = _C.tune_prefetch(timed)
    if not speeds:
        return str(_C.isa())
    chosen = timed[0].prefetch
    for module in model.modules():
        for matrix in module.matrices if isinstance(module, KtModule) else ():
            matrix.prefetch = chosen
    others = ", ".join(f"{name} {speed / speeds[chosen]:.2f}" for name, speed in speeds.items() if name != chosen)
    return f"{_C.isa()}; prefetch strategy: {chosen} ({others} of its speed)"
