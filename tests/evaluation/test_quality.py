"""``transformers_kt.quality``: figures against torch's own functions on logits taken without us."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import transformers_kt
from transformers_kt.assets import bundled_model
from transformers_kt.errors import InputError
from transformers_kt.evaluation import quality as quality_module

TEXTS = {"sum": "What is 486 + 57? " * 12, "name": "Marta took the ferry at twenty past six."}
CONTEXT = 200  # the first text is two windows, the first of which is run in two pieces
# Logits are kept in 16 bits: a step is up to 4e-4 here, a rounding error 1e-4 at most in the mean.
KEPT_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")


@pytest.fixture(scope="module")
def pair(bundled: Any) -> tuple[Any, Any]:
    """The bundled model, and transformers' own modules on its dequantized weights."""
    return bundled, AutoModelForCausalLM.from_pretrained(
        bundled_model(), kt_rules=[{"match": {"name": ""}, "replace": {"op": "torch"}}]
    )


@torch.no_grad()
def expected(pair: tuple[Any, Any], tokenizer: PreTrainedTokenizerFast, text: str) -> dict[str, torch.Tensor]:
    """By torch.nn.functional, on whole windows without a cache."""
    found: dict[str, list[torch.Tensor]] = {"kl": [], "agrees": [], "losses": [], "reference_losses": []}
    body = tokenizer(text, add_special_tokens=False).input_ids
    for start in range(0, len(body), CONTEXT - 1):
        ids = torch.tensor([[tokenizer.bos_token_id, *body[start : start + CONTEXT - 1]]])
        mine, theirs = (model(ids, use_cache=False).logits[0, :-1].double() for model in pair)
        logs = torch.nn.functional.log_softmax(mine, -1), torch.nn.functional.log_softmax(theirs, -1)
        found["kl"].append(torch.nn.functional.kl_div(*logs, reduction="none", log_target=True).sum(-1))
        found["agrees"].append((mine.argmax(-1) == theirs.argmax(-1)).double())
        for name, logits in (("losses", mine), ("reference_losses", theirs)):
            found[name].append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_figures_are_those_of_torch_on_whole_windows(pair: tuple[Any, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    report = transformers_kt.quality(*pair, TEXTS, context=CONTEXT)
    of_texts = {name: expected(pair, tokenizer, text) for name, text in TEXTS.items()}
    together = {name: torch.cat([each[name] for each in of_texts.values()]) for name in of_texts["sum"]}
    for found, wanted in ((report.overall, together), *((report.texts[name], of_texts[name]) for name in TEXTS)):
        kl, losses, others = wanted["kl"], wanted["losses"], wanted["reference_losses"]
        count = len(kl)
        assert found.tokens == count
        assert kl.median() > 1e-6  # otherwise the tolerance would hide it
        quantiles = np.quantile(kl.numpy(), [0.5, 0.99])
        assert [found.kl_mean.value, found.kl_median, found.kl_99] == pytest.approx(
            [kl.mean().item(), *quantiles], rel=0.01, abs=KEPT_TOLERANCE
        )
        assert found.kl_mean.error == pytest.approx(kl.std().item() / math.sqrt(count), rel=0.01)
        assert found.same_top.value == pytest.approx(wanted["agrees"].mean().item())
        # Beside the file's 16 bits: torch's products depend on how many rows there are.
        assert found.perplexity.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        assert found.reference_perplexity.value == pytest.approx(others.mean().exp().item(), rel=1e-4)
        error = losses.mean().exp().item() * losses.std().item() / math.sqrt(count)
        assert found.perplexity.error == pytest.approx(error, rel=1e-4)
        difference = losses - others
        assert math.log(found.perplexity_ratio.value) == pytest.approx(difference.mean().item(), abs=1e-5)


def test_saved_logits_give_the_same_report_and_hold_the_texts(bundled: Any, tmp_path: Path) -> None:
    file = tmp_path / "logits.npz"
    other = bundled_model()
    direct = transformers_kt.quality(bundled, other, TEXTS, context=CONTEXT, save_logits=file)
    again = transformers_kt.quality(bundled, file)
    assert again.to_dict() == direct.to_dict()
    assert json.loads(json.dumps(again.to_dict()))["texts"]["sum"]["same_top"] == {"value": 1.0, "error": 0.0}
    assert again.overall.kl_99 < KEPT_TOLERANCE  # a model against itself
    tokens = transformers_kt.save_logits(bundled, tmp_path / "again.npz", TEXTS, context=CONTEXT)
    assert tokens == direct.overall.tokens
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()
    assert file.stat().st_size < 1.1 * 2 * 512 * tokens + 20_000


def test_a_folders_own_weights_are_a_reference(
    stock_model: Callable[[str], Any],
    gguf_file: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    stock_model("small-v3-F32").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = transformers_kt.quality(gguf_file("small-v3-F32"), tmp_path, TEXTS["name"])
    assert report.reference == f"{tmp_path.name} (transformers, float32)"
    assert report.overall.kl_99 < KEPT_TOLERANCE


def test_models_that_it_loads_are_not_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    stock = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **options: Any) -> Any:
        gc.collect()
        assert [model for model in alive if model() is not None] == []
        model = stock(*args, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    transformers_kt.quality(bundled_model(), bundled_model(), TEXTS["name"])
    assert len(alive) == 2


def test_what_cannot_be_compared_is_refused_before_a_model_is_run(
    bundled: Any, kt_model: Callable[[str], Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = tmp_path / "logits.npz"
    transformers_kt.save_logits(bundled, file, TEXTS["name"])
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(file.read_bytes()[:-40])
    np.savez(tmp_path / "other.npz", about="{}")
    monkeypatch.setattr(quality_module, "_pieces", None)
    renamed = json.loads(tokenizer.backend_tokenizer.to_str())
    renamed["model"]["vocab"] = {token.swapcase(): number for token, number in renamed["model"]["vocab"].items()}
    renamed["model"]["merges"] = []
    others = PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(renamed)))
    for match, reference, texts, options in (
        ("other tokens", file, None, {"tokenizer": others}),
        ("other texts: token 1 of a window of text", file, "Something else.", {}),
        ("other texts: it has", file, TEXTS["name"] + " Gone", {}),
        ("a file of logits already", file, None, {"save_logits": tmp_path / "new.npz"}),
        ("no file of saved logits", tmp_path / "other.npz", None, {}),
        ("there is no folder", bundled, None, {"save_logits": tmp_path / "no" / "new.npz"}),
        ("is 0 tokens long", bundled, {"empty": ""}, {}),
        ("no text", bundled, [], {}),
        ("None is no model", None, None, {}),
        ("context=2", bundled, None, {"context": 2}),
    ):
        with pytest.raises(InputError, match=match):
            transformers_kt.quality(bundled, reference, texts, **options)
