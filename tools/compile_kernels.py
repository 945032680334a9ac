"""Compile every Triton kernel for GPUs that need not be there, and refuse what spills or takes too much shared memory.

    python tools/compile_kernels.py                          # all types, sm_80 86 89 90 120
    python tools/compile_kernels.py --arch 89 --type Q4_K    # some of them

Prints a line a kernel: registers, bytes of stack, of shared memory, and the loads of 16 bytes among its loads.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transformers_kt.backends.gpu.panels import LAYOUTS
from transformers_kt.backends.triton import dequantize, gemv, mla_decode
from transformers_kt.backends.triton.unpack import KINDS

ARCHITECTURES = (80, 86, 89, 90, 120)
MOST_SHARED = 99 << 10  # bytes a block may have on consumer cards (sm_86, 89, 120)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


class Kernel(NamedTuple):
    """A kernel with the types of its arguments, as a call would make them, and its constants."""

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


def kernels(types: list[str]) -> list[Kernel]:
    found = []
    for name in types:
        found += [_gemv(name, tokens) for tokens in sorted({gemv.padded_tokens(name, n) for n in (1, 2, 4, 8)})]
        found.append(_dequantize(name))
    return found


def _gemv(name: str, tokens: int) -> Kernel:
    sizes = {"tokens": "i32", "rows": "i32", "x_stride": "i32"}
    if name not in KINDS:
        signature = {"panels": f"*{_element(name)}", "x": "*bf16", "out": "*fp32", **sizes, "cols": "i32"}
        constants = {"TOKENS": tokens, "COLUMNS": gemv.COLUMNS}
        return Kernel(f"gemv {name} x{tokens}", gemv.gemv_floats, signature, constants)
    signature = {"panels": "*i32", "x": "*bf16", "out": "*fp32", **sizes, "blocks": "i32", "panel_words": "i32"}
    constants = {"TOKENS": tokens, **gemv.constants(name)}
    return Kernel(f"gemv {name} x{tokens}", gemv.gemv_sets, signature, constants, gemv.warps(name))


def _dequantize(name: str) -> Kernel:
    sizes = {"rows": "i32", "out_stride": "i32"}
    if name not in KINDS:
        signature = {"panels": f"*{_element(name)}", "out": "*bf16", **sizes, "cols": "i32"}
        return Kernel(f"dequantize {name}", dequantize.dequantize_floats, signature, {"COLUMNS": gemv.COLUMNS})
    signature = {"panels": "*i32", "out": "*bf16", **sizes, "blocks": "i32", "panel_words": "i32"}
    return Kernel(f"dequantize {name}", dequantize.dequantize_sets, signature, gemv.constants(name))


def _element(name: str) -> str:
    return _DTYPES[gemv.FLOATS[name]]


def _mla_decode() -> list[Kernel]:
    """With the dimensions of every published DeepSeek model."""
    strides = ["query_batch", "query_head", "latents_batch", "latents_key", "ropes_batch", "ropes_key"]
    sizes = dict.fromkeys(("heads", "latent_dim", "rope_dim", *strides), "i32")
    tensors = {"query": "*fp32", "latents": "*bf16", "ropes": "*bf16", "ranges": "*i32", "scratch": "*fp32"}
    constants = {"LATENT": 512, "ROPE": 64, "TILE_HEADS": mla_decode.HEADS, "TILE_KEYS": mla_decode.KEYS}
    splits = Kernel("mla splits", mla_decode.mla_splits, {**tensors, **sizes}, constants)
    sizes = dict.fromkeys(("heads", "latent_dim", "splits", "out_batch", "out_head"), "i32")
    merge = Kernel("mla merge", mla_decode.mla_merge, {"scratch": "*fp32", "out": "*fp32", **sizes}, {"LATENT": 512})
    return [splits, merge]


def compiled(kernel: Kernel, arch: int) -> Any:
    names = kernel.function.arg_names
    # What a call finds out of its arguments: pointers and strides are multiples of 16.
    aligned = [
        name
        for name, kind in kernel.signature.items()
        if kind[0] == "*" or name.endswith(("_stride", "_words", "_key", "_dim"))
    ]
    source = ASTSource(
        fn=kernel.function,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, "num_warps": kernel.warps}
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and of local memory, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--type", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    options = parser.parse_args()
    refused = 0
    for kernel in [*kernels(options.type), *_mla_decode()]:
        for arch in options.arch:
            result = compiled(kernel, arch)
            use, loads = resources(result.asm["cubin"]), re.findall(r"ld\.global[.\w]*", result.asm["ptx"])
            is_fine = use["STACK"] == use["LOCAL"] == 0 and result.metadata.shared <= MOST_SHARED
            refused += not is_fine
            print(
                f"{kernel.name:20} sm_{arch:<4} {use['REG']:3} registers {use['STACK']:3} stack {use['LOCAL']:3} local "
                f"{result.metadata.shared:6} shared {sum('v4' in load for load in loads):3} of {len(loads):3} loads of "
                f"16 bytes{'' if is_fine else '  SPILLS OR TOO LARGE'}",
                flush=True,
            )
    return refused


if __name__ == "__main__":
    sys.exit(main())
