"""Prefill, decode, load and memory of whole models: ours against llama.cpp on the same file.

    python benchmarks/synthetic.py v2-lite q4_k_m v2-lite.gguf
    python benchmarks/bench_generate.py v2-lite.gguf --llama-python /path/to/venv/bin/python --json result.json

Engines take turns, each in a process of its own (two copies of a 10 GB model do not fit into 24 GB), `--rounds` times;
medians are reported. Ours is timed inside `generate()` by a streamer, with all of Python counted: prefill is the time
to the first token, decode the median gap between tokens. llama.cpp runs through
llama-cpp-python, without choosing tokens. `--llama-python` is an interpreter that has it; without one only ours runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFILL_TOKENS = 512
NEW_TOKENS = 24


def random_tokens(count: int) -> list[int]:
    state, tokens = 1, []
    for _ in range(count):
        state = (state * 48271) % 2147483647
        tokens.append(3 + state % 90000)
    return tokens


def measured(timed: Callable[[int], tuple[float, float]], depth: int) -> dict[str, float]:
    """`timed(tokens)` gives tokens per second of a prompt so long, and of decoding after it."""
    timed(8)
    result = {"decode_0": timed(1)[1], f"prefill_{PREFILL_TOKENS}": timed(PREFILL_TOKENS)[0]}
    if depth:
        result[f"prefill_{depth}"], result[f"decode_{depth}"] = timed(depth)
    result["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return result


def run_ours(path: str, threads: int, depth: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    import transformers_kt

    transformers_kt.set_thread_count(threads)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
    load_s = time.perf_counter() - start

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def timed(tokens: int) -> tuple[float, float]:
        clock = Clock()
        ids = torch.tensor([random_tokens(tokens)])
        model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock, eos_token_id=None)
        gaps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
        return tokens / (clock.times[1] - clock.times[0]), 1 / statistics.median(gaps)

    return {"load_s": load_s, **measured(timed, depth)}


def run_llama(path: str, threads: int, depth: int) -> dict[str, float]:
    import llama_cpp

    start = time.perf_counter()
    llama = llama_cpp.Llama(
        path,
        n_ctx=max(depth, PREFILL_TOKENS) + 64,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    load_s = time.perf_counter() - start

    def timed(tokens: int) -> tuple[float, float]:
        llama.reset()
        begin = time.perf_counter()
        llama.eval(random_tokens(tokens))
        prefill = time.perf_counter() - begin
        gaps = []
        for step in range(NEW_TOKENS):
            begin = time.perf_counter()
            llama.eval([3 + step])
            gaps.append(time.perf_counter() - begin)
        return tokens / prefill, 1 / statistics.median(gaps)

    return {"load_s": load_s, **measured(timed, depth)}


ENGINES = {"ours": run_ours, "llama.cpp": run_llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("--llama-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4096, help="context for the second decode figure; 0: skip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(ENGINES[args.engine](args.gguf, args.threads, args.depth)))
        return

    interpreters = {"ours": sys.executable} | ({"llama.cpp": args.llama_python} if args.llama_python else {})
    results: dict[str, list[dict[str, float]]] = {engine: [] for engine in interpreters}
    for _ in range(args.rounds):
        for engine, interpreter in interpreters.items():
            command = [interpreter, __file__, args.gguf, "--engine", engine]
            command += ["--threads", str(args.threads), "--depth", str(args.depth)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[engine].append(json.loads(output.splitlines()[-1]))
            print(engine, {key: round(value, 2) for key, value in results[engine][-1].items()}, flush=True)
    medians = {
        engine: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for engine, runs in results.items()
    }
    for key in medians["ours"]:
        figures = "  ".join(f"{engine} {medians[engine][key]:8.2f}" for engine in medians)
        ratio = f"  ratio {medians['ours'][key] / medians['llama.cpp'][key]:.2f}" if "llama.cpp" in medians else ""
        print(f"{key:14} {figures}{ratio}")
    if args.json:
        args.json.write_text(json.dumps({"runs": results, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
