"""Compile every Triton kernel for GPUs that need not be there, and refuse what spills or takes too much shared memory.

    python tools/compile_kernels.py                          # all types, sm_80 86 89 90 120
    python tools/compile_kernels.py --arch 89 --type Q4_K    # some of them
    python tools/compile_kernels.py --table benchmarks/gpu_kernels.md

Prints a line a kernel: registers, spilled bytes, bytes of shared memory, and the loads of 16 bytes among its loads.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transformers_kt.backends.triton import (
    dequantize,
    gemm,
    gemv,
    grouped_experts,
    mla_decode,
    norm,
    norm_rope_append,
    router_stage,
    swiglu,
)
from transformers_kt.backends.triton.unpack import KINDS

ARCHITECTURES = (80, 86, 89, 90, 120)
MOST_SHARED = 99 << 10  # bytes a block may have on consumer cards (sm_86, 89, 120)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LOADS = r"ld\.global[.\w]*|cp\.async\.c[ag]"  # .cg always takes 16 bytes
_COUNTS = ("tokens", "blocks", "top_k", "heads", "splits", "values", "lengths_stride", "ranges_stride")
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


_ABOVE_TABLE = """# What GPU kernels take

Registers of a thread / bytes of shared memory / spilled bytes, as Triton {} compiles them (`make compile-kernels`).
No kernel has run on a GPU.

"""


class Kernel(NamedTuple):
    """A kernel with the types of its arguments, as a call would make them, and its constants."""

    name: str
    function: Any
    types: dict[str, str]
    """Of arguments that are not int32."""
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def kernels(types: list[str]) -> list[Kernel]:
    """Those that read panels, for each type; activations are bfloat16."""
    return [kernel for name in types for kernel in _of_panels(name)]


def _of_panels(name: str) -> list[Kernel]:
    stored = f"*{_DTYPES[gemv.as_stored(torch.empty(0, dtype=torch.uint8), name).dtype]}"
    kind, warps = {"KIND": KINDS[name]}, gemv.warps(name)
    types = {"panels": stored, "x": "*bf16", "out": "*fp32"}
    found = []
    for tokens in sorted({gemv.padded_tokens(name, n) for n in (1, 2, 4, 8)}):
        found.append(Kernel(f"gemv {name} x{tokens}", gemv.gemv_kernel, types, {"TOKENS": tokens, **kind}, warps))
    own = {"TOKENS": gemm.MOST_ROWS, **kind}
    found.append(Kernel(f"gemm {name}", gemm.gemm_kernel, types, own, *gemm.warps_and_stages(name).values()))
    types = {"gate": stored, "up": stored, "x": "*bf16", "ids": "*i32", "hidden": "*bf16"}
    found.append(Kernel(f"gate up {name}", grouped_experts.gate_up_kernel, types, kind, warps))
    types = {"down": stored, "hidden": "*bf16", "ids": "*i32", "weights": "*fp32", "out": "*fp32"}
    found.append(Kernel(f"down {name}", grouped_experts.down_kernel, types, kind, warps))
    types = {"panels": stored, "out": "*bf16"}
    return [*found, Kernel(f"dequantize {name}", dequantize.dequantize_kernel, types, kind)]


def other_kernels() -> list[Kernel]:
    """With the dimensions of the largest published DeepSeek models."""
    types = {"x": "*fp32", "first": "*fp32", "second": "*fp32", "weight": "*fp32", "out": "*bf16", "eps": "fp32"}
    constants = {"ADDED": 2, "SIZE": 8192}
    found = [Kernel("add, norm", norm.rms_norm_kernel, types, constants, norm.WARPS)]
    floats = ("query", "query_norm", "key", "key_norm", "rope_table")
    types = {**dict.fromkeys(floats, "*fp32"), "query_out": "*bf16", "latents": "*bf16", "ropes": "*bf16"}
    types |= {"lengths": "*i32", "eps": "fp32"}
    constants = {"QUERY": 2048, "LATENT": 512, "PAIRS": 32}
    found.append(Kernel("norm, rope, append", norm_rope_append.norm_rope_append_kernel, types, constants))
    types = {**dict.fromkeys(("query", "query_rope", "rope_table", "scratch"), "*fp32"), "ranges": "*i32"}
    types |= {"latents": "*bf16", "ropes": "*bf16", "scale": "fp32"}
    constants = {"HAS_TABLE": True, "LATENT": 512, "ROPE": 64}
    constants |= {"TILE_HEADS": mla_decode.HEADS, "TILE_KEYS": mla_decode.KEYS}
    found.append(Kernel("mla splits", mla_decode.mla_splits, types, constants))
    types = {"scratch": "*fp32", "out": "*bf16"}
    found.append(Kernel("mla merge", mla_decode.mla_merge, types, {"LATENT": 512}))
    types = {"gate_up": "*fp32", "out": "*bf16"}
    found.append(Kernel("swiglu", swiglu.swiglu_kernel, types, {"SIZE": swiglu.SIZE}))
    floats = ("logits", "bias", "x", "staged_x", "staged_weights", "resident_weights")
    types = {**dict.fromkeys(floats, "*fp32"), **dict.fromkeys(("staged_ids", "slots", "resident_ids"), "*i32")}
    types |= {"scale": "fp32"}
    v3 = {"SIGMOID": True, "NORMALIZE": True, "GROUPS": 8, "TOP_GROUPS": 4, "TOP_K": 8, "PADDED_GROUPS": 8}
    v2 = {"SIGMOID": False, "NORMALIZE": False, "GROUPS": 8, "TOP_GROUPS": 3, "TOP_K": 6, "PADDED_GROUPS": 8}
    for title, router in (("sigmoid", v3), ("softmax", v2)):
        constants = {"HAS_BIAS": title == "sigmoid", "HAS_SLOTS": True, **router, "PADDED_SIZE": 32}
        constants |= {"COPIED": router_stage.COPIED}
        found.append(Kernel(f"router, {title}", router_stage.router_stage_kernel, types, constants, 1))
    types = {"partial": "*fp32", "out": "*fp32"}
    return [*found, Kernel("add splits", gemv.add_splits, types, {"SIZE": 1024})]


def compiled(kernel: Kernel, arch: int) -> Any:
    names = kernel.function.arg_names
    signature = {name: kernel.types.get(name, "constexpr" if name in kernel.constants else "i32") for name in names}
    # What a call finds out of its arguments: pointers, dimensions and strides are multiples of 16.
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and name not in _COUNTS)]
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"enable_fp_fusion": False, "num_warps": kernel.warps, "num_stages": kernel.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


class Use(NamedTuple):
    """What a compiled kernel takes; bytes but for registers and numbers of loads."""

    registers: int
    spilled: int
    shared: int
    loads: int
    wide_loads: int
    """Those of 16 bytes."""

    @property
    def is_fine(self) -> bool:
        return self.spilled == 0 and self.shared <= MOST_SHARED


def use_of(kernel: Kernel, arch: int) -> Use:
    result = compiled(kernel, arch)
    found, loads = resources(result.asm["cubin"]), re.findall(_LOADS, result.asm["ptx"])
    wide = sum("v4" in load or "cg" in load for load in loads)
    return Use(found["REG"], found["STACK"] + found["LOCAL"], result.metadata.shared, len(loads), wide)


def table_of(used: dict[str, dict[int, Use]], archs: Sequence[int]) -> str:
    """Markdown: a row a kernel, a column an architecture."""
    head = [["kernel", *(f"sm_{arch}" for arch in archs)], ["---"] * (1 + len(archs))]
    cells = {
        kernel: [f"{use.registers} / {use.shared} / {use.spilled}" for use in of.values()]
        for kernel, of in used.items()
    }
    rows = [*head, *([kernel, *own] for kernel, own in cells.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--type", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--kernel", default="", help="only kernels whose name has this")
    parser.add_argument("--table", type=Path, help="Markdown file to write registers, shared memory and spills to")
    options = parser.parse_args()
    used: dict[str, dict[int, Use]] = {}
    for kernel in [*kernels(options.type), *other_kernels()]:
        if options.kernel not in kernel.name:
            continue
        used[kernel.name] = {}
        for arch in options.arch:
            use = used[kernel.name][arch] = use_of(kernel, arch)
            print(
                f"{kernel.name:20} sm_{arch:<4} {use.registers:3} registers {use.spilled:3} spilled",
                f"{use.shared:6} shared {use.wide_loads:3} of {use.loads:3} loads of 16 bytes",
                "" if use.is_fine else " SPILLS OR TOO LARGE",
                flush=True,
            )
    if options.table:
        options.table.write_text(_ABOVE_TABLE.format(triton.__version__) + table_of(used, options.arch))
    return sum(not use.is_fine for of in used.values() for use in of.values())


if __name__ == "__main__":
    sys.exit(main())
