"""One MoE layer of DeepSeek-V3 in one call: 1 token against the memory, 512 tokens against the multipliers.

    python benchmarks/bench_moe.py --threads 2 --json moe.json

Real widths (7168, experts of 2048, a shared expert), 64 experts of 256, of which a token takes 8; random weights. For
one token, each call has another token, so its experts come from memory. "routed" is the routed experts alone, each
token's 8 drawn at random; "layer" is all: router, routed and shared experts. Limits are sampled in the same rounds
(limits.cpp), and what is set against them are medians of the ratios of each round.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from measuring import Limits, median, share
from rich.console import Console
from rich.table import Table

import transformers_kt._C as _C

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import synthetic

HIDDEN, INTERMEDIATE, TOP_K = 7168, 2048, 8
GROUPS, TOP_GROUPS = 8, 4
MANY_TOKENS = 512
DIFFERENT_TOKENS = 64  # for one at a time
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0")


def matrix(name: str, count: int, rows: int, cols: int) -> _C.PackedMatrix:
    ggml_type = GGMLQuantizationType[name]
    packed = _C.PackedMatrix(int(ggml_type), count, rows, cols)
    elements, _nbytes = GGML_QUANT_SIZES[ggml_type]
    blocks = synthetic.random_blocks(ggml_type, rows * cols // elements, cols**-0.5, np.random.default_rng(0))
    source = np.ascontiguousarray(blocks).reshape(-1)
    for index in range(count):
        packed.pack(index, source)
    return packed


def experts(gate_up: str, down: str, count: int) -> tuple[_C.Experts, int]:
    """Experts, and how many bytes one of them has."""
    gate, up = (matrix(gate_up, count, INTERMEDIATE, HIDDEN) for _ in range(2))
    last = matrix(down, count, HIDDEN, INTERMEDIATE)
    return _C.Experts(gate, up, last), (gate.nbytes + up.nbytes + last.nbytes) // count


def float_matrix(values: np.ndarray[Any, np.dtype[np.float32]]) -> _C.PackedMatrix:
    packed = _C.PackedMatrix(int(GGMLQuantizationType.F32), 1, *values.shape)
    packed.pack_floats(values[None])
    return packed


def samplers(routed: _C.Experts, block: _C.MoeBlock, count: int) -> dict[str, Callable[[], float]]:
    rng = np.random.default_rng(1)
    many = rng.standard_normal((MANY_TOKENS, HIDDEN), dtype=np.float32)
    out, logits = np.empty_like(many), np.empty((MANY_TOKENS, count), np.float32)
    indices = np.argsort(rng.random((MANY_TOKENS, count)), axis=1)[:, :TOP_K].astype(np.int64)
    weights = np.full((MANY_TOKENS, TOP_K), 1 / TOP_K, np.float32)
    turn = itertools.cycle(range(DIFFERENT_TOKENS))

    def one(call: Callable[[int], None]) -> Callable[[], float]:
        return lambda: measuring.seconds_per_call(lambda: call(next(turn)))

    def layer_of_one(i: int) -> None:
        block.forward(many[i : i + 1], out[:1], logits[:1])

    def routed_of_one(i: int) -> None:
        routed.forward_routed(many[i : i + 1], indices[i : i + 1], weights[i : i + 1], out[:1])

    return {
        "layer, 1 token": one(layer_of_one),
        "routed, 1 token": one(routed_of_one),
        f"layer, {MANY_TOKENS} tokens": lambda: measuring.seconds_per_call(lambda: block.forward(many, out, logits)),
        f"routed, {MANY_TOKENS} tokens": lambda: measuring.seconds_per_call(
            lambda: routed.forward_routed(many, indices, weights, out)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate-up", choices=TYPES, default="Q4_K", help="their type")
    parser.add_argument("--down", choices=TYPES, default="Q6_K", help="its type")
    parser.add_argument("--experts", type=int, default=64, help=f"a multiple of {GROUPS}")
    parser.add_argument("--isa", choices=_C.supported_isas(), default=_C.isa())
    parser.add_argument("--threads", type=int, default=_C.thread_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.experts % GROUPS or args.experts // GROUPS * TOP_GROUPS < TOP_K:
        parser.error(f"--experts must be a multiple of {GROUPS}, at least {GROUPS * TOP_K // TOP_GROUPS}")

    _C.select_isa(args.isa)
    _C.set_thread_count(args.threads)
    limits = Limits(args.threads)
    routed, expert_bytes = experts(args.gate_up, args.down, args.experts)
    shared, _shared_bytes = experts(args.gate_up, args.down, 1)
    scores = np.random.default_rng(2).standard_normal((args.experts, HIDDEN), dtype=np.float32) * HIDDEN**-0.5
    router = float_matrix(scores)
    block = _C.MoeBlock(
        router, np.zeros(args.experts, np.float32), routed, shared,
        sigmoid=True, groups=GROUPS, top_groups=TOP_GROUPS, top_k=TOP_K, normalize=True, scale=2.5,
    )  # fmt: skip
    calls = samplers(routed, block, args.experts)
    samples = measuring.in_turns({**limits.samplers, **calls}, args.rounds)

    reads, peaks = samples["read_gb_per_s"], samples["dot_gops"]
    expert_operations = 2 * 3 * HIDDEN * INTERMEDIATE
    table = Table(title=f"{args.threads} threads, {args.isa}, {args.gate_up} and {args.down}, {args.experts} experts")
    for column in ("", "ms", "spread", "GFLOPS", "GB/s", "at least, ms", "time / least"):
        table.add_column(column, justify="right", no_wrap=True)
    results = {}
    for name in calls:
        tokens = 1 if name.endswith("1 token") else MANY_TOKENS
        taken = TOP_K + 1 if name.startswith("layer") else TOP_K
        used = taken if tokens == 1 else min(args.experts + taken - TOP_K, tokens * taken)
        nbytes = used * expert_bytes + (router.nbytes if name.startswith("layer") else 0)
        operations = tokens * taken * expert_operations
        seconds = median(samples[name])
        # Round by round: where memory jumps between two speeds, the medians may be of different ones.
        leasts = [measuring.least_seconds(nbytes, operations, *limit) for limit in zip(reads, peaks, strict=True)]
        over_least = median([s / least for s, least in zip(samples[name], leasts, strict=True)])
        results[name] = {
            "seconds": samples[name], "median_s": seconds, "nbytes": nbytes, "operations": operations,
            "at_least_s": median(leasts), "over_least": over_least,
            "of_read": median([nbytes / s / 1e9 / read for s, read in zip(samples[name], reads, strict=True)]),
            "of_peak": median([operations / s / 1e9 / peak for s, peak in zip(samples[name], peaks, strict=True)]),
        }  # fmt: skip
        rates = (f"{operations / seconds / 1e9:.0f}", f"{nbytes / seconds / 1e9:.1f}")
        spread = f"{measuring.spread(samples[name]):.0%}"
        table.add_row(name, f"{seconds * 1e3:.2f}", spread, *rates, f"{median(leasts) * 1e3:.2f}", f"{over_least:.2f}")
    for line in limits.missing:
        print("not measured:", line)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(f"read {median(reads):.1f} GB/s, dot products of bytes {median(peaks):.0f} GOPS (medians of the same rounds)")
    of_peak = share(results[f"routed, {MANY_TOKENS} tokens"]["of_peak"], 1.0)
    print(f"routed experts, {MANY_TOKENS} tokens: {of_peak} of the dot-product peak")
    settings = {key: getattr(args, key) for key in ("gate_up", "down", "experts", "isa", "threads")}
    limits_seen = {key: samples[key] for key in limits.samplers}
    measuring.save(args.json, {"machine": measuring.machine(), **settings, "limits": limits_seen, "results": results})


if __name__ == "__main__":
    main()
