"""``transformers-kt chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import transformers_kt._C as _C
from transformers_kt.cli import options
from transformers_kt.cli.models import MODEL_HELP
from transformers_kt.cli.screen import Screen, console
from transformers_kt.errors import InputError, KtError
from transformers_kt.rules import AUTO
from transformers_kt.text import nearest

if TYPE_CHECKING:
    from rich.table import Table

    from transformers_kt.cli.conversation import Conversation
    from transformers_kt.integration.loading import KtReport

_BLOCK = '"""'
_HELP = f"""\
Ctrl-C stops an answer, Ctrl-D or /quit leaves. A question of several lines stands between two lines of {_BLOCK},
or has \\ at the end of each line but the last.

/retry        answer the last question again
/reset        forget the conversation
/save FILE    write the conversation to a file
/load FILE    go on with the conversation of a file
/stats        what was computed, how fast, in how much memory
/quit         leave"""
_COMMANDS = ("/help", "/retry", "/reset", "/save", "/load", "/stats", "/quit")
_ROLES = ("user", "assistant")


class ChatLoop:
    """Questions and commands, one after the other."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._console = console()

    def ask(self, question: str) -> None:
        """Show the answer and its statistics."""
        self._note(self._conversation.ask(question).statistics())
        self._console.print()

    def answer(self, line: str) -> bool:
        """Do what ``line`` says, and show what was wrong with it; False if it says to leave."""
        try:
            if line in ("exit", "/quit"):
                return False
            if not line.startswith("/"):
                self.ask(line)
                return True
            self._command(*line.split(maxsplit=1))
        except (KtError, OSError) as error:
            self._console.print(str(error), markup=False)
        self._console.print()
        return True

    def _command(self, name: str, argument: str = "") -> None:
        conversation = self._conversation
        if name == "/help":
            self._console.print(_HELP, markup=False)
        elif name == "/retry":
            self._note(conversation.retry().statistics())
        elif name == "/reset":
            conversation.reset()
            self._note("[the conversation begins anew]")
        elif name == "/save":
            written = _file(argument, name).write_text(
                json.dumps(conversation.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            self._note(f"[{len(conversation.messages)} messages, {written} characters, are in {argument}]")
        elif name == "/load":
            conversation.go_on_after(_messages_in(_file(argument, name)))
            self._note(f"[the conversation goes on after {len(conversation.messages)} messages of {argument}]")
        elif name == "/stats":
            self._console.print(_statistics(conversation))
        else:
            raise InputError(f"{name} is no command{nearest(name, _COMMANDS)}; /help lists them")

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise InputError(f"{command} takes the name of a file: {command} talk.json")
    return Path(argument).expanduser()


def _messages_in(file: Path) -> list[dict[str, str]]:
    """Raises `InputError` where the file does not hold questions and answers in turns."""
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}); a file that /save wrote is accepted") from None
    turns: list[Any] = messages if isinstance(messages, list) else [messages]
    for number, message in enumerate(turns):
        role = _ROLES[number % 2]
        if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
            raise InputError(
                f"{file}: message {number + 1} is not of the {role} with a text; a file that /save wrote is accepted"
            )
    if len(turns) % 2:
        raise InputError(f"{file} ends with a question; a file that /save wrote is accepted")
    return turns


def _statistics(conversation: Conversation) -> Table:
    from rich import box
    from rich.table import Table

    from transformers_kt.cli.conversation import memory_in_use, shown_rate

    answers = conversation.answers
    computed = sum(answer.prompt - answer.reused for answer in answers)
    prefill_s = sum(answer.prefill_s for answer in answers)
    later = sum(max(0, answer.answer - 1) for answer in answers)
    decode_s = sum(answer.decode_s for answer in answers)
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    rows = {
        "model": conversation.model.kt_report.title,
        "kernels": conversation.model.kt_report.kernels,
        "threads": str(_C.thread_count()),
        "answers": f"{len(answers):,}",
        "in the cache": f"{len(conversation.cached_ids):,} of {conversation.positions:,} tokens",
        "prompts": f"{computed:,} tokens computed, {sum(answer.reused for answer in answers):,} reused, "
        + shown_rate(computed / prefill_s if prefill_s else None),
        "answered": f"{later + len(answers):,} tokens, {shown_rate(later / decode_s if decode_s else None)}",
        **{name: f"{nbytes / 1e9:.2f} GB" for name, nbytes in memory_in_use().items()},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _what_runs_where(report: KtReport) -> Table:
    """One line per operation; ``print(report)`` has one per kind of module."""
    from rich import box
    from rich.table import Table

    table = Table(title=report.title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=True)
    for name in ("operation", "device", "modules", "types", "memory"):
        table.add_column(name, justify="right" if name in ("modules", "memory") else "left")
    for operation, device in dict.fromkeys((row.operation, row.device) for row in report.rows):
        rows = [row for row in report.rows if (row.operation, row.device) == (operation, device)]
        types = sorted({ggml_type for row in rows for ggml_type in row.types})
        table.add_row(operation, device, str(len(rows)), ", ".join(types), _megabytes(sum(row.nbytes for row in rows)))
    table.columns[-1].footer = _megabytes(report.nbytes)
    return table


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB"


def _question_in(file: Path) -> str:
    question = file.read_text(encoding="utf-8").strip()
    print(f"> {textwrap.shorten(question, 300)}")
    return question


def _typed_lines() -> Iterator[str]:
    """Questions and commands until the input ends; those of several lines in one piece."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    while True:
        try:
            line = _typed("> ").strip()
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{_typed('. ')}"
            if line == _BLOCK:
                line = "\n".join(iter(lambda: _typed(". "), _BLOCK)).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if line:
            yield line


def _typed(prompt: str) -> str:
    line = input(prompt)
    if not sys.stdin.isatty():
        print(line)  # a terminal shows what is typed, a pipe does not
    return line


def chat_command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    model_path: Annotated[str | None, typer.Option(help="The same as MODEL, for local_chat.", hidden=True)] = None,
    gguf_path: options.GgufPath = None,
    kt_rules: options.Rules = AUTO,
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 1000,
    force_think: options.ForceThink = False,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Answer what this file asks, and leave.")
    ] = None,
    system: options.System = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    chunk_size: options.ChunkSize = 512,
) -> None:
    """Talk with a model in the terminal. Without MODEL, with the bundled one, which adds two numbers.

    What was computed of the conversation is kept: a further question costs no more than its own length. Ctrl-C stops
    an answer and keeps the conversation; /help lists what else can be typed. The options of KTransformers' local_chat
    are understood too, as that spells them.
    """
    if model is not None and model_path is not None:
        raise InputError(f"two models are named, {model} and model_path={model_path}; name one of them")
    chosen = options.sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    )
    screen = console()
    conversation = options.loaded_conversation(
        model or model_path,
        gguf_path,
        kt_rules,
        threads,
        seed,
        Screen(screen, screen, screen),
        max_new_tokens=max_new_tokens,
        force_think=force_think,
        system=system,
        options=chosen,
        chunk=chunk_size,
    )
    screen.print(_what_runs_where(conversation.model.kt_report))
    print(f"{_C.thread_count()} threads. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.\n")
    loop = ChatLoop(conversation)
    if prompt_file is not None:
        loop.ask(_question_in(prompt_file))
        return
    for line in _typed_lines():
        if not loop.answer(line):
            break
