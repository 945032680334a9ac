"""``transformers-kt run``: another program, in whose Python transformers knows GGUF files as if it had imported us."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from transformers_kt._environment import ACTIVATE, RULES, THREADS

RulesOption = Annotated[
    str | None,
    typer.Option(
        "--rules", "--kt-rules", help="What computes which module: auto, a YAML file, or the name of bundled rules."
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads to compute with. Default: physical cores.")]


def run_command(
    program: Annotated[
        str,
        typer.Argument(metavar="PROGRAM", help="A script, a command such as lm_eval, or a module as for python -m."),
    ],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENTS", help="What PROGRAM is given.")] = None,
    rules: RulesOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Run a program that only knows transformers, such as lm_eval, with models from GGUF files.

    Options of this command stand before PROGRAM; all that follows is PROGRAM's own. Where it calls from_pretrained,
    gguf_file= and paths of GGUF files load as they do after "import transformers_kt".
    """
    import importlib.util

    if importlib.util.find_spec("_transformers_kt_startup") is None:
        raise typer.BadParameter(
            "this copy of transformers_kt is not installed, so no other program finds it. Run: pip install ."
        )
    set_environment(rules, threads)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *_program(program), *(arguments or ())])


def set_environment(rules: str | None, threads: int | None) -> None:
    """Let this process, and those that it starts, load models from GGUF files. Raises RuleError for unknown rules."""
    if rules is not None:
        from transformers_kt.planning.operations import replaced_classes
        from transformers_kt.rules import load_rules

        load_rules(rules, replaced_classes())
        os.environ[RULES] = rules
    if threads is not None:
        os.environ[THREADS] = str(threads)
    os.environ[ACTIVATE] = "1"


def _program(name: str) -> list[str]:
    """What Python is called with: a path, a command of the same environment, or a module."""
    if Path(name).exists():
        return [name]
    command = Path(sys.executable).with_name(name)
    if os.sep not in name and command.is_file() and _is_python(command):
        return [str(command)]
    return ["-m", name]


def _is_python(script: Path) -> bool:
    with script.open("rb") as file:
        start = file.read(256)
    return start.startswith(b"#!") and b"python" in start
