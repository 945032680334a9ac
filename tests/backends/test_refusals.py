"""The bindings refuse None, zero, negative and overflowing sizes, and say what was found and what is expected."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import transformers_kt._C as _C

F32, Q8_0 = 0, 8
HIDDEN, INNER, EXPERTS, TOP_K, HEADS, NOPE, ROPE, LATENT, VALUE = 64, 96, 4, 2, 2, 32, 8, 32, 32
TOKENS, KEYS = 3, 5
SIZES_OF_NOTHING = (0, -1, -(2**31), -(2**63))
OVERFLOWING = (2**40, 2**62, 2**63 - 1)


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def packed(count: int, rows: int, cols: int) -> _C.PackedMatrix:
    return _C.PackedMatrix(F32, count, rows, cols)


_FILE = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the calls below are there)
_FILE.write(floats(2, 16, 32).tobytes())
_FILE.flush()


def stored() -> _C.StoredTensor:
    return _C.StoredTensor(F32, [(_FILE.fileno(), 0)], 2 * 16 * 32 * 4)


def experts(count: int) -> _C.Experts:
    return _C.Experts(packed(count, INNER, HIDDEN), packed(count, INNER, HIDDEN), packed(count, HIDDEN, INNER))


ROUTER = {"sigmoid": True, "groups": 2, "top_groups": 1, "top_k": TOP_K, "normalize": True, "scale": 1.0}


def moe(**changes: Any) -> _C.MoeBlock:
    parts = {"router": packed(1, EXPERTS, HIDDEN), "bias": floats(EXPERTS), "routed": experts(EXPERTS), "shared": None}
    return _C.MoeBlock(**{**parts, **ROUTER, **changes})


def attention(**changes: Any) -> _C.MlaAttention:
    parts = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "nope_dim": NOPE,
        "rope_dim": ROPE,
        "latent_dim": LATENT,
        "value_dim": VALUE,
        "softmax_scale": 0.1,
        "norm_eps": 1e-6,
        "q_a": None,
        "q_a_norm": None,
        "q": packed(1, HEADS * (NOPE + ROPE), HIDDEN),
        "kv_a": packed(1, LATENT + ROPE, HIDDEN),
        "kv_a_norm": floats(LATENT),
        "k_b": packed(HEADS, LATENT, NOPE),
        "v_b": packed(HEADS, VALUE, LATENT),
        "o": packed(1, HIDDEN, HEADS * VALUE),
    }
    return _C.MlaAttention(**{**parts, **changes})


def layer(**changes: Any) -> _C.DecoderLayer:
    parts = {"attention": attention(), "moe": None, "mlp": experts(1), "input_norm_eps": 1e-6, "post_norm_eps": 1e-6}
    return _C.DecoderLayer(**{**parts, **changes})


def in_layer(**changes: Any) -> dict[str, Any]:
    """Arguments of a layer's ``forward``."""
    ranges = np.zeros((1, TOKENS, 2), np.int32)
    arguments = {
        "x": floats(1, TOKENS, HIDDEN),
        "input_norm": floats(HIDDEN),
        "post_norm": floats(HIDDEN),
        "rope_table": floats(TOKENS, ROPE),
        "first": floats(1, KEYS, LATENT),
        "second": floats(1, KEYS, ROPE),
        "ranges": ranges,
        "mask": None,
        "out": floats(1, TOKENS, HIDDEN),
    }
    return {**arguments, **changes}


def in_stack(keys: int = KEYS, **changes: Any) -> dict[str, Any]:
    """Arguments of a stack's ``append_and_forward``."""
    arguments = in_layer(**changes)
    buffers = _C.KeyBuffers([arguments.pop("first")], [arguments.pop("second")])
    del arguments["input_norm"], arguments["post_norm"]
    return {**arguments, "buffers": [buffers], "lengths": [keys]}


def stack() -> _C.DecoderStack:
    return _C.DecoderStack([layer()], [floats(HIDDEN), floats(HIDDEN)])


# What the module is called with when all is well: every argument is then replaced by what it must refuse.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hide_cpu_features": (_C.hide_cpu_features, {"names": ""}),
    "select_isa": (_C.select_isa, {"name": ""}),
    "set_thread_count": (_C.set_thread_count, {"n": 1}),
    "nodes_of_threads": (_C.nodes_of_threads, {"n": 1}),
    "PackedMatrix": (_C.PackedMatrix, {"ggml_type": Q8_0, "count": 2, "rows": 40, "cols": 64}),
    "StoredTensor": (
        _C.StoredTensor,
        {"ggml_type": F32, "parts": [(_FILE.fileno(), 0)], "part_bytes": 2 * 16 * 32 * 4},
    ),
    "StoredTensor.read": (stored().read, {"start": 0, "out": np.zeros(4096, np.uint8)}),
    "StoredTensor.look_at": (stored().look_at, {"start": 0, "blocks": np.zeros(4096, np.uint8)}),
    "PackedMatrix.pack": (packed(2, 16, 4).pack, {"index": 0, "source": np.zeros(16 * 4 * 4, np.uint8)}),
    "PackedMatrix.pack_stored": (packed(2, 16, 32).pack_stored, {"source": stored(), "first": 0, "count": 2}),
    "PackedMatrix.pack_floats": (packed(2, 16, 4).pack_floats, {"source": floats(2, 16, 4)}),
    "PackedMatrix.read_panels": (packed(2, 16, 4).read_panels, {"index": 0, "out": np.zeros((1, 256), np.uint8)}),
    "linear": (_C.linear, {"w": packed(1, INNER, HIDDEN), "x": floats(TOKENS, HIDDEN), "out": floats(TOKENS, INNER)}),
    "rms_norm": (_C.rms_norm, {"x": floats(3, 8), "weight": floats(8), "eps": 1e-6, "out": floats(3, 8)}),
    "embed": (
        _C.embed,
        {"ggml_type": F32, "data": np.zeros(80, np.uint8), "ids": np.arange(4), "out": floats(4, 4)},
    ),
    "dequantize": (_C.dequantize, {"ggml_type": F32, "data": np.zeros(80, np.uint8), "out": floats(20)}),
    "rope_table": (
        _C.rope_table,
        {"positions": np.arange(3), "inv_freq": floats(4), "scaling": 1.0, "table": floats(3, 8)},
    ),
    "Experts": (_C.Experts, {"gate": packed(2, 8, 4), "up": packed(2, 8, 4), "down": packed(2, 4, 8)}),
    "Experts.forward_routed": (
        experts(EXPERTS).forward_routed,
        {
            "x": floats(TOKENS, HIDDEN),
            "indices": np.tile(np.arange(TOP_K), (TOKENS, 1)),
            "weights": floats(TOKENS, TOP_K),
            "out": floats(TOKENS, HIDDEN),
        },
    ),
    "Experts.submit_routed": (
        experts(EXPERTS).submit_routed,
        {
            "x": floats(TOKENS, HIDDEN),
            "indices": np.tile(np.arange(TOP_K), (TOKENS, 1)),
            "weights": floats(TOKENS, TOP_K),
            "out": floats(TOKENS, HIDDEN),
        },
    ),
    "Experts.forward_mlp": (experts(1).forward_mlp, {"x": floats(3, HIDDEN), "out": floats(3, HIDDEN)}),
    "MoeBlock": (moe, {"router": packed(1, EXPERTS, HIDDEN), "routed": experts(EXPERTS), **ROUTER}),
    "MoeBlock.forward": (
        moe().forward,
        {"x": floats(TOKENS, HIDDEN), "out": floats(TOKENS, HIDDEN), "logits": floats(TOKENS, EXPERTS)},
    ),
    "MlaAttention": (
        attention,
        {
            "hidden": HIDDEN,
            "heads": HEADS,
            "nope_dim": NOPE,
            "rope_dim": ROPE,
            "latent_dim": LATENT,
            "value_dim": VALUE,
            "q": packed(1, HEADS * (NOPE + ROPE), HIDDEN),
            "kv_a": packed(1, LATENT + ROPE, HIDDEN),
            "kv_a_norm": floats(LATENT),
            "k_b": packed(HEADS, LATENT, NOPE),
            "v_b": packed(HEADS, VALUE, LATENT),
            "o": packed(1, HIDDEN, HEADS * VALUE),
        },
    ),
    "MlaAttention.project_keys": (
        attention().project_keys,
        {
            "x": floats(TOKENS, HIDDEN),
            "rope_table": floats(TOKENS, ROPE),
            "latents": floats(TOKENS, LATENT),
            "ropes": floats(TOKENS, ROPE),
        },
    ),
    "MlaAttention.attend": (
        attention().attend,
        {
            "x": floats(1, TOKENS, HIDDEN),
            "rope_table": floats(TOKENS, ROPE),
            "latents": floats(1, KEYS, LATENT),
            "ropes": floats(1, KEYS, ROPE),
            "ranges": np.zeros((1, TOKENS, 2), np.int32),
            "mask": None,
            "out": floats(1, TOKENS, HIDDEN),
        },
    ),
    "DecoderLayer": (layer, {"attention": attention(), "mlp": experts(1)}),
    "DecoderLayer.project_keys": (
        layer().project_keys,
        {
            "x": floats(TOKENS, HIDDEN),
            "input_norm": floats(HIDDEN),
            "rope_table": floats(TOKENS, ROPE),
            "first": floats(TOKENS, LATENT),
            "second": floats(TOKENS, ROPE),
        },
    ),
    "DecoderLayer.forward": (layer().forward, in_layer()),
    "DecoderLayer.append_and_forward": (layer().append_and_forward, in_layer()),
    "KeyBuffers": (_C.KeyBuffers, {"first": [floats(1, KEYS, LATENT)], "second": [floats(1, KEYS, ROPE)]}),
    "DecoderStack": (_C.DecoderStack, {"layers": [layer()], "norms": [floats(HIDDEN), floats(HIDDEN)]}),
    "DecoderStack.append_and_forward": (stack().append_and_forward, in_stack()),
}
ARGUMENTS = [
    pytest.param(call, name, id=f"{call}({name})")
    for call, (_function, arguments) in CALLS.items()
    for name, value in arguments.items()
    if value is not None
]
REFUSALS = (TypeError, ValueError, IndexError, MemoryError)


def test_every_entry_of_the_module_is_among_the_calls() -> None:
    functions = {name for name, value in vars(_C).items() if callable(value) and not name.startswith("_")}
    without_sizes = {"Attention", "Job", "cpu_features", "supported_isas", "isa", "thread_count", "topology"}
    without_sizes |= {"weight_types", "panel_layouts", "failing_loop", "refused_calls"}
    without_sizes |= {"begin_step", "end_step", "codebooks"}
    names_and_paths = {"use_topology", "tune_prefetch"}
    assert functions - without_sizes - names_and_paths == {call for call in CALLS if "." not in call}
    for call in CALLS:
        owner, _, method = call.partition(".")
        assert not method or hasattr(getattr(_C, owner), method)
    for name in {each for each in functions if isinstance(getattr(_C, each), type)}:
        methods = {key for key, value in vars(getattr(_C, name)).items() if type(value).__name__ == "instancemethod"}
        assert {f"{name}.{key}" for key in methods if not key.startswith("_")} <= {*CALLS, "Job.is_done", "Job.wait"}


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_well_but_for_what_is_changed(call: str) -> None:
    function, arguments = CALLS[call]
    function(**arguments)


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_none_is_refused(call: str, name: str) -> None:
    function, arguments = CALLS[call]
    with pytest.raises((TypeError, ValueError)):
        function(**{**arguments, name: None})


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_a_list_that_holds_none_is_refused(call: str, name: str) -> None:
    function, arguments = CALLS[call]
    with pytest.raises((TypeError, ValueError)):
        function(**{**arguments, name: [None]})


INTEGERS = [each for each in ARGUMENTS if type(CALLS[each.values[0]][1][each.values[1]]) is int]  # type: ignore[index]
MAY_BE_ZERO = {("PackedMatrix", "ggml_type"), ("PackedMatrix.pack", "index"), ("PackedMatrix.pack_stored", "first")}
MAY_BE_ZERO |= {("StoredTensor", "ggml_type"), ("StoredTensor.read", "start"), ("StoredTensor.look_at", "start")}
MAY_BE_ZERO |= {("embed", "ggml_type"), ("dequantize", "ggml_type"), ("PackedMatrix.read_panels", "index")}


@pytest.mark.parametrize("value", [*SIZES_OF_NOTHING, *OVERFLOWING])
@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_a_size_of_nothing_or_beyond_memory_is_refused(call: str, name: str, value: int) -> None:
    if value == 0 and (call, name) in MAY_BE_ZERO:
        return
    if 0 < value < 2**62 and (call, name) == ("StoredTensor", "part_bytes"):
        return  # a file can be that large
    function, arguments = CALLS[call]
    with pytest.raises(REFUSALS):
        function(**{**arguments, name: value})


ARRAYS = [each for each in ARGUMENTS if isinstance(CALLS[each.values[0]][1][each.values[1]], np.ndarray)]  # type: ignore[index]


# The rows that are there decide which ids exist, the columns of the output how long one is; values have any shape.
MAY_DIFFER = {("embed", "data"), ("embed", "out"), ("dequantize", "out")}


@pytest.mark.parametrize(("call", "name"), ARRAYS)
def test_an_array_with_an_axis_of_nothing_one_more_or_one_less_is_refused(call: str, name: str) -> None:
    function, arguments = CALLS[call]
    array = arguments[name]
    if (call, name) in MAY_DIFFER:
        return
    for axis in range(array.ndim):
        for size in {0, 1, array.shape[axis] + 1, array.shape[axis] - 1} - {array.shape[axis]}:
            shape = list(array.shape)
            shape[axis] = size
            with pytest.raises(ValueError, match=r"\d|got \("):
                function(**{**arguments, name: np.zeros(shape, array.dtype)})
    with pytest.raises(ValueError, match=r"\d|got \("):
        function(**{**arguments, name: np.zeros((*array.shape, 1), array.dtype)})
    with pytest.raises(ValueError, match=r"\d|got \("):
        function(**{**arguments, name: np.zeros((), array.dtype)})
    with pytest.raises(TypeError):
        function(**{**arguments, name: array.astype(np.float64)})


@pytest.mark.parametrize("parts", [[], [(-1, 0)], [(0, -1)], [(0, 2**63 - 1)], [(0, 0)] * 2])
def test_a_tensor_without_a_place_is_refused(parts: list[tuple[int, int]]) -> None:
    nbytes = 2**62 if len(parts) > 1 else 2 * 16 * 32 * 4
    with pytest.raises(ValueError, match=r"parts of whole blocks|no place"):
        _C.StoredTensor(F32, parts, nbytes)


def test_a_tensor_that_does_not_fill_the_matrix_is_refused() -> None:
    for matrix in (packed(1, 16, 32), packed(3, 16, 32), packed(2, 16, 31)):
        with pytest.raises(ValueError, match=r"a tensor of 4096 bytes .* does not fill \d x 16 x 3\d of F32"):
            matrix.pack_stored(stored(), 0, 1)
    with pytest.raises(ValueError, match="of another type, does not fill 2 x 16 x 32 of Q8_0"):
        _C.PackedMatrix(Q8_0, 2, 16, 32).pack_stored(stored(), 0, 1)
    halves_of_a_matrix = _C.StoredTensor(F32, [(_FILE.fileno(), 0)] * 4, 8 * 32 * 4)
    with pytest.raises(ValueError, match="in parts of 1024 does not fill"):
        packed(2, 16, 32).pack_stored(halves_of_a_matrix, 0, 1)
    for first, count in ((0, 3), (2, 1), (1, 2)):
        with pytest.raises(ValueError, match=rf"{count} matrices from {first} on, of 2"):
            packed(2, 16, 32).pack_stored(stored(), first, count)


def test_columns_of_nothing_are_refused() -> None:
    """0 columns divided by zero."""
    for cols in (0, -1):
        with pytest.raises(ValueError, match=f"positive, got 1 x 4 x {cols}"):
            _C.PackedMatrix(F32, 1, 4, cols)
    with pytest.raises(ValueError, match=r"whole blocks of 1\), got \(0, 0\)"):
        _C.embed(F32, np.zeros(16, np.uint8), np.zeros(0, np.int64), floats(0, 0))
    with pytest.raises(ValueError, match=r"weight must have shape \(size,\), size at least 1, got \(0\)"):
        _C.rms_norm(floats(3, 0), floats(0), 1e-6, floats(3, 0))


def test_ids_are_looked_for_in_the_rows_that_are_there() -> None:
    for nbytes, ids in ((0, [0]), (15, [0]), (16, [1]), (47, [2]), (48, [-1]), (48, [2**62])):
        with pytest.raises(IndexError, match=rf"{ids[0]} is not in \[0, {nbytes // 16}\)"):
            _C.embed(F32, np.zeros(nbytes, np.uint8), np.array(ids), floats(1, 4))


@pytest.mark.parametrize("cpus", [[-1], [0, -1], [-(2**31)], [2**31 - 1], [1 << 16]])
def test_a_machine_of_cpus_that_cannot_be_is_refused(cpus: list[int]) -> None:
    wrong = next(cpu for cpu in cpus if cpu != 0)
    with pytest.raises(ValueError, match=rf"0 to 65535, got {wrong}"):
        _C.use_topology("no-sysfs", cpus)


def test_routing_to_no_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k at least 1, got \(3, 0\)"):
        experts(EXPERTS).forward_routed(
            floats(TOKENS, HIDDEN), np.zeros((TOKENS, 0), np.int64), floats(TOKENS, 0), floats(TOKENS, HIDDEN)
        )


@pytest.mark.parametrize("expert", [-2, EXPERTS, 2**32 - 1, 2**32, -(2**63)])
def test_an_expert_that_is_not_there_is_refused(expert: int) -> None:
    indices = np.array([[0, expert]])
    with pytest.raises(IndexError, match=rf"expert {expert} is not in \[0, {EXPERTS}\)"):
        experts(EXPERTS).forward_routed(floats(1, HIDDEN), indices, floats(1, 2), floats(1, HIDDEN))


def test_matrices_that_do_not_belong_together_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"gate 2 x 8 x 4, up 2 x 8 x 4, down 2 x 8 x 4$"):
        _C.Experts(packed(2, 8, 4), packed(2, 8, 4), packed(2, 8, 4))
    with pytest.raises(ValueError, match=rf"router must be 1 x {EXPERTS} x {HIDDEN}, got 1 x 5 x {HIDDEN}"):
        moe(router=packed(1, 5, HIDDEN))
    with pytest.raises(ValueError, match=rf"bias must have {EXPERTS} values, got 3"):
        moe(bias=floats(3))
    with pytest.raises(ValueError, match=rf"one expert of hidden size {HIDDEN}, got 2 of {HIDDEN}"):
        moe(shared=experts(2))
    with pytest.raises(ValueError, match=rf"hidden size {HIDDEN}, the feed-forward half 4"):
        layer(mlp=_C.Experts(packed(1, 8, 4), packed(1, 8, 4), packed(1, 4, 8)))
    with pytest.raises(ValueError, match="an MLP is one expert, got 2"):
        layer(mlp=experts(2))


def test_a_cache_that_is_too_short_or_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="cache of 2 keys has no room for those of 3 tokens"):
        layer().append_and_forward(**in_layer(first=floats(1, 2, LATENT), second=floats(1, 2, ROPE)))
    with pytest.raises(ValueError, match="cache of 2 keys has no room for those of 3 tokens"):
        stack().append_and_forward(**in_stack(keys=2))
    read_only = floats(1, KEYS, LATENT)
    read_only.flags.writeable = False
    layer().forward(**in_layer(first=read_only))
    for call, arguments in ((layer().append_and_forward, in_layer), (stack().append_and_forward, in_stack)):
        with pytest.raises(ValueError, match="first stream cannot be written"):
            call(**arguments(first=read_only))
    buffers = _C.KeyBuffers([floats(1, KEYS, LATENT)] * 2, [floats(1, KEYS, ROPE)] * 2)
    with pytest.raises(ValueError, match="1 layers need a cache each, got 2"):
        stack().append_and_forward(**{**in_stack(), "buffers": [buffers]})
    with pytest.raises(ValueError, match="buffers need a length each, got 1 and 2"):
        stack().append_and_forward(**{**in_stack(), "lengths": [KEYS, KEYS]})


def test_a_stack_takes_the_sequences_that_its_buffers_hold() -> None:
    arguments = in_stack()
    (buffers,) = arguments["buffers"]
    with pytest.raises(ValueError, match="x has 1 sequences, the buffers 2"):
        stack().append_and_forward(**{**arguments, "buffers": [buffers] * 2, "lengths": [KEYS] * 2})
    with pytest.raises(ValueError, match="buffers 0 is None"):
        stack().append_and_forward(**{**arguments, "buffers": [None]})
    two = {"x": floats(2, TOKENS, HIDDEN), "out": floats(2, TOKENS, HIDDEN), "rope_table": floats(2 * TOKENS, ROPE)}
    mask = {"ranges": None, "mask": np.ones((2, TOKENS, KEYS), np.uint8)}
    with pytest.raises(ValueError, match="a mask is for sequences of one length; give ranges"):
        stack().append_and_forward(
            **{**arguments, **two, **mask, "buffers": [buffers] * 2, "lengths": [KEYS, KEYS - 1]}
        )


def test_buffers_are_never_copied() -> None:
    """A silent copy would take the keys and lose them."""
    for array in (np.zeros((1, KEYS, LATENT)), [[[0.0] * LATENT] * KEYS]):
        with pytest.raises(TypeError):
            _C.KeyBuffers([array], [floats(1, KEYS, ROPE)])  # type: ignore[list-item]
