"""Matrix products over packed panels, 1 to 512 rows per expert, against what the memory and the multipliers can do.

    make bench BENCH="-k 'Q4_K and v3-gate'"

Weights come from memory: each call takes the next of as many matrices as no cache can hold, as experts follow one
another in a model. Limits (limits.cpp): reading memory, dot products of bytes (VNNI, or those of AVX2, which sum in 16
bits), for the float types multiply-adds of float32. "of limit" is the time that reading the weights or multiplying
would take at least, whichever is longer, over the time taken. On a machine that others use too, read shares, not times.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import synthetic
from gguf import GGMLQuantizationType
from shares import Measure

import transformers_kt._C as _C

TYPES = {name: (number, elements, nbytes) for name, number, elements, nbytes in _C.weight_types()}
FLOAT_TYPES = ("F32", "F16", "BF16")
ROWS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MOST_OUTPUTS = 1 << 24  # float32 values: 512 rows of an output matrix are logits that no one asks for
LARGE_BYTES = 256 << 20  # of weights, see the top of this file


class Shape(NamedTuple):
    rows: int
    cols: int


SHAPES = {
    "v2-lite-gate": Shape(1408, 2048),
    "v2-lite-down": Shape(2048, 1408),
    "v2-lite-output": Shape(102400, 2048),
    "v3-gate": Shape(2048, 7168),
    "v3-down": Shape(7168, 2048),
}
# No file has the others: columns are whole blocks.
MATRICES = [(name, shape) for shape in SHAPES for name in TYPES if SHAPES[shape].cols % TYPES[name][1] == 0]


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


@pytest.fixture(scope="module", params=MATRICES, ids="-".join)
def matrices(request: pytest.FixtureRequest) -> tuple[str, list[_C.PackedMatrix]]:
    """A type, and equal matrices of it."""
    name, shape_name = request.param
    shape = SHAPES[shape_name]
    number, elements, nbytes = TYPES[name]
    source = random_bytes(name, shape.rows * shape.cols, shape.cols)
    packed = []
    for _ in range(max(2, LARGE_BYTES // (shape.rows * shape.cols // elements * nbytes))):
        packed.append(_C.PackedMatrix(number, 1, shape.rows, shape.cols))
        packed[-1].pack(0, source)
    return name, packed


@pytest.mark.parametrize("rows", ROWS_PER_EXPERT)
def test_product(matrices: tuple[str, list[_C.PackedMatrix]], rows: int, measure: Measure) -> None:
    name, packed = matrices
    matrix = packed[0]
    if rows * matrix.rows > MOST_OUTPUTS:
        pytest.skip("more outputs than anyone asks for")
    x = np.random.default_rng(1).standard_normal((rows, matrix.cols), dtype=np.float32)
    out = np.empty((rows, matrix.rows), np.float32)
    turn = itertools.cycle(packed)
    measure(
        lambda: _C.linear(next(turn), x, out),
        nbytes=matrix.nbytes,
        operations=2 * rows * matrix.rows * matrix.cols,
        peak="fma_gflops" if name in FLOAT_TYPES else "dot_gops",
    )
