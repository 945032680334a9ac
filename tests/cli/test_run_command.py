"""``transformers-kt run`` is Python itself with models from GGUF files: arguments, exit code and output are the
program's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
import transformers
print(__name__, sys.argv[1:], "transformers_kt" in sys.modules)
print(*(os.environ.get("TRANSFORMERS_KT" + end) for end in ("", "_RULES", "_THREADS")))
sys.exit(7)
"""


def run(*args: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transformers_kt.cli", "run", *args]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRANSFORMERS_KT")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


@pytest.mark.parametrize("program", ["program.py", "program"])
def test_a_script_or_module_gets_its_arguments_and_gives_its_exit_code(folder: Path, program: str) -> None:
    own = ["--help", "-x", "--", "--rules", "b", ""]
    done = run("--rules", "observable", "--threads", "1", program, *own, folder=folder)
    assert done.stdout == f"__main__ {own} True\n1 observable 1\n", done.stderr
    assert done.returncode == 7


def test_a_command_of_the_environment_needs_no_path() -> None:
    done = run("transformers", "version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("5.")


def test_a_program_that_is_not_there_is_named_by_python() -> None:
    done = run("no_such_program")
    assert done.returncode == 1
    assert done.stderr.endswith("No module named no_such_program\n")


def test_unknown_rules_are_refused_before_the_program_starts(folder: Path) -> None:
    done = run("--rules", "nosuch", "program.py", folder=folder)
    assert done.returncode == 1
    assert done.stderr.startswith("transformers-kt: there are no rules named 'nosuch'; --kt-rules takes")
    assert not done.stdout
