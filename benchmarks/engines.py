"""One engine, one process: loads a GGUF file, measures, prints one line of JSON. Started by bench_generate.py, and by
bench_types.py, which asks for each generation when it is its turn.

It runs under interpreters that have only their own engine installed, so it imports nothing but the standard library
before it knows which one is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 8
LLAMA_BATCH = 512  # its default, and the length of the prompt that all engines get


@dataclass
class Run:
    """One generation: seconds from the prompt to the first token, and from each token to the next."""

    first: float
    gaps: list[float]
    compiled: list[float] = field(default_factory=list)  # of each gap: seconds inside transformers_kt._C


def _peer() -> Any:
    """The module of the package that measures llama.cpp, from its file: the package is not in that interpreter."""
    spec = spec_from_file_location("peer", Path(__file__).parents[1] / "transformers_kt/cli/peer.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PEER = _peer()
Generate = Callable[[list[int]], Run]


def peak_rss_gb() -> float:
    # Not getrusage: its maximum survives exec, so it starts from what the benchmark itself has in memory.
    with open("/proc/self/status") as status:
        kib = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(kib) * 1024 / 1e9


def random_tokens(count: int, seed: int = 1) -> list[int]:
    state, tokens = seed, []
    for _ in range(count):
        state = (state * 48271) % 2147483647
        tokens.append(3 + state % 90000)
    return tokens


def measured(generate: Generate, settings: argparse.Namespace) -> dict[str, list[float]]:
    """Samples of each figure: tokens per second of prompts, and of decoding after them (one sample for each token)."""
    generate(random_tokens(WARM_UP_TOKENS))
    if settings.in_turns:
        take_turns(generate)
        return {}
    figures: dict[str, list[float]] = {}

    def add(tokens: int, decode: str | None) -> None:
        run = generate(random_tokens(tokens, seed=1 + len(figures)))
        if tokens > 1:
            figures.setdefault(f"prefill_{tokens}", []).append(tokens / run.first)
        if decode:
            figures.setdefault(decode, []).extend(1 / gap for gap in run.gaps)

    for _ in range(settings.repeats):
        add(1, "decode_0")
        add(settings.prefill, None)
    for depth in settings.depth:
        add(depth, f"decode_{depth}")
    return figures


def take_turns(generate: Generate) -> None:
    """Each line of stdin is a number of prompt tokens; the answer: seconds to the first token, and the gaps."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where ik_llama.cpp talks while it computes
    print("ready", file=answers, flush=True)
    for seed, line in enumerate(sys.stdin, 2):
        run = generate(random_tokens(int(line), seed))
        print(json.dumps([run.first, run.gaps]), file=answers, flush=True)


def generate_of(model: Any, new_tokens: int, compiled: Callable[[], float] = lambda: 0.0) -> Generate:
    """Ours and stock: `generate()` of transformers, greedy, with all of Python counted."""
    from transformers_kt.cli.timing import timed_generate

    def generate(tokens: list[int]) -> Run:
        return Run(*timed_generate(model, [tokens], new_tokens, compiled))

    return generate


@contextmanager
def timed_calls(module: Any) -> Iterator[Callable[[], float]]:
    """Gives the seconds spent so far in the functions of a compiled module and the methods of its classes."""
    spent = 0.0

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        return call

    replaced = []
    for owner in (module, *(value for value in vars(module).values() if isinstance(value, type))):
        for name, value in list(vars(owner).items()):
            if not name.startswith("_") and callable(value) and not isinstance(value, type):
                replaced.append((owner, name, value))
                setattr(owner, name, timed(value))
    try:
        yield lambda: spent
    finally:
        for owner, name, value in replaced:
            setattr(owner, name, value)


def run_ours(path: str, settings: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_kt
    import transformers_kt._C as _C

    transformers_kt.set_thread_count(settings.threads)
    torch.set_num_threads(settings.threads)
    before = peak_rss_gb()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
    load_s = time.perf_counter() - start
    figures = measured(generate_of(model, settings.new_tokens), settings)
    # Apart from the runs above, so that timing the calls costs none of them anything.
    with timed_calls(_C) as compiled:
        run = generate_of(model, settings.new_tokens, compiled)(random_tokens(1))
    python_ms = [1e3 * (gap - inside) for gap, inside in zip(run.gaps, run.compiled, strict=True)]
    return {
        "load_s": [load_s],
        "rss_before_load_gb": [before],
        **figures,
        "python_ms_per_token": python_ms,
        "isa": _C.isa(),
    }


def run_stock(path: str, settings: argparse.Namespace) -> dict[str, Any]:
    """transformers' own modules on dequantized weights, in bfloat16 as the original checkpoints are."""
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_kt  # noqa: F401  (teaches from_pretrained to read the file)

    torch.set_num_threads(settings.threads)
    before = peak_rss_gb()
    start = time.perf_counter()
    rules = [{"match": {"name": ""}, "replace": {"op": "torch"}}]
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_rules=rules)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    load_s = time.perf_counter() - start
    return {
        "load_s": [load_s],
        "rss_before_load_gb": [before],
        **measured(generate_of(model, settings.new_tokens), settings),
    }


def run_llama(
    path: str, settings: argparse.Namespace, *, repacked: bool = True, flash_attention: bool = False
) -> dict[str, Any]:
    """llama.cpp through llama-cpp-python, with its repacking or its tiles, without choosing tokens."""
    import llama_cpp

    before = peak_rss_gb()
    start = time.perf_counter()
    positions = max([*settings.depth, settings.prefill]) + settings.new_tokens + 32
    options = {"repacked": repacked, "flash_attention": flash_attention}
    llama = PEER.opened(llama_cpp, path, positions, settings.threads, **options)
    load_s = time.perf_counter() - start
    timed = PEER.timer(llama_cpp, llama)

    def generate(tokens: list[int]) -> Run:
        llama.reset()
        return Run(timed(tokens), [timed([3 + step]) for step in range(settings.new_tokens)])

    return {"load_s": [load_s], "rss_before_load_gb": [before], **measured(generate, settings)}


def run_ik_llama(path: str, settings: argparse.Namespace, *, repack: bool = False) -> dict[str, Any]:
    """ik_llama.cpp through ik-llama-cpp-python, without choosing tokens.

    With its attention over latents (`mla` 3) and its flash attention. `repack` is its run-time repacking, which takes
    memory of its own in place of mapping the file.
    """
    from ik_llama_cpp import _ctypes_api as ik
    from ik_llama_cpp._internals import make_batch_range

    before = peak_rss_gb()
    start = time.perf_counter()
    ik.llama_backend_init()
    model_options = ik.llama_model_default_params()
    model_options.repack_tensors, model_options.use_mmap = repack, not repack
    model = ik.llama_model_load_from_file(path.encode(), model_options)
    options = ik.llama_context_default_params()
    options.n_ctx = max([*settings.depth, settings.prefill]) + settings.new_tokens + 32
    options.n_batch = options.n_ubatch = LLAMA_BATCH
    options.n_threads = options.n_threads_batch = settings.threads
    options.mla_attn, options.flash_attn, options.fused_moe_up_gate = 3, True, True
    context = ik.llama_init_from_model(model, options) if model else None
    if context is None:
        raise SystemExit(f"ik_llama.cpp cannot load {path}; its own message stands above")
    load_s = time.perf_counter() - start

    def timed(tokens: list[int], position: int) -> float:
        """The pointer to the logits is asked for last: that call waits until they are there."""
        begin = time.perf_counter()
        for first in range(0, len(tokens), LLAMA_BATCH):
            part = tokens[first : first + LLAMA_BATCH]
            batch = make_batch_range(part, pos_start=position + first)
            status = ik.llama_decode(context, batch)
            ik.llama_batch_free(batch)
            if status != 0:
                raise SystemExit(f"ik_llama.cpp refused a batch of {len(part)} tokens with status {status}")
        ik.llama_get_logits_ith(context, -1)
        return time.perf_counter() - begin

    def generate(tokens: list[int]) -> Run:
        ik.llama_kv_cache_clear(context)
        return Run(timed(tokens, 0), [timed([3 + step], len(tokens) + step) for step in range(settings.new_tokens)])

    return {"load_s": [load_s], "rss_before_load_gb": [before], **measured(generate, settings)}


ENGINES: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "ours": run_ours,
    "llama.cpp": run_llama,
    "llama.cpp-tiled": lambda path, settings: run_llama(path, settings, repacked=False),
    "llama.cpp-fa": lambda path, settings: run_llama(path, settings, flash_attention=True),
    "ik_llama.cpp": run_ik_llama,
    "ik_llama.cpp-repacked": lambda path, settings: run_ik_llama(path, settings, repack=True),
    "stock": run_stock,
}


def main() -> None:
    engine, path, settings = sys.argv[1:]
    figures = ENGINES[engine](path, argparse.Namespace(**json.loads(settings)))
    figures["peak_rss_gb"] = [peak_rss_gb()]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
