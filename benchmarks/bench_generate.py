"""Prefill, decode, load and memory of whole models: ours, llama.cpp, ik_llama.cpp, stock transformers on the same file.

    python tests/support/synthetic.py v2-lite q4_k_m v2-lite.gguf
    python benchmarks/bench_generate.py v2-lite.gguf --llama-python venv/bin/python --json out.json --plot out.png

A peer is measured in each of its ways, and compared by its better: llama.cpp with weights repacked as it does by itself
and with tiles ("llama.cpp-tiled"), ik_llama.cpp as it does by itself and repacked at load ("ik_llama.cpp-repacked").

Engines alternate, each in a process of its own (two copies of a 10 GB model do not fit into 24 GB), `--rounds` times.
A round's figure is the median of its samples; medians over rounds are shown, and how far the rounds lie apart. Before
each process the file is read once, so that every load is one with a warm page cache; how much of the file the cache
really held is shown.

Ours and stock are timed inside `generate()` by a streamer: prefill is the time to the first token, decode the gap
between two tokens. "python_ms_per_token" is that gap less the time inside compiled calls. llama.cpp and ik_llama.cpp do
not choose tokens. "rss_before_load_gb" is what the engine's libraries take by themselves. `--llama-python` is an
interpreter that has llama-cpp-python, `--ik-llama-python` one that has ik-llama-cpp-python; "llama.cpp-fa" is llama.cpp
with flash attention. For AVX2, give interpreters with builds for it, and `--isa avx2`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engines
import measuring
import numpy as np
import psutil
from measuring import Limits, median
from rich.console import Console
from rich.table import Table

from transformers_kt.gguf.checkpoint import Checkpoint, open_checkpoint

ENGINES_SCRIPT = Path(__file__).with_name("engines.py")
LIMIT_SAMPLES = 5
STOCK_BYTES_PER_WEIGHT = 4  # while it loads; bfloat16 comes after
WAYS = {"llama.cpp": ("llama.cpp", "llama.cpp-tiled"), "ik_llama.cpp": ("ik_llama.cpp", "ik_llama.cpp-repacked")}


def bytes_per_token(checkpoint: Checkpoint) -> int:
    """Weights that one token reads: all but the embeddings, of the routed experts as many as it takes."""
    metadata = checkpoint.metadata
    architecture = metadata["general.architecture"]
    share = metadata[f"{architecture}.expert_used_count"] / metadata[f"{architecture}.expert_count"]
    total = 0.0
    for name, tensor in checkpoint.tensors.items():
        if name != "token_embd.weight" or "output.weight" not in checkpoint.tensors:
            total += tensor.nbytes * (share if re.search(r"ffn_(gate|up|down)_exps\.", name) else 1.0)
    return round(total)


def warm_page_cache(path: Path) -> float:
    """Reads the file; returns the share of it that the page cache holds afterwards, NaN where that is not told."""
    with path.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            resident = np.zeros(-(-view.nbytes // mmap.PAGESIZE), np.uint8)
            failed = ctypes.CDLL(None).mincore(
                *map(ctypes.c_void_p, (view.ctypes.data, view.nbytes, resident.ctypes.data))
            )
            del view  # the mapping cannot be closed while it is there
    return float("nan") if failed else float((resident & 1).mean())


def refusal(engine: str, checkpoint: Checkpoint) -> str | None:
    """Why the engine cannot run this file here."""
    if engine != "stock":
        return None
    weights = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    needed, available = weights * STOCK_BYTES_PER_WEIGHT, psutil.virtual_memory().available
    if needed < 0.95 * available:
        return None
    return (
        f"stock is skipped: dequantized weights take {needed / 1e9:.1f} GB as float32 while loading "
        f"({needed / 2e9:.1f} GB as bfloat16 after it), and {available / 1e9:.1f} GB are available"
    )


def run_engine(engine: str, interpreter: str, args: argparse.Namespace) -> dict[str, Any]:
    settings = {key: getattr(args, key) for key in ("threads", "prefill", "depth", "new_tokens", "repeats")}
    settings["in_turns"] = False
    command = [interpreter, str(ENGINES_SCRIPT), engine, args.gguf, json.dumps(settings)]
    environment = {**os.environ, **({"TRANSFORMERS_KT_ISA": args.isa} if args.isa else {})}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed with status {done.returncode}; its own message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each figure the median of each round, the median of these, and how far they lie apart."""
    figures = {}
    for key in (key for key, value in rounds[0].items() if isinstance(value, list)):
        per_round = [median(run[key]) for run in rounds]
        figures[key] = {"median": median(per_round), "spread": measuring.spread(per_round), "rounds": per_round}
    return figures


def program(engine: str) -> str:
    """What the engine is a way of."""
    return engine.split("-")[0]


def better(key: str, results: Mapping[str, dict[str, Any]], peer: str) -> float | None:
    """The median of the better of a program's ways: the highest speed; of times and memory the lowest."""
    best = max if key.startswith(("prefill", "decode")) else min
    ways = (figures[key]["median"] for engine, figures in results.items() if program(engine) == peer and key in figures)
    return best(ways, default=None)


def print_table(results: dict[str, dict[str, Any]], title: str) -> None:
    peers = dict.fromkeys(program(engine) for engine in results if engine != "ours" and "ours" in results)
    table = Table(title=title)
    for column in ("", *results, *(f"ours / {peer}" for peer in peers)):
        table.add_column(column.replace("-", "\n").replace("/ ", "/\n"), justify="right", no_wrap=True)
    for key in dict.fromkeys(key for figures in results.values() for key in figures):
        cells = []
        for figures in results.values():
            figure = figures.get(key)
            cells.append(f"{figure['median']:.2f} ±{figure['spread'] / 2:.0%}" if figure else "")
        for peer in peers:
            theirs, ours = better(key, results, peer), results["ours"].get(key)
            cells.append(f"{ours['median'] / theirs:.2f}" if ours and theirs else "")
        table.add_row(key, *cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """A panel for each speed, bars for the engines, marks for the rounds."""
    first = next(iter(results.values()))
    speeds = [key for key in first if key.startswith(("prefill", "decode"))]
    figure, axes = measuring.figure(len(speeds))
    for axis, key in zip(axes[0], speeds, strict=True):
        names = [engine for engine in results if key in results[engine]]
        axis.bar(
            names, [results[engine][key]["median"] for engine in names], color=[f"C{i}" for i in range(len(names))]
        )
        for index, engine in enumerate(names):
            values = results[engine][key]["rounds"]
            axis.plot([index] * len(values), values, "k.", alpha=0.6)
        axis.set_xticks(range(len(names)), [engine.replace("-", "\n") for engine in names])
        axis.set(title=key.replace("_", " "), ylabel="tokens / s")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=engines.ENGINES,
        help="default: ours, and both ways of those whose interpreters are given",
    )
    parser.add_argument("--llama-python", metavar="INTERPRETER")
    parser.add_argument("--ik-llama-python", metavar="INTERPRETER")
    parser.add_argument("--isa", help="instruction set of ours, as in TRANSFORMERS_KT_ISA")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, nargs="*", default=[4096], help="contexts for further decode figures")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="samples of each decode figure")
    parser.add_argument("--repeats", type=int, default=3, help="of prefill and empty-context decode in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    interpreters = {"llama.cpp": args.llama_python, "ik_llama.cpp": args.ik_llama_python}
    wanted = args.engines or ["ours", *(way for peer, given in interpreters.items() if given for way in WAYS[peer])]
    interpreter_of = {engine: interpreters.get(program(engine), sys.executable) for engine in wanted}
    for engine, interpreter in interpreter_of.items():
        if interpreter is None:
            parser.error(f"{engine} needs an interpreter that has it: --llama-python or --ik-llama-python")

    checkpoint = open_checkpoint(args.gguf)
    files = [file.path for file in checkpoint.files]
    limits = Limits(args.threads)
    for line in [*limits.missing, *filter(None, (refusal(engine, checkpoint) for engine in wanted))]:
        print(line)
    wanted = [engine for engine in wanted if refusal(engine, checkpoint) is None]
    if not wanted:
        raise SystemExit("no engine is left")
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in wanted}
    read: list[float] = []
    cached: list[float] = []
    for _ in range(args.rounds):
        for engine in wanted:
            read += measuring.in_turns({"read": limits.read_gb_per_s}, LIMIT_SAMPLES)["read"]
            cached.append(min(map(warm_page_cache, files)))
            runs[engine].append(run_engine(engine, interpreter_of[engine], args))
            shown = {key: round(median(value), 2) for key, value in runs[engine][-1].items() if isinstance(value, list)}
            print(engine, shown, flush=True)

    results = {engine: summary(rounds) for engine, rounds in runs.items()}
    per_token = bytes_per_token(checkpoint)
    print_table(results, f"{Path(args.gguf).name}, {args.threads} threads, {args.rounds} rounds")
    size = checkpoint.nbytes
    print(f"file {size / 1e9:.2f} GB, of which the page cache held {min(cached):.0%} to {max(cached):.0%} at loads")
    bound = median(read) * 1e9 / per_token
    print(
        f"read bandwidth {median(read):.1f} GB/s ({min(read):.1f} to {max(read):.1f}); {per_token / 1e9:.3f} GB of "
        f"weights a token: at most {bound:.1f} tokens/s"
    )
    for engine, figures in results.items():
        of_limit, of_file = figures["decode_0"]["median"] / bound, figures["peak_rss_gb"]["median"] * 1e9 / size
        print(f"{engine}: decode_0 is {of_limit:.0%} of that; peak resident is {of_file:.2f} of the file")
    measuring.save(
        args.json,
        {
            "machine": measuring.machine(),
            "file_bytes": size,
            "bytes_per_token": per_token,
            "read_gb_per_s": read,
            "page_cache_share": cached,
            "settings": {
                key: value
                for key, value in vars(args).items()
                if key not in ("json", "plot", "llama_python", "ik_llama_python")
            },
            "results": results,
            "runs": runs,
        },
    )
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    main()
