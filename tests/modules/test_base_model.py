"""Small batches through a base model without torch: the bits of its modules, called if a hook watches them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from random_files import left_padded, random_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.modules.fused.base_model import _PackedModel

PROMPT = random_tokens(40, seed=1)
STEP = random_tokens(3, seed=2)
WATCHED = ("embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.0.self_attn", "layers.1.mlp")


@pytest.fixture(params=["small-v3-mixed", "small-v2-F32", "v2-lite-like-Q4_K_M"])
def model(kt_model: Callable[[str], Any], request: pytest.FixtureRequest) -> Any:
    return kt_model(request.param)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each pass that goes by the modules, from now on."""
    passes: list[int] = []
    forward = _PackedModel.forward

    def count(self: _PackedModel, steps: Any) -> Any:
        passes.append(steps[0].ids.shape[1])
        return forward(self, steps)

    monkeypatch.setattr(_PackedModel, "forward", count)
    return passes


def prefilled(model: Any) -> DynamicCache:
    cache = model(PROMPT, past_key_values=DynamicCache()).past_key_values
    assert isinstance(cache, DynamicCache)
    return cache


def by_modules(model: Any, *args: Any, **kwargs: Any) -> Any:
    """What the model gives when its modules are called one by one."""
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    try:
        return model(*args, **kwargs)
    finally:
        handle.remove()


def test_it_gives_the_bits_of_its_modules(model: Any, at_once: list[int]) -> None:
    cache = prefilled(model)
    other = copy.deepcopy(cache)
    found = [model(STEP, past_key_values=cache) for _ in range(3)]
    assert at_once == [3, 3, 3]
    expected = [by_modules(model, STEP, past_key_values=other) for _ in range(3)]
    assert at_once == [3, 3, 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
        assert type(ours) is type(theirs)
    for layer, reference in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.keys, reference.keys)
        assert torch.equal(layer.values, reference.values)
    states = model.model(STEP, past_key_values=cache)
    expected_states = model.model.forward(STEP, past_key_values=other, return_dict=True)
    assert type(states) is type(expected_states)
    assert states.past_key_values is cache
    assert torch.equal(states.last_hidden_state, expected_states.last_hidden_state)


def test_padded_batches_go_the_same_way(model: Any, at_once: list[int]) -> None:
    ids, mask = left_padded([random_tokens(tokens, seed=tokens) for tokens in (50, 3, 17)])
    found, expected = DynamicCache(), DynamicCache()
    for tokens, positions in ((47, None), (1, None), (2, torch.tensor([[48, 49], [5, 6], [7, 8]]))):
        seen = found.get_seq_length()
        options = {"attention_mask": mask[:, : seen + tokens], "position_ids": positions}
        chunk = ids[:, seen : seen + tokens]
        ours = model(chunk, past_key_values=found, **options).logits
        assert torch.equal(ours, by_modules(model, chunk, past_key_values=expected, **options).logits)
    assert at_once == [1, 2]


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"return_dict": False}])
def test_what_only_the_modules_give_comes_from_them(model: Any, options: dict[str, Any], at_once: list[int]) -> None:
    cache = prefilled(model)
    found = model.model(STEP, past_key_values=copy.deepcopy(cache), **options)
    assert at_once == []
    expected = model.model(STEP, past_key_values=cache).last_hidden_state
    assert torch.equal(found[0], expected)
    if "output_hidden_states" in options:
        assert len(found.hidden_states) == len(model.model.layers) + 1
    assert at_once == [3]  # hooks that transformers left are none that look


def test_hidden_states_asked_for_in_the_config_are_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = prefilled(model)
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    assert len(model(STEP, past_key_values=cache).hidden_states) == len(model.model.layers) + 1


def test_a_mask_of_another_form_is_left_to_the_modules(model: Any, at_once: list[int]) -> None:
    cache = prefilled(model)
    mask = torch.ones(1, 1, 3, 43, dtype=torch.bool).tril(40)
    found = model(STEP, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
    assert at_once == []
    assert torch.equal(found, model(STEP, past_key_values=cache).logits)


@pytest.mark.parametrize("path", WATCHED)
def test_a_hook_sees_every_call(model: Any, path: str) -> None:
    cache, calls = prefilled(model), []
    model(STEP, past_key_values=cache)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.model.get_submodule(path), register)(lambda *_: calls.append(path))
        try:
            model(STEP, past_key_values=cache)
        finally:
            handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("path", WATCHED)
def test_a_wrapped_forward_method_is_called(model: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, calls = prefilled(model), []
    model(STEP, past_key_values=cache)
    module = model.model.get_submodule(path)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        return type(module).forward(module, *args, **kwargs)

    monkeypatch.setitem(vars(module), "forward", wrapped)
    model(STEP, past_key_values=cache)
    assert calls == [path]


@pytest.mark.parametrize("was_called", [True, False])
@pytest.mark.parametrize("path", ["norm", "layers.1", "layers.1.mlp"])
def test_a_module_that_was_exchanged_is_used(
    model: Any, path: str, was_called: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.zeros_like(x)

    cache = prefilled(model)
    expected = model(STEP, past_key_values=copy.deepcopy(cache)).logits
    if not was_called:
        monkeypatch.setattr(model.model, "_packed_model", None)
    parent, _, name = path.rpartition(".")
    monkeypatch.setitem(model.model.get_submodule(parent)._modules, name, Zero())
    assert not torch.equal(model(STEP, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("path", ["norm", "layers.1.input_layernorm"])
@pytest.mark.parametrize("exchanged", [True, False])
def test_norm_weights_can_be_changed(model: Any, path: str, exchanged: bool) -> None:
    cache, norm = prefilled(model), model.model.get_submodule(path)
    expected = model(STEP, past_key_values=copy.deepcopy(cache)).logits
    before, values = norm.weight, norm.weight.data
    try:
        if exchanged:
            norm.weight = nn.Parameter(before * 2, requires_grad=False)
        else:
            norm.weight.data = values * 2
        assert not torch.equal(model(STEP, past_key_values=copy.deepcopy(cache)).logits, expected)
    finally:
        before.data = values
        norm.weight = before
    assert torch.equal(model(STEP, past_key_values=cache).logits, expected)


def test_a_copied_model_computes_with_its_own_modules(model: Any) -> None:
    cache = prefilled(model)
    expected = model(STEP, past_key_values=copy.deepcopy(cache)).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(STEP, past_key_values=copy.deepcopy(cache)).logits, expected)
    twin.model.layers[0].input_layernorm.weight.data.mul_(2)
    assert not torch.equal(twin(STEP, past_key_values=copy.deepcopy(cache)).logits, expected)
    assert torch.equal(model(STEP, past_key_values=cache).logits, expected)


def test_operators_are_called_where_each_is_observed(model: Any) -> None:
    cache, names = prefilled(model), set()
    model(STEP, past_key_values=cache)

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        model(STEP, past_key_values=cache)
    assert "kt::layer_append_and_forward" in names


# ---- The cache between steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: setattr(cache.layers[1], "keys", cache.layers[1].keys * 2),
        lambda cache: cache.layers[0].keys.mul_(2),
        lambda cache: cache.reset(),
    ],
)
def test_a_cache_changed_between_steps_counts_as_it_is(model: Any, change: Callable[[Any], Any]) -> None:
    """Held to a cache that never grew in one call: both are changed, and go on."""
    prompts = torch.cat((PROMPT, random_tokens(40, seed=3)))
    steps = torch.cat((STEP, random_tokens(3, seed=4)))
    ours, theirs = DynamicCache(), DynamicCache()
    for cache, call in ((ours, model), (theirs, lambda *args, **kwargs: by_modules(model, *args, **kwargs))):
        call(prompts, past_key_values=cache)
        for _ in range(2):
            call(steps, past_key_values=cache)
        change(cache)
    batch = ours.layers[0].keys.shape[0] if ours.get_seq_length() else 2
    again = torch.cat((steps, steps))[:batch]
    for _ in range(2):
        found = model(again, past_key_values=ours).logits
        assert torch.equal(found, by_modules(model, again, past_key_values=theirs).logits)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for layer, reference in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(layer.keys, reference.keys)
        assert torch.equal(layer.values, reference.values)


def test_steps_past_the_room_of_the_buffers_lose_nothing(model: Any, at_once: list[int]) -> None:
    ours, theirs = prefilled(model), prefilled(model)
    ids = random_tokens(300, seed=5)  # room begins with 256
    for first in range(0, 300, 30):
        found = model(ids[:, first : first + 30], past_key_values=ours).logits
        assert torch.equal(found, by_modules(model, ids[:, first : first + 30], past_key_values=theirs).logits)
    assert len(at_once) == 10


def test_a_layer_of_another_cache_dissolves_the_group(model: Any) -> None:
    first, second = prefilled(model), prefilled(model)
    model(STEP, past_key_values=first)
    model(STEP, past_key_values=second)
    second.layers[0] = copy.deepcopy(first.layers[0])
    expected = by_modules(model, STEP, past_key_values=copy.deepcopy(second)).logits
    assert torch.equal(model(STEP, past_key_values=second).logits, expected)


# ---- accelerate -----------------------------------------------------------------------------------------------------


def test_hooks_of_accelerate_change_no_bit(model: Any, at_once: list[int]) -> None:
    """`dispatch_model` wraps the forward method of every module in its device map."""
    layers = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    device_map = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head"], "cpu")
    cache = prefilled(model)
    other = copy.deepcopy(cache)
    expected = [model(STEP, past_key_values=cache).logits for _ in range(2)]
    assert at_once == [3, 3]
    dispatch_model(model, device_map, force_hooks=True)
    try:
        assert model.hf_device_map == device_map
        found = [model(STEP, past_key_values=other).logits for _ in range(2)]
    finally:
        remove_hook_from_module(model, recurse=True)
        for module in model.modules():
            module.__dict__.pop("forward", None)  # accelerate leaves the bound method, which hides patches of the class
        del model.hf_device_map
    assert at_once == [3, 3]
    for ours, reference in zip(found, expected, strict=True):
        assert torch.equal(ours, reference)
    model(STEP, past_key_values=cache)
    assert at_once == [3, 3, 3]


# ---- Parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["model", "model.layers.1", "model.layers.1.mlp", "model.layers.0.self_attn", "model.embed_tokens", "lm_head"],
)
def test_a_part_is_copied_but_not_pickled(model: Any, path: str) -> None:
    part = model.get_submodule(path)
    for copied in (copy.copy(part), copy.deepcopy(part)):
        assert type(copied) is type(part)
    with pytest.raises(UnsupportedOperationError, match=f"a {type(part).__name__} cannot be pickled by itself"):
        pickle.dumps(part)


# ---- Patched classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    "place", ["stock model", "stock layer", "layer", "self_attn", "mlp", "input_layernorm", "norm"]
)
def test_a_class_that_is_patched_after_loading_is_heard(
    model: Any, place: str, tokens: int, name: str, at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model.model.layers[1]
    cls = {
        "stock model": type(model.model).__bases__[1],
        "stock layer": type(layer).__bases__[1],
        "layer": type(layer),
        "norm": type(model.model.norm),
    }.get(place) or type(getattr(layer, place))
    ids = PROMPT[:, :tokens]
    expected = model(ids).logits
    del at_once[:]
    seen: list[Any] = []
    method = getattr(cls, name)

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, name, patched)
    assert torch.equal(model(ids).logits, expected)
    instances = sum(isinstance(module, cls) for module in model.modules())
    assert len(seen) == instances
    assert at_once == []
    monkeypatch.undo()
    assert torch.equal(model(ids).logits, expected)
