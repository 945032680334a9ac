"""Models of real dimensions, few layers, random weights: `generate()` with layer graphs and without, what of a token's
time goes where, and a picture of some tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import synthetic
import torch
from measuring import median
from transformers import AutoModelForCausalLM

import transformers_kt._C as _C
from transformers_kt.assets import bundled_model
from transformers_kt.cli.timing import random_tokens, timed_generate

from .setting import Setting
from .trace import draw


class Model(NamedTuple):
    title: str
    dimensions: str
    layers: int
    experts: int


MODELS = (
    Model("V2-Lite dimensions, 27 layers of 16 experts", "v2-lite", 27, 16),
    Model("V3 dimensions, 7 layers of 32 experts", "v3", 7, 32),
)
"""A token reads of each layer what it reads of one with all experts. V2-Lite first: there launches decide."""
_TOKENS = 32
_TRACED = 3


def measure(setting: Setting) -> None:
    if setting.is_fake:
        _measure_model(setting, "tiny-r1", next(Path(bundled_model()).glob("*.gguf")))
        return
    with TemporaryDirectory() as folder:
        for model in MODELS:
            path = Path(folder) / "model.gguf"
            synthetic.write(model.dimensions, "q4_k_m", path, model.layers, model.experts)
            _measure_model(setting, model.title, path)
            path.unlink()


def _measure_model(setting: Setting, title: str, path: Path) -> None:
    for has_graphs in (False, True):
        model: Any = AutoModelForCausalLM.from_pretrained(
            None, gguf_path=path, kt_gpu_experts=0, kt_cuda_graph=has_graphs
        )
        for tokens in setting.size((1, 512), (1,)):
            _measure_generate(setting, {"model": title, "graphs": has_graphs}, model, tokens)
    _trace(setting, title, model)


def _measure_generate(setting: Setting, of: dict[str, Any], model: Any, tokens: int) -> None:
    new = setting.size(_TOKENS, 2)
    prompts = [random_tokens(tokens, model.config.vocab_size)]
    timed_generate(model, prompts, new)  # kernels are compiled, caches and buffers made
    with timed_experts() as spent:
        timed = timed_generate(model, prompts, new, spent)
    gap, experts = median(timed.gaps), median(timed.spent)
    row: dict[str, Any] = {**of, "prompt": tokens, "decode, tokens/s": 1 / gap, "token, ms": gap * 1e3}
    row |= {"CPU experts, ms": experts * 1e3, "all else, ms": (gap - experts) * 1e3}
    setting.report.add("Models", {**row, "prompt, tokens/s": tokens / timed.first if tokens > 1 else None})


@contextmanager
def timed_experts() -> Iterator[Callable[[], float]]:
    """Seconds spent so far in routed experts on the CPU, which profiles show by the name "experts" too."""
    original, spent = _C.Experts.forward_routed, 0.0

    def forward_routed(*args: Any) -> None:
        nonlocal spent
        begin = time.perf_counter()
        with torch.profiler.record_function("experts"):
            original(*args)
        spent += time.perf_counter() - begin

    _C.Experts.forward_routed = forward_routed  # type: ignore[method-assign,assignment]
    try:
        yield lambda: spent
    finally:
        _C.Experts.forward_routed = original  # type: ignore[method-assign]


def _trace(setting: Setting, title: str, model: Any) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not setting.is_fake:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    prompt = [random_tokens(1, model.config.vocab_size)]
    with timed_experts(), torch.profiler.profile(activities=activities) as profile:
        timed_generate(model, prompt, _TRACED)
    name = f"trace-{title.split()[0].lower()}.png"
    busy = draw(profile, title, setting.report.out / name)
    setting.report.add("Profiles", {"model": title, "GPU busy": busy, "picture": name})
