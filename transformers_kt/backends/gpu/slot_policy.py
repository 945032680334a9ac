"""Which of a layer's experts lie in slots of a GPU: a slow LRU, pure.

An expert enters when it has been chosen clearly more often, of late, than one that lies there. Plain LRU exchanges an
expert with nearly every token where slots are few (8 of V3's 256 are chosen by a token), at 25 MB each over the link;
a fixed choice, even the best for some text, is soon wrong for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_KEPT = 0.5 ** (1 / 256)
"""Of what a choice counts, after each token: half after 256."""
_LEAD, _MARGIN = 1.5, 2.0
"""A newcomer counts at least this many times what it replaces, and so much more: among evenly chosen experts chance
alone then moves one of V3's some hundred tokens apart."""
UPLOADS_PER_TOKEN = 2
"""Of a layer, at most."""


class Exchange(NamedTuple):
    """``expert`` goes to ``slot``, in which ``leaving`` was; None where that was empty."""

    slot: int
    expert: int
    leaving: int | None


class SlotPolicy:
    """Slots of one layer, and how often its experts were chosen of late."""

    def __init__(self, experts: int, slots: int) -> None:
        self.in_slots: list[int | None] = [None] * min(slots, experts)
        self.counts = [0.0] * experts

    def observe(self, choices: Sequence[int], tokens: int) -> None:
        """``choices`` are how often ``tokens`` that came one after the other chose each expert."""
        kept = _KEPT**tokens
        # Of many tokens the first have faded by the end of them: each counts as the mean of them all.
        weight = (1 - kept) / (1 - _KEPT) / tokens
        self.counts = [kept * old + weight * new for old, new in zip(self.counts, choices, strict=True)]

    def exchanges(self, most: int) -> list[Exchange]:
        """Up to ``most`` exchanges, the most wanted expert first; they count as done.

        Slots that are empty are filled before others change.
        """
        there = {expert for expert in self.in_slots if expert is not None}
        wanted = sorted((e for e in range(len(self.counts)) if e not in there), key=lambda e: -self.counts[e])
        # The least chosen leaves first, and empty slots come before all.
        places = sorted(range(len(self.in_slots)), key=self._count_in)
        done = []
        for expert, slot in zip(wanted[:most], places, strict=False):
            leaving = self.in_slots[slot]
            if self.counts[expert] <= (0.0 if leaving is None else _LEAD * self.counts[leaving] + _MARGIN):
                break
            self.in_slots[slot] = expert
            done.append(Exchange(slot, expert, leaving))
        return done

    def _count_in(self, slot: int) -> float:
        expert = self.in_slots[slot]
        return -1.0 if expert is None else self.counts[expert]
