"""``transformers-kt quality``: what a quantization costs, in probabilities of the next token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import transformers_kt._C as _C
from transformers_kt.cli import options
from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.errors import InputError
from transformers_kt.planning.report import require_plot
from transformers_kt.rules import AUTO
from transformers_kt.text import format_bytes

_ARGUMENTS = ("save_logits", "context")
OPTIONS = {"texts": "--text", **{argument: f"--{argument.replace('_', '-')}" for argument in _ARGUMENTS}}
"""Arguments of `quality`, as messages name them -> options of the command."""


def quality_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="REFERENCE",
            help="The model that MODEL should equal: named as MODEL is, or the folder or hub id of original weights, "
            "or a file that --save-logits wrote.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Compare on this text file; may be given several times. Default: four "
            "pages that are bundled, prose, an explanation, a program and letters.",
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Texts are read in windows of so many tokens.")] = 512,
    gguf_path: options.GgufPath = None,
    kt_rules: options.Rules = AUTO,
    threads: options.Threads = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(
            help="Keep what the reference said in this file (.npz), as a REFERENCE for later; without --against, what "
            "MODEL says. It takes 2 bytes for each token of text and of the vocabulary."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[str | None, typer.Option(help="Also write a picture to this file (.png, .svg).")] = None,
) -> None:
    """Measure how far MODEL is from a REFERENCE: what it lost by being quantized, that is stored in fewer bits.

    Both read the same texts and say, token after token, how likely each next token is. The report tells how much these
    probabilities differ, and how well each model foresaw the text. One after the other is in memory.
    """
    if plot is not None:
        require_plot(plot)
    if against is None and save_logits is None:
        raise typer.BadParameter("name what to compare with: --against REFERENCE; or --save-logits FILE to do so later")
    if against is None and (as_json or plot is not None):
        raise typer.BadParameter("--json and --plot show a comparison: name the other model with --against")
    from transformers_kt.evaluation import quality

    if threads is not None:
        _C.set_thread_count(threads)
    texts = None if not text else {path.name: path.read_text(encoding="utf-8") for path in text}
    if texts is not None and len(texts) < len(text or ()):
        raise InputError("two text files have the same name, and names tell them apart in the report. Rename one")
    # "auto" is what a GGUF gets anyway, and would refuse a folder of original weights.
    shared: dict[str, Any] = {
        "gguf_path": gguf_path,
        "kt_rules": None if kt_rules == AUTO else kt_rules,
        "context": context,
    }
    if against is None:
        assert save_logits is not None
        tokens = quality.save_logits(located(model), save_logits, texts, **shared)
        print(f"{save_logits}: {tokens:,} tokens, {format_bytes(save_logits.stat().st_size)}")
        return
    report = quality.quality(located(model), located(against), texts, save_logits=save_logits, **shared)
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    if plot is not None:
        report.plot(plot)
