"""Everything that transformers does with a model: each way to generate, to stop, to stream and to look inside."""

from __future__ import annotations

import copy
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from random_files import left_padded, random_tokens, recorded_lengths
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from transformers_kt.errors import UnsupportedOperationError

# Measured: 2e-5 on logits and hidden states of these models, whose order of additions differs from transformers'. The
# logits' standard deviation is 3.
FLOAT_TOLERANCE = 6e-4
# Of attention weights, which lie between 0 and 1.
ATTENTION_TOLERANCE = 1e-4

PROMPTS = [random_tokens(tokens, seed=tokens) for tokens in (40, 3, 17)]
PROMPT = PROMPTS[0]
NEW_TOKENS = 24

# No end of sequence, so that lengths are known; the models are random and end anywhere.
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 2}
SAMPLING = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
WITH_LOGITS: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def model(kt_model: Callable[[str], Any]) -> Any:
    """V3 in F32."""
    return kt_model("small-v3-F32")


@pytest.fixture(scope="module")
def stock(stock_model: Callable[[str], Any], model: Any) -> Any:
    """transformers' model of the same weights."""
    found = stock_model("small-v3-F32")
    found.generation_config = copy.deepcopy(model.generation_config)
    return found


@pytest.fixture(scope="module")
def quantized(kt_model: Callable[[str], Any]) -> Any:
    """The same model with weights of three quantized types."""
    return kt_model("small-v3-mixed")


@pytest.fixture(scope="module")
def greedy(model: Any) -> torch.Tensor:
    """The continuation of PROMPT, (NEW_TOKENS,)."""
    return new_tokens(model)


def new_tokens(model: Any, prompt: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    """What comes after ``prompt``, (tokens,)."""
    return model.generate(prompt, **{**GREEDY, **options})[0, prompt.shape[1] :]


def logits_of(output: Any) -> torch.Tensor:
    """(tokens, vocab) of generate(**WITH_LOGITS) for one prompt."""
    return torch.cat(output.logits)


# ---- Decoding strategies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small-v3-F32", "small-v2-F32"])
def test_greedy_tokens_equal_those_of_transformers(
    kt_model: Callable[[str], Any], stock_model: Callable[[str], Any], name: str
) -> None:
    ids, mask = left_padded(PROMPTS)
    expected = stock_model(name).generate(ids, attention_mask=mask, **GREEDY)
    assert len(set(expected[:, ids.shape[1] :].flatten().tolist())) > NEW_TOKENS  # no loop of a few tokens
    assert torch.equal(kt_model(name).generate(ids, attention_mask=mask, **GREEDY), expected)


def test_a_padded_prompt_goes_on_as_it_does_alone(quantized: Any) -> None:
    ids, mask = left_padded(PROMPTS)
    batch = quantized.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert torch.equal(row, new_tokens(quantized, prompt))


def test_sampling_repeats_with_its_seed_and_equals_transformers(model: Any, stock: Any) -> None:
    drawn = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        drawn.append(new_tokens(model, **SAMPLING))
        torch.manual_seed(seed)
        assert torch.equal(new_tokens(model, **SAMPLING), drawn[-1])
        torch.manual_seed(seed)
        assert torch.equal(new_tokens(stock, **SAMPLING), drawn[-1])
    assert not torch.equal(*drawn)


def test_beams_equal_those_of_transformers(model: Any, stock: Any, greedy: torch.Tensor) -> None:
    """Beams trade places in the cache as they go."""
    ids, mask = left_padded(PROMPTS[:2])
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    got, expected = (
        m.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options) for m in (model, stock)
    )
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=0, atol=FLOAT_TOLERANCE)
    assert any(indices.unique().numel() > 1 for indices in expected.beam_indices[:1])  # or nothing was reordered
    assert not torch.equal(got.sequences[0, ids.shape[1] :], greedy)


def test_prompt_lookup_gives_the_greedy_tokens_in_fewer_passes(quantized: Any) -> None:
    """The prompt holds its own greedy continuation, so looked-up candidates are right until it ends."""
    prompt = torch.cat((PROMPT, new_tokens(quantized)[None], PROMPT[:, -8:]), dim=1)
    expected = new_tokens(quantized, prompt)
    with recorded_lengths(quantized) as lengths:
        got = new_tokens(quantized, prompt, prompt_lookup_num_tokens=5)
    assert torch.equal(got, expected)
    assert any(1 < length <= 6 for length in lengths[1:])  # candidates were checked


def test_an_assistant_gives_the_greedy_tokens_in_fewer_passes(model: Any, quantized: Any, greedy: torch.Tensor) -> None:
    with recorded_lengths(model) as lengths:
        assert torch.equal(new_tokens(model, assistant_model=quantized), greedy)
    assert len(lengths) < NEW_TOKENS


# ---- Streaming and stopping ------------------------------------------------------------------------------------------


def test_a_text_streamer_prints_the_continuation(
    model: Any, tokenizer: PreTrainedTokenizerFast, greedy: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    model.generate(PROMPT, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert capsys.readouterr().out == tokenizer.decode(greedy) + "\n"


def test_a_text_iterator_streamer_is_fed_from_another_thread(
    model: Any, tokenizer: PreTrainedTokenizerFast, greedy: torch.Tensor
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(greedy)
    assert len([piece for piece in pieces if piece]) > 3  # not all at the end


class _Collector(BaseStreamer):
    """Collects tokens and calls ``at_token[n]`` when the n-th new one comes."""

    def __init__(self, at_token: dict[int, Callable[[], Any]]) -> None:
        self.tokens: list[int] = []
        self._at_token = at_token
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.tokens += value.flatten().tolist()
        self._at_token.get(len(self.tokens), lambda: None)()

    def end(self) -> None:
        pass


def test_stopping_criteria_end_generation(model: Any, greedy: torch.Tensor) -> None:
    class SeenEnough(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT.shape[1] + 7)

    got = new_tokens(model, stopping_criteria=StoppingCriteriaList([SeenEnough()]))
    assert torch.equal(got, greedy[:7])


def test_an_end_token_and_a_stop_string_end_generation(
    model: Any, tokenizer: PreTrainedTokenizerFast, greedy: torch.Tensor
) -> None:
    assert torch.equal(new_tokens(model, eos_token_id=int(greedy[5])), greedy[:6])
    stop = tokenizer.decode(greedy[9:11])
    text = tokenizer.decode(new_tokens(model, stop_strings=[stop], tokenizer=tokenizer))
    assert text.endswith(stop)
    assert tokenizer.decode(greedy).startswith(text)


def test_ctrl_c_ends_generation_and_leaves_the_model_as_it_was(quantized: Any) -> None:
    before = logits_of(quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS))
    streamer = _Collector({5: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(KeyboardInterrupt):
        quantized.generate(PROMPT, streamer=streamer, **GREEDY)
    assert len(streamer.tokens) == 5
    assert torch.equal(logits_of(quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS)), before)


@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.23])
def test_ctrl_c_at_any_moment_leaves_the_model_as_it_was(quantized: Any, seconds: float) -> None:
    """The signal comes from outside, in the middle of a kernel more likely than not."""
    before = logits_of(quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS))
    heard = threading.Event()

    def interrupt() -> None:
        # Python loses an exception that is raised inside a callback of the garbage collector, and hypothesis leaves one
        # there: about one signal in a hundred falls into it. A user presses the key again.
        wait = seconds
        while not heard.wait(wait):
            os.kill(os.getpid(), signal.SIGINT)
            wait = 2.0

    interrupter = threading.Thread(target=interrupt)
    deadline = time.monotonic() + 60
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            interrupter.start()
            while time.monotonic() < deadline:
                quantized.generate(PROMPT, **GREEDY)
    finally:
        heard.set()
    interrupter.join()
    assert torch.equal(logits_of(quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS)), before)


# ---- Pipelines and chats ---------------------------------------------------------------------------------------------


def test_a_pipeline_answers_one_prompt_and_several(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["12+34=?", "Add 5 and 77, please.", "1"]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected.append(tokenizer.decode(new_tokens(model, ids), skip_special_tokens=True))
    assert len(set(expected)) == len(texts)
    one = generate(texts[0], return_full_text=False, **GREEDY)
    assert one == [{"generated_text": expected[0]}]
    several = generate(texts, batch_size=3, return_full_text=False, **GREEDY)
    assert [answers[0]["generated_text"] for answers in several] == expected


def test_a_pipeline_answers_a_chat(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "12+34=?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = tokenizer.decode(new_tokens(model, ids["input_ids"]), skip_special_tokens=True)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = generate(chat, **GREEDY)[0]["generated_text"]
    assert answer == [*chat, {"role": "assistant", "content": expected}]


def test_the_next_turn_goes_on_from_the_cache_of_the_last(quantized: Any) -> None:
    first = quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS)
    history = torch.cat((first.sequences, random_tokens(9, seed=7)), dim=1)
    fresh = quantized.generate(history, **GREEDY, **WITH_LOGITS)
    with recorded_lengths(quantized) as lengths:
        second = quantized.generate(history, past_key_values=first.past_key_values, **GREEDY, **WITH_LOGITS)
    assert lengths[0] == 10  # the new turn, and the last token of the turn before, which no pass has seen yet
    assert torch.equal(second.sequences, fresh.sequences)
    assert torch.equal(logits_of(second), logits_of(fresh))


# ---- Caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"cache_implementation": "static", "prefill_chunk_size": 7},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_way_to_cache_gives_the_same_bits(quantized: Any, options: dict[str, Any]) -> None:
    ids, mask = left_padded(PROMPTS)
    expected = quantized.generate(ids, attention_mask=mask, **GREEDY, **WITH_LOGITS)
    with recorded_lengths(quantized) as lengths:
        got = quantized.generate(ids, attention_mask=mask, **GREEDY, **WITH_LOGITS, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    if not options.get("use_cache", True):
        assert lengths == list(range(40, 40 + NEW_TOKENS))
    elif "prefill_chunk_size" in options:
        assert lengths[:6] == [7, 7, 7, 7, 7, 5]
    if options.get("cache_implementation") == "static":
        assert isinstance(got.past_key_values, StaticCache)


@pytest.mark.parametrize("kept", [r"\.1\.self_attn", r"\.[01]\.self_attn"])
def test_a_static_cache_serves_stock_attention_beside_ours(gguf_file: Callable[[str], Any], kept: str) -> None:
    """Layers then share transformers' own masks, which leave out what a causal kernel knows by itself."""
    rules = [{"match": {"name": kept}, "replace": "torch"}, {"match": {"name": ""}, "replace": "auto"}]
    mixed = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("small-v3-F32"), kt_rules=rules)
    expected = logits_of(mixed.generate(PROMPT, **GREEDY, **WITH_LOGITS))
    got = logits_of(mixed.generate(PROMPT, **GREEDY, **WITH_LOGITS, cache_implementation="static"))
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_TOLERANCE)


@torch.no_grad()
def test_copies_of_a_cache_go_on_independently(quantized: Any) -> None:
    """One prompt's cache as the start of two texts, which take turns: its buffers have room behind their end."""
    cache = DynamicCache()
    quantized(PROMPT, past_key_values=cache)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    texts = [random_tokens(5, seed) for seed in (1, 2)]
    steps: list[list[torch.Tensor]] = [[], []]
    for token in range(5):
        for text, start, found in zip(texts, copies, steps, strict=True):
            found.append(quantized(text[:, token : token + 1], past_key_values=start).logits)
    for text, found in zip(texts, steps, strict=True):
        assert torch.equal(torch.cat(found, dim=1), quantized(torch.cat((PROMPT, text), dim=1)).logits[:, -5:])
    assert cache.get_seq_length() == PROMPT.shape[1]


# ---- Looking inside --------------------------------------------------------------------------------------------------


def test_scores_and_logits_are_those_of_the_whole_sequence(quantized: Any) -> None:
    output = quantized.generate(PROMPT, **GREEDY, **WITH_LOGITS, output_scores=True)
    with torch.no_grad():
        whole = quantized(output.sequences, use_cache=False).logits[0, PROMPT.shape[1] - 1 : -1]
    assert torch.equal(logits_of(output), whole)
    assert torch.equal(torch.cat(output.scores), whole)


def test_hidden_states_are_those_of_transformers(model: Any, stock: Any) -> None:
    output = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, output_hidden_states=True)
    with torch.no_grad():
        expected = stock(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == NEW_TOKENS
    for layer, states in enumerate(expected):
        got = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        assert states.std() > 0.5
        torch.testing.assert_close(got, states, rtol=0, atol=FLOAT_TOLERANCE)


@torch.no_grad()
def test_attention_weights_need_eager_attention_and_are_then_those_of_transformers(
    model: Any, stock: Any, gguf_file: Callable[[str], Any]
) -> None:
    with pytest.raises(UnsupportedOperationError, match="eager"):
        model(PROMPT, output_attentions=True)
    eager = type(model).from_pretrained(None, gguf_path=gguf_file("small-v3-F32"), attn_implementation="eager")
    stock.set_attn_implementation("eager")
    try:
        expected = stock(PROMPT, output_attentions=True)
    finally:
        stock.set_attn_implementation("sdpa")
    got = eager(PROMPT, output_attentions=True)
    assert len(got.attentions) == len(expected.attentions) == 3
    for ours, theirs in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATTENTION_TOLERANCE)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=FLOAT_TOLERANCE)


def test_embeddings_in_place_of_tokens_give_the_same_bits(quantized: Any) -> None:
    embeddings = quantized.get_input_embeddings()(PROMPT)
    with torch.no_grad():
        assert torch.equal(quantized(inputs_embeds=embeddings).logits, quantized(PROMPT).logits)
    generated = quantized.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(generated[0], new_tokens(quantized))


def test_a_copy_of_the_model_shares_its_weights(quantized: Any, greedy: torch.Tensor) -> None:
    before = psutil.Process().memory_info().rss
    copies = [copy.deepcopy(quantized) for _ in range(20)]
    assert psutil.Process().memory_info().rss - before < 5 * quantized.get_memory_footprint()
    assert torch.equal(new_tokens(copies[7]), new_tokens(quantized))


# ---- Several at once -------------------------------------------------------------------------------------------------


def test_two_models_do_not_disturb_each_other(
    kt_model: Callable[[str], Any], quantized: Any, gguf_file: Callable[[str], Any]
) -> None:
    """Taking turns token by token, and after one of them is deleted."""
    other = type(kt_model("small-v2-F32")).from_pretrained(None, gguf_path=gguf_file("small-v2-F32"))
    expected, of_other = new_tokens(quantized), new_tokens(other)
    turns = dict.fromkeys(range(NEW_TOKENS), functools.partial(new_tokens, other, max_new_tokens=3))
    assert torch.equal(new_tokens(quantized, streamer=_Collector(turns)), expected)
    assert torch.equal(new_tokens(other), of_other)
    del other, turns
    assert torch.equal(new_tokens(quantized), expected)


def test_one_model_serves_two_threads(quantized: Any) -> None:
    alone = [logits_of(quantized.generate(prompt, **GREEDY, **WITH_LOGITS)) for prompt in PROMPTS[:2]]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def generate(index: int) -> None:
        for _ in range(3):
            found[index].append(logits_of(quantized.generate(PROMPTS[index], **GREEDY, **WITH_LOGITS)))

    threads = [threading.Thread(target=generate, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert len(found[index]) == 3
        assert all(torch.equal(logits, expected) for logits in found[index])


def test_a_generation_config_of_the_user_is_obeyed(model: Any, greedy: torch.Tensor) -> None:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert torch.equal(model.generate(PROMPT, generation_config=config)[0, PROMPT.shape[1] :], greedy[:4])


# ---- torch's threads -------------------------------------------------------------------------------------------------


class _ThreadCounter(BaseStreamer):
    def __init__(self) -> None:
        self.counts: set[int] = set()

    def put(self, value: Any) -> None:
        self.counts.add(torch.get_num_threads())

    def end(self) -> None:
        pass


@pytest.fixture
def three_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_torch_threads")
def test_torch_keeps_to_one_thread_while_our_kernels_generate(model: Any) -> None:
    seen = _ThreadCounter()
    model.generate(PROMPT, streamer=seen, **GREEDY)
    assert (seen.counts, torch.get_num_threads()) == ({1}, 3)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(PROMPT, max_new_tokens=-1)
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_torch_threads")
def test_torch_keeps_its_threads_where_it_computes_modules(gguf_file: Callable[[str], Any]) -> None:
    rules = [
        {"match": {"name": r"\.mlp"}, "replace": {"op": "torch"}},
        {"match": {"name": ""}, "replace": {"op": "auto"}},
    ]
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("small-v3-F32"), kt_rules=rules)
    seen = _ThreadCounter()
    model.generate(PROMPT, streamer=seen, **GREEDY)
    assert seen.counts == {3}
