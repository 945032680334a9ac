"""Threads that generate at once have their passes computed as one, and get what each gets alone."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from random_files import random_tokens
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from transformers_kt.assets import bundled_model
from transformers_kt.errors import ServerBusyError
from transformers_kt.integration.batching import Batcher, Limits, Request
from transformers_kt.integration.rounds import Rounds
from transformers_kt.modules.fused.base_model import has_fast_path
from transformers_kt.modules.gathering import computed

ENDLESS = {"eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True, "output_logits": True}
GREEDY = {**ENDLESS, "do_sample": False}
SAMPLED = {**ENDLESS, "do_sample": True, "temperature": 1.5}
# Tokens of the prompt, tokens of the answer, options, seed.
REQUESTS: list[tuple[int, int, dict[str, Any], int]] = [
    (40, 24, GREEDY, 0),
    (3, 9, SAMPLED, 1),
    (150, 12, {**SAMPLED, "repetition_penalty": 1.3}, 2),
    (1, 16, GREEDY, 3),
    (17, 6, {**GREEDY, "num_beams": 3}, 4),
    (33, 8, {**GREEDY, "prompt_lookup_num_tokens": 3}, 5),
    (130, 20, SAMPLED, 6),
]


@pytest.fixture(params=["v2-lite-like-Q4_K_M", "v3-like-Q4_K_M", "tiny-r1"])
def model(kt_model: Callable[[str], Any], request: pytest.FixtureRequest) -> Any:
    name: str = request.param
    return AutoModelForCausalLM.from_pretrained(str(bundled_model())) if name == "tiny-r1" else kt_model(name)


class Signal(BaseStreamer):  # type: ignore[misc]
    """Set once there are some tokens."""

    def __init__(self) -> None:
        self.tokens, self.reached = 0, threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens == 4:
            self.reached.set()

    def end(self) -> None:
        self.reached.set()


def generated(model: Any, prompt: int, answer: int, options: dict[str, Any], **more: Any) -> Any:
    ids = random_tokens(prompt, seed=prompt) % model.config.vocab_size
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer, **options, **more)


def test_each_gets_the_bits_that_it_gets_alone(model: Any) -> None:
    expected = []
    for prompt, answer, options, seed in REQUESTS:
        torch.manual_seed(seed)
        expected.append(generated(model, prompt, answer, options))
    assert has_fast_path(model)
    together: list[int] = []
    rounds, signal = Rounds(together.append), Signal()
    torch.manual_seed(0)
    before = torch.get_rng_state()

    def answered(number: int) -> Any:
        prompt, answer, options, seed = REQUESTS[number]
        if number > 3:  # joins when the others are in the middle
            signal.reached.wait(60)
        with rounds.taking_part(seed):
            return generated(model, prompt, answer, options, **({"streamer": signal} if number == 0 else {}))

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = list(pool.map(answered, range(len(REQUESTS))))
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours.sequences, alone.sequences)
        assert all(map(torch.equal, ours.logits, alone.logits))
    assert max(together) > 3
    assert torch.equal(torch.get_rng_state(), before)


def test_one_that_fails_takes_no_other_with_it() -> None:
    seen: list[int] = []
    rounds, has_begun = Rounds(), threading.Event()

    def compute(calls: Sequence[int]) -> list[int]:
        seen.append(len(calls))
        if calls == [1]:  # until the others stand in line
            has_begun.set()
            while len(rounds._ready) < 2:
                time.sleep(0.001)
        return [10 // call for call in calls]

    def called(*calls: int) -> int:
        if 1 not in calls:
            has_begun.wait(60)
        with rounds.taking_part():
            return [int(computed(compute, call, begins_pass=True)) for call in calls][-1]

    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(called, *calls) for calls in ((1, 5), (0,), (2,))]
        assert [answers[0].result(60), answers[2].result(60)] == [2, 5]
        with pytest.raises(ZeroDivisionError):
            answers[1].result(60)
    assert seen == [1, 3, 1, 1, 1]


def asked(model: Any, batcher: Batcher, ids: torch.Tensor, new_tokens: int = 12) -> Request:
    config = copy.deepcopy(model.generation_config)
    config.update(**GREEDY, max_new_tokens=new_tokens)
    request = Request(model, {"input_ids": ids}, config, None)
    batcher.submit(request)
    return request


def test_what_is_used_again_changes_no_bit(model: Any) -> None:
    vocab = model.config.vocab_size
    long, other = (random_tokens(150, seed=seed) % vocab for seed in (1, 2))
    prompts = [long[:, :140], torch.cat([long[:, :130], other[:, :30]], 1), long, other]
    batcher = Batcher(model, Limits(cache_bytes=100_000_000))
    requests = []
    for prompt in prompts:
        requests.append(asked(model, batcher, prompt))
        found = requests[-1].done.result(60)
        alone = model.generate(prompt, generation_config=requests[-1].config)
        assert torch.equal(found.sequences, alone.sequences)
        assert all(map(torch.equal, found.logits, alone.logits))
    assert [request.reused for request in requests[:3]] == [0, 130, 140]
    assert requests[3].reused < 10
    batcher.kept.make_room(0)
    assert batcher.kept.nbytes == 0
    assert asked(model, batcher, long).reused == 0


def test_requests_wait_for_memory_and_one_always_runs(kt_model: Callable[[str], Any]) -> None:
    model = kt_model("v3-like-Q4_K_M")
    batcher = Batcher(model, Limits(max_waiting=2, cache_bytes=1))
    ids = random_tokens(20, seed=1)
    requests = [asked(model, batcher, ids, 40) for _ in range(3)]
    assert len(batcher.running) == 1
    with pytest.raises(ServerBusyError, match="1 requests are answered and 2 wait"):
        asked(model, batcher, ids)
    requests[2].cancel()
    assert requests[2].done.result(60) is None
    first, second = (request.done.result(60).sequences for request in requests[:2])
    assert torch.equal(first, second)
    assert batcher.kept.nbytes == 0


def test_a_model_that_is_watched_answers_one_after_the_other(
    kt_model: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = kt_model("v3-like-Q4_K_M")
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    try:
        batcher = Batcher(model, Limits())
        requests = [asked(model, batcher, random_tokens(20, seed=1)) for _ in range(3)]
        assert len(batcher.running) == 1
        first, *others = (request.done.result(60).sequences for request in requests)
    finally:
        handle.remove()
    assert "one after the other" in caplog.text
    assert all(torch.equal(first, other) for other in others)
