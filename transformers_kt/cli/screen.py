"""Where a conversation is shown: answers, thinking and remarks, and a bar while a long prompt is computed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOWN_FROM_S = 1.0  # what is over sooner needs no bar


class Screen:
    """Answers go to ``out``, remarks and bars to ``aside``, thinking, dimmed, to ``thinking``, if there is one.

    Where an answer stands alone, it begins without the blank lines that part it from the thinking.
    """

    def __init__(self, out: Console, aside: Console, thinking: Console | None) -> None:
        self._out, self._aside, self._thinking = out, aside, thinking
        self._stands_alone = thinking is not out
        self._is_thinking = self._has_begun = False

    def answer(self, text: str, *, is_thinking: bool) -> None:
        console = self._thinking if is_thinking else self._out
        if self._stands_alone and not is_thinking:
            if self._is_thinking and self._thinking is not None:
                self._thinking.print()
            text = text if self._has_begun else text.lstrip()
            self._has_begun = self._has_begun or text != ""
        self._is_thinking = is_thinking
        if console is not None:
            console.print(text, style="dim" if is_thinking else None, end="", markup=False)
            console.file.flush()

    def note(self, text: str) -> None:
        self._aside.print(text, style="dim", markup=False)

    def prefill(self, tokens: int) -> PrefillBar:
        return PrefillBar(self._aside, tokens)


class PrefillBar:
    """Tokens per second and time left of a prompt, shown on a terminal if it takes over a second, and taken away."""

    def __init__(self, console: Console, tokens: int) -> None:
        self._console, self._tokens, self._done = console, tokens, 0
        self._start = time.perf_counter()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, tokens: int) -> None:
        self._done += tokens
        elapsed = time.perf_counter() - self._start
        if self._bar is None and elapsed * self._tokens / self._done > _SHOWN_FROM_S:
            self._show()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{self._done / elapsed:,.1f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("reading the prompt"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]} tokens/s,"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=self._tokens, rate="")


def console(*, to_stderr: bool = False, quiet: bool = False) -> Console:
    """Plain text where the output is no terminal. Lines are left to the terminal: answers are copied from it."""
    return Console(highlight=False, soft_wrap=True, stderr=to_stderr, quiet=quiet)
