"""``transformers-kt chat`` as a user meets it: in a terminal (pexpect), through a pipe, and as examples/chat.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transformers_kt.assets import bundled_model
from transformers_kt.cli import main

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed; it is in the extra test")

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "transformers_kt.cli", "chat"]
PROMPT = "\r\n> "
STATISTICS = (
    r"prompt \d+ tokens(?: \((\d+) reused\))?, [\d,.-]+ tokens/s · answer (\d+) tokens, [\d,.-]+ tokens/s · RAM"
)


def terminal(*args: str, **environment: str) -> Any:
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *args],
        env={**os.environ, "TERM": "xterm-256color", "NO_COLOR": "", **environment},
        encoding="utf-8",
        timeout=150,  # a loaded machine takes a minute to start Python and torch
        dimensions=(40, 120),
    )
    child.expect_exact("> ")
    return child


def asked(child: Any, line: str) -> str:
    """What is shown between ``line`` and the next prompt."""
    child.sendline(line)
    child.expect_exact(PROMPT)
    shown: str = child.before
    return shown


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    child = terminal()
    first = asked(child, "What is 486 + 57?")
    assert "486 + 57 = 543" in first
    assert re.search("\x1b\\[2m.*carry", first)  # thinking is dimmed
    assert re.search(STATISTICS, first)
    again = re.search(STATISTICS, asked(child, "/retry"))
    assert again is not None
    assert int(again[1]) == 15  # all of the prompt but its last token

    talk = tmp_path / "talk.json"
    asked(child, f"/save {talk}")
    assert [message["role"] for message in json.loads(talk.read_text())] == ["user", "assistant"]
    asked(child, "/reset")
    assert "there is no question" in asked(child, "/retry")
    asked(child, f"/load {talk}")
    assert "486 + 57 = 543" in asked(child, "/retry")

    child.sendline('"""')
    child.sendline("What is")
    child.sendline("12 + 5?")
    assert re.search(STATISTICS, asked(child, '"""'))
    asked(child, f"/save {talk}")
    assert json.loads(talk.read_text())[-2]["content"] == "What is\n12 + 5?"
    child.sendline("What is \\")
    assert re.search(STATISTICS, asked(child, "30 + 4?"))
    asked(child, f"/save {talk}")
    assert json.loads(talk.read_text())[-2]["content"] == "What is \n30 + 4?"
    assert "answers" in asked(child, "/stats")
    assert "/retry" in asked(child, "/help")
    assert "/sav is no command (did you mean '/save'?)" in asked(child, "/sav")
    assert "/save takes the name of a file" in asked(child, "/save")
    assert "no JSON" in asked(child, f"/load {ROOT / 'README.md'}")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_stops_an_answer_and_keeps_the_chat_and_a_long_prompt_has_a_bar() -> None:
    # Plain code, hundreds of times slower: there is time to stop an answer, and a prompt takes seconds.
    child = terminal("--chunk-size", "16", TRANSFORMERS_KT_ISA="scalar")
    child.sendline("What is 486 + 57? " * 20)
    child.expect(r"reading the prompt .* of (\d+) tokens, ([\d.]+) tokens/s")
    child.expect(STATISTICS)
    child.expect_exact(PROMPT)
    asked(child, "/reset")
    child.sendline("What is 486 + 57?")
    child.expect("carry")
    child.sendintr()
    child.expect_exact("[stopped: the question is left out of the conversation]")
    child.expect(STATISTICS)
    child.expect_exact(PROMPT)
    child.sendintr()
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_the_example_takes_the_options_of_local_chat_and_has_no_colours_in_a_pipe(tmp_path: Path) -> None:
    question = tmp_path / "question.txt"
    question.write_text("What is 12 + 5?\n")
    (gguf,) = bundled_model().glob("*.gguf")
    flags = {
        "model_path": bundled_model(),
        "gguf_path": gguf,
        "optimize_rule_path": "cpu",
        "cpu_infer": 1,
        "max_new_tokens": 200,
        "prompt_file": question,
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "examples/chat.py"), *given, "--force_think"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert "1 threads" in done.stdout
    assert "> What is 12 + 5?\n<think>\n" in done.stdout
    assert "12 + 5 = 17\n" in done.stdout


def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str]:
    """Exit code and stderr of ``transformers-kt chat``, which prints nothing else."""
    monkeypatch.setattr(sys, "argv", ["transformers-kt", "chat", *args])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert said.out == ""
    return left.value.code, said.err


def test_a_model_that_is_not_there_is_one_message_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(monkeypatch, capsys, "nowhere.gguf")
    assert code == 1
    assert re.fullmatch(r"transformers-kt: .*nowhere\.gguf.*\n", said)


def test_a_file_without_a_chat_template_is_refused_before_its_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (gguf,) = bundled_model().glob("*.gguf")
    path = tmp_path / "base.gguf"
    path.write_bytes(gguf.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tamplete"))
    code, said = ended(monkeypatch, capsys, str(path))
    assert code == 1
    assert "has no chat template" in said
    assert "the weights with --gguf-path" in said


def test_options_of_sampling_that_contradict_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(monkeypatch, capsys, "--temperature", "0", "--top-p", "0.9")
    assert (code, "--temperature 0 always takes the likeliest token; --top-p has no meaning" in said) == (1, True)


def test_ctrl_c_outside_an_answer_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_kt.cli.options.loaded_conversation", interrupted)
    assert ended(monkeypatch, capsys) == (130, "")
