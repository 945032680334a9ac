"""Tries out, over the weights of a loaded model, how products of few tokens had best look ahead on this machine."""

from __future__ import annotations

from torch import nn

import transformers_kt._C as _C
from transformers_kt.modules.experts import KtExperts, KtMoe


def choose_look_ahead(model: nn.Module) -> str:
    """Time the ways over the routed experts of the loaded ``model`` and keep the fastest; the kernels in words.

    A quarter of a second; no result changes. Experts of less than 0.5 GB, which caches may hold, are not tried.
    """
    experts = (module.routed for module in model.modules() if isinstance(module, KtExperts | KtMoe))
    speeds = _C.choose_look_ahead([matrix for each in experts for matrix in each.matrices])
    chosen = _C.look_ahead()
    if not speeds:
        return str(_C.isa())
    others = (f"{name} {speed / speeds[chosen]:.2f}" for name, speed in speeds.items() if name != chosen)
    return f"{_C.isa()}; how weights are fetched ahead: {chosen} ({', '.join(others)} times as fast)"
