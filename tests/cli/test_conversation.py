"""A conversation: what is forgotten when it outgrows the model's positions, what is used again, how it is stopped."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kt.assets import bundled_model
from transformers_kt.cli import options
from transformers_kt.cli.conversation import Conversation
from transformers_kt.errors import InputError

QUESTION = "What is 1 + 2?"
ANSWER_TOKENS = 20


@dataclass
class Recorded:
    """A screen that keeps what is shown. It presses Ctrl-C at the first piece that holds the text ``interrupts_at``, of
    the thinking or not."""

    pieces: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prefills: list[list[int]] = field(default_factory=list)
    interrupts_at: tuple[str, bool] | None = None

    def answer(self, text: str, *, is_thinking: bool) -> None:
        if self.interrupts_at is not None and self.interrupts_at[0] in text and self.interrupts_at[1] == is_thinking:
            self.interrupts_at = None
            os.kill(os.getpid(), signal.SIGINT)
        self.pieces.append((text, is_thinking))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def prefill(self, tokens: int) -> Recorded:
        self.prefills.append([tokens])
        return self

    def advance(self, tokens: int) -> None:
        self.prefills[-1].append(tokens)

    def close(self) -> None:
        pass

    def shown(self, *, thinking: bool) -> str:
        return "".join(text for text, is_thinking in self.pieces if is_thinking == thinking)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
    return model, AutoTokenizer.from_pretrained(bundled_model())


@pytest.fixture
def chat(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Conversation:
    return conversation(loaded, monkeypatch, ANSWER_TOKENS)


def conversation(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tokens: int, **more: Any) -> Conversation:
    config = loaded[0].config
    monkeypatch.setattr(config, "max_position_embeddings", config.max_position_embeddings)  # tests lower it
    return Conversation(*loaded, Recorded(), max_new_tokens=tokens, **more)


def turns(chat: Conversation) -> list[str]:
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def with_history(chat: Conversation, count: int, room: int) -> list[str]:
    """``count`` turns, after which QUESTION would leave ``room`` positions."""
    for number in range(count):
        chat.messages += [
            {"role": "user", "content": f"What is {number} + {number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    asked = [*chat.messages, {"role": "user", "content": QUESTION}]
    text = chat.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    chat.model.config.max_position_embeddings = tokens + room
    return turns(chat)


def generated(chat: Conversation, messages: list[dict[str, str]], tokens: int) -> str:
    """What transformers' generate() alone answers to ``messages``."""
    inputs = chat.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = chat.model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    text: str = chat.tokenizer.decode(output, skip_special_tokens=True)
    return text


def test_nothing_is_forgotten_while_there_is_room(chat: Conversation) -> None:
    before = with_history(chat, 3, room=ANSWER_TOKENS)
    chat.ask(QUESTION)
    assert turns(chat)[:3] == before
    assert not any("forgotten" in note for note in chat.screen.notes)


def test_only_the_turns_that_have_to_go_are_forgotten_and_it_is_said(chat: Conversation) -> None:
    before = with_history(chat, 4, room=ANSWER_TOKENS - 1)
    chat.ask(QUESTION)
    assert turns(chat)[:3] == before[1:]
    assert "the oldest turn was forgotten" in chat.screen.notes[0]


def test_a_question_longer_than_all_positions_is_refused_and_forgets_nothing(chat: Conversation) -> None:
    before = with_history(chat, 3, room=ANSWER_TOKENS)
    messages = list(chat.messages)
    with pytest.raises(InputError, match="Nothing was forgotten"):
        chat.ask(QUESTION * 200)
    assert turns(chat) == before
    assert chat.messages == messages


@pytest.mark.parametrize("chunk", [512, 5])
def test_answers_are_those_of_generate_whatever_was_in_the_cache(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    chat = conversation(loaded, monkeypatch, 300, chunk=chunk)
    for question in ("What is 12 + 5?", "What is 486 + 57?", "What is 77 + 1?"):
        expected = generated(chat, [*chat.messages, {"role": "user", "content": question}], 300)
        answer = chat.ask(question)
        assert chat.messages[-1]["content"] == expected
        assert answer.finish == "stop"
    assert answer.reused > 20
    assert answer.prompt - answer.reused < answer.prompt / 2


def test_a_long_prompt_is_computed_in_chunks_and_every_chunk_is_told(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = conversation(loaded, monkeypatch, 1, chunk=16)
    answer = chat.ask(QUESTION * 10)
    (told,) = chat.screen.prefills
    assert told[0] == answer.prompt
    assert set(told[1:]) == {16}
    assert answer.prompt - 16 <= sum(told[1:]) < answer.prompt  # the answer begins with the rest


def test_thinking_is_told_from_the_answer(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversation(loaded, monkeypatch, 300)
    answer = chat.ask("What is 12 + 5?")
    assert answer.text == "12 + 5 = 17"
    assert "carry" in answer.thinking
    assert "carry" in chat.screen.shown(thinking=True)
    assert chat.screen.shown(thinking=False).strip() == answer.text


def test_an_answer_that_is_interrupted_stays_and_the_conversation_goes_on(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = conversation(loaded, monkeypatch, 300)
    chat.screen.interrupts_at = ("=", False)
    answer = chat.ask("What is 12 + 5?")
    assert answer.finish == "stopped"
    assert chat.screen.notes == ["[stopped]"]
    assert "12 + 5 =" in chat.messages[-1]["content"]
    assert "17" not in chat.messages[-1]["content"]
    expected = generated(chat, [*chat.messages, {"role": "user", "content": QUESTION}], 300)
    after = chat.ask(QUESTION)
    assert chat.messages[-1]["content"] == expected
    assert after.reused > 0


def test_a_thought_that_is_interrupted_is_left_out_and_the_cache_stays(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = conversation(loaded, monkeypatch, 300)
    chat.screen.interrupts_at = ("carry", True)
    answer = chat.ask("What is 12 + 5?")
    assert (answer.finish, chat.messages) == ("stopped", [])
    assert "left out" in chat.screen.notes[0]
    assert chat.ask("What is 12 + 5?").reused == answer.prompt - 1
    assert chat.messages[-1]["content"].endswith("12 + 5 = 17")


def test_a_second_interrupt_ends_even_what_does_not_stop(chat: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_twice(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat.model, "generate", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTION)
    assert (chat.messages, chat.cache) == ([], None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_retry_answers_the_last_question_again(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversation(loaded, monkeypatch, 300)
    with pytest.raises(InputError, match="no question"):
        chat.retry()
    first = chat.ask("What is 12 + 5?")
    messages = list(chat.messages)
    again = chat.retry()
    assert again.text == first.text
    assert again.reused == again.prompt - 1
    assert chat.messages == messages


def test_the_system_prompt_comes_first_and_stays(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversation(loaded, monkeypatch, 300, system="You add numbers.")
    messages = [{"role": "system", "content": "You add numbers."}, {"role": "user", "content": QUESTION}]
    expected = generated(chat, messages, 300)
    answer = chat.ask(QUESTION)
    assert chat.messages[-1]["content"] == expected
    assert answer.prompt > conversation(loaded, monkeypatch, 1).ask(QUESTION).prompt


def test_force_think_begins_an_answer_with_a_thought(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("<think>\\n", ""))
    for force in (False, True):
        chat = conversation((model, tokenizer), monkeypatch, ANSWER_TOKENS, force_think=force)
        chat.ask(QUESTION)
        assert ("<think>\n" in chat.screen.shown(thinking=True)) == force


def test_a_template_that_refuses_the_conversation_is_an_input_error(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat.tokenizer, "chat_template", "{{ raise_exception('no system message') }}")
    with pytest.raises(InputError, match="does not take this conversation: no system message"):
        chat.ask(QUESTION)
    assert chat.messages == []


def test_the_statistics_name_prompt_reuse_answer_speeds_and_memory(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.ask(QUESTION)
    line = chat.retry().statistics()
    rate, memory = r"[\d,.]+ tokens/s", r"RAM \d+\.\d\d GB"
    assert re.fullmatch(rf"prompt 13 tokens \(12 reused\), {rate} · answer 20 tokens, {rate} · {memory}", line)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 10**9)
    assert chat.answers[-1].statistics().endswith(" · VRAM 2.00 GB")


def test_sampling_is_on_where_an_option_of_it_is_given() -> None:
    assert options.sampling(temperature=None, top_p=None) == {}
    assert options.sampling(temperature=0.6, top_p=None) == {"temperature": 0.6, "do_sample": True}
    assert options.sampling(temperature=0, repetition_penalty=1.1) == {"repetition_penalty": 1.1, "do_sample": False}
    assert options.sampling(repetition_penalty=1.1) == {"repetition_penalty": 1.1}
    with pytest.raises(InputError, match="top_p= has no meaning"):
        options.sampling(temperature=0, top_p=0.9)
