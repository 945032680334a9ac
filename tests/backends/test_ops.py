"""The torch operators ``kt::*``: what torch.library demands of an operator, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.backends.handles import register_object
from transformers_kt.errors import UnsupportedOperationError

HIDDEN, INNER, EXPERTS, TOP_K, HEADS, NOPE, ROPE, LATENT, VALUE = 64, 96, 4, 2, 3, 32, 8, 32, 32
BATCH, TOKENS, KEYS = 2, 5, 9

_generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator)


def transposed(*shape: int) -> torch.Tensor:
    """As `random`, but not contiguous: the last two axes lie the other way round in memory."""
    return random(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def packed(count: int, rows: int, cols: int) -> _C.PackedMatrix:
    matrix = _C.PackedMatrix(int(gguf.GGMLQuantizationType.F32), count, rows, cols)
    matrix.pack_floats(random(count, rows, cols).numpy())
    return matrix


class _Embedding:
    def gather(self, ids: np.ndarray, out: np.ndarray) -> None:
        _C.embed(0, self.rows, ids, out)

    rows = random(100, HIDDEN).numpy().view(np.uint8).reshape(-1)


def experts(count: int) -> _C.Experts:
    return _C.Experts(packed(count, INNER, HIDDEN), packed(count, INNER, HIDDEN), packed(count, HIDDEN, INNER))


def make_moe() -> _C.MoeBlock:
    router = {"sigmoid": True, "groups": 2, "top_groups": 1, "top_k": TOP_K, "normalize": True, "scale": 2.5}
    return _C.MoeBlock(packed(1, EXPERTS, HIDDEN), random(EXPERTS).numpy(), experts(EXPERTS), experts(1), **router)


def make_attention() -> _C.MlaAttention:
    return _C.MlaAttention(
        hidden=HIDDEN,
        heads=HEADS,
        nope_dim=NOPE,
        rope_dim=ROPE,
        latent_dim=LATENT,
        value_dim=VALUE,
        softmax_scale=0.1,
        norm_eps=1e-6,
        q_a=None,
        q_a_norm=None,
        q=packed(1, HEADS * (NOPE + ROPE), HIDDEN),
        kv_a=packed(1, LATENT + ROPE, HIDDEN),
        kv_a_norm=np.ones(LATENT, np.float32),
        k_b=packed(HEADS, LATENT, NOPE),
        v_b=packed(HEADS, VALUE, LATENT),
        o=packed(1, HIDDEN, HEADS * VALUE),
    )


def make_layer() -> _C.DecoderLayer:
    return _C.DecoderLayer(
        attention=make_attention(), moe=make_moe(), mlp=None, input_norm_eps=1e-6, post_norm_eps=1e-5
    )


def cached_keys() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents and rotary keys, as views of longer buffers, which is what caches hand out; and what queries see."""
    visible = torch.ones(BATCH, TOKENS, KEYS, dtype=torch.bool).tril(KEYS - TOKENS)
    return random(BATCH, KEYS + 7, LATENT)[:, :KEYS], random(BATCH, KEYS + 7, ROPE)[:, :KEYS], visible


def layer_arguments(make: Callable[..., torch.Tensor], weights: int) -> tuple[Any, ...]:
    norms = random(HIDDEN), random(HIDDEN)
    return make(BATCH, TOKENS, HIDDEN), *norms, make(BATCH, TOKENS, ROPE), *cached_keys(), weights


# Operator -> what holds its weights, and its other arguments for activations of a given make.
OPERATORS: dict[str, tuple[Callable[[], Any], Callable[[Callable[..., torch.Tensor], int], tuple[Any, ...]]]] = {
    "linear": (lambda: packed(1, 37, HIDDEN), lambda make, weights: (make(BATCH, TOKENS, HIDDEN), weights, 37)),
    "rms_norm": (object, lambda make, _: (make(BATCH, TOKENS, HIDDEN), random(HIDDEN), 1e-6)),
    "embedding": (_Embedding, lambda _, weights: (torch.tensor([[1, 99, 0], [5, 5, 5]]), weights, HIDDEN)),
    "mlp": (lambda: experts(1), lambda make, weights: (make(BATCH, TOKENS, HIDDEN), weights)),
    "routed_experts": (
        lambda: experts(EXPERTS),
        lambda make, weights: (
            make(TOKENS, HIDDEN),
            torch.tensor([[0, 1], [3, 2], [1, 3], [0, 3], [2, 1]]),
            make(TOKENS, TOP_K).abs(),
            weights,
        ),
    ),
    "moe": (make_moe, lambda make, weights: (make(BATCH, TOKENS, HIDDEN), weights, EXPERTS)),
    "rope_table": (object, lambda make, _: (torch.arange(BATCH * TOKENS).view(BATCH, TOKENS), random(ROPE // 2), 1.5)),
    "mla_project_keys": (
        make_attention,
        lambda make, weights: (make(BATCH, TOKENS, HIDDEN), make(BATCH, TOKENS, ROPE), weights, LATENT, ROPE),
    ),
    "mla_attend": (
        make_attention,
        lambda make, weights: (
            make(BATCH, TOKENS, HIDDEN),
            make(BATCH, TOKENS, ROPE),
            *cached_keys(),
            weights,
        ),
    ),
    "layer_project_keys": (
        make_layer,
        lambda make, weights: (
            make(BATCH, TOKENS, HIDDEN),
            random(HIDDEN),
            make(BATCH, TOKENS, ROPE),
            weights,
            LATENT,
            ROPE,
        ),
    ),
    "layer_forward": (make_layer, layer_arguments),
    "layer_append_and_forward": (make_layer, layer_arguments),
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Callable[..., tuple[Any, ...]]]]:
    """An operator, and its arguments for a function that makes activations."""
    make_weights, arguments = OPERATORS[request.param]
    weights = make_weights()
    handle = 0 if type(weights) is object else register_object(weights)
    yield getattr(ops, request.param), lambda make: arguments(make, handle)  # noqa: PT022 - keeps the weights alive


def test_every_operator_is_tested() -> None:
    defined = {name for name in vars(ops) if isinstance(getattr(ops, name), torch._ops.OpOverload)}
    assert defined == OPERATORS.keys()


@pytest.mark.parametrize("make", [random, transposed])
def test_schema_fake_and_kernel_agree(operator: Any, make: Callable[..., torch.Tensor]) -> None:
    call, arguments = operator
    torch.library.opcheck(call, arguments(make))


def test_layout_of_the_input_changes_no_bit(operator: Any) -> None:
    call, arguments = operator
    activations = arguments(transposed)
    contiguous = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in activations]
    for got, expected in zip(_tuple(call(*activations)), _tuple(call(*contiguous)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - {"embedding"}), indirect=True)
def test_gradients_are_refused_unless_nobody_wants_them(operator: Any) -> None:
    call, arguments = operator
    activations = arguments(random)
    wanted = next(a for a in activations if isinstance(a, torch.Tensor) and a.is_floating_point())
    expected = call(*activations)
    wanted.requires_grad_()
    with pytest.raises(UnsupportedOperationError, match="gradient"):
        call(*activations)
    with torch.no_grad():
        for got, value in zip(_tuple(call(*activations)), _tuple(expected), strict=True):
            assert torch.equal(got, value)


def test_a_compiled_function_gives_the_same_bits() -> None:
    weights = packed(1, 37, HIDDEN)
    handle = register_object(weights)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x + 1, handle, 37) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (1, 3, 8):
        x = random(tokens, HIDDEN)
        assert torch.equal(compiled(x), function(x))


def test_weights_that_are_gone_are_an_error() -> None:
    handle = register_object(packed(1, 37, HIDDEN))
    with pytest.raises(RuntimeError, match="gone"):
        ops.linear(random(2, HIDDEN), handle, 37)


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - {"embedding", "rope_table"}), indirect=True)
def test_a_wrong_shape_is_an_error(operator: Any) -> None:
    """And no read or write beyond a tensor: each argument in turn loses its last column."""
    call, arguments = operator
    right = arguments(random)
    for at, argument in enumerate(right):
        if not isinstance(argument, torch.Tensor):
            continue
        wrong = [*right]
        wrong[at] = argument[..., :-1]
        with pytest.raises(ValueError, match=r"must have|reshape"):
            call(*wrong)


@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_a_token_outside_the_table_is_an_error(token: int) -> None:
    table = _Embedding()
    with pytest.raises(IndexError, match=r"not in \[0, 100\)"):
        ops.embedding(torch.tensor([3, token]), register_object(table), HIDDEN)


def _tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
