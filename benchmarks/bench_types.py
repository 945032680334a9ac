"""Prompts and decode, type by type: ours, llama.cpp and ik_llama.cpp on a file of each.

    python benchmarks/bench_types.py only-iq4_xs only-q3_k --llama-python venv/bin/python

Files are those of tests/support/synthetic.py, of V2-Lite's dimensions with 8 experts, of which a token takes 6: small
enough for all engines in memory at once. So each engine is a process that stays, and they generate in turns, a few
seconds each: all meet the same slow minute. A file is written before it is measured and removed after. Cells are
medians over rounds; a ratio is to the better of a program's ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]
import measuring  # noqa: E402
import synthetic  # noqa: E402
from bench_generate import ENGINES_SCRIPT, WAYS, program  # noqa: E402
from measuring import Limits, median  # noqa: E402

PROMPT_TOKENS = 512
Speeds = dict[str, dict[str, list[float]]]
"""Tokens per second of each round, by "prefill" and "decode", by engine."""


class EngineEnded(Exception):
    """An engine that cannot do what was asked, such as ik_llama.cpp to repack some types: the others go on."""


class Engine:
    """A process that has loaded a file and generates when asked."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._name = process, name
        while self._line() != "ready\n":  # but for what its libraries print while they load
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineEnded(f"{self._name} ended; its own message stands above")
        return line

    def prefill(self) -> float:
        first, _gaps = self._generate(PROMPT_TOKENS)
        return PROMPT_TOKENS / first

    def decode(self) -> float:
        _first, gaps = self._generate(1)
        return 1 / median(gaps)

    def _generate(self, tokens: int) -> tuple[float, list[float]]:
        assert self._process.stdin is not None
        print(tokens, file=self._process.stdin, flush=True)
        first, gaps = json.loads(self._line())
        return first, gaps


@contextmanager
def started(engine: str, interpreter: str, file: Path, settings: dict[str, Any]) -> Iterator[Engine]:
    command = [interpreter, str(ENGINES_SCRIPT), engine, str(file), json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Engine(process, engine)
        finally:
            process.kill()


def speeds(file: Path, interpreters: dict[str, str], args: argparse.Namespace) -> Speeds:
    settings = {
        **{"threads": args.threads, "new_tokens": args.new_tokens, "prefill": PROMPT_TOKENS, "depth": []},
        "in_turns": True,
    }
    found: Speeds = {engine: {"prefill": [], "decode": []} for engine in interpreters}
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name, interpreter in interpreters.items():
            try:
                engines[name] = stack.enter_context(started(name, interpreter, file, settings))
                engines[name].prefill()
            except EngineEnded as error:
                print(f"{file.name}: {error}", flush=True)
                engines.pop(name, None)
        for _ in range(args.rounds):
            for name, engine in engines.items():
                found[name]["prefill"].append(engine.prefill())
            for name, engine in engines.items():
                found[name]["decode"].append(engine.decode())
    return found


def table(results: dict[str, Speeds]) -> str:
    """Markdown: a line for each file and figure, the engines, and ours over the better way of each peer."""
    engines = list(next(iter(results.values())))
    peers = list(dict.fromkeys(program(engine) for engine in engines if engine != "ours"))
    lines = [
        "| file | tok/s | " + " | ".join([*engines, *(f"ours / {peer}" for peer in peers)]) + " |",
        "|---" * (2 + len(engines) + len(peers)) + "|",
    ]
    for file, found in results.items():
        for figure in ("prefill", "decode"):
            medians = {engine: median(rounds) for engine in engines if (rounds := found[engine][figure])}
            cells = [f"{medians[engine]:.1f}" if engine in medians else "" for engine in engines]
            for peer in peers:
                best = max((value for engine, value in medians.items() if program(engine) == peer), default=None)
                cells.append(f"{medians['ours'] / best:.2f}" if best else "")
            lines.append(f"| {file} | {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantizations", nargs="+", choices=synthetic.QUANTIZATIONS, metavar="QUANTIZATION")
    parser.add_argument("--model", choices=synthetic.MODELS, default="v2-lite-even")
    parser.add_argument("--llama-python", metavar="INTERPRETER")
    parser.add_argument("--ik-llama-python", metavar="INTERPRETER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=16, help="whose gaps are a sample of decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are written, 1 to 3 GB at a time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    given = {"llama.cpp": args.llama_python, "ik_llama.cpp": args.ik_llama_python}
    interpreters = {"ours": sys.executable}
    interpreters |= {way: python for peer, python in given.items() if python for way in WAYS[peer]}

    limits = Limits(args.threads)
    results: dict[str, Speeds] = {}
    read: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for quantization in args.quantizations:
            file = Path(folder) / f"{quantization}.gguf"
            synthetic.write(args.model, quantization, file, experts=8)
            read.append(limits.read_gb_per_s())
            results[quantization] = speeds(file, interpreters, args)
            os.remove(file)
            print(table({quantization: results[quantization]}), flush=True)
    print("\n" + table(results))
    print(f"\nread bandwidth {median(read):.1f} GB/s ({min(read):.1f} to {max(read):.1f})")
    measuring.save(args.json, {"machine": measuring.machine(), "read_gb_per_s": read, "results": results})


if __name__ == "__main__":
    main()
