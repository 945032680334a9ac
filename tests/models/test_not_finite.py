"""NaN and infinity come out wherever they are carried to, alike on every instruction set, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_files import random_tokens
from transformers import DynamicCache

import transformers_kt._C as _C

NAN, INFINITY = float("nan"), float("inf")
PROMPT = random_tokens(40, seed=1)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    _C.select_isa(request.param)  # taken back after every test
    assert _C.isa() == request.param
    return str(request.param)


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("token", [0, 7, 39])
@pytest.mark.parametrize("name", ["small-v3-mixed", "small-v2-F32", "v3-like-Q4_K_M", "v2-lite-like-Q4_K_M"])
def test_later_tokens_see_it_and_earlier_ones_do_not(
    kt_model: Callable[[str], Any], name: str, token: int, bad: float, isa: str
) -> None:
    model = kt_model(name)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(PROMPT).clone()
        expected = model(inputs_embeds=embeddings).logits[0]
        embeddings[0, token, 5] = bad
        found = model(inputs_embeds=embeddings).logits[0]
    assert not found[token:].isfinite().any()
    assert torch.equal(found[:token], expected[:token])


def test_what_a_cache_holds_is_carried_into_the_next_token(kt_model: Callable[[str], Any], isa: str) -> None:
    model = kt_model("v3-like-Q4_K_M")
    with torch.no_grad():
        cache = model(PROMPT, past_key_values=DynamicCache()).past_key_values
        cache.layers[0].values[0, 0, 3, 0] = NAN
        assert model(PROMPT[:, :1], past_key_values=cache).logits.isnan().all()
