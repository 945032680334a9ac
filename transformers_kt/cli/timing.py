"""How long a model takes inside `generate`: to the first token, and from each token to the next."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Timed(NamedTuple):
    """Seconds from the prompt to the first token, and from each token to the next."""

    first: float
    gaps: list[float]


class _Clock:
    """A streamer that notes when tokens come; the first `put` is the prompt, before anything is computed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def random_tokens(count: int, vocab: int, seed: int = 1) -> list[int]:
    """Token ids that are no special ones: those are the first or the last of a vocabulary."""
    state, tokens = seed, []
    for _ in range(count):
        state = (state * 48271) % 2147483647
        tokens.append(vocab // 8 + state % (vocab // 2))
    return tokens


def timed_generate(model: Any, tokens: list[int], new_tokens: int, batch: int = 1, **options: Any) -> Timed:
    """``batch`` times the prompt ``tokens``, then ``new_tokens`` after the first, greedy, all of Python counted."""
    clock = _Clock()
    ids = torch.tensor([tokens] * batch)
    # The streamers of transformers take one sequence alone; how it gets the tokens does not matter to the clock.
    options = {"max_new_tokens": new_tokens + 1, "do_sample": False, "eos_token_id": None, **options}
    if batch == 1:
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    else:
        clock.put(None)
        criterion = _Noticed(clock)
        model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[criterion], **options)
    first, *gaps = (after - before for before, after in pairwise(clock.times))
    return Timed(first, gaps)


class _Noticed:
    """A stopping criterion that stops nothing, and tells the clock of each token."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._clock.put(None)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)
