"""Chat with a DeepSeek model from a GGUF file on the CPU; by default with the bundled tiny-r1, which adds numbers.

    python examples/chat.py
    python examples/chat.py --gguf_path DeepSeek-R1-Q4_K_M/
    python examples/chat.py --model_path deepseek-ai/DeepSeek-R1 --gguf_path DeepSeek-R1-Q4_K_M/ --cpu_infer 32

Ctrl-C stops an answer, Ctrl-D or "exit" leaves. The options are those of KTransformers' local_chat.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import transformers_kt
from transformers_kt.assets import bundled_model
from transformers_kt.errors import InputError

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  # gives input() line editing and a history

THINK, END_OF_THINKING = "<think>\n", "</think>"

console = Console(highlight=False, soft_wrap=True)


class ThinkingStreamer(TextStreamer):
    """Prints text as it comes, the thinking dimmed, and remembers when tokens came."""

    def __init__(self, tokenizer: Any, is_thinking: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._is_thinking = is_thinking
        self.times: list[float] = []  # of the prompt, then of each token of the answer
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self._is_thinking and END_OF_THINKING in text:
            thought, _, text = text.partition(END_OF_THINKING)
            console.print(thought + END_OF_THINKING, style="dim", end="", markup=False)
            self._is_thinking = False
        console.print(text, style="dim" if self._is_thinking else None, end="\n" if stream_end else "", markup=False)


@dataclass
class Chat:
    """A conversation. What the model has computed is kept and used again as far as the next prompt begins alike."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    force_think: bool
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: DynamicCache | None = None
    cached_ids: list[int] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer and its timing. Raises `transformers_kt.KtError` if the question is too long."""
        self.messages.append({"role": "user", "content": question})
        prompt, inputs, dropped = self._prompt()
        tokens = inputs["input_ids"].shape[1]
        if tokens > self._positions:
            self.messages.pop()
            raise InputError(
                f"The question alone is {tokens} tokens long; this model has {self._positions} positions. Nothing was "
                "forgotten: ask a shorter one."
            )
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            console.print(f"[no room for all: the oldest {turns} forgotten]", style="dim", markup=False)
            del self.messages[: 2 * dropped]
        reused = self._reuse_cache(inputs["input_ids"][0].tolist())
        is_thinking = prompt.endswith(THINK)
        streamer = ThinkingStreamer(self.tokenizer, is_thinking)
        if is_thinking:
            console.print(THINK, style="dim", end="", markup=False)
        try:
            output = self.model.generate(
                **inputs,
                max_new_tokens=max(1, min(self.max_new_tokens, self._positions - tokens)),
                streamer=streamer,
                **{_cache_argument(self.model): self.cache},
            )
        except KeyboardInterrupt:
            streamer.end()
            self._forget("stopped")
            self._drop_cache()  # some of its layers may be ahead of others
            return
        except transformers_kt.KtError:
            self.messages.pop()
            self._drop_cache()
            raise
        self.cached_ids = output[0, : self.cache.get_seq_length()].tolist()
        if is_thinking and END_OF_THINKING not in streamer.text:
            self._forget(f"no answer within {output.shape[1] - tokens} tokens")
        else:
            # Whole, with its thinking: chat templates drop that themselves.
            self.messages.append({"role": "assistant", "content": streamer.text})
        console.print(_timing(tokens, reused, streamer.times), style="dim", markup=False)

    @property
    def _positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def _prompt(self) -> tuple[str, dict[str, torch.Tensor], int]:
        """The conversation as text and tokens, without the oldest turns where room is wanting, and how many these are.

        Room is for a whole answer, but no more than half of the positions, or than a long question alone leaves.
        """
        wanted = min(self.max_new_tokens, self._positions // 2)
        alone = self._tokens_from(len(self.messages) - 1)[1]["input_ids"].shape[1]
        wanted = max(1, min(wanted, self._positions - alone))
        for dropped in range(len(self.messages) // 2 + 1):
            text, inputs = self._tokens_from(2 * dropped)
            if self._positions - inputs["input_ids"].shape[1] >= wanted:
                break
        return text, inputs, dropped

    def _tokens_from(self, first: int) -> tuple[str, dict[str, torch.Tensor]]:
        """What is asked of the model when the conversation begins with message ``first``."""
        text = self.tokenizer.apply_chat_template(self.messages[first:], tokenize=False, add_generation_prompt=True)
        if self.force_think and not text.endswith(THINK):
            text += THINK
        return text, self.tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)

    def _reuse_cache(self, ids: list[int]) -> int:
        """Cut the cache to what it has in common with the prompt ``ids``; the number of tokens left in it."""
        # Not the last token: it has to be computed, for the answer's first token comes from it.
        pairs = zip(self.cached_ids, ids[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common == 0 or self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
        elif common < len(self.cached_ids):
            self.cache.crop(common - len(self.cached_ids))
        return common

    def _drop_cache(self) -> None:
        self.cache, self.cached_ids = None, []

    def _forget(self, why: str) -> None:
        """Leave the question out: a thought without an end would pass for an answer in later prompts."""
        self.messages.pop()
        console.print(f"[{why}; the conversation goes on without this question]", style="dim", markup=False)


def _cache_argument(model: Any) -> str:
    """What `generate` calls the cache to go on from: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _timing(tokens: int, reused: int, times: list[float]) -> str:
    cached = f" ({reused} cached)" if reused else ""
    prefill = _rate(tokens - reused, times[1] - times[0])
    decode = _rate(len(times) - 2, times[-1] - times[1])
    return f"prompt: {tokens} tokens{cached}, {prefill}\nanswer: {len(times) - 1} tokens, {decode}"


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if tokens and seconds else "- tokens/s"


def _what_runs_where(report: transformers_kt.KtReport) -> Table:
    """One line per operation; ``print(report)`` has one per kind of module."""
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


def _question_in(file: Path) -> Iterator[str]:
    question = file.read_text(encoding="utf-8").strip()
    print(f"> {textwrap.shorten(question, 300)}")
    yield question


def _typed_questions() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():
            print(line)  # a terminal shows what is typed, a pipe does not
        if line == "exit":
            return
        if line:
            yield line


def main(
    model_path: Annotated[
        str | None, typer.Option("--model_path", help="Folder or hub id with config and tokenizer.")
    ] = None,
    gguf_path: Annotated[
        str | None, typer.Option("--gguf_path", help="GGUF file, folder, shard, or hub repo:file.")
    ] = None,
    optimize_rule_path: Annotated[
        str, typer.Option("--optimize_rule_path", help="Placement rules: YAML file or bundled name.")
    ] = "auto",
    cpu_infer: Annotated[
        int | None, typer.Option("--cpu_infer", min=1, help="Threads; by default one per usable core.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Most tokens of an answer.")] = 1000,
    force_think: Annotated[
        bool, typer.Option("--force_think", help="Begin answers with <think> where the template does not.")
    ] = False,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt_file", exists=True, dir_okay=False, help="Answer this file and exit.")
    ] = None,
) -> None:
    """Chat with a DeepSeek model from a GGUF file on the CPU; without arguments with the bundled tiny-r1."""
    if cpu_infer is not None:
        transformers_kt.set_thread_count(cpu_infer)
    if model_path is None and gguf_path is None:
        model_path = str(bundled_model())
    source: dict[str, Any] = {"gguf_path": gguf_path, "kt_rules": optimize_rule_path}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, **source)
        model = AutoModelForCausalLM.from_pretrained(model_path, **source)
    except transformers_kt.KtError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    console.print(_what_runs_where(model.kt_report))
    print(f"{transformers_kt.thread_count()} threads. Ctrl-C stops an answer, Ctrl-D or exit leaves.\n")
    chat = Chat(model, tokenizer, max_new_tokens, force_think)
    for question in _typed_questions() if prompt_file is None else _question_in(prompt_file):
        try:
            chat.ask(question)
        except transformers_kt.KtError as error:
            print(error)
        print()


if __name__ == "__main__":
    typer.run(main)
