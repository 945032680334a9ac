"""Who computes which expert of a long prompt: some are copied to the GPU and computed there, the CPU computes the rest.

Pure. A layer is done when both are, so that the shares follow from how long each would take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class PrefillRates:
    """What one expert takes, in seconds: on the CPU ``cpu_s`` and ``cpu_per_token_s`` for each of its tokens, or
    ``link_s`` to be copied to the GPU, which computes one while the next comes."""

    cpu_s: float
    cpu_per_token_s: float
    link_s: float

    def cpu_seconds(self, tokens: int) -> float:
        return self.cpu_s + self.cpu_per_token_s * tokens

    def scaled(self, factor: float) -> PrefillRates:
        """Those of an expert that is so many times as large."""
        return PrefillRates(factor * self.cpu_s, factor * self.cpu_per_token_s, factor * self.link_s)


@dataclass(frozen=True, slots=True)
class Split:
    """Experts by who computes them: ``link`` the busiest, most tokens first, ``cpu`` the others."""

    link: tuple[int, ...]
    cpu: tuple[int, ...]


def split_experts(counts: Sequence[int], rates: PrefillRates) -> Split:
    """The split of experts that ``counts`` tokens each chose after which both sides are done soonest.

    Copying takes as long for each, so that the link gets the busiest, whichever their number.
    """
    active = sorted((e for e in range(len(counts)) if counts[e]), key=lambda e: (-counts[e], e))
    on_cpu = list(accumulate((rates.cpu_seconds(counts[e]) for e in reversed(active)), initial=0.0))[::-1]
    ends = [max(number * rates.link_s, rest) for number, rest in enumerate(on_cpu)]
    number = ends.index(min(ends))
    return Split(tuple(active[:number]), tuple(active[number:]))


def fewest_tokens(experts: int, top_k: int) -> int:
    """From how many tokens on experts are copied to the GPU, where nothing else is said.

    With fewer than 16 for each expert the CPU is held up by reading weights, and a copy would read from the same RAM.
    """
    return math.ceil(16 * experts / max(1, top_k))


@dataclass(frozen=True, slots=True)
class RingStep:
    """``experts`` are copied to ``slot``, which is free once those that were there before have been computed."""

    slot: int
    experts: tuple[int, ...]


def ring_steps(experts: Sequence[int], slots: int, experts_per_slot: int, first_slot: int = 0) -> Iterator[RingStep]:
    """``experts`` through ``slots`` in turn, from ``first_slot`` on."""
    for number, start in enumerate(range(0, len(experts), experts_per_slot)):
        yield RingStep((first_slot + number) % slots, tuple(experts[start : start + experts_per_slot]))
