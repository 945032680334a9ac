"""Matrix products over packed panels, 1 to 512 rows per expert, against what the memory and the multipliers can do.

    python benchmarks/bench_kernels.py --threads 2 --isas avx512_vnni avx2 --json kernels.json --plot kernels.png

Weights come from memory: each call takes the next of as many matrices as no cache can hold, as experts follow one
another in a model. Limits are sampled in the same rounds by the same number of threads (limits.cpp): reading memory,
dot products of bytes (VNNI, or those of AVX2, which sum in 16 bits), for the float types multiply-adds of float32.
Percentages beside GB/s are of the read bandwidth; those beside GOPS are of the limit: the time that reading the weights
or multiplying would take at least, whichever is longer, over the time taken.

Medians; the last lines say how far the limits moved. On a machine that others use too, read shares, not times.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
from gguf import GGMLQuantizationType
from measuring import Limits, median, share
from rich.console import Console
from rich.table import Table

import transformers_kt._C as _C

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import synthetic

TYPES = {name: (number, elements, nbytes) for name, number, elements, nbytes in _C.weight_types()}
FLOAT_TYPES = ("F32", "F16", "BF16")
ROWS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
COLUMNS_SHOWN = (1, 8, 64, 512)
MOST_OUTPUTS = 1 << 24  # float32 values: 512 rows of an output matrix are logits that no one asks for
LARGE_BYTES = 256 << 20  # of weights, see the top of this file


class Shape(NamedTuple):
    model: str
    part: str
    rows: int
    cols: int


SHAPES = {
    "v2-lite-gate": Shape("v2-lite", "gate, up", 1408, 2048),
    "v2-lite-down": Shape("v2-lite", "down", 2048, 1408),
    "v2-lite-output": Shape("v2-lite", "output", 102400, 2048),
    "v3-gate": Shape("v3", "gate, up", 2048, 7168),
    "v3-down": Shape("v3", "down", 7168, 2048),
}


def random_bytes(name: str, elements: int, cols: int) -> Any:
    """Bytes of a matrix of finite weights about 1 / sqrt(cols) large."""
    _number, block, _nbytes = TYPES[name]
    rng = np.random.default_rng(0)
    if name in FLOAT_TYPES:
        values = rng.standard_normal(elements, dtype=np.float32) / np.float32(np.sqrt(cols))
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    blocks = synthetic.random_blocks(GGMLQuantizationType[name], elements // block, cols**-0.5, rng)
    return np.ascontiguousarray(blocks).reshape(-1)


def matrices(name: str, shape: Shape) -> list[_C.PackedMatrix]:
    number, elements, nbytes = TYPES[name]
    source = random_bytes(name, shape.rows * shape.cols, shape.cols)
    packed = []
    for _ in range(max(2, LARGE_BYTES // (shape.rows * shape.cols // elements * nbytes))):
        packed.append(_C.PackedMatrix(number, 1, shape.rows, shape.cols))
        packed[-1].pack(0, source)
    return packed


def sampler(packed: list[_C.PackedMatrix], rows: int) -> Callable[[], float]:
    """Samples seconds per product of `rows` activation rows with the next matrix."""
    x = np.random.default_rng(1).standard_normal((rows, packed[0].cols), dtype=np.float32)
    out = np.empty((rows, packed[0].rows), np.float32)
    turn = itertools.cycle(packed)
    return lambda: measuring.seconds_per_call(lambda: _C.linear(next(turn), x, out))


def measure(name: str, shape: Shape, limits: Limits, rounds: int, row_counts: list[int]) -> dict[str, Any]:
    packed = matrices(name, shape)
    row_counts = [rows for rows in row_counts if rows * shape.rows <= MOST_OUTPUTS]
    samplers = {str(rows): sampler(packed, rows) for rows in row_counts}
    samples = measuring.in_turns({**limits.samplers, **samplers}, rounds)
    read = median(samples["read_gb_per_s"])
    peak = median(samples["fma_gflops" if name in FLOAT_TYPES else "dot_gops"])
    per_rows = []
    for rows in row_counts:
        seconds = median(samples[str(rows)])
        operations = 2 * rows * shape.rows * shape.cols
        least = measuring.least_seconds(packed[0].nbytes, operations, read, peak)
        per_rows.append(
            {
                "rows": rows,
                "seconds": seconds,
                "spread": measuring.spread(samples[str(rows)]),
                "gb_per_s": packed[0].nbytes / seconds / 1e9,
                "gops": operations / seconds / 1e9,
                "of_read": packed[0].nbytes / seconds / 1e9 / read,
                "of_peak": operations / seconds / 1e9 / peak,
                "of_limit": least / seconds,
            }
        )
    limits_seen = {key: samples[key] for key in limits.samplers}
    return {"type": name, **shape._asdict(), "nbytes": packed[0].nbytes, "limits": limits_seen, "per_rows": per_rows}


def print_table(results: list[dict[str, Any]], row_counts: list[int], title: str) -> None:
    shown = [rows for rows in row_counts if rows in COLUMNS_SHOWN] or row_counts
    table = Table(title=title)
    columns = ("isa", "type", "matrix", "GB/s, 1 row", *(f"GOPS, {rows}" for rows in shown))
    for column in columns if 1 in row_counts else columns[:3] + columns[4:]:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        by_rows = {entry["rows"]: entry for entry in result["per_rows"]}
        cells = [result["isa"], result["type"], f"{result['model']} {result['part']}"]
        if 1 in by_rows:
            cells.append(f"{by_rows[1]['gb_per_s']:.1f} {share(by_rows[1]['of_read'], 1.0)}")
        for entry in map(by_rows.get, shown):
            cells.append(f"{entry['gops']:.0f} {share(entry['of_limit'], 1.0)}" if entry else "")
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """One panel per shape: share of the limit over rows per expert, a line for each type and instruction set."""
    parts = list(dict.fromkeys((result["model"], result["part"]) for result in results))
    styles = dict(
        zip(dict.fromkeys(result["isa"] for result in results), itertools.cycle(("-", "--", ":", "-.")), strict=False)
    )
    colors = {name: f"C{index}" for index, name in enumerate(TYPES)}
    figure, axes = measuring.figure(len(parts))
    for axis, part in zip(axes[0], parts, strict=True):
        for result in results:
            if (result["model"], result["part"]) == part:
                entries = result["per_rows"]
                axis.plot(
                    [entry["rows"] for entry in entries],
                    [100 * entry["of_limit"] for entry in entries],
                    styles[result["isa"]],
                    color=colors[result["type"]],
                    label=f"{result['type']} {result['isa']}",
                )
        axis.set(title=" ".join(part), xlabel="rows per expert", ylabel="% of limit", xscale="log", ylim=(0, 105))
        axis.set_xticks(ROWS_PER_EXPERT, [str(rows) for rows in ROWS_PER_EXPERT])
        axis.minorticks_off()
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--isas", nargs="+", choices=_C.supported_isas(), default=[_C.isa()])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS_PER_EXPERT), help="per expert")
    parser.add_argument("--threads", type=int, default=_C.thread_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    _C.set_thread_count(args.threads)
    limits = Limits(args.threads)
    for line in limits.missing:
        print("not measured:", line)
    results = []
    for isa, shape_name, name in itertools.product(args.isas, args.shapes, args.types):
        shape = SHAPES[shape_name]
        if shape.cols % TYPES[name][1]:
            continue  # no file has this type here
        _C.select_isa(isa)
        results.append({"isa": isa, **measure(name, shape, limits, args.rounds, args.rows)})
    print_table(results, args.rows, f"{args.threads} threads, medians of {args.rounds} rounds")
    for key in limits.samplers:
        values = [value for result in results for value in result["limits"][key]]
        print(f"{key} {median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    measuring.save(args.json, {"machine": measuring.machine(), "threads": args.threads, "results": results})
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    main()
