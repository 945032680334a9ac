"""Matrix products over packed panels: GB/s for one token, GOPS for many, against the memory and the multipliers.

    python benchmarks/bench_kernels.py --types Q4_K Q6_K --isas avx512_vnni avx2 --threads 2 --json kernels.json

Bounds are measured in the same run: reading a large F32 matrix in the same way (no arithmetic to speak of) for one
token; the scale is what one thread reads from L2. Medians of interleaved rounds; absolute times on a shared machine say
little, so read the last column.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from transformers_kt import _C

TYPES = {name: (number, elements, nbytes) for name, number, elements, nbytes in _C.weight_types()}
ROUNDS = 5
LARGE_BYTES = 256 << 20  # well past any L3 a few cores can hold on to


def matrix(name: str, rows: int, cols: int) -> _C.PackedMatrix:
    number, elements, nbytes = TYPES[name]
    packed = _C.PackedMatrix(number, 1, rows, cols)
    # Bytes below 60 keep every f16 and f32 finite.
    packed.pack(0, np.random.default_rng(0).integers(0, 60, rows * cols // elements * nbytes, dtype=np.uint8))
    return packed


def call(packed: _C.PackedMatrix, tokens: int) -> Callable[[], None]:
    x = np.random.default_rng(1).standard_normal((tokens, packed.cols)).astype(np.float32)
    out = np.empty((tokens, packed.rows), np.float32)
    return lambda: _C.linear(packed, x, out)


def medians(calls: list[Callable[[], None]]) -> list[float]:
    """Seconds per call, the calls taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for taken, run in zip(times, calls, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in times]


def measure(name: str, cols: int, tokens: list[int]) -> dict[str, float]:
    _number, elements, nbytes = TYPES[name]
    row_bytes = cols // elements * nbytes
    large = matrix(name, LARGE_BYTES // row_bytes // 32 * 32, cols)
    bound = matrix("F32", LARGE_BYTES // (cols * 4) // 32 * 32, cols)
    read, bound_read = medians([call(large, 1), call(bound, 1)])
    result = {"gb_per_s": large.nbytes / read / 1e9, "read_gb_per_s": bound.nbytes / bound_read / 1e9}
    small = matrix(name, 2816, cols)
    for count, seconds in zip(tokens, medians([call(small, count) for count in tokens]), strict=True):
        result[f"gops_{count}"] = 2 * count * small.rows * cols / seconds / 1e9
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--isas", nargs="+", choices=_C.supported_isas(), default=[_C.isa()])
    parser.add_argument("--threads", type=int, default=_C.thread_count())
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 48, 512], help="rows per expert")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    _C.set_thread_count(args.threads)
    table = Table(title=f"{args.threads} threads, {args.cols} columns; one token from memory, more from cache")
    for column in ("isa", "type", "GB/s", "of F32 read", *(f"GOPS {n}" for n in args.tokens)):
        table.add_column(column, justify="right")
    results = []
    for isa in args.isas:
        _C.select_isa(isa)
        for name in args.types:
            result = measure(name, args.cols, args.tokens)
            results.append({"isa": isa, "type": name, "threads": args.threads, "cols": args.cols, **result})
            share = result["gb_per_s"] / result["read_gb_per_s"]
            gops = (f"{result[f'gops_{n}']:.0f}" for n in args.tokens)
            table.add_row(isa, name, f"{result['gb_per_s']:.1f}", f"{share:.0%}", *gops)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
