"""Triton kernels give the numbers of the plain torch form: interpreted where there is no GPU, compiled where there is.

Compiling for GPUs that are not there is tested apart, in a process without the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; make test-triton installs it and runs these")

from gpu_matrices import packed_panels, stored_rows

from transformers_kt.backends.gpu import panels
from transformers_kt.backends.gpu.panels import LAYOUTS
from transformers_kt.backends.triton.dequantize import dequantize
from transformers_kt.backends.triton.gemv import MOST_ROWS, gemv
from transformers_kt.backends.triton.unpack import KINDS

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Sums of float32 in another order than float64's: n products round to within n / 2 units of 2^-24 of the sum of
# absolute products at the very worst, and to a few where they cancel at random. The longest sum here has 1,280 terms.
GEMV_TOLERANCE = 16 * 2.0**-24


# The interpreter cuts bfloat16 off where a GPU rounds it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 16), (2, 33), (5, 20)])
@pytest.mark.parametrize("name", KINDS)
def test_dequantizing_gives_the_bits_of_the_plain_form(name: str, blocks: int, rows: int, dtype: torch.dtype) -> None:
    cols = blocks * LAYOUTS[name].block_elements
    packed = packed_panels(name, stored_rows(name, rows, cols), cols).to(DEVICE)
    got = dequantize(packed, name, rows, cols, torch.full((rows, cols), torch.nan, dtype=dtype, device=DEVICE))
    assert torch.equal(got, panels.dequantize(packed, name, rows, cols).to(dtype))


@pytest.mark.parametrize(("tokens", "splits"), [(1, None), (1, 3), (3, None), (MOST_ROWS, 2)])
@pytest.mark.parametrize(("blocks", "rows"), [(1, 16), (5, 33)])
@pytest.mark.parametrize("name", KINDS)
def test_products_lie_within_their_bound(name: str, blocks: int, rows: int, tokens: int, splits: int | None) -> None:
    cols = blocks * LAYOUTS[name].block_elements
    packed = packed_panels(name, stored_rows(name, rows, cols), cols).to(DEVICE)
    weights = panels.dequantize(packed, name, rows, cols).double()
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16).to(DEVICE)
    out = torch.full((tokens, rows), torch.nan, device=DEVICE)
    partial = None if splits is None else torch.full((splits, tokens, rows), torch.nan, device=DEVICE)
    gemv(packed, name, x, out, partial)
    error = (out.double() - x.double() @ weights.T).abs()
    assert (error <= GEMV_TOLERANCE * (x.double().abs() @ weights.abs().T)).all()


def test_kernels_compile_for_a_gpu_that_is_not_there_without_spilling() -> None:
    """Three types for one architecture; ``make compile-kernels`` has all of them."""
    types = ["Q8_0", "Q4_K", "MXFP4"]
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "compile_kernels.py", "--arch", "89"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--type", *types], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in types:
        of_type = [line for line in done.stdout.splitlines() if f" {name} " in line]
        assert {line.split(f" {name} ")[0] for line in of_type} == {"gemv", "gemm", "gate up", "down", "dequantize"}
