"""How long a model takes inside `generate`: to the first token, and from each token to the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Timed(NamedTuple):
    """Seconds from the prompt to the first token, and from each token to the next; of each gap, what was ``spent``."""

    first: float
    gaps: list[float]
    spent: list[float]


class _Clock:
    """A stopping criterion that stops nothing, and notes when it was made and when tokens came.

    Not a streamer: those of transformers take one sequence alone.
    """

    def __init__(self, spent: Callable[[], float]) -> None:
        self._spent = spent
        self.times = [(time.perf_counter(), spent())]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append((time.perf_counter(), self._spent()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def random_tokens(count: int, vocab: int, seed: int = 1) -> list[int]:
    """Token ids that are no special ones: those are the first or the last of a vocabulary."""
    state, tokens = seed, []
    for _ in range(count):
        state = (state * 48271) % 2147483647
        tokens.append(vocab // 8 + state % (vocab // 2))
    return tokens


def timed_generate(
    model: Any, prompts: list[list[int]], new_tokens: int, spent: Callable[[], float] = lambda: 0.0
) -> Timed:
    """``prompts`` of one length as a batch, then ``new_tokens`` after the first, greedy, all of Python counted.

    ``spent`` gives seconds that run beside the clock, such as those inside compiled code.
    """
    ids = torch.tensor(prompts)
    clock = _Clock(spent)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens + 1,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=[clock],
    )
    first, *steps = ((after[0] - before[0], after[1] - before[1]) for before, after in pairwise(clock.times))
    return Timed(first[0], [wall for wall, _ in steps], [inside for _, inside in steps])
