"""A patched class is called as in stock transformers, or refused before it is missed."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_examples import Example, make_example
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.families.deepseek import DEEPSEEK

REPLACED = ("attention", "moe", "mlp", "experts", "norm", "rotary")
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Example]:
    return functools.cache(lambda name: make_example(name, tmp_path_factory.mktemp(name)))


def stock_class(kind: str, example: str) -> type[nn.Module]:
    module, _, name = DEEPSEEK.stock_classes[kind][example == "v3"].rpartition(".")
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


def patch(
    monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module], wrap: Callable[[Any], Any] = lambda method: lambda f: f
) -> list[Any]:
    """Replaces the forward method by one that notes its calls; ``wrap(method)`` decorates it."""
    seen: list[Any] = []
    method = cls.forward

    @wrap(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    return seen


def load(example: Example, kt_rules: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(example.folder, kt_rules=kt_rules)


def rules_of(message: str) -> list[Any]:
    """What the message says to pass."""
    stated = re.search(r"kt_rules=(\[.*\])", message)
    assert stated is not None
    rules: list[Any] = eval(stated[1])
    return rules


@pytest.mark.parametrize("wrap", [lambda _: lambda f: f, functools.wraps], ids=["plain", "wraps"])
@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("example", ["v2", "v3"])
def test_a_patch_that_nothing_would_call_is_refused_with_the_rule_that_has_it_called(
    files: Callable[[str], Example], example: str, kind: str, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = stock_class(kind, example)
    model = load(files(example))
    expected = model(IDS).logits
    seen = patch(monkeypatch, cls, wrap)
    said = f"{cls.__name__} was given another forward, which is {__name__}."
    with pytest.raises(UnsupportedOperationError, match=re.escape(said)):
        model(IDS)
    with pytest.raises(UnsupportedOperationError, match=re.escape(said)) as raised:
        load(files(example))
    assert seen == []
    kept = load(files(example), rules_of(str(raised.value)))
    logits = kept(IDS).logits
    assert set(seen) == {module for module in kept.modules() if isinstance(module, cls)}
    # Those modules compute in float32, ours with activations of 8 bits.
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    monkeypatch.undo()
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("kind", ["decoder_layer", "base_model"])
@pytest.mark.parametrize("example", ["v2", "v3"])
def test_a_class_whose_modules_stay_may_be_patched_before_loading(
    files: Callable[[str], Example], example: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(files(example))(IDS).logits
    cls = stock_class(kind, example)
    seen = patch(monkeypatch, cls)
    model = load(files(example))
    assert torch.equal(model(IDS).logits, expected)
    assert seen == [module for module in model.modules() if isinstance(module, cls)]


def test_a_class_that_is_kept_in_torch_may_be_patched(
    files: Callable[[str], Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"match": {"name": r"\.self_attn$"}, "replace": {"op": "torch"}}]
    model = load(files("v3"), rules)
    cls = stock_class("attention", "v3")
    seen = patch(monkeypatch, cls)
    model(IDS)
    assert len(seen) == model.config.num_hidden_layers
