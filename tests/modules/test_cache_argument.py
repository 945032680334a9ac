"""Models, layers and attention take their cache under the name of every transformers release that is supported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_files import random_tokens
from transformers import DynamicCache

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT, cache_argument

NAMES = ("cache", "past_key_values")
PROMPT = random_tokens(20)


@pytest.fixture(scope="module")
def base_model(kt_model: Callable[[str], Any]) -> Any:
    return kt_model("v3-like-Q4_K_M").model


def filled_cache(base_model: Any) -> DynamicCache:
    cache = DynamicCache()
    base_model(PROMPT, **{CACHE_ARGUMENT: cache})
    return cache


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40])  # all layers in one call, and one after the other
@pytest.mark.parametrize("name", NAMES)
def test_a_base_model_reads_its_cache(base_model: Any, name: str, tokens: int) -> None:
    more = random_tokens(tokens, seed=5)
    whole = base_model(torch.cat((PROMPT, more), dim=1)).last_hidden_state[:, PROMPT.shape[1] :]
    cache = filled_cache(base_model)
    out = base_model.forward(more, **{name: cache})
    assert torch.equal(out.last_hidden_state, whole)
    assert out[CACHE_ARGUMENT] is cache
    assert cache.get_seq_length() == PROMPT.shape[1] + tokens


@torch.no_grad()
@pytest.mark.parametrize("part", [lambda layer: layer, lambda layer: layer.self_attn], ids=["layer", "attention"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_and_attention_append_to_it(base_model: Any, name: str, part: Callable[[Any], Any]) -> None:
    cache = copy.deepcopy(filled_cache(base_model))
    states = torch.randn(1, 3, base_model.config.hidden_size)
    table = base_model.rotary_emb(states, torch.arange(20, 23)[None])
    module = part(base_model.layers[0])
    module(hidden_states=states, attention_mask=None, position_embeddings=table, **{name: cache})
    assert cache.get_seq_length(0) == 23
    assert cache.get_seq_length(1) == 20


def test_models_that_take_it_under_another_name_are_refused() -> None:
    def renamed(self: Any, hidden_states: Any, memory: Any = None, **kwargs: Any) -> None: ...

    def known(self: Any, hidden_states: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...

    assert cache_argument([known, known]) == "past_key_values"
    with pytest.raises(UnsupportedModelError, match=r"5\.22 to 5\.24 are tested"):
        cache_argument([known, renamed])
