"""Caches branch as transformers' own do: every handle to keys stays as it was, whatever is appended elsewhere.

Beside the model from a file stands the stock model it was written from, with the stock cache. Whatever is done to one
cache is done to the other, and what both models say next has to agree.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_files import random_tokens
from transformers import DynamicCache

from transformers_kt.modules.fused.base_model import _PackedModel
from transformers_kt.modules.fused.latent_cache import LatentCacheLayer

# Between us and transformers stand the order of additions and the absorbed form of attention, 6e-5 at most; a key of
# another branch moves these logits, whose standard deviation is 3, by 0.1 or more.
FLOAT_TOLERANCE = 6e-4
NAME = "small-v3-F32"
PROMPT = torch.cat((random_tokens(40, seed=1), random_tokens(40, seed=2)))


@pytest.fixture(scope="module")
def models(kt_model: Callable[[str], Any], stock_model: Callable[[str], Any]) -> tuple[Any, Any]:
    return kt_model(NAME), stock_model(NAME)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- Every way to branch --------------------------------------------------------------------------------------------


def begun(model: Any) -> DynamicCache:
    """A cache that has grown in place: the first call makes its layers, the second its buffers."""
    cache = DynamicCache()
    for ids in (PROMPT, PROMPT[:, :2], PROMPT[:, :1]):
        model(ids, past_key_values=cache)
    return cache


def states(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def put_back(cache: DynamicCache, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        layer.keys, layer.values = keys, values
    return cache


def with_layers(cache: DynamicCache, layers: list[Any]) -> DynamicCache:
    copied = copy.copy(cache)
    copied.layers = layers
    return copied


def of_states(cache: DynamicCache) -> DynamicCache:
    return DynamicCache(states(cache))


def by_updates(cache: DynamicCache) -> DynamicCache:
    """As caches are made of legacy tuples."""
    made = DynamicCache()
    for index, (keys, values) in enumerate(states(cache)):
        made.update(keys, values, index)
    return made


BRANCHES: dict[str, Callable[[DynamicCache], DynamicCache]] = {
    "copied layers": lambda cache: with_layers(cache, [copy.copy(layer) for layer in cache.layers]),
    "deep-copied layers": lambda cache: with_layers(cache, [copy.deepcopy(layer) for layer in cache.layers]),
    "deep copy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "keys in another cache": lambda cache: put_back(copy.deepcopy(cache), states(cache)),
    "slices in another cache": lambda cache: put_back(
        copy.deepcopy(cache), [(keys[:, :, :30], values[:, :, :30]) for keys, values in states(cache)]
    ),
    "cloned keys": lambda cache: put_back(copy.deepcopy(cache), [(k.clone(), v.clone()) for k, v in states(cache)]),
    "made of its states": of_states,
    "made of tuples": by_updates,
}

CHANGES: dict[str, Callable[[DynamicCache], Any]] = {
    "none": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "crop of all that was appended": lambda cache: cache.crop(-30),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "crop and reorder": lambda cache: (cache.crop(-2), cache.reorder_cache(torch.tensor([1, 1]))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", BRANCHES)
def test_branches_go_on_as_those_of_a_stock_cache(models: tuple[Any, Any], way: str, change: str) -> None:
    """Trunk and two branches take turns; each appends other tokens than the others."""
    said = []
    for model in models:
        cache = begun(model)
        first = BRANCHES[way](cache)
        second = BRANCHES[way](cache)
        CHANGES[change](first)
        logits = []
        for turn in range(3):
            for number, branch in enumerate((cache, first, second)):
                ids = PROMPT[:, 3 * turn + number : 3 * turn + number + 1]
                logits.append(model(ids, past_key_values=branch).logits)
        said.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("look", [lambda layer: layer.keys, lambda layer: layer.values], ids=["keys", "values"])
def test_what_was_handed_out_is_never_written(models: tuple[Any, Any], look: Callable[[Any], torch.Tensor]) -> None:
    model = models[0]
    cache = begun(model)
    handles = [look(layer) for layer in cache.layers]
    kept = [handle.clone() for handle in handles]
    for _ in range(2):
        model(PROMPT[:, :3], past_key_values=cache)
        cache.crop(-5)
        model(PROMPT[:, 5:7], past_key_values=cache)
    assert all(map(torch.equal, handles, kept))


def test_writing_into_what_was_handed_out_changes_no_later_step(models: tuple[Any, Any]) -> None:
    model = models[0]
    cache, other = begun(model), begun(model)
    handles = states(cache)
    for each in (cache, other):
        model(PROMPT[:, :1], past_key_values=each)
    for keys, values in handles:
        keys.zero_()
        values.zero_()
    found, expected = (model(PROMPT[:, 1:2], past_key_values=each).logits for each in (cache, other))
    assert torch.equal(found, expected)


def test_what_update_returned_outlives_a_crop(models: tuple[Any, Any]) -> None:
    layer = LatentCacheLayer()
    rows = torch.arange(24.0).view(1, 1, 6, 4)
    returned = layer.update(rows, rows)[0]
    layer.crop(-2)
    layer.update(-rows, -rows)
    assert torch.equal(returned, rows)


def test_keys_of_another_type_are_joined_as_the_stock_layer_joins_them() -> None:
    """The stock layer concatenates, which promotes: float32 behind bfloat16 loses nothing."""
    layer = LatentCacheLayer()
    rows = torch.rand(1, 1, 6, 4)
    layer.update(rows, rows)
    layer.keys = layer.keys.to(torch.bfloat16)
    keys, _values = layer.update(rows, rows)
    assert keys.dtype == torch.float32
    assert torch.equal(keys[:, :, 6:], rows)


# ---- The fast path stays --------------------------------------------------------------------------------------------


def test_nobody_looking_nothing_is_copied(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, and the crops of assisted decoding, stay in the buffers that the second call made."""
    model = models[0]
    cache = begun(model)
    passes: list[int] = []
    forward = _PackedModel.forward

    def count(self: _PackedModel, *args: Any) -> torch.Tensor:
        passes.append(1)
        return forward(self, *args)

    monkeypatch.setattr(_PackedModel, "forward", count)
    buffers = [[buffer.data_ptr() for buffer in layer._buffers] for layer in cache.layers]
    for _ in range(20):
        model(PROMPT[:, :4], past_key_values=cache)
        cache.crop(-3)
    assert cache.get_seq_length() == 43 + 20
    assert len(passes) == 20
    assert buffers == [[buffer.data_ptr() for buffer in layer._buffers] for layer in cache.layers]


def test_a_look_costs_one_copy(models: tuple[Any, Any]) -> None:
    model = models[0]
    cache = begun(model)
    states(cache)
    seen = []
    for _ in range(5):
        model(PROMPT[:, :1], past_key_values=cache)
        seen.append([buffer.data_ptr() for layer in cache.layers for buffer in layer._buffers])
    assert seen == 5 * seen[:1]


# ---- Anything in any order ------------------------------------------------------------------------------------------

OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 5)),
    st.tuples(st.just("append"), st.integers(0, 3), st.just(1)),
    st.tuples(st.just("append by modules"), st.integers(0, 3), st.integers(1, 3)),
    st.tuples(st.just("branch"), st.integers(0, 3), st.sampled_from(sorted(BRANCHES))),
    st.tuples(st.just("crop"), st.integers(0, 3), st.integers(0, 6)),
    st.tuples(st.just("reorder"), st.integers(0, 3), st.permutations([0, 1])),
    st.tuples(st.just("select"), st.integers(0, 3), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("repeat and select"), st.integers(0, 3), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
    st.tuples(st.just("snapshot"), st.integers(0, 3), st.none()),
    st.tuples(st.just("snapshot of a slice"), st.integers(0, 3), st.integers(1, 6)),
    st.tuples(st.just("restore"), st.integers(0, 3), st.integers(0, 7)),
    st.tuples(st.just("scale in place"), st.integers(0, 3), st.just(1.25)),
)


class Tree:
    """Branches of a cache and snapshots of their keys, of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.branches = [DynamicCache()]
        self.snapshots: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.model(PROMPT[:, :9], past_key_values=self.branches[0])

    def do(self, operation: str, number: int, argument: Any) -> torch.Tensor | None:
        number %= len(self.branches)
        cache = self.branches[number]
        if operation.startswith("append"):
            return self._append(cache, argument, operation.endswith("modules"))
        if operation == "branch" and len(self.branches) < 4:
            self.branches.append(BRANCHES[argument](cache))
        elif operation == "crop":
            cache.crop(-min(argument, cache.get_seq_length() - 1))
        elif operation == "reorder":
            cache.reorder_cache(torch.tensor(argument))
        elif operation == "select":
            cache.batch_select_indices(torch.tensor(argument))
        elif operation == "repeat and select":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor(argument))
        elif operation == "snapshot":
            self.snapshots.append(states(cache))
        elif operation == "snapshot of a slice":
            self.snapshots.append([(k[:, :, :argument], v[:, :, :argument]) for k, v in states(cache)])
        elif operation == "restore" and self.snapshots:
            put_back(cache, self.snapshots[argument % len(self.snapshots)])
        elif operation == "scale in place":
            cache.layers[1].keys.mul_(argument)
        return None

    def after_snapshot(self, number: int) -> torch.Tensor:
        return self._append(put_back(copy.deepcopy(self.branches[0]), self.snapshots[number]), 1, False)

    def _append(self, cache: DynamicCache, tokens: int, by_modules: bool) -> torch.Tensor:
        start = cache.get_seq_length() % 30
        ids = PROMPT[:, start : start + tokens]
        hook = self.model.model.norm.register_forward_hook(lambda *_: None) if by_modules else None
        logits: torch.Tensor = self.model(ids, past_key_values=cache).logits
        if hook is not None:
            hook.remove()
        return logits


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=st.lists(OPERATIONS, min_size=8, max_size=24))
def test_caches_do_what_stock_caches_do(models: tuple[Any, Any], operations: list[tuple[str, int, Any]]) -> None:
    ours, stock = (Tree(model) for model in models)
    for operation in operations:
        found, expected = ours.do(*operation), stock.do(*operation)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT_TOLERANCE)
    for number in range(len(ours.branches)):  # what was overwritten behind a branch's back shows here at the latest
        found, expected = (tree.do("append", number, 1) for tree in (ours, stock))
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT_TOLERANCE)
        assert ours.branches[number].get_seq_length() == stock.branches[number].get_seq_length()
    for number in range(len(ours.snapshots)):  # nor was any snapshot written into
        found, expected = (tree.after_snapshot(number) for tree in (ours, stock))
        torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT_TOLERANCE)
