"""What other parts of transformers and torch would refuse in their own words, or compute wrong; and pickles."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from tiny_examples import Example
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from transformers_kt import errors
from transformers_kt.integration import from_pretrained


@pytest.fixture(autouse=True)
def _real_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_pretrained, "_modules", fakes.REAL_MODULES)


@pytest.fixture
def model(v3: Example) -> Any:
    return AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")


def logits(model: Any, example: Example) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(example.prompt).logits
    return found


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [lambda model: pickle.loads(pickle.dumps(model)), by_torch], ids=["pickle", "torch"])
def test_a_pickled_model_loads_again(model: Any, v3: Example, way: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # what can be changed is kept
    model.generation_config.temperature = 0.123
    again = way(model)
    assert torch.equal(logits(again, v3), logits(model, v3))
    assert again.generation_config.temperature == 0.123
    assert again.kt_report == model.kt_report


def _send_logits(model: Any, prompt: torch.Tensor, to: Any) -> None:
    with torch.no_grad():
        to.send(model(prompt).logits.numpy())


def test_a_spawned_process_gets_a_model_of_its_own(model: Any, v3: Example) -> None:
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_send_logits, args=(model, v3.prompt, theirs))
    process.start()
    theirs.close()
    found = mine.recv()
    process.join()
    assert torch.equal(torch.from_numpy(found), logits(model, v3))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_copies_do_not_go_by_the_file(model: Any, v3: Example, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert torch.equal(logits(way(model), v3), logits(model, v3))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate_batch([[3, 4, 5]], max_new_tokens=2),
        lambda model: model.init_continuous_batching(),
        lambda model: model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, cache_implementation="paged"),
    ],
)
def test_paged_caches_are_refused_with_what_to_do_instead(model: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match="left-padded batch"):
        call(model)


@pytest.mark.parametrize("attention", ["paged|eager", "paged|sdpa", "paged|flash_attention_2"])
def test_paged_attention_is_refused_before_memory_is_taken(v3: Example, attention: str) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match=r'attn_implementation="paged\|.*left-padded batch'):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", attn_implementation=attention)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "paged|eager"])
def test_attention_that_reads_no_mask_of_ours_is_refused_after_loading(model: Any, attention: str) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match=r"Load it with from_pretrained"):
        model.set_attn_implementation(attention)


def test_prediction_layers_are_refused_with_what_guesses_tokens(model: Any, v3: Example) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match="prompt_lookup_num_tokens"):
        model.generate(v3.prompt, use_mtp=True, max_new_tokens=2)
    with pytest.raises(errors.UnsupportedOperationError, match="use_mtp= cannot be combined with a GGUF"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", use_mtp=True)
    AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", use_mtp=False)


def test_trainer_is_refused_with_how_to_evaluate(model: Any, v3: Example, tmp_path: Path) -> None:
    data = [{"input_ids": v3.prompt[0], "labels": v3.prompt[0]}]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(errors.UnsupportedOperationError, match="To evaluate"):
        Trainer(model=model, args=arguments, eval_dataset=data).evaluate()


@pytest.mark.parametrize("strict", [False, True])
def test_the_model_can_be_exported(model: Any, v3: Example, strict: bool) -> None:
    exported = torch.export.export(model, (v3.prompt,), {"use_cache": False}, strict=strict)
    assert torch.equal(exported.module()(v3.prompt, use_cache=False).logits, logits(model, v3))


@pytest.mark.parametrize(
    "changed",
    [
        {"num_experts_per_tok": 0},
        {"num_experts_per_tok": 5, "n_group": 2, "topk_group": 1},
        {"n_group": 3},
        {"n_group": 0},
        {"topk_group": 0},
        {"n_group": 2, "topk_group": 3},
        {"n_group": 8, "topk_group": 8},
    ],
)
@pytest.mark.parametrize("experts_alone", [False, True])
def test_a_router_that_could_choose_no_experts_is_refused_before_memory_is_taken(
    v3: Example, changed: dict[str, int], experts_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_kt.integration.loading.fill", None)
    experts = [{"match": {"name": r"\.mlp\.experts$"}, "replace": {"op": "experts_cpu"}}]
    rules: Any = [*experts, {"match": {"name": ""}, "replace": {"op": "torch"}}] if experts_alone else "auto"
    with pytest.raises(errors.UnsupportedModelError, match="num_experts_per_tok"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=rules, **changed)


def test_gradients_reach_what_stands_behind_the_last_of_our_modules(v3: Example) -> None:
    rules = [{"match": {"name": "^lm_head$"}, "replace": {"op": "torch"}}, {"match": {"name": ""}, "replace": "auto"}]
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=rules)
    with pytest.raises(errors.UnsupportedOperationError, match="train"):
        model.train()
    model.lm_head.weight.requires_grad_(True)
    model.train()
    model(v3.prompt, labels=v3.prompt, past_key_values=DynamicCache()).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0
