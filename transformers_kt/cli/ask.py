"""``transformers-kt ask``: one question, and nothing but the answer on stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transformers_kt.cli import options
from transformers_kt.cli.models import MODEL_HELP, NOT_ALL_WELL
from transformers_kt.cli.screen import Screen, console
from transformers_kt.errors import InputError
from transformers_kt.rules import AUTO

if TYPE_CHECKING:
    from transformers_kt.cli.conversation import Answer

_STDIN = "-"


def ask_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="The question. If it is not given, or -, it is read from the standard input."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Ask what this file says.")
    ] = None,
    gguf_path: options.GgufPath = None,
    kt_rules: options.Rules = AUTO,
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 1000,
    force_think: options.ForceThink = False,
    system: options.System = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    chunk_size: options.ChunkSize = 512,
    thinking: Annotated[bool, typer.Option("--thinking", help="Show what the model thinks, on stderr.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Tell speed and memory in the end, on stderr.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer, thinking, counts of tokens and times as JSON.")
    ] = False,
) -> None:
    """Ask MODEL one question. The answer, and nothing else, goes to the standard output, so that it can be piped.

    Ends with 0 if the model ended its answer, with 3 if it was cut off by --max-new-tokens or Ctrl-C.
    """
    question = _question(prompt, prompt_file)
    chosen = options.sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    )
    aside = console(to_stderr=True)
    out = console(quiet=as_json)
    conversation = options.loaded_conversation(
        model,
        gguf_path,
        kt_rules,
        threads,
        seed,
        Screen(out, aside, aside if thinking else None),
        max_new_tokens=max_new_tokens,
        force_think=force_think,
        system=system,
        options=chosen,
        chunk=chunk_size,
    )
    answer = conversation.ask(question)
    if as_json:
        print(json.dumps(_plain(answer), indent=1, ensure_ascii=False))
    if stats:
        aside.print(answer.statistics(), style="dim", markup=False)
    if answer.finish != "stop":
        raise typer.Exit(NOT_ALL_WELL)


def _question(prompt: str | None, prompt_file: Path | None) -> str:
    """Raises `InputError` where there is none, or two."""
    if prompt_file is not None:
        if prompt is not None:
            raise InputError(f"two questions are given, {prompt!r} and that of {prompt_file}; give one of them")
        question, source = prompt_file.read_text(encoding="utf-8"), str(prompt_file)
    elif prompt is None or prompt == _STDIN:
        question, source = sys.stdin.read(), "the standard input"
    else:
        question, source = prompt, "the argument"
    if not question.strip():
        raise InputError(f"the question is empty ({source}); a text is accepted")
    return question.strip()


def _plain(answer: Answer) -> dict[str, object]:
    return {
        "answer": answer.text,
        "thinking": answer.thinking,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt,
        "answer_tokens": answer.answer,
        "prefill_s": answer.prefill_s,
        "decode_s": answer.decode_s,
    }
