"""Fused decoder layers: the bits of their parts, and the parts themselves as soon as a hook watches them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from random_files import left_padded, random_tokens
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from transformers_kt.backends import schemas as ops
from transformers_kt.modules.fused import decoder_layer

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
PROMPTS = [random_tokens(tokens, seed=tokens) for tokens in (300, 3, 17)]


@pytest.fixture(params=["small-v3-mixed", "small-v2-F32", "v2-lite-like-Q4_K_M"])
def model(kt_model: Callable[[str], Any], request: pytest.FixtureRequest) -> Any:
    return kt_model(request.param)


@pytest.fixture
def apart(model: Any) -> Iterator[Callable[[], None]]:
    """Makes the layers of `model` call their parts, until the test ends."""
    handles: list[Any] = []

    def hook() -> None:
        for layer in model.model.layers:
            handles.append(layer.mlp.register_forward_hook(lambda *_: None))

    yield hook
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model: Any, cache: Any) -> torch.Tensor:
    """Of a padded batch in a prefill, a step, a chunk and a step."""
    ids, mask = left_padded(PROMPTS)
    found, seen = [], 0
    for tokens in (280, 1, ids.shape[1] - 282, 1):
        chunk = ids[:, seen : seen + tokens]
        seen += tokens
        found.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """One entry per call of the operator ``name`` from now on."""
    calls: list[None] = []
    operator = getattr(ops, name)

    def count(*args: Any) -> Any:
        calls.append(None)
        return operator(*args)

    monkeypatch.setattr(ops, name, count)
    return calls


def test_layers_keep_their_parts_and_their_stock_class(model: Any) -> None:
    for layer in model.model.layers:
        assert isinstance(layer, decoder_layer._FusedDecoderLayer)
        assert isinstance(layer, DeepseekV2DecoderLayer | DeepseekV3DecoderLayer)
        assert [name for name, _ in layer.named_children()] == ["self_attn", "mlp", *PARTS[::2]]


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda: None, "static"])
def test_in_one_go_gives_the_bits_of_the_parts(
    model: Any, apart: Callable[[], None], make_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make_cache == "static":

        def make_cache() -> StaticCache:
            return StaticCache(model.config, max_cache_len=320)

    singly = counted(monkeypatch, "mla_attend")
    found = logits(model, make_cache())
    assert len(singly) == 0
    apart()
    assert torch.equal(logits(model, make_cache()), found)
    assert len(singly) == 4 * len(model.model.layers)


def test_a_dynamic_cache_is_written_in_place(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, in_place = counted(monkeypatch, "layer_forward"), counted(monkeypatch, "layer_append_and_forward")
    with torch.no_grad():
        cache = model(PROMPTS[1], past_key_values=DynamicCache()).past_key_values
        layers = len(model.model.layers)
        assert len(copied) == layers  # the first call makes the layers of the cache
        model(PROMPTS[0], past_key_values=cache)
    assert (len(copied), len(in_place)) == (layers, layers)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_hook_on_a_layer_sees_its_own_output(model: Any, layer: int) -> None:
    def hidden_states() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        hook = model.model.layers[layer].register_forward_hook(lambda _module, _args, output: seen.append(output))
        try:
            logits(model, DynamicCache())
        finally:
            hook.remove()
        return seen

    found = hidden_states()
    ids, mask = left_padded(PROMPTS)
    with torch.no_grad():
        expected = model.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_a_cache_of_another_class_goes_through_its_own_update(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []

    class WatchedCache(DynamicCache):
        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            updates.append(layer_idx)
            return super().update(keys, values, layer_idx, *args, **kwargs)

    expected = logits(model, DynamicCache())
    assert torch.equal(logits(model, WatchedCache()), expected)
    assert updates == 4 * list(range(len(model.model.layers)))


def test_a_copied_cache_goes_its_own_way(model: Any) -> None:
    with torch.no_grad():
        cache = model(PROMPTS[0], past_key_values=DynamicCache()).past_key_values
        model(PROMPTS[1][:, :1], past_key_values=cache)  # the first step makes room, in which the next ones write
        branch = copy.deepcopy(cache)
        expected = model(PROMPTS[2], past_key_values=copy.deepcopy(cache)).logits
        model(PROMPTS[1], past_key_values=branch)
        assert torch.equal(model(PROMPTS[2], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_a_part_sees_every_call(model: Any, part: str) -> None:
    seen: list[nn.Module] = []
    modules = [getattr(layer, part) for layer in model.model.layers]
    handles = [module.register_forward_hook(lambda module, *_: seen.append(module)) for module in modules]
    try:
        with torch.no_grad():
            model(PROMPTS[1])
    finally:
        for handle in handles:
            handle.remove()
    assert seen == modules


def test_a_part_that_was_exchanged_is_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    layer = model.model.layers[0]
    expected = logits(model, None)
    monkeypatch.setitem(layer._modules, "mlp", Zero())
    assert not torch.equal(logits(model, None), expected)


def test_a_wrapped_forward_method_is_called(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[0].self_attn
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return type(attention).forward(attention, *args, **kwargs)

    monkeypatch.setitem(vars(attention), "forward", wrapped)
    with torch.no_grad():
        model(PROMPTS[1])
    assert len(calls) == 1


def test_norm_weights_can_be_changed(model: Any) -> None:
    """As they can in any model: the packed layer holds no copy of them."""
    norm = model.model.layers[0].input_layernorm
    before, expected = norm.weight, logits(model, None)
    try:
        norm.weight = nn.Parameter(before * 2, requires_grad=False)
        assert not torch.equal(logits(model, None), expected)
    finally:
        norm.weight = before
    assert torch.equal(logits(model, None), expected)
