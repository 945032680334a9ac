"""Damaged tensor data behind a sound header is an error that names tensor and block, whatever the type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import given, settings
from hypothesis import strategies as st

import transformers_kt._C as _C
from transformers_kt.errors import GgufFormatError
from transformers_kt.gguf.damage import require_finite, require_values
from transformers_kt.gguf.reader import TensorInfo

BLOCKS = 40


def is_dequantized(ggml_type: GgmlType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True


TYPES = [ggml_type for ggml_type in gguf.GGML_QUANT_SIZES if is_dequantized(ggml_type)]
HALF_NAN, HALF_INF = np.frombuffer(np.array([np.nan, -np.inf], np.float16).tobytes(), "<u2")


def checked(
    ggml_type: GgmlType,
    stored: np.ndarray,
    name: str = "t.weight",
    is_last: bool = False,
    shape: tuple[int, ...] = (1,),
    looks: int = 1,
) -> None:
    """As loading does it, in `looks` pieces of whole blocks."""
    info = TensorInfo(name, ggml_type, shape, 64, len(stored), Path("m.gguf"), is_last)
    tensor = _C.StoredTensor(int(ggml_type), [(0, 0)], len(stored))
    block_bytes = gguf.GGML_QUANT_SIZES[ggml_type][1]
    step = -(-len(stored) // block_bytes // looks) * block_bytes
    for start in range(0, len(stored), step):
        tensor.look_at(start, stored[start : start + step])
        require_finite(info, tensor)
    require_values(info, tensor, lambda start, end: stored[start:end])


def finite_blocks(ggml_type: GgmlType, seed: int = 0) -> np.ndarray:
    """(BLOCKS, bytes of a block), every value of which is finite by the `gguf` package's dequantization."""
    rng = np.random.default_rng(seed)
    nbytes = gguf.GGML_QUANT_SIZES[ggml_type][1]
    made = np.empty((0, nbytes), np.uint8)
    while len(made) < BLOCKS:
        candidates = rng.integers(0, 256, (BLOCKS, nbytes), np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(candidates, ggml_type)
        made = np.concatenate((made, candidates[np.isfinite(values).all(axis=1)]))
    return made[:BLOCKS]


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda ggml_type: ggml_type.name)
def test_blocks_whose_values_are_finite_pass(ggml_type: GgmlType) -> None:
    checked(ggml_type, finite_blocks(ggml_type).reshape(-1), is_last=True)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(TYPES), st.integers(0, 2**32 - 1))
def test_what_is_not_finite_is_found_and_nothing_else(ggml_type: GgmlType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = finite_blocks(ggml_type, seed)
    at = int(rng.integers(BLOCKS))
    # Random bytes until the gguf package reads something that is no number: independent of where we look for scales.
    for _ in range(400):
        candidate = rng.integers(0, 256, (1, blocks.shape[1]), np.uint8)
        place = int(rng.integers(max(1, blocks.shape[1] - 1)))
        candidate[0, place : place + 2] = np.frombuffer(HALF_NAN.tobytes(), np.uint8)[: blocks.shape[1] - place]
        with np.errstate(all="ignore"):
            values = gguf.dequantize(candidate, ggml_type)
        if np.isnan(values).any():
            break
    else:
        return
    blocks[at] = candidate
    with pytest.raises(GgufFormatError, match=rf"m\.gguf: block {at} of tensor t\.weight \({ggml_type.name}\)"):
        checked(ggml_type, blocks.reshape(-1))


HALVES = {
    GgmlType.Q4_0: [0], GgmlType.Q4_1: [0, 2], GgmlType.Q5_0: [0], GgmlType.Q5_1: [0, 2], GgmlType.Q8_0: [0],
    GgmlType.Q2_K: [80, 82], GgmlType.Q3_K: [108], GgmlType.Q4_K: [0, 2], GgmlType.Q5_K: [0, 2], GgmlType.Q6_K: [208],
    GgmlType.F16: [0], GgmlType.IQ4_XS: [0], GgmlType.IQ1_S: [0], GgmlType.TQ1_0: [52], GgmlType.TQ2_0: [64],
}  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("ggml_type", "at"), [(t, at) for t, places in HALVES.items() for at in places])
def test_every_scale_of_a_block_is_looked_at(ggml_type: GgmlType, at: int, value: float) -> None:
    blocks = finite_blocks(ggml_type)
    blocks[17, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    with np.errstate(all="ignore"):
        assert not np.isfinite(gguf.dequantize(blocks, ggml_type)).all()
    with pytest.raises(GgufFormatError, match=r"block 17 of tensor t\.weight"):
        checked(ggml_type, blocks.reshape(-1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ggml_type", [GgmlType.F32, GgmlType.BF16])
def test_floats_are_looked_at_one_by_one(ggml_type: GgmlType, value: float) -> None:
    values = np.linspace(-3, 3, 50, dtype=np.float32)
    values[33] = value
    with pytest.raises(GgufFormatError, match=r"block 33 .* has a value that is infinite or not a number"):
        checked(ggml_type, gguf.quantize(values, ggml_type).view(np.uint8))


def test_blocks_are_counted_over_pieces() -> None:
    blocks = finite_blocks(GgmlType.Q4_K)
    blocks[33, 2:4] = np.frombuffer(HALF_INF.tobytes(), np.uint8)
    with pytest.raises(GgufFormatError, match="block 33 of tensor t"):
        checked(GgmlType.Q4_K, blocks.reshape(-1), looks=3)


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda ggml_type: ggml_type.name)
def test_a_tensor_of_zeros_is_refused(ggml_type: GgmlType) -> None:
    zeros = np.zeros(BLOCKS * gguf.GGML_QUANT_SIZES[ggml_type][1], np.uint8)
    with pytest.raises(GgufFormatError, match="nothing but zeros"):
        checked(ggml_type, zeros)
    checked(ggml_type, zeros, "blk.1.exp_probs_b.bias")


def test_a_tensor_with_one_value_is_none_of_zeros() -> None:
    for ggml_type in (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q4_K, GgmlType.Q8_0):
        stored = np.zeros(BLOCKS * gguf.GGML_QUANT_SIZES[ggml_type][1], np.uint8)
        stored[0] = 1  # a denormal scale or value
        checked(ggml_type, stored)


def ending_in_zeros(nbytes: int, total: int = 1 << 16) -> np.ndarray:
    values = np.ones(total // 4, np.float32)
    values[(total - nbytes) // 4 :] = 0
    return values.view(np.uint8)


def test_a_file_that_ends_in_a_hole_is_refused() -> None:
    with pytest.raises(GgufFormatError, match=r"ends in zeros, from byte 61504 on, block 15360 of tensor t\.weight"):
        checked(GgmlType.F32, ending_in_zeros(4096), is_last=True)
    checked(GgmlType.F32, ending_in_zeros(4092), is_last=True)
    checked(GgmlType.F32, ending_in_zeros(4096), is_last=False)


def test_the_hole_at_the_end_is_followed_to_where_it_begins() -> None:
    stored = ending_in_zeros(3 << 20, 4 << 20)
    with pytest.raises(GgufFormatError, match=rf"from byte {64 + (1 << 20)} on, block {1 << 18} of"):
        checked(GgmlType.F32, stored, is_last=True)


def with_a_hole(start: int, end: int, nbytes: int = 8 << 20) -> np.ndarray:
    stored = np.full(nbytes // 34 * 34, 1, np.uint8)
    stored[start:end] = 0
    return stored


PIECES = 64  # of 131 kB: as little as a hole may be larger than what is told


def test_a_hole_within_a_tensor_is_refused() -> None:
    start = 3 << 20
    with pytest.raises(GgufFormatError, match=r"m\.gguf: \d+ bytes of tensor t\.weight are zeros, from block 9\d+ on"):
        checked(GgmlType.Q8_0, with_a_hole(start, start + (1 << 20) + (1 << 18)), looks=PIECES)
    checked(GgmlType.Q8_0, with_a_hole(start, start + (1 << 20) - 1), looks=PIECES)
    # In a stack, too, where it is not a matrix or several.
    with pytest.raises(GgufFormatError, match="are zeros"):
        checked(GgmlType.Q8_0, with_a_hole(start, start + (3 << 19)), shape=(4, 1, 1), looks=PIECES)


def test_a_pruned_expert_is_no_hole() -> None:
    each = PIECES // 4 * (-(-(8 << 20) // 34 // PIECES) * 34)
    stored = np.full(4 * each, 1, np.uint8)
    stored[each : 2 * each] = 0
    checked(GgmlType.Q8_0, stored, shape=(4, 1, 1), looks=PIECES)


def test_unused_rows_within_the_vocabulary_are_no_hole() -> None:
    stored = with_a_hole(20 << 20, (20 << 20) + (3 << 19), 32 << 20)
    checked(GgmlType.Q8_0, stored, "token_embd.weight", looks=4 * PIECES)
    with pytest.raises(GgufFormatError, match="are zeros"):
        checked(GgmlType.Q8_0, stored, looks=4 * PIECES)


def test_unused_rows_of_the_vocabulary_are_no_hole() -> None:
    total = 1 << 20
    checked(GgmlType.F32, ending_in_zeros(total // 20, total), "output.weight", is_last=True)
    with pytest.raises(GgufFormatError, match="the file ends in zeros"):
        checked(GgmlType.F32, ending_in_zeros(total // 16, total), "output.weight", is_last=True)
