"""What a GGUF-backed model refuses, and that it says so before it computes anything."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from fakes import REAL_MODULES
from tiny_examples import BOS, VOCAB, Example
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.trainer_utils import validate_quantization_for_training

from transformers_kt.errors import InputError, UnsupportedOperationError
from transformers_kt.integration import from_pretrained

LIMIT = 96  # max_position_embeddings of the examples
GREEDY: dict[str, Any] = {"do_sample": False}


@pytest.fixture
def model(v3: Example) -> Any:
    return AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")


def calls(model: Any) -> int:
    return sum(module.calls for module in model.modules() if isinstance(module, fakes.FakeOperation))


# --- Saving and training ---


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_saving_is_refused_with_the_file_to_copy_and_writes_nothing(
    model: Any, v3: Example, method: str, tmp_path: Path
) -> None:
    target = tmp_path / "saved"
    with pytest.raises(UnsupportedOperationError, match=method) as caught:
        getattr(model, method)(str(target))
    assert str(v3.folder) in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.train(),
        lambda model: model.requires_grad_(),
        lambda model: model.gradient_checkpointing_enable(),
        validate_quantization_for_training,
    ],
    ids=["train", "requires_grad_", "gradient_checkpointing_enable", "Trainer's check"],
)
def test_training_is_refused_with_the_reason(model: Any, call: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="kernels compute no gradients"):
        call(model)


def test_trainer_shows_our_reason_and_not_an_invitation_to_use_adapters(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    with pytest.raises(UnsupportedOperationError, match="kernels compute no gradients"):
        Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


def test_eval_mode_may_be_asked_for(model: Any) -> None:
    assert model.eval() is model
    assert model.train(False) is model
    assert model.requires_grad_(False) is model


def test_other_changes_of_the_weights_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedOperationError, match="op: torch"):
        model.dequantize()
    with pytest.raises(UnsupportedOperationError, match="rows of the embedding"):
        model.resize_token_embeddings(VOCAB + 8)


# --- Moving ---


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("cpu"),
        lambda model: model.to(torch.float32),
        lambda model: model.to(device="cpu", dtype=torch.float32),
        lambda model: model.to(torch.zeros(1)),
        lambda model: model.cpu(),
        lambda model: model.float(),
    ],
)
def test_a_move_to_where_the_model_is_changes_nothing(model: Any, v3: Example, move: Any) -> None:
    assert move(model) is model
    with torch.no_grad():
        assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (lambda model: model.to("cuda"), r"to\(cuda\)"),
        (lambda model: model.to("cuda:1", torch.bfloat16), r"to\(cuda:1, torch\.bfloat16\)"),
        (lambda model: model.to(torch.float16), r"to\(torch\.float16\)"),
        (lambda model: model.cuda(), r"cuda\(\)"),
        (lambda model: model.half(), r"half\(\)"),
        (lambda model: model.bfloat16(), r"bfloat16\(\)"),
        (lambda model: model.double(), r"double\(\)"),
    ],
)
def test_a_move_elsewhere_is_refused_and_leaves_the_model_whole(model: Any, v3: Example, move: Any, said: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=said):
        move(model)
    with torch.no_grad():
        assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)


# --- Token ids ---


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**9])
@pytest.mark.parametrize("length", [1, 5])
def test_a_token_id_out_of_range_is_refused_before_anything_is_computed(model: Any, bad: int, length: int) -> None:
    ids = torch.tensor([[BOS] * (length - 1) + [bad]])
    with pytest.raises(InputError, match=f"token id {bad}; this model has 0 to {VOCAB - 1}"):
        model(ids)
    with pytest.raises(InputError, match=f"token id {bad}"):
        model.generate(ids, max_new_tokens=1)
    assert calls(model) == 0


@pytest.mark.parametrize("shape", [(1, 0), (0, 5)])
def test_no_token_at_all_is_refused_before_anything_is_computed(model: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"input_ids is empty, of shape \({shape[0]}, {shape[1]}\)"):
        model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(InputError, match="inputs_embeds is empty"):
        model(inputs_embeds=torch.zeros((*shape, 64)))
    assert calls(model) == 0


def test_the_first_and_the_last_token_id_are_in_range(model: Any) -> None:
    assert model(torch.tensor([[0, VOCAB - 1]])).logits.shape == (1, 2, VOCAB)


def test_the_model_without_head_refuses_the_same(v3: Example) -> None:
    base = AutoModel.from_pretrained(v3.folder, kt_rules="auto")
    with pytest.raises(InputError, match="token id"):
        base(torch.tensor([[VOCAB]]))


def test_the_base_of_a_model_with_head_refuses_the_same(model: Any) -> None:
    with pytest.raises(InputError, match="token id"):
        model.model(torch.tensor([[VOCAB]]))


# --- Positions ---


def prompt_of(length: int) -> torch.Tensor:
    return torch.arange(length)[None] % 250


def test_a_prompt_may_fill_all_positions(model: Any) -> None:
    assert model(prompt_of(LIMIT)).logits.shape[1] == LIMIT


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 16}, {"cache_implementation": "static"}])
def test_a_prompt_longer_than_the_positions_is_refused_before_anything_is_computed(
    model: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens long; this model has {LIMIT} positions"):
        model.generate(prompt_of(LIMIT + 1), max_new_tokens=1, **options)
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens long"):
        model(prompt_of(LIMIT + 1))
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens long"):
        model(inputs_embeds=torch.zeros(1, LIMIT + 1, 64))
    assert calls(model) == 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_positions_count_from_the_start_of_the_cache(model: Any, kind: str) -> None:
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=2 * LIMIT)
    for start in range(0, LIMIT, 24):
        model(prompt_of(24) + start // 24, past_key_values=cache)
    before = calls(model)
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens long"):
        model(prompt_of(1), past_key_values=cache)
    assert calls(model) == before


def test_positions_that_are_passed_are_checked(model: Any) -> None:
    ids = prompt_of(2)
    model(ids, position_ids=torch.tensor([[3, LIMIT - 1]]))
    with pytest.raises(InputError, match=f"{LIMIT + 1} tokens long"):
        model(ids, position_ids=torch.tensor([[3, LIMIT]]))
    with pytest.raises(InputError, match="position_ids holds -1"):
        model(ids, position_ids=torch.tensor([[-1, 3]]))


def test_positional_arguments_are_checked_too(model: Any) -> None:
    with pytest.raises(InputError, match="position_ids holds -1"):
        model.model(prompt_of(2), None, torch.tensor([[-1, 3]]))


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}, {"num_beams": 2}]
)
def test_generation_ends_at_the_last_position_and_says_so_once(
    model: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        tokens = model.generate(prompt_of(LIMIT - 9), max_new_tokens=1000, eos_token_id=None, **GREEDY, **options)
        assert tokens.shape[1] == LIMIT - options.get("prompt_lookup_num_tokens", 0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{LIMIT} tokens in all" in record.getMessage()


def test_generation_from_embeddings_ends_there_too(model: Any, v3: Example) -> None:
    embeds = v3.stock.get_input_embeddings()(prompt_of(LIMIT - 9)).detach()
    tokens = model.generate(inputs_embeds=embeds, max_new_tokens=1000, eos_token_id=None, **GREEDY)
    assert tokens.shape[1] == 9


def test_a_prompt_that_fills_all_positions_still_gets_one_token(model: Any) -> None:
    assert model.generate(prompt_of(LIMIT), max_new_tokens=5, **GREEDY).shape[1] == LIMIT + 1


def test_a_length_within_the_positions_is_left_alone(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert model.generate(prompt_of(10), max_new_tokens=6, eos_token_id=None, **GREEDY).shape[1] == 16
    assert caplog.records == []


# --- Outputs that hooks would record ---


@pytest.mark.parametrize(
    ("output", "way_out"),
    [
        ("output_attentions", 'attn_implementation="eager"'),
        ("output_router_logits", "op: torch"),
        ("output_router_logits", 'kt_rules="observable"'),
    ],
)
def test_outputs_of_replaced_modules_are_refused_with_a_way_to_get_them(
    model: Any, v3: Example, output: str, way_out: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=way_out):
        model(v3.prompt, **{output: True})
    assert calls(model) == 0


def test_attentions_come_from_eager_attention(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", attn_implementation="eager")
    with torch.no_grad():
        found = model(v3.prompt, output_attentions=True).attentions
        sums = [attention.sum(-1) for attention in found]
    assert len(found) == model.config.num_hidden_layers
    torch.testing.assert_close(sums, [torch.ones_like(total) for total in sums])


def test_router_logits_come_from_kept_routers(v3: Example) -> None:
    kt_rules = [{"match": {"name": r"experts$"}, "replace": {"op": "auto"}}]
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=kt_rules)
    with torch.no_grad():
        found = model.model(v3.prompt, output_router_logits=True).router_logits
        expected = v3.stock.model(v3.prompt, output_router_logits=True).router_logits
    torch.testing.assert_close(found, expected)


def test_hidden_states_are_those_of_the_stock_model(model: Any, v3: Example) -> None:
    with torch.no_grad():
        found = model(v3.prompt, output_hidden_states=True).hidden_states
        expected = v3.stock(v3.prompt, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, found, expected))


def test_our_attention_cannot_be_switched_on_for_stock_modules(v3: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers_kt._C")
    monkeypatch.setattr(from_pretrained, "_modules", REAL_MODULES)
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", attn_implementation="sdpa")
    model.set_attn_implementation("kt")
    with pytest.raises(UnsupportedOperationError, match='choose "sdpa" or "eager"'):
        model(v3.prompt)
