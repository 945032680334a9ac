"""examples/chat.py: what is forgotten when a conversation outgrows the model's positions, and that it is said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kt.assets import bundled_model
from transformers_kt.errors import InputError

_FILE = Path(__file__).parents[2] / "examples" / "chat.py"
QUESTION = "What is 1 + 2?"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("chat_example", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_example"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def chat(example: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
    return example.Chat(model, AutoTokenizer.from_pretrained(bundled_model()), max_new_tokens=20, force_think=False)


def turns(chat: Any) -> list[str]:
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def with_history(chat: Any, count: int, room: int) -> list[str]:
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


def test_nothing_is_forgotten_while_there_is_room(chat: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = with_history(chat, 3, room=20)
    chat.ask(QUESTION)
    assert turns(chat)[:3] == before
    assert "forgotten" not in capsys.readouterr().out


def test_only_the_turns_that_have_to_go_are_forgotten_and_it_is_said(
    chat: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = with_history(chat, 4, room=19)  # one token too few
    chat.ask(QUESTION)
    assert turns(chat)[:3] == before[1:]
    assert "the oldest turn was forgotten" in capsys.readouterr().out


def test_a_question_longer_than_all_positions_is_refused_and_forgets_nothing(chat: Any) -> None:
    before = with_history(chat, 3, room=20)
    messages = list(chat.messages)
    with pytest.raises(InputError, match="Nothing was forgotten"):
        chat.ask(QUESTION * 200)
    assert turns(chat) == before
    assert chat.messages == messages
