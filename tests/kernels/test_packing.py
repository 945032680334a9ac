"""Large tensors are read and packed in pieces: of several matrices, or of the rows of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_machines
import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

import transformers_kt._C as _C
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules import base, embedding
from transformers_kt.modules.base import pack_matrices
from transformers_kt.modules.embedding import KtEmbedding

COLS = 64
ROW_BYTES = COLS // 32 * 34  # Q8_0


class Stored:
    """A tensor of Q8_0 that notes which of its bytes are asked for."""

    def __init__(self, *shape: int) -> None:
        values = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
        blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        self.values = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        self.bytes = blocks.reshape(-1)
        self.info = TensorInfo("t", GgmlType.Q8_0, shape, 0, blocks.nbytes, Path("x.gguf"))
        self.asked: list[tuple[int, int]] = []

    def __call__(self, info: TensorInfo, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        assert info is self.info
        assert end is not None
        self.asked.append((start, end))
        return self.bytes[start:end]

    def rows_asked_for(self) -> list[tuple[int, int]]:
        """Checks that they were whole rows, all of them, in order."""
        assert [start for start, _ in self.asked] == [0, *(end for _, end in self.asked[:-1])]
        assert self.asked[-1][1] == self.info.nbytes
        assert all(end % ROW_BYTES == 0 for _, end in self.asked)
        return [(start // ROW_BYTES, end // ROW_BYTES) for start, end in self.asked]


def at_once(stored: Stored) -> Any:
    shape = stored.info.shape
    matrix = _C.PackedMatrix(int(GgmlType.Q8_0), 1 if len(shape) == 2 else shape[0], *shape[-2:])
    matrix.pack(0, stored.bytes)
    return matrix


def products(matrix: Any) -> npt.NDArray[np.float32]:
    """Of each matrix and the same vectors; (matrices * 3, 64)."""
    down = _C.PackedMatrix(int(GgmlType.F32), matrix.count, COLS, matrix.rows)
    down.pack_floats(np.random.default_rng(1).standard_normal((matrix.count, COLS, matrix.rows)).astype(np.float32))
    x = np.random.default_rng(2).standard_normal((matrix.count * 3, COLS)).astype(np.float32)
    out = np.full_like(x, np.nan)
    experts = np.repeat(np.arange(matrix.count, dtype=np.int64), 3)[:, None]
    _C.Experts(matrix, matrix, down).forward_routed(x, experts, np.ones(experts.shape, np.float32), out)
    return out


@pytest.fixture(params=[None, {0: [[0], [1], [2]], 1: [[3]]}], ids=["this-machine", "uneven-nodes"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    if request.param is not None:
        _C.use_topology(fake_machines.write_machine(tmp_path, request.param), [0, 1, 2, 3])
    yield
    _C.use_topology()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("shape", "rows_at_once", "expected"),
    [
        pytest.param((75, COLS), 40, [(0, 32), (32, 64), (64, 75)], id="rows-of-one"),
        pytest.param((75, COLS), 75, [(0, 75)], id="one-as-a-whole"),
        pytest.param((5, 20, COLS), 45, [(0, 40), (40, 80), (80, 100)], id="two-matrices"),
        pytest.param((3, 40, COLS), 20, [(i * 40 + j, i * 40 + min(j + 16, 40)) for i in range(3) for j in (0, 16, 32)],
                     id="rows-of-each"),
        pytest.param((2, 40, COLS), 1, [(i * 40 + j, i * 40 + min(j + 16, 40)) for i in range(2) for j in (0, 16, 32)],
                     id="never-less-than-a-panel"),
    ],
)  # fmt: skip
def test_packed_in_pieces_a_tensor_gives_the_same_bits(
    shape: tuple[int, ...], rows_at_once: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PIECE_BYTES", rows_at_once * ROW_BYTES)
    stored = Stored(*shape)
    matrix = pack_matrices(stored.info, stored)
    assert stored.rows_asked_for() == expected
    np.testing.assert_array_equal(products(matrix), products(at_once(stored)))


def test_an_embedding_table_is_copied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PIECE_BYTES", 30 * ROW_BYTES)
    stored = Stored(75, COLS)
    table = KtEmbedding(75, COLS)
    assert table.load({"weight": stored.info}, stored) == stored.info.nbytes
    assert stored.rows_asked_for() == [(0, 30), (30, 60), (60, 75)]
    np.testing.assert_array_equal(table(torch.arange(75)).numpy(), stored.values)


@pytest.mark.parametrize(
    ("index", "row", "rows"),
    [(0, 0, 0), (0, 0, 33), (0, 8, 16), (0, 16, 8), (0, 16, 32), (0, 48, 16), (0, -16, 16), (0, 32, 40), (1, 0, 80),
     (2, 0, 40), (-1, 0, 40), (0, 2**62, 16), (0, -(2**63), 16), (2**62, 0, 40)],
)  # fmt: skip
def test_a_piece_that_does_not_fit_is_refused(index: int, row: int, rows: int) -> None:
    matrix = _C.PackedMatrix(int(GgmlType.Q8_0), 2, 40, COLS)
    with pytest.raises(ValueError, match=rf"whole matrices of 40 rows .* row {row} of matrix {index} of 2"):
        matrix.pack(index, np.zeros(rows * ROW_BYTES, np.uint8), row)


def test_a_piece_of_broken_rows_is_refused() -> None:
    matrix = _C.PackedMatrix(int(GgmlType.Q8_0), 2, 40, COLS)
    with pytest.raises(ValueError, match="whole matrices of 40 rows of 68 bytes"):
        matrix.pack(0, np.zeros(16 * ROW_BYTES + 1, np.uint8), 0)
