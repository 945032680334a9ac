"""transformers' server loads a model by every name that leads to a GGUF, and takes its answers apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_examples import Example
from transformers.cli.serving import utils
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils.chat_parsing import ResponseParser

from transformers_kt.families.registry import response_template


def a_file(example: Example, tmp_path: Path) -> str:
    return str(example.gguf)


def a_folder_with_the_file_alone(example: Example, tmp_path: Path) -> str:
    return str(example.gguf.parent)


def a_folder_with_config(example: Example, tmp_path: Path) -> str:
    folder = Path(shutil.copytree(example.folder, tmp_path / "model"))
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "architectures": ["DeepseekV3ForCausalLM"]}))
    return str(folder)


def a_file_in_a_folder_with_config(example: Example, tmp_path: Path) -> str:
    return f"{a_folder_with_config(example, tmp_path)}:{example.gguf.name}"


def a_file_in_a_folder_without_config(example: Example, tmp_path: Path) -> str:
    shutil.copy(example.gguf, tmp_path / "one.gguf")
    shutil.copy(example.gguf, tmp_path / "two.gguf")
    return f"{tmp_path}:two.gguf"


def a_folder_with_tokenizer_and_without_config(example: Example, tmp_path: Path) -> str:
    folder = shutil.copytree(example.folder, tmp_path / "model")
    (folder / "config.json").unlink()
    return str(folder)


FORMS = [
    a_file,
    a_folder_with_the_file_alone,
    a_folder_with_config,
    a_file_in_a_folder_with_config,
    a_file_in_a_folder_without_config,
    a_folder_with_tokenizer_and_without_config,
]


@pytest.mark.parametrize("form", FORMS)
def test_the_server_loads_what_leads_to_a_gguf(form: Any, v3: Example, tmp_path: Path) -> None:
    manager = ModelManager(force_model=form(v3, tmp_path))
    (loaded,) = manager.loaded_models.values()
    with torch.no_grad():
        assert torch.equal(loaded.model(v3.prompt).logits, v3.stock(v3.prompt).logits)
    assert loaded.processor.chat_template
    assert utils.get_response_template(loaded.processor, loaded.model) is None  # its chat template knows no thoughts


R1 = "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] }}"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (
            "<｜Assistant｜><think>\n",
            "a\n</think>\n\n5<｜end▁of▁sentence｜>",
            {"reasoning_content": "a", "content": "5"},
        ),
        ("<｜Assistant｜>", "<think>\na\n</think>543", {"reasoning_content": "a", "content": "543"}),
        ("<｜Assistant｜>", "543<｜end▁of▁sentence｜>", {"content": "543"}),
        ("<｜Assistant｜></think>", "543<｜end▁of▁sentence｜>", {"content": "543"}),
        ("<｜Assistant｜>1</think>2<｜User｜><｜Assistant｜><think>\n", "cut off", {"reasoning_content": "cut off"}),
    ],
)
def test_thoughts_are_told_from_the_answer(prompt: str, answer: str, expected: dict[str, str]) -> None:
    template = response_template(R1)
    whole, streamed = ResponseParser(template, prefix=prompt), ResponseParser(template, prefix=prompt)
    whole.feed(answer)
    assert whole.finalize()[0] == {"role": "assistant", **expected}
    events = [event for character in answer for event in streamed.feed(character)] + streamed.finalize()[1]
    for name, text in expected.items():
        pieces = [event["text"] for event in events if event["type"] == "region_chunk" and event["field"] == name]
        assert "".join(pieces) == text


@pytest.mark.parametrize("chat_template", [None, {"default": R1}, "{{ messages }}", "<｜Assistant｜>", "</think>"])
def test_a_chat_template_of_another_kind_has_no_response_template(chat_template: Any) -> None:
    assert response_template(chat_template) is None


def test_the_template_is_given_to_models_of_ours_alone(v3: Example) -> None:
    class Tokenizer:
        chat_template = R1

    class Ours:
        kt_report, config = object(), v3.stock.config

    assert utils.get_response_template(Tokenizer(), Ours()) == response_template(R1)
    assert utils.get_response_template(Tokenizer(), v3.stock) is None
