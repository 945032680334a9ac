"""Threads read what they pack: from any place in one file or several, with the bits of packing from memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import fake_machines
import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as GgmlType

import transformers_kt._C as _C

TYPES = [GgmlType(number) for _name, number, _elements, _bytes in _C.weight_types()]
COLS = 512


@pytest.fixture(params=[None, {0: [[0], [1], [2]], 1: [[3]]}], ids=["this-machine", "uneven-nodes"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    if request.param is not None:
        _C.use_topology(fake_machines.write_machine(tmp_path, request.param), [0, 1, 2, 3])
    yield
    _C.use_topology()


class Stored:
    """Random blocks of a tensor (matrices, rows, COLS), cut into parts that lie in a file each, at odd offsets."""

    def __init__(self, folder: Path, ggml_type: GgmlType, matrices: int, rows: int, parts: int = 1) -> None:
        self.type, self.shape = ggml_type, (matrices, rows, COLS)
        elements, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        rng = np.random.default_rng(rows)
        # Small scales of every type: bytes without the upper exponent bits of float16 and float32.
        self.bytes = rng.integers(0, 64, matrices * rows * COLS // elements * block_bytes, np.uint8)
        self.paths = [folder / f"part-{number}" for number in range(parts)]
        self.part_bytes = len(self.bytes) // parts
        for number, path in enumerate(self.paths):
            path.write_bytes(b"x" * (number + 3) + self.bytes[number * self.part_bytes :][: self.part_bytes].tobytes())
        self.files = [os.open(path, os.O_RDONLY) for path in self.paths]

    def tensor(self) -> _C.StoredTensor:
        places = [(file, number + 3) for number, file in enumerate(self.files)]
        return _C.StoredTensor(int(self.type), places, self.part_bytes)

    def matrix(self) -> _C.PackedMatrix:
        return _C.PackedMatrix(int(self.type), *self.shape)


def panels(matrix: _C.PackedMatrix) -> npt.NDArray[np.uint8]:
    rows = -(-matrix.rows // _C.PANEL_ROWS)
    each = np.empty((matrix.count, rows, matrix.nbytes // matrix.count // rows), np.uint8)
    for index, out in enumerate(each):
        matrix.read_panels(index, out)
    return each


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("matrices", "rows", "parts"),
    [
        pytest.param(1, 75, 1, id="one"),
        pytest.param(1, 3000, 1, id="in-several-reads"),
        pytest.param(5, 20, 1, id="a-stack"),
        pytest.param(6, 40, 3, id="two-in-each-file"),
        pytest.param(4, 33, 4, id="a-file-each"),
    ],
)
@pytest.mark.parametrize("ggml_type", [GgmlType.F32, GgmlType.Q8_0, GgmlType.Q6_K, GgmlType.IQ3_S], ids=str)
def test_packed_from_files_a_tensor_gives_the_bits_of_one_in_memory(
    tmp_path: Path, ggml_type: GgmlType, matrices: int, rows: int, parts: int
) -> None:
    stored = Stored(tmp_path, ggml_type, matrices, rows, parts)
    expected = stored.matrix()
    expected.pack(0, stored.bytes)
    matrix, tensor = stored.matrix(), stored.tensor()
    for first in range(0, matrices, 2):
        matrix.pack_stored(tensor, first, min(2, matrices - first))
    np.testing.assert_array_equal(panels(matrix), panels(expected))
    assert (tensor.not_finite, tensor.has_values, tensor.zeros) == (-1, True, [])


@pytest.mark.parametrize("ggml_type", TYPES, ids=str)
def test_every_type_is_packed_from_its_file(tmp_path: Path, ggml_type: GgmlType) -> None:
    stored = Stored(tmp_path, ggml_type, 2, 20)
    expected, matrix = stored.matrix(), stored.matrix()
    expected.pack(0, stored.bytes)
    matrix.pack_stored(stored.tensor(), 0, 2)
    np.testing.assert_array_equal(panels(matrix), panels(expected))


def test_reads_into_an_array_are_put_together(tmp_path: Path) -> None:
    stored = Stored(tmp_path, GgmlType.Q5_0, 6, 800, parts=3)
    tensor = stored.tensor()
    out = np.empty_like(stored.bytes)
    cut = len(out) // 22 // 2 * 22 + 5 * 22  # within a part
    tensor.read(0, out[:cut])
    tensor.read(cut, out[cut:])
    np.testing.assert_array_equal(out, stored.bytes)
    assert (tensor.not_finite, tensor.has_values, tensor.zeros) == (-1, True, [])


@pytest.mark.parametrize("way", ["pack", "read"])
def test_a_file_that_ends_too_early_is_an_end_of_file_that_says_where(tmp_path: Path, way: str) -> None:
    stored = Stored(tmp_path, GgmlType.Q8_0, 4, 300, parts=2)
    os.truncate(stored.paths[1], stored.part_bytes // 2)
    calls = {
        "pack": lambda: stored.matrix().pack_stored(stored.tensor(), 0, 4),
        "read": lambda: stored.tensor().read(0, np.empty_like(stored.bytes)),
    }
    with pytest.raises(EOFError) as raised:
        calls[way]()
    # Any thread may be the first to meet it, in any of the reads behind.
    assert raised.value.part == 1  # type: ignore[attr-defined]
    assert stored.part_bytes // 2 - 4 <= raised.value.position < stored.part_bytes  # type: ignore[attr-defined]
    os.truncate(stored.paths[1], stored.part_bytes + 4)
    stored.matrix().pack_stored(stored.tensor(), 0, 4)  # all is as it was


def test_a_read_that_is_refused_is_an_error_with_its_number(tmp_path: Path) -> None:
    stored = Stored(tmp_path, GgmlType.Q8_0, 1, 300)
    stored.files[0] = os.open(tmp_path, os.O_RDONLY)  # a folder
    with pytest.raises(OSError, match="Is a directory") as raised:
        stored.matrix().pack_stored(stored.tensor(), 0, 1)
    assert (raised.value.errno, raised.value.part) == (errno.EISDIR, 0)  # type: ignore[attr-defined]


def test_the_first_damaged_block_is_named_whoever_meets_it(tmp_path: Path) -> None:
    stored = Stored(tmp_path, GgmlType.Q8_0, 3, 2000)
    blocks = stored.bytes.reshape(-1, 34)
    for block in (70000, 5001, 90000):
        blocks[block, :2] = [0, 0x7C]  # infinity
    stored.paths[0].write_bytes(b"xxx" + stored.bytes.tobytes())
    tensor = stored.tensor()
    stored.matrix().pack_stored(tensor, 0, 3)
    assert tensor.not_finite == 5001


def test_zeros_are_found_by_panels_and_joined(tmp_path: Path) -> None:
    stored = Stored(tmp_path, GgmlType.Q8_0, 3, 320)
    rows = stored.bytes.reshape(3 * 320, -1)
    rows[30:90] = 0  # panels 2 to 4 as a whole
    rows[310:330] = 0  # half of panel 19, half of the next matrix's first
    rows[640:656, 1:] = 0
    rows[640:656, 0] = 5  # scales, but no quants
    stored.paths[0].write_bytes(b"xxx" + stored.bytes.tobytes())
    tensor = stored.tensor()
    stored.matrix().pack_stored(tensor, 0, 3)
    assert tensor.zeros == [(32 * rows.shape[1], 80 * rows.shape[1])]


@pytest.mark.parametrize("index", [-1, 2, 2**62])
def test_matrices_that_are_not_there_are_refused(index: int) -> None:
    matrix = _C.PackedMatrix(int(GgmlType.Q8_0), 2, 40, 64)
    with pytest.raises(ValueError, match=rf"whole matrices of 2720 bytes; .* for matrix {index} of 2"):
        matrix.pack(index, np.zeros(40 * 68, np.uint8))


@pytest.mark.parametrize("nbytes", [0, 40 * 68 - 1, 40 * 68 + 68, 3 * 40 * 68])
def test_a_source_of_no_whole_matrices_is_refused(nbytes: int) -> None:
    matrix = _C.PackedMatrix(int(GgmlType.Q8_0), 2, 40, 64)
    with pytest.raises(ValueError, match="whole matrices of 2720 bytes"):
        matrix.pack(0, np.zeros(nbytes, np.uint8))
