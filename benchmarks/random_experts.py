"""Experts of real widths with random weights, on the CPU, for benchmarks of one layer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import synthetic
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

import transformers_kt._C as _C


class Widths(NamedTuple):
    hidden: int
    intermediate: int
    top_k: int


V3 = Widths(7168, 2048, 8)
"""DeepSeek-V3 and R1."""


class RandomExperts(NamedTuple):
    widths: Widths
    count: int
    routed: _C.Experts
    matrices: tuple[_C.PackedMatrix, ...]
    """Gate, up and down."""

    @property
    def expert_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices) // self.count


def random_matrix(type_name: str, count: int, rows: int, cols: int) -> _C.PackedMatrix:
    """``count`` times the same random matrix, in memory of their own."""
    ggml_type = GGMLQuantizationType[type_name]
    packed = _C.PackedMatrix(int(ggml_type), count, rows, cols)
    elements, _nbytes = GGML_QUANT_SIZES[ggml_type]
    blocks = synthetic.random_blocks(ggml_type, rows * cols // elements, cols**-0.5, np.random.default_rng(0))
    source = np.ascontiguousarray(blocks).reshape(-1)
    for index in range(count):
        packed.pack(index, source)
    return packed


def random_experts(widths: Widths, count: int, gate_up: str, down: str) -> RandomExperts:
    """``count`` experts with gate and up of one type and down of another."""
    gate, up = (random_matrix(gate_up, count, widths.intermediate, widths.hidden) for _ in range(2))
    last = random_matrix(down, count, widths.hidden, widths.intermediate)
    return RandomExperts(widths, count, _C.Experts(gate, up, last), (gate, up, last))


class RandomCalls:
    """Calls of the routed experts with ``tokens`` tokens whose choices are drawn anew for each of a few calls."""

    _DIFFERENT = 16  # calls whose experts of one token are 3 GB of the largest models' weights

    def __init__(self, experts: RandomExperts, tokens: int) -> None:
        widths, rng = experts.widths, np.random.default_rng(1)
        shape = (self._DIFFERENT, tokens, experts.count)
        self._indices = np.argsort(rng.random(shape), axis=-1)[..., : widths.top_k].astype(np.int64)
        self._x = rng.standard_normal((tokens, widths.hidden), dtype=np.float32)
        self._weights = np.full((tokens, widths.top_k), 1 / widths.top_k, np.float32)
        self._out = np.empty_like(self._x)
        self._routed = experts.routed
        self._turn = 0

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % self._DIFFERENT
        self._routed.forward_routed(self._x, self._indices[self._turn], self._weights, self._out)
