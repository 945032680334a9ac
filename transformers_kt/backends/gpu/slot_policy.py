"""Which of a layer's experts lie in slots of a GPU: a slow LRU, pure.

An expert enters when it has been chosen clearly more often, of late, than one that lies there. Plain LRU exchanges an
expert with nearly every token where slots are few (8 of 256 are chosen by a token), at 25 MB each over the link;
a fixed choice, even the best for some text, is soon wrong for another.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_EMPTY = -1
_KEPT = 0.5 ** (1 / 256)
"""Of what a choice counts, after each token: half after 256."""
_LEAD, _MARGIN = 1.5, 2.0
"""A newcomer counts at least this many times what it replaces, and so much more: among evenly chosen experts chance
alone then moves one of 256 some hundred tokens apart."""
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
        self._counts = np.zeros(experts)
        self._in_slots = np.full(min(slots, experts), _EMPTY)

    @property
    def in_slots(self) -> list[int | None]:
        """The expert of each slot; None where it is empty."""
        return [None if expert == _EMPTY else int(expert) for expert in self._in_slots]

    def observe(self, choices: npt.ArrayLike, tokens: int) -> None:
        """``choices`` are how often ``tokens`` that came one after the other chose each expert."""
        kept = _KEPT**tokens
        # Of many tokens the first have faded by the end of them: each counts as the mean of them all.
        weight = (1 - kept) / (1 - _KEPT) / tokens
        self._counts *= kept
        self._counts += weight * np.asarray(choices)

    def exchanges(self, most: int) -> list[Exchange]:
        """Up to ``most`` exchanges, the most wanted expert first; they count as done.

        Slots that are empty are filled before others change.
        """
        done: list[Exchange] = []
        while len(done) < most:
            wanted = self._counts.copy()
            wanted[self._in_slots[self._in_slots != _EMPTY]] = -1.0
            expert = int(wanted.argmax())
            held = np.where(self._in_slots == _EMPTY, -1.0, self._counts[self._in_slots])
            slot = int(held.argmin())
            leaving = int(self._in_slots[slot])
            if wanted[expert] <= (0.0 if leaving == _EMPTY else _LEAD * held[slot] + _MARGIN):
                break
            self._in_slots[slot] = expert
            done.append(Exchange(slot, expert, None if leaving == _EMPTY else leaving))
        return done
