"""The link between RAM and the GPU: copies both ways from ordinary, pinned and registered memory, kernels that read
pinned memory where it lies, what registering costs, and copies while experts compute on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from random_experts import V3, RandomCalls, Widths, random_experts

from transformers_kt.backends.gpu.plain import Staging

from .handoff import EXPERTS, ROUTER
from .setting import Setting

_BESIDE_S = 2.0
"""How long experts compute, alone and beside copies."""


def measure(setting: Setting) -> None:
    nbytes = setting.size(1 << 30, 1 << 16)
    here = setting.device.empty((nbytes,), torch.uint8)
    pinned, pageable = setting.device.pinned((nbytes,), torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    for kind, host in (("ordinary", pageable), ("pinned", pinned)):
        _measure_copies(setting, kind, host, here)
    if not setting.is_fake:
        with _registered(setting, pageable):
            _measure_copies(setting, "registered", pageable, here)
    _measure_zero_copy(setting)
    _measure_beside_experts(setting, pinned, here)


def _measure_copies(setting: Setting, kind: str, host: torch.Tensor, here: torch.Tensor) -> None:
    row: dict[str, object] = {"memory": kind}
    for way, to, source in (("to the GPU", here, host), ("from the GPU", host, here)):
        copy = partial(to.copy_, source, non_blocking=True)
        row[f"{way}, GB/s"] = host.nbytes / setting.seconds([copy], is_captured=False) / 1e9
    setting.report.add("Copies of 1 GiB", row)


@contextmanager
def _registered(setting: Setting, host: torch.Tensor) -> Iterator[None]:
    runtime = torch.cuda.cudart()
    begin = time.perf_counter()
    status = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
    taken = time.perf_counter() - begin
    row = {"GB": host.nbytes / 1e9, "s/GB": taken / host.nbytes * 1e9, "status": status}
    setting.report.add("Registering memory", row)
    try:
        yield
    finally:
        if status == 0:
            runtime.cudaHostUnregister(host.data_ptr())


def _measure_zero_copy(setting: Setting) -> None:
    """Kernels over memory of the host, in the sizes of 1 and 64 tokens: what `handoff` and long prompts meet."""
    if not setting.device.has_kernels:
        return
    from transformers_kt.backends.triton.norm import add_rms_norm
    from transformers_kt.backends.triton.router_stage import router_stage

    def measure_rows(rows: int, hidden: int) -> None:
        residual, out = (setting.values(rows, hidden, dtype=torch.float32) for _ in range(2))
        weight = setting.values(hidden, dtype=torch.float32)
        logits = setting.values(rows, EXPERTS, dtype=torch.float32)
        host = setting.device.pinned((rows, hidden), torch.float32).zero_()
        block = setting.device.pinned((Staging.words(rows, hidden, ROUTER.top_k),), torch.float32)
        staging = Staging.of(block, rows, hidden, ROUTER.top_k)
        read = partial(add_rms_norm, residual, [host], weight, 1e-6, out)
        write = partial(router_stage, logits, None, ROUTER, residual, staging)
        for way, work, nbytes in (("read", read, host.nbytes), ("written", write, block.nbytes)):
            seconds = setting.seconds([work])
            row = {"pinned memory is": way, "KB": nbytes / 1e3, "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9}
            setting.report.add("Kernels over pinned memory", row)

    for rows in setting.size((1, 64), (2,)):
        measure_rows(rows, setting.size(7168, 64))


def _measure_beside_experts(setting: Setting, pinned: torch.Tensor, here: torch.Tensor) -> None:
    """Experts of one token, bound by RAM, and a stream that copies all the while from the same RAM."""
    experts = random_experts(*setting.size((V3, 64, "Q4_K", "Q6_K"), (Widths(64, 32, 2), 4, "Q8_0", "Q8_0")))
    compute, duration = RandomCalls(experts, tokens=1), setting.size(_BESIDE_S, 0.01)
    nbytes = experts.widths.top_k * experts.expert_bytes
    row = {"copies": "none", "experts, GB/s": _calls_per_second(compute, duration) * nbytes / 1e9}
    setting.report.add("Experts of one token beside copies", row)
    is_over, copied = threading.Event(), 0

    def copy() -> None:
        nonlocal copied
        stream, done = setting.device.stream(), setting.device.event(is_blocking=True)
        while not is_over.is_set():
            stream.copy(here, pinned)
            stream.record(done)
            done.synchronize()
            copied += here.nbytes

    thread = threading.Thread(target=copy)
    begin = time.perf_counter()
    thread.start()
    rate = _calls_per_second(compute, duration)
    is_over.set()
    thread.join()
    taken = time.perf_counter() - begin
    row = {"copies": "RAM to GPU", "experts, GB/s": rate * nbytes / 1e9, "copies, GB/s": copied / taken / 1e9}
    setting.report.add("Experts of one token beside copies", row)


def _calls_per_second(compute: RandomCalls, duration: float) -> float:
    compute()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < duration:
        compute()
        calls += 1
    return max(1, calls) / (time.perf_counter() - begin)
