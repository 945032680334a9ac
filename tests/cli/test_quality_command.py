"""``transformers-kt quality``: tables, JSON, a picture, files of logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_kt.assets import bundled_model
from transformers_kt.cli import build_app, main

MODEL = bundled_model().name


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text, and the file of logits that the command makes of it, in a process of its own."""
    folder = tmp_path_factory.mktemp("quality")
    text, file = folder / "sums.txt", folder / "logits.npz"
    text.write_text("What is 486 + 57? 543. " * 10)
    command = [sys.executable, "-m", "transformers_kt.cli", "quality", MODEL, "--text", str(text)]
    done = subprocess.run([*command, "--save-logits", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(":")[0]) == (0, str(file)), done.stderr
    return text, file


def quality(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["quality", MODEL, *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_a_table_explains_itself_and_json_holds_the_same(logits: tuple[Path, Path], tmp_path: Path) -> None:
    text, file = logits
    picture = tmp_path / "quality.png"
    code, shown = quality("--against", file, "--plot", picture)
    assert code == 0
    assert shown.startswith("tiny-r1 (transformers_kt) against tiny-r1 (transformers_kt), 512 tokens of context")
    assert "lower is better" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out = quality("--against", file, "--text", text, "--json")
    found = json.loads(out)
    assert (code, list(found["texts"])) == (0, ["sums.txt"])
    assert found["overall"]["same_top"]["value"] == 1
    assert f"{found['overall']['perplexity']['value']:.4g}" in shown


def test_a_command_line_without_a_reference_is_not_understood(tmp_path: Path) -> None:
    assert quality()[0] == 2
    assert quality("--json", "--save-logits", tmp_path / "logits.npz")[0] == 2


def test_a_refusal_names_options(
    logits: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["transformers-kt", "quality", MODEL, "--against", str(logits[1]), "--text", __file__]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (1, 1)
    assert "Leave --text out" in said
