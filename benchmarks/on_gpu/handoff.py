"""What it costs a layer to hand its activations to the CPU and to take the experts' sum back, with experts that compute
nothing: kernels that add, norm, choose and stage, an event, a copy of 28 KB by the host, kernels for shared experts.

Ways to launch, times ways to pass the block: kernels that read and write pinned memory, or copies before and after.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from transformers_kt.backends.gpu import plain
from transformers_kt.backends.gpu.device import Work
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.families.base import Router

from .setting import Setting, median_of

ROUTER = Router(sigmoid=True, groups=8, top_groups=4, top_k=8, normalize=True, scale=2.5)
EXPERTS = 256


def measure(setting: Setting) -> None:
    hidden, layers, rounds = setting.size((7168, 58, 15), (64, 2, 1))
    for passing in ("pinned, zero-copy", "copied"):
        layer = _Layer.made(setting, hidden, is_copied=passing == "copied")
        for way, run in _ways(setting, layer):
            seconds = median_of(partial(_timed, run, layers), rounds) / layers
            setting.report.add("Hand-off, a layer", {"launched as": way, "staging": passing, "us": seconds * 1e6})
    own = setting.seconds([layer.before, layer.after]) * 2
    setting.report.add("Hand-off, a layer", {"launched as": "one graph, nobody waits", "us": own * 1e6})
    if not setting.is_fake:
        _check_external_event(setting)


@dataclass
class _Layer:
    """What a layer of a decode step does around its experts, as work of the device and of the host."""

    before: Work
    after: Work
    host: Work

    @classmethod
    def made(cls, setting: Setting, hidden: int, *, is_copied: bool) -> _Layer:
        device = setting.device
        kernels = _kernels(has_kernels=device.has_kernels)
        residual, normed, shared, routed = (device.empty((1, hidden), torch.float32).zero_() for _ in range(4))
        weight, gate_up = setting.values(hidden, dtype=torch.float32), setting.values(1, 2 * hidden)
        logits, bias = (setting.values(*shape, dtype=torch.float32) for shape in ((1, EXPERTS), (EXPERTS,)))
        result = device.pinned((1, hidden), torch.float32).zero_()
        words = (Staging.words(1, hidden, ROUTER.top_k),)
        pinned, block = device.pinned(words, torch.float32), device.empty(words, torch.float32)
        staging = Staging.of(block if is_copied else pinned, 1, hidden, ROUTER.top_k)
        staged = Staging.of(pinned, 1, hidden, ROUTER.top_k)

        def before() -> None:
            if is_copied:
                routed.copy_(result, non_blocking=True)
            kernels.add_rms_norm(residual, [routed if is_copied else result], weight, 1e-6, normed)
            kernels.router_stage(logits, bias, ROUTER, normed, staging)
            if is_copied:
                pinned.copy_(block, non_blocking=True)

        def after() -> None:
            kernels.swiglu(gate_up, shared)
            residual.add_(shared)

        return cls(before, after, lambda: result.copy_(staged.x))


def _kernels(*, has_kernels: bool) -> Any:
    if not has_kernels:
        return plain
    from types import SimpleNamespace

    from transformers_kt.backends.triton import norm, router_stage, swiglu

    return SimpleNamespace(add_rms_norm=norm.add_rms_norm, router_stage=router_stage.router_stage, swiglu=swiglu.swiglu)


def _ways(setting: Setting, layer: _Layer) -> Iterator[tuple[str, Work]]:
    """How a layer is launched, and the call that does so and is the host's part of it."""
    device, stream, staged, done = (
        setting.device,
        setting.device.stream(),
        setting.device.event(),
        setting.device.event(),
    )
    stream.follow_torch()

    def one_by_one() -> None:
        stream.launch(layer.before)
        stream.record(staged)
        stream.launch(layer.after)
        staged.synchronize()
        layer.host()

    yield "kernels one by one", one_by_one
    stream.record(done)
    done.synchronize()
    first, second = device.capture(layer.before), device.capture(layer.after)

    def two_graphs() -> None:
        first.launch(stream)
        stream.record(staged)
        second.launch(stream)
        staged.synchronize()
        layer.host()

    yield "two graphs", two_graphs
    stream.record(done)
    done.synchronize()
    with contextlib.suppress(TypeError):  # of a torch whose events know nothing of graphs
        if not setting.is_fake:
            yield "one graph, external event", _with_external_event(setting, layer)


def _with_external_event(setting: Setting, layer: _Layer) -> Work:
    event = torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
    stream = torch.cuda.Stream(setting.device.torch_device)  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        layer.before()
        event.record(stream)
        layer.after()

    def one_graph() -> None:
        with torch.cuda.stream(stream):
            graph.replay()
        event.synchronize()
        layer.host()

    return one_graph


def _check_external_event(setting: Setting) -> None:
    """Whether the host, when the event of a graph lets it go on, always reads what that launch has written."""
    count, seen = setting.device.empty((1,), torch.int32).zero_(), setting.device.pinned((1,), torch.int32).zero_()

    def before() -> None:
        count.add_(1)
        seen.copy_(count, non_blocking=True)

    stale = []
    layer = _Layer(before, setting.sleep(50e-6), lambda: stale.append(int(seen)))
    try:
        run = _with_external_event(setting, layer)
    except TypeError:
        return
    count.zero_()
    torch.cuda.synchronize()
    for _ in range(500):
        run()
    wrong = sum(found != number for number, found in enumerate(stale, start=1))
    setting.report.add("External event", {"launches": len(stale), "the host read too early": wrong})


def _timed(run: Work, layers: int) -> float:
    begin = time.perf_counter()
    for _ in range(layers):
        run()
    return time.perf_counter() - begin
