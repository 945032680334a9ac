"""Whatever is passed: what the stock model says of it, or a refusal of ours that names the argument and its shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from transformers_kt.errors import InputError

# As in test_exactness.py: order of additions, and attention in absorbed form.
FLOAT_TOLERANCE = 6e-4
DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64),
)
BATCH, TOKENS, CACHED, HIDDEN = 2, 5, 3, 96


@pytest.fixture(scope="module")
def models(kt_model: Callable[[str], Any], stock_model: Callable[[str], Any]) -> tuple[Any, Any]:
    return kt_model("small-v3-F32"), stock_model("small-v3-F32")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(3, 120, shape, generator=torch.Generator().manual_seed(1))


def outcome(model: Any, arguments: dict[str, Any], cached: bool) -> tuple[torch.Tensor | None, Exception | None]:
    arguments = {name: value.clone() for name, value in arguments.items()}
    try:
        if cached:
            arguments["past_key_values"] = DynamicCache()
            model(ids((BATCH, CACHED)), past_key_values=arguments["past_key_values"])
        return model(**arguments).logits, None
    except Exception as error:
        return None, error


def assert_as_stock(models: tuple[Any, Any], arguments: dict[str, Any], cached: bool = False) -> None:
    (ours, our_error), (stock, stock_error) = (outcome(model, arguments, cached) for model in models)
    said = {name: (value.dtype, tuple(value.shape)) for name, value in arguments.items()}
    if our_error is not None:
        named = any(name in str(our_error).replace("attention mask", "attention_mask") for name in arguments)
        refused = isinstance(our_error, InputError) and named and "shape" in str(our_error)
        assert refused or type(our_error) is type(stock_error), (said, our_error, stock_error)
        return
    assert stock_error is None, (said, "taken, where stock says", stock_error)
    torch.testing.assert_close(ours, stock, rtol=0, atol=FLOAT_TOLERANCE, msg=lambda text: f"{said}: {text}")


LENGTHS = st.sampled_from([1, 2, TOKENS - 1, TOKENS, TOKENS + 1, TOKENS + CACHED, TOKENS + CACHED + 2])
SHAPES = st.one_of(
    st.tuples(LENGTHS),
    st.tuples(st.sampled_from([1, BATCH, 3]), LENGTHS),
    st.tuples(st.sampled_from([1, BATCH]), st.just(1), LENGTHS),
    st.tuples(st.sampled_from([1, BATCH]), st.sampled_from([1, 2]), st.sampled_from([1, TOKENS]), LENGTHS),
)
MANY = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@MANY
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_ids_of_any_shape_and_dtype(models: tuple[Any, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_stock(models, {"input_ids": ids(shape).to(dtype)})


@MANY
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), fraction=st.sampled_from([0.0, 0.5]), cached=st.booleans())
def test_positions_of_any_shape_and_dtype(
    models: tuple[Any, Any], shape: tuple[int, ...], dtype: torch.dtype, fraction: float, cached: bool
) -> None:
    positions = torch.arange(shape[-1]).expand(shape) + cached * CACHED + fraction
    assert_as_stock(models, {"input_ids": ids((BATCH, TOKENS)), "position_ids": positions.to(dtype)}, cached)


@MANY
@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), hidden=st.sampled_from([0, 1, 2]), cached=st.booleans())
def test_masks_of_any_shape_and_dtype(
    models: tuple[Any, Any], shape: tuple[int, ...], dtype: torch.dtype, hidden: int, cached: bool
) -> None:
    if len(shape) == 4:
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 1 : 1 + hidden] = False
        mask[..., 0] = True  # a query that sees nothing has no answer that models have to share
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if dtype == torch.float32 else mask.to(dtype)
    else:
        mask = torch.ones(shape)
        mask[..., :hidden] = 0
        mask = mask.to(dtype)
        if shape[-1] <= hidden:
            return
    _, stock_error = outcome(models[1], {"input_ids": ids((BATCH, TOKENS)), "attention_mask": mask}, cached)
    arguments = {"input_ids": ids((BATCH, TOKENS)), "attention_mask": mask}
    if len(shape) == 2 and hidden and stock_error is None:
        _assert_visible_as_stock(models, arguments, cached)
    else:
        assert_as_stock(models, arguments, cached)


def _assert_visible_as_stock(models: tuple[Any, Any], arguments: dict[str, Any], cached: bool) -> None:
    """At padding, queries see nothing; what is computed there is nobody's business."""
    (ours, our_error), (stock, _) = (outcome(model, arguments, cached) for model in models)
    if our_error is not None:
        assert isinstance(our_error, InputError)
        return
    torch.testing.assert_close(ours[:, -2:], stock[:, -2:], rtol=0, atol=FLOAT_TOLERANCE)


@MANY
@given(
    shape=st.one_of(SHAPES.map(lambda shape: (*shape, HIDDEN)), SHAPES, st.just((BATCH, TOKENS, HIDDEN - 1))),
    dtype=st.sampled_from(DTYPES),
)
def test_embeddings_of_any_shape_and_dtype(models: tuple[Any, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if dtype not in (torch.float16, torch.bfloat16):
        assert_as_stock(models, {"inputs_embeds": values.to(dtype)})
        return
    # The stock model goes on in half precision, and rounds; ours computes in float32, whatever comes in.
    (ours, error), (exact, _) = (
        outcome(models[0], {"inputs_embeds": x}, False) for x in (values.to(dtype), values.to(dtype).float())
    )
    assert isinstance(error, InputError) if ours is None else torch.equal(ours, exact)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
@pytest.mark.parametrize("given_as", [list, tuple, lambda value: torch.tensor(value).numpy()])
def test_what_is_no_tensor_is_refused_by_name(models: tuple[Any, Any], name: str, given_as: Any) -> None:
    arguments = {"input_ids": ids((1, 3)), name: given_as([[0, 1, 2]])}
    with pytest.raises(InputError, match=name):
        models[0](**arguments)


def test_tuples_of_keys_are_refused_with_how_a_cache_is_made_of_them(models: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="DynamicCache"):
        models[0](ids((1, 3)), past_key_values=((torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)),))
