"""Kernels against the scalar reference, bit for bit, and the scalar reference against the gguf package."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest

import transformers_kt._C as _C

TYPES = {name: (number, elements, nbytes) for name, number, elements, nbytes in _C.weight_types()}
VECTOR_ISAS = [isa for isa in _C.supported_isas() if isa != "scalar"]
FLOAT_TYPES = ("F32", "F16", "BF16")
SCALE_OFFSETS = {  # where f16 scales stand in a block
    **{name: [0] for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS")},
    **{name: [0] for name in ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S")},
    **{name: [0, 2] for name in ("Q4_K", "Q5_K", "Q4_1", "Q5_1")},
    **{"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]},
    **{"IQ1_M": [], "MXFP4": [], "NVFP4": []},  # in parts; E8M0; E4M3, always finite
}


@pytest.fixture(autouse=True)
def _automatic_isa_afterwards() -> Iterator[None]:
    yield
    _C.select_isa("")


def gguf_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(TYPES[name][0])


def random_blocks(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Bytes of a (rows, cols) matrix: every bit pattern of quants and sub-block scales, f16 scales that stay finite."""
    _number, elements, nbytes = TYPES[name]
    rng = np.random.default_rng(seed)
    if name in FLOAT_TYPES:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        return gguf.quants.quantize(values, gguf_type(name)).view(np.uint8).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows, cols // elements, nbytes), dtype=np.uint8)
    set_finite_scales(name, blocks, rng)
    return blocks.reshape(rows, -1)


def set_finite_scales(name: str, blocks: np.ndarray, rng: np.random.Generator) -> None:
    """Small scales in ``blocks`` uint8 (rows, blocks, block bytes), in which everything else stays as it is."""
    set_scales(name, blocks, rng.uniform(-0.02, 0.02, (*blocks.shape[:2], 2)).astype(np.float16))
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(110, 125, blocks.shape[:2])


def set_scales(name: str, blocks: np.ndarray, scales: np.ndarray) -> None:
    """float16 ``scales`` (rows, blocks, 2), of which most types have the first alone."""
    for i, offset in enumerate(SCALE_OFFSETS[name]):
        blocks[..., offset : offset + 2] = scales[..., i : i + 1].view(np.uint8)
    if name == "IQ1_M":  # a nibble of the f16 in the upper bits of each of 4 words
        bits = scales[..., 0].view(np.uint16)
        for i in range(4):
            blocks[..., 49 + 2 * i] = blocks[..., 49 + 2 * i] & 0x0F | ((bits >> (4 * i) & 15) << 4).astype(np.uint8)


EDGES = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, -1.0, 65504.0, -65504.0, np.inf, -np.inf, np.nan]
EDGES_OF_ONE_BYTE = [0, 1, 2, 126, 127, 128, 253, 254, 255]


def edge_blocks(name: str, cols: int) -> np.ndarray:
    """Rows of which each has one of `EDGES` for scales, or among random values, in its second block, and every other
    pair of them in its first."""
    _number, elements, nbytes = TYPES[name]
    edges = np.array(EDGES, np.float16)
    rows = len(EDGES) ** 2
    data = random_blocks(name, rows, cols)
    first, second = np.divmod(np.arange(rows), len(EDGES))
    if name in FLOAT_TYPES:
        values = gguf.quants.dequantize(data, gguf_type(name)).reshape(rows, cols)
        values[:, [3, 70]] = np.stack((edges[first], edges[second]), axis=1)
        return gguf.quants.quantize(values, gguf_type(name)).view(np.uint8).reshape(rows, -1)
    blocks = data.reshape(rows, cols // elements, nbytes)
    of_one_byte = {"MXFP4": 1, "NVFP4": 4}.get(name)
    if of_one_byte is not None:
        blocks[:, 1, :of_one_byte] = np.resize(EDGES_OF_ONE_BYTE, (rows, 1))
    else:
        pairs = np.stack((edges[first], edges[second]), axis=1)
        set_scales(name, blocks[:, :1], pairs[:, None])
        set_scales(name, blocks[:, 1:2], np.repeat(pairs[:, None, :1], 2, axis=2))
    return data


def packed(name: str, data: np.ndarray, cols: int, count: int = 1) -> _C.PackedMatrix:
    matrix = _C.PackedMatrix(TYPES[name][0], count, data.shape[0] // count, cols)
    for index, rows in enumerate(np.split(data, count)):
        matrix.pack(index, np.ascontiguousarray(rows).reshape(-1))
    return matrix


def multiply(matrix: _C.PackedMatrix, x: np.ndarray) -> np.ndarray:
    out = np.empty((x.shape[0], matrix.rows), np.float32)
    _C.linear(matrix, x, out)
    return out


def test_block_facts_equal_those_of_the_gguf_package() -> None:
    for name, (_number, elements, nbytes) in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf_type(name)] == (elements, nbytes)


@pytest.mark.parametrize("name", TYPES)
def test_dequantization_equals_the_gguf_package(name: str) -> None:
    data = random_blocks(name, 5, 512)
    expected = gguf.quants.dequantize(data, gguf_type(name)).astype(np.float32)
    got = np.empty((5, 512), np.float32)
    _C.dequantize(TYPES[name][0], data.reshape(-1), got)
    # Products of scale and quant are exact in float32; the package and we round the one subtraction alike.
    np.testing.assert_array_equal(got, expected.reshape(5, 512))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", TYPES)
def test_edge_blocks_decode_as_in_the_gguf_package(name: str) -> None:
    """Zero, negative, denormal and largest scales, and those that are infinite or no number: loading refuses these."""
    data = edge_blocks(name, 512)
    expected = gguf.quants.dequantize(data, gguf_type(name)).astype(np.float32).reshape(len(data), 512)
    got = np.empty_like(expected)
    _C.dequantize(TYPES[name][0], data.reshape(-1), got)
    np.testing.assert_array_equal(got, expected)
    assert np.isnan(got).any() or name in ("MXFP4", "NVFP4")


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_products_of_edge_blocks_equal_the_scalar_reference(isa: str, name: str, tokens: int) -> None:
    """Bit for bit, but for the bits of what is no number."""
    matrix = packed(name, edge_blocks(name, 512), 512)
    x = np.random.default_rng(tokens).standard_normal((tokens, 512)).astype(np.float32)
    x[-1, :256] = 0
    _C.select_isa("scalar")
    expected = multiply(matrix, x)
    _C.select_isa(isa)
    got = multiply(matrix, x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(got[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("has_edges", [False, True], ids=["random", "edges"])
@pytest.mark.parametrize("name", TYPES)
def test_scalar_products_equal_dequantized_weights_times_activations(name: str, has_edges: bool) -> None:
    """Activations that int8 holds exactly, so that only the order of additions differs from a plain product. With a
    weight that is infinite or no number the product is not finite."""
    cols = 512
    data = edge_blocks(name, cols) if has_edges else random_blocks(name, 37, cols)
    rows = len(data)
    x = np.random.default_rng(1).integers(-127, 128, (3, cols)).astype(np.float32)
    x[:, ::32] = 127  # every block's largest value is 127: its scale is exactly 1
    weights = gguf.quants.dequantize(data, gguf_type(name)).astype(np.float64).reshape(rows, cols)
    _C.select_isa("scalar")
    got = multiply(packed(name, data, cols), x)
    # Float additions over `cols` terms: error below cols * 2^-24 of the sum of magnitudes.
    bound = cols * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
    finite = np.isfinite(weights).all(1)
    assert np.all(np.abs(got - x.astype(np.float64) @ weights.T)[:, finite] <= bound[:, finite])
    assert not np.isfinite(got[:, ~finite]).any()
    assert finite.any()
    assert has_edges or finite.all()


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 7, 13, 15, 18])
def test_products_equal_the_scalar_reference_bit_for_bit(isa: str, name: str, tokens: int) -> None:
    assert_equal_to_scalar(isa, name, tokens, cols=768)


@pytest.mark.parametrize("prefetch", _C.PREFETCHES)
@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9])
def test_prefetching_changes_no_bit(prefetch: str, isa: str, name: str, tokens: int) -> None:
    assert_equal_to_scalar(isa, name, tokens, cols=512, prefetch=prefetch)


def test_the_fastest_prefetch_strategy_is_set_on_the_matrices_timed() -> None:
    """Matrices that nobody packed read as zeros, and take no memory."""
    number, _elements, _nbytes = TYPES["Q4_K"]
    matrices = [_C.PackedMatrix(number, 64, 1408, 2048) for _ in range(6)]
    other = _C.PackedMatrix(number, 1, 16, 256)
    standard = other.prefetch
    for before in _C.PREFETCHES:
        for matrix in matrices:
            matrix.prefetch = before
        speeds = _C.tune_prefetch(matrices)
        assert list(speeds) == list(_C.PREFETCHES)
        assert speeds[before] == 1.0
        assert min(speeds.values()) > 0
        (chosen,) = {matrix.prefetch for matrix in matrices}
        # Another one has to be faster in most rounds; then it is the fastest of those in the middle one.
        assert chosen == before or speeds[chosen] >= 1.03
        assert other.prefetch == standard


def test_matrices_that_caches_may_hold_are_not_timed() -> None:
    number, _elements, _nbytes = TYPES["Q4_K"]
    matrix = _C.PackedMatrix(number, 64, 1408, 2048)
    matrix.prefetch = "bursts"
    assert _C.tune_prefetch([matrix]) == {}
    assert _C.tune_prefetch([]) == {}
    assert matrix.prefetch == "bursts"


def test_scalar_kernels_which_do_not_prefetch_are_not_timed() -> None:
    """It would take minutes."""
    number, _elements, _nbytes = TYPES["Q4_K"]
    _C.select_isa("scalar")
    assert _C.tune_prefetch([_C.PackedMatrix(number, 64, 1408, 2048) for _ in range(6)]) == {}


def test_an_unknown_prefetch_strategy_is_refused_with_the_known_ones() -> None:
    matrix = _C.PackedMatrix(TYPES["Q4_K"][0], 1, 16, 256)
    with pytest.raises(ValueError, match="no prefetch strategy is called sideways; there are hardware, per line and"):
        matrix.prefetch = "sideways"


def test_the_default_prefetch_strategy_depends_on_vendor_and_register_width_and_comes_back() -> None:
    matrix = _C.PackedMatrix(TYPES["Q4_K"][0], 1, 16, 256)
    vendors = ({"avx2": "bursts", "avx512": "bursts"}, {"avx2": "per line", "avx512": "hardware"})
    found = {}
    for isa in ("avx2", "avx512"):
        if isa in VECTOR_ISAS:
            _C.select_isa(isa)
            matrix.prefetch = "hardware"
            assert matrix.prefetch == "hardware"
            matrix.prefetch = ""
            found[isa] = matrix.prefetch
    assert any(found.items() <= vendor.items() for vendor in vendors)


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", [n for n in TYPES if n not in FLOAT_TYPES])
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 4, 13])
def test_a_last_block_without_a_second_is_read_where_it_lies(isa: str, name: str, blocks: int, tokens: int) -> None:
    """Panels lead pairs of blocks by their scales."""
    assert_equal_to_scalar(isa, name, tokens, cols=blocks * TYPES[name][1])


def assert_equal_to_scalar(isa: str, name: str, tokens: int, cols: int, prefetch: str = "") -> None:
    data = random_blocks(name, 16 * 3 + 5, cols)
    x = np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(np.float32)
    x[0, :256] = 0  # a block of zeros has no scale
    matrix = packed(name, data, cols)
    _C.select_isa("scalar")
    expected = multiply(matrix, x)
    _C.select_isa(isa)
    assert _C.isa() == isa
    matrix.prefetch = prefetch
    got = multiply(matrix, x)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", [n for n in TYPES if n not in FLOAT_TYPES])
@pytest.mark.parametrize("fill", [0, 128, 255])
def test_extreme_bytes_do_not_saturate(isa: str, name: str, fill: int) -> None:
    """vpmaddubsw saturates where a pair of byte products passes 32,767: largest quants against 127 and -127."""
    cols = 512
    data = random_blocks(name, 16, cols)
    blocks = data.reshape(16, -1, TYPES[name][2])
    blocks[...] = fill
    if name == "Q6_K" and fill == 255:
        blocks[..., 192:208] = 128  # scale -128
    set_finite_scales(name, blocks, np.random.default_rng(0))
    matrix = packed(name, data, cols)
    for x in (np.full((1, cols), 127, np.float32), np.full((5, cols), -127, np.float32)):
        _C.select_isa("scalar")
        expected = multiply(matrix, x)
        _C.select_isa(isa)
        np.testing.assert_array_equal(multiply(matrix, x), expected)


def test_every_type_that_the_gguf_package_dequantizes_has_a_kernel() -> None:
    floats = {gguf.GGMLQuantizationType[name] for name in FLOAT_TYPES}
    dequantized = {number for number, quant in gguf.quants._type_traits.items() if can_dequantize(quant)}
    assert {gguf_type(name) for name in TYPES} == dequantized | floats


def can_dequantize(quant: type) -> bool:
    return "dequantize_blocks" in vars(quant)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_of_one_byte_is_decoded_as_the_gguf_package_does(name: str) -> None:
    """E8M0 from denormal to infinite products, E4M3 with what is no number."""
    number, elements, nbytes = TYPES[name]
    data = np.random.default_rng(6).integers(0, 256, (256, nbytes), dtype=np.uint8)
    scales = 1 if name == "MXFP4" else 4
    data[:, :scales] = np.arange(256)[:, None]
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(data, gguf_type(name))
    got = np.empty((256, elements), np.float32)
    _C.dequantize(number, data.reshape(-1), got)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("isa", _C.supported_isas())
def test_a_product_with_what_is_not_finite_is_not(isa: str, name: str, bad: float) -> None:
    matrix = packed(name, random_blocks(name, 37, 512), 512)
    x = np.random.default_rng(3).standard_normal((3, 512)).astype(np.float32)
    _C.select_isa(isa)
    finite = multiply(matrix, x)
    for column in (0, 15, 16, 31, 32, 300, 511):
        spoilt = x.copy()
        spoilt[1, column] = bad
        found = multiply(matrix, spoilt)
        assert not np.isfinite(found[1]).any()
        np.testing.assert_array_equal(found[[0, 2]], finite[[0, 2]])  # of other tokens not a bit changes


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", TYPES)
def test_thread_count_and_batch_do_not_change_a_bit(isa: str, name: str) -> None:
    cols = 512
    matrix = packed(name, random_blocks(name, 100, cols), cols)
    x = np.random.default_rng(3).standard_normal((150, cols)).astype(np.float32)
    _C.select_isa(isa)
    before = _C.thread_count()
    try:
        _C.set_thread_count(1)
        expected = multiply(matrix, x)
        for threads in (2, 3, 7):
            _C.set_thread_count(threads)
            np.testing.assert_array_equal(multiply(matrix, x), expected)
    finally:
        _C.set_thread_count(before)
    for row in (0, 77, 149):
        np.testing.assert_array_equal(multiply(matrix, x[row : row + 1])[0], expected[row])


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "IQ2_XXS", "Q5_1"])
def test_however_tokens_divide_into_tiles_each_gets_the_same_bits(isa: str, name: str) -> None:
    """From 6 tokens on K-quants are unpacked once for all of them, in tiles of two sizes."""
    matrix = packed(name, random_blocks(name, 37, 512), 512)
    x = np.random.default_rng(4).standard_normal((64, 512)).astype(np.float32)
    _C.select_isa(isa)
    expected = np.concatenate([multiply(matrix, x[row : row + 1]) for row in range(64)])
    for tokens in (*range(4, 32), 63, 64):
        np.testing.assert_array_equal(multiply(matrix, x[:tokens]), expected[:tokens])


@pytest.mark.usefixtures("eight_cpus")
def test_experts_give_a_token_the_same_bits_among_many_and_alone() -> None:
    """Above 96 an expert's tokens are divided, and a task then has several pairs of output panels."""
    hidden, intermediate, tokens = 800, 256, 200
    gate, up = (packed("Q8_0", random_blocks("Q8_0", intermediate, hidden, seed), hidden) for seed in (0, 1))
    experts = _C.Experts(gate, up, packed("Q6_K", random_blocks("Q6_K", hidden, intermediate), intermediate))
    x = np.random.default_rng(5).standard_normal((tokens, hidden)).astype(np.float32)

    def outputs(x: np.ndarray) -> np.ndarray:
        out = np.full(x.shape, np.nan, np.float32)
        experts.forward_routed(x, np.zeros((len(x), 1), np.int64), np.full((len(x), 1), 0.5, np.float32), out)
        return out

    before = _C.thread_count()
    try:
        expected = np.concatenate([outputs(x[row : row + 1]) for row in range(tokens)])
        assert np.isfinite(expected).all()
        for threads in (1, 2, 5):
            _C.set_thread_count(threads)
            np.testing.assert_array_equal(outputs(x), expected)
    finally:
        _C.set_thread_count(before)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("tokens", [1, 32, 40, 600])
def test_a_choice_of_no_expert_leaves_the_bits_of_the_others(tokens: int) -> None:
    """Few tokens and many are computed differently, and pieces of 512 one after the other."""
    experts, hidden, top_k = 5, 64, 3
    parts = [packed("Q8_0", random_blocks("Q8_0", experts * 64, 64, seed), 64, count=experts) for seed in range(3)]
    random = np.random.default_rng(6)
    x = random.standard_normal((tokens, hidden)).astype(np.float32)
    indices = np.stack([np.sort(random.permutation(experts)[:top_k]) for _ in range(tokens)])
    weights = random.random((tokens, top_k)).astype(np.float32)
    indices[random.random(indices.shape) < 0.4] = -1
    indices[: tokens // 2 + 1 : 2] = -1
    routed = _C.Experts(*parts)

    def outputs(x: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        out = np.full(x.shape, np.nan, np.float32)
        routed.forward_routed(x, indices, weights, out)
        return out

    expected = np.zeros_like(x)
    for token, of_token in enumerate(indices):
        left = np.flatnonzero(of_token >= 0)
        if left.size:
            row = slice(token, token + 1)
            expected[row] = outputs(x[row], of_token[None, left], weights[row, left])
    assert not expected.any(axis=1).all()
    before = _C.thread_count()
    try:
        for threads in (1, 2, 5):
            _C.set_thread_count(threads)
            np.testing.assert_array_equal(outputs(x, indices, weights), expected)
    finally:
        _C.set_thread_count(before)
    weights[indices < 0] = np.nan
    np.testing.assert_array_equal(outputs(x, indices, weights), expected)
    np.testing.assert_array_equal(outputs(x, np.full_like(indices, -1), weights), np.zeros_like(x))
