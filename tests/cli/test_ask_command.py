"""``transformers-kt ask``: the answer alone on stdout, wherever the question comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_kt.assets import bundled_model
from transformers_kt.cli import build_app
from transformers_kt.errors import InputError

MODEL = bundled_model().name


def ask(*args: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr; refusals are raised."""
    result = CliRunner().invoke(build_app(), ["ask", MODEL, *args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_stdout_holds_the_answer_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "transformers_kt.cli", "ask", MODEL]
    done = subprocess.run(command, input="What is 486 + 57?", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "486 + 57 = 543\n")


def test_a_question_comes_from_the_argument_a_file_or_stdin(tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text("What is 12 + 5?\n")
    for args, stdin in ((("What is 12 + 5?",), ""), (("--prompt-file", str(file)), ""), (("-",), "What is 12 + 5?\n")):
        assert ask(*args, stdin=stdin)[:2] == (0, "12 + 5 = 17\n")


def test_thinking_and_statistics_go_to_stderr_where_they_are_asked_for() -> None:
    code, out, err = ask("What is 12 + 5?", "--thinking", "--stats")
    assert (code, out) == (0, "12 + 5 = 17\n")
    assert "carry" in err
    assert err.splitlines()[-1].startswith("prompt 14 tokens, ")
    assert "carry" not in ask("What is 12 + 5?")[2]


def test_json_holds_answer_thinking_and_counts() -> None:
    said = json.loads(ask("What is 12 + 5?", "--json")[1])
    assert (said["answer"], said["finish"], said["prompt_tokens"]) == ("12 + 5 = 17", "stop", 14)
    assert said["thinking"].startswith("12 + 5\nOnes")


def test_an_answer_that_is_cut_off_ends_with_3() -> None:
    assert ask("What is 12 + 5?", "--max-new-tokens", "3")[:2] == (3, "")
    code, out, err = ask("What is 12 + 5?", "--max-new-tokens", "54")
    assert code == 3
    assert "12 + 5 = 17".startswith(out.strip())
    assert "[cut off after 54 tokens]" in err


@pytest.mark.parametrize("args", [("",), ("-",), ("What is 1 + 1?", "--prompt-file", __file__)])
def test_no_question_and_two_questions_are_refused_before_the_model_is_loaded(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers_kt.cli.options.loaded_conversation", None)
    with pytest.raises(InputError, match="question"):
        ask(*args)


def test_a_seed_makes_sampled_answers_the_same() -> None:
    options = ("--temperature", "5", "--seed", "1", "--max-new-tokens", "30", "--json")
    first, again = (json.loads(ask("What is 12 + 5?", *options)[1]) for _ in range(2))
    assert first["thinking"] == again["thinking"]
    other = json.loads(ask("What is 12 + 5?", "--temperature", "5", "--seed", "2", *options[4:])[1])
    assert first["thinking"] != other["thinking"]
