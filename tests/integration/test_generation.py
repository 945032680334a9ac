"""generate() on a GGUF-backed model does what it does on the stock model, with every option."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import BOS, EOS, PAD, Example
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
    set_seed,
)

pytestmark = pytest.mark.usefixtures("either_operations")

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(params=["v2", "v3"])
def example(request: pytest.FixtureRequest) -> Example:
    found: Example = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def model(example: Example, either_operations: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(example.folder, kt_rules="auto")


@pytest.fixture
def tokenizer(example: Example) -> Any:
    return AutoTokenizer.from_pretrained(example.folder)


def stock_tokens(example: Example, prompt: torch.Tensor, **options: Any) -> list[list[int]]:
    tokens: list[list[int]] = example.stock.generate(prompt, **options).tolist()
    return tokens


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**GREEDY, "use_cache": False},
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
        {**GREEDY, "prompt_lookup_num_tokens": 3},
        {**GREEDY, "prefill_chunk_size": 3},
        {**GREEDY, "cache_implementation": "static"},
        {**GREEDY, "cache_implementation": "static", "prefill_chunk_size": 3},
        {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_new_tokens": 12},
        {"do_sample": True, "temperature": 1.0, "num_return_sequences": 3, "max_new_tokens": 12},
        {"do_sample": True, "temperature": 1.0, "num_beams": 2, "max_new_tokens": 12},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items() if key != "max_new_tokens"),
)
def test_generate_gives_the_tokens_of_the_stock_model(example: Example, model: Any, options: dict[str, Any]) -> None:
    set_seed(3)
    expected = stock_tokens(example, example.prompt, **options)
    set_seed(3)
    assert model.generate(example.prompt, **options).tolist() == expected


def test_a_batch_padded_on_the_left_gives_what_each_prompt_gives_alone(example: Example, model: Any) -> None:
    prompts = [[BOS, 72, 101], [BOS, 1, 2, 3, 4, 5, 6, 7], [BOS]]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    together = model.generate(ids, attention_mask=(ids != PAD).long(), **GREEDY)[:, width:].tolist()
    for prompt, found in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist()
        assert found[: len(alone)] == alone


def test_scores_and_hidden_states_are_those_of_the_stock_model(example: Example, model: Any) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options["output_hidden_states"] = True
    found, expected = model.generate(example.prompt, **options), example.stock.generate(example.prompt, **options)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for step, expected_step in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(step, expected_step, rtol=1e-4, atol=1e-4)


def test_the_cache_of_one_turn_serves_the_next(example: Example, model: Any) -> None:
    whole = model.generate(example.prompt, **GREEDY, return_dict_in_generate=True)
    turn = torch.cat((whole.sequences, torch.tensor([[72, 105, 63]])), dim=1)
    continued = model.generate(turn, past_key_values=whole.past_key_values, **GREEDY)
    assert continued.tolist() == model.generate(turn, **GREEDY).tolist()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_the_user_made_is_used(example: Example, model: Any, kind: str) -> None:
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=64)
    found = model.generate(example.prompt, past_key_values=cache, **GREEDY).tolist()
    assert found == stock_tokens(example, example.prompt, **GREEDY)
    assert cache.get_seq_length() == example.prompt.shape[1] + 12 - 1


def test_a_loop_of_forward_calls_gives_what_generate_gives(example: Example, model: Any) -> None:
    ids, cache, past = example.prompt, DynamicCache(), None
    with torch.no_grad():
        step = ids
        for _ in range(12):
            past = model(step, past_key_values=cache, use_cache=True)
            step = past.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, step), dim=1)
    assert ids.tolist() == model.generate(example.prompt, **GREEDY).tolist()


def test_a_gguf_backed_model_may_be_the_assistant(example: Example, model: Any, v3: Example) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    found = model.generate(example.prompt, assistant_model=assistant, **GREEDY).tolist()
    assert found == model.generate(example.prompt, **GREEDY).tolist()


def test_a_streamer_writes_the_text(
    example: Example, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = model.generate(example.prompt, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(tokens[0, example.prompt.shape[1] :]).strip("\n")


def test_a_streamer_in_another_thread_yields_the_text(example: Example, model: Any, tokenizer: Any) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(example.prompt,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    text = "".join(streamer)
    thread.join()
    tokens = model.generate(example.prompt, **GREEDY)
    assert text == tokenizer.decode(tokens[0, example.prompt.shape[1] :])


class StopAfter(StoppingCriteria):
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


def test_stopping_criteria_stop(example: Example, model: Any) -> None:
    assert model.generate(example.prompt, stopping_criteria=[StopAfter(10)], **GREEDY).shape[1] == 10


class InterruptAfter(StopAfter):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] >= self.tokens:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_ctrl_c_in_the_middle_leaves_the_model_usable(example: Example, model: Any) -> None:
    before = model.generate(example.prompt, **GREEDY).tolist()
    with pytest.raises(KeyboardInterrupt):
        model.generate(example.prompt, stopping_criteria=[InterruptAfter(9)], **GREEDY)
    assert model.generate(example.prompt, **GREEDY).tolist() == before


def test_generation_ends_at_the_stop_token(example: Example, model: Any) -> None:
    free = model.generate(example.prompt, eos_token_id=None, **GREEDY)[0].tolist()
    stop = free[-4]
    stopped = model.generate(example.prompt, eos_token_id=stop, **GREEDY)[0].tolist()
    assert stopped == free[: free.index(stop, example.prompt.shape[1]) + 1]


def test_pipeline_answers_one_prompt_several_prompts_and_a_chat(example: Example, model: Any, tokenizer: Any) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {**GREEDY, "return_full_text": False}
    one = generator("Hello", **options)[0]["generated_text"]
    several = generator(["Hello", "Hi there"], batch_size=2, **options)
    assert len(several) == 2
    assert several[0][0]["generated_text"] == one
    chat = generator([{"role": "user", "content": "Hello"}], **options)
    assert chat[0]["generated_text"] == one


def test_two_models_are_loaded_at_once(v2: Example, v3: Example) -> None:
    with ThreadPoolExecutor(2) as pool:
        models = list(
            pool.map(
                lambda example: AutoModelForCausalLM.from_pretrained(example.folder, kt_rules="auto"), [v2, v3, v2]
            )
        )
    for model, example in zip(models, [v2, v3, v2], strict=True):
        assert model.generate(example.prompt, **GREEDY).tolist() == stock_tokens(example, example.prompt, **GREEDY)


def test_one_model_serves_two_threads(example: Example, model: Any) -> None:
    prompts = [torch.tensor([[BOS, *range(start, start + 5)]]) for start in (10, 60, 110, 160)]
    alone = [model.generate(prompt, **GREEDY).tolist() for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, **GREEDY).tolist(), prompts * 2))
    assert together == alone * 2


def test_the_stop_token_of_the_examples_is_theirs(example: Example, model: Any) -> None:
    assert model.generation_config.eos_token_id == EOS
