"""The examples that put a model under other people's software do so: hooks, PEFT, xgrammar, LangChain, lm-eval.

Each needs what it shows; `make test-recipes` brings all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
OTHERS = ("steering", "lora", "json_answer", "langchain_chain", "evaluate")
_RECIPES = "the extra recipes brings it: make test-recipes"


def example(name: str, *args: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", OTHERS)
def test_an_example_fits_on_a_screen(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


def test_hooks_steer_what_is_generated() -> None:
    answers = [line.partition(": ")[2] for line in example("steering").splitlines()]
    assert len(set(answers)) == 3


def test_a_lora_adapter_on_the_attention_changes_the_logits() -> None:
    pytest.importorskip("peft", reason="the extra test brings it")
    words = example("lora").split()
    assert words[:3] == ["the", "adapter", "moves"]
    assert float(words[-1]) > 0.1


def test_an_answer_is_json_of_the_schema() -> None:
    pytest.importorskip("xgrammar", reason=_RECIPES)
    answer = json.loads(example("json_answer"))
    assert list(answer) == ["sum"]
    assert 0 <= answer["sum"] <= 1998


def test_a_chain_of_langchain_answers() -> None:
    pytest.importorskip("langchain_huggingface", reason=_RECIPES)
    assert example("langchain_chain").splitlines() == ["486 + 57 = 543", "12 + 30 = 42"]


def test_lm_eval_gives_the_same_bits_alone_and_in_batches() -> None:
    pytest.importorskip("lm_eval", reason=_RECIPES)
    said = example("evaluate", "1", "4", "auto").splitlines()  # lm-eval itself says how large a batch may be
    alone, batched, automatic = (line for line in said if line.startswith("["))
    assert alone == batched == automatic
    _, results = json.loads(alone)
    assert results["sums"]["exact_match,last-number"] == 1
    assert results["first_step"]["acc,none"] == 1
