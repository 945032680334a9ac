"""A conversation with a loaded model: prompts by chat template, a KV cache that is used again, answers as they come.

What it says, it says to a `Screen`.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import psutil
import torch
from jinja2 import TemplateError
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from transformers_kt.errors import InputError
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT

THINK, END_OF_THINKING = "<think>\n", "</think>"
# The first piece of a prompt: enough tokens to tell the speed by, few enough to be there within seconds on any machine.
_FIRST_CHUNK = 64


class Screen(Protocol):
    """Where a conversation is shown."""

    def answer(self, text: str, *, is_thinking: bool) -> None:
        """A piece of the answer as it comes; ``text`` of the last piece ends with a line break."""

    def note(self, text: str) -> None:
        """A remark about the conversation itself."""

    def prefill(self, tokens: int) -> Progress:
        """The prompt is about to be computed, ``tokens`` of it."""


class Progress(Protocol):
    """How far a prompt is computed."""

    def advance(self, tokens: int) -> None:
        """``tokens`` more are done."""

    def close(self) -> None:
        """The answer begins."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What `Conversation.ask` gives. Counts are in tokens, times in seconds.

    ``finish`` is "stop" where the model ended its answer, "length" where it had no room for more, "stopped" where
    somebody stopped it. ``reused`` of the ``prompt`` came from the cache.
    """

    text: str
    thinking: str
    finish: str
    prompt: int
    reused: int
    answer: int
    prefill_s: float
    decode_s: float

    @property
    def prefill_rate(self) -> float | None:
        return _rate(self.prompt - self.reused, self.prefill_s)

    @property
    def decode_rate(self) -> float | None:
        """Of all tokens but the first, which the prompt gives."""
        return _rate(self.answer - 1, self.decode_s)

    def statistics(self) -> str:
        """One line: the prompt, what was used again of it, the answer, their speeds, memory."""
        reused = f" ({self.reused:,} reused)" if self.reused else ""
        parts = [
            f"prompt {self.prompt:,} tokens{reused}, {shown_rate(self.prefill_rate)}",
            f"answer {self.answer:,} tokens, {shown_rate(self.decode_rate)}",
            *(f"{name} {nbytes / 1e9:.2f} GB" for name, nbytes in memory_in_use().items()),
        ]
        return " · ".join(parts)


@dataclass
class Conversation:
    """What the model has computed is kept and used again as far as the next prompt begins alike.

    ``options`` are those of `generate`, ``chunk`` is how many tokens of a prompt are computed at a time.
    """

    model: Any
    tokenizer: Any
    screen: Screen
    max_new_tokens: int
    force_think: bool = False
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    chunk: int = 512
    messages: list[dict[str, str]] = field(default_factory=list)
    cache: Any = None
    cached_ids: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    _asked: str | None = None

    def ask(self, question: str) -> Answer:
        """Show the answer as it comes, and return it.

        Ctrl-C ends the answer, not the conversation. What is left of it stays in the conversation, unless it is a
        thought without an end, which would pass for an answer in later prompts. Raises `InputError`, and forgets
        nothing, if the question is too long.
        """
        self._asked = question
        self.messages = [*self.messages, {"role": "user", "content": question}]
        try:
            return self._answer()
        except BaseException:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()
            raise

    def retry(self) -> Answer:
        """Answer the last question again, also one that was left out. Raises `InputError` if there is none."""
        messages = self.messages
        question = self._asked if self._asked is not None or not messages else messages[-2]["content"]
        if question is None:
            raise InputError("there is no question to answer again")
        if messages and messages[-2]["content"] == question:
            self.messages = messages[:-2]
        try:
            return self.ask(question)
        except BaseException:
            self.messages = messages
            raise

    def reset(self) -> None:
        """Forget all that was said, and the cache."""
        self.go_on_after([])
        self._drop_cache()

    def go_on_after(self, messages: list[dict[str, str]]) -> None:
        """Put ``messages``, questions and answers in turns, in the place of what was said."""
        self.messages, self._asked = messages, None

    @property
    def positions(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.model.config.max_position_embeddings)

    def _answer(self) -> Answer:
        prompt, ids, dropped = self._prompt()
        if len(ids) > self.positions:
            raise InputError(
                f"The question alone is {len(ids)} tokens long; this model has {self.positions} positions. Nothing was "
                "forgotten: ask a shorter one."
            )
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self.screen.note(f"[no room for all: the oldest {turns} forgotten]")
            del self.messages[: 2 * dropped]
        reused = self._reuse_cache(ids)
        start = time.perf_counter()
        progress = self.screen.prefill(len(ids) - reused)
        streamer = _ThinkingStreamer(self.tokenizer, self.screen, prompt.endswith(THINK), progress)
        try:
            with _stopping_on_interrupt() as stop:
                self._prefill(ids, reused, progress, stop)
                output = self._generate(ids, streamer, stop)
        except BaseException:
            self._drop_cache()  # some of its layers may be ahead of others
            raise
        finally:
            progress.close()
        self.cached_ids = output[: self.cache.get_seq_length()]
        answer = self._taken(ids, output, streamer, reused, start, stop)
        self.answers.append(answer)
        return answer

    def _taken(
        self, ids: list[int], output: list[int], streamer: _ThinkingStreamer, reused: int, start: float, stop: _Stop
    ) -> Answer:
        """The answer, added to the messages or left out of them."""
        count = len(output) - len(ids)
        first = streamer.times[1] if len(streamer.times) > 1 else time.perf_counter()
        last = streamer.times[-1] if len(streamer.times) > 1 else first
        ends = self.model.generation_config.eos_token_id
        ended = count > 0 and output[-1] in (ends if isinstance(ends, list) else [ends])
        finish = "stop" if ended else "stopped" if stop.wanted else "length"
        is_answer = not streamer.is_thinking and (finish != "stopped" or streamer.text.strip())
        if is_answer:
            # Whole, with its thinking: chat templates drop that themselves.
            self.messages.append({"role": "assistant", "content": streamer.thinking + streamer.text})
            if finish != "stop":
                self.screen.note("[stopped]" if stop.wanted else f"[cut off after {count:,} tokens]")
        else:
            self.messages.pop()
            why = "stopped" if stop.wanted else f"no answer within {count:,} tokens"
            self.screen.note(f"[{why}: the question is left out of the conversation]")
        thinking = streamer.thinking.removesuffix(END_OF_THINKING).strip()
        return Answer(streamer.text.strip(), thinking, finish, len(ids), reused, count, first - start, last - first)

    def _generate(self, ids: list[int], streamer: _ThinkingStreamer, stop: _Stop) -> list[int]:
        if stop.wanted:
            return ids
        room = max(1, min(self.max_new_tokens, self.positions - len(ids)))
        criteria = StoppingCriteriaList([stop])
        return self._generated(ids, max_new_tokens=room, streamer=streamer, stopping_criteria=criteria, **self.options)

    def _prefill(self, ids: list[int], reused: int, progress: Progress, stop: _Stop) -> None:
        """Compute the prompt in chunks, all but the last of them, which the answer begins with."""
        one_token = GenerationConfig(max_new_tokens=1, do_sample=False)
        done, size = reused, min(_FIRST_CHUNK, self.chunk)
        while len(ids) - done > size and not stop.wanted:
            done += size
            self._generated(ids[:done], generation_config=one_token)
            progress.advance(size)
            size = self.chunk

    def _generated(self, ids: list[int], **options: Any) -> list[int]:
        inputs = torch.tensor([ids])
        cache = {CACHE_ARGUMENT: self.cache}
        output: list[int] = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **cache, **options)[
            0
        ].tolist()
        return output

    def _prompt(self) -> tuple[str, list[int], int]:
        """The conversation as text and tokens, without the oldest turns where room is wanting, and how many these are.

        Room is for a whole answer, but no more than half of the positions, or than a long question alone leaves.
        """
        wanted = min(self.max_new_tokens, self.positions // 2)
        alone = len(self._tokens_from(len(self.messages) - 1)[1])
        wanted = max(1, min(wanted, self.positions - alone))
        for dropped in range(len(self.messages) // 2 + 1):
            text, ids = self._tokens_from(2 * dropped)
            if self.positions - len(ids) >= wanted:
                break
        return text, ids, dropped

    def _tokens_from(self, first: int) -> tuple[str, list[int]]:
        """What is asked of the model when the conversation begins with message ``first``."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.messages[first:]]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:
            raise InputError(
                f"the model's chat template does not take this conversation: {error}. Name a folder or hub id whose "
                "tokenizer has one that does, with the weights as gguf_path="
            ) from error
        if self.force_think and not text.endswith(THINK):
            text += THINK
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text, ids

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


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer after the token at which it is ``wanted``."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.wanted)


@contextmanager
def _stopping_on_interrupt() -> Iterator[_Stop]:
    """Ctrl-C ends the answer between two tokens, where the cache is whole; a second one raises KeyboardInterrupt."""
    stop = _Stop()

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _ThinkingStreamer(TextStreamer):  # type: ignore[misc]
    """Shows text as it comes, tells thinking from the answer, and remembers when tokens came."""

    def __init__(self, tokenizer: Any, screen: Screen, is_thinking: bool, progress: Progress) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._screen, self._progress = screen, progress
        self.is_thinking = is_thinking
        self.times: list[float] = []  # of the prompt, then of each token of the answer
        self.thinking = self.text = ""

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._progress.close()
            if self.is_thinking:
                self._screen.answer(THINK, is_thinking=True)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.is_thinking:
            thought, end, text = text.partition(END_OF_THINKING)
            self.thinking += thought + end
            is_last = stream_end and not end
            self._screen.answer(thought + end + ("\n" if is_last else ""), is_thinking=True)
            self.is_thinking = not end
            if self.is_thinking:
                return
        self.text += text
        self._screen.answer(text + ("\n" if stream_end else ""), is_thinking=False)


def memory_in_use() -> dict[str, int]:
    """Bytes of RAM that the process holds, and of VRAM where torch uses some."""
    used = {"RAM": psutil.Process().memory_info().rss}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        used["VRAM"] = sum(torch.cuda.memory_reserved(number) for number in range(torch.cuda.device_count()))
    return used


def shown_rate(rate: float | None) -> str:
    return "- tokens/s" if rate is None else f"{rate:,.1f} tokens/s"


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None
