"""Keys of finished requests, from which the next that begins alike takes what it needs not compute."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from transformers_kt.modules.fused.latent_cache import cache_of, copied_states

_Ids = npt.NDArray[np.int64]


class _Kept(NamedTuple):
    ids: _Ids
    states: list[list[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for layer in self.states for states in layer)


class KeptCaches:
    """The last used ones, as many as there is room for. Tokens are told by id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the one used last at the end
        self._numbers = itertools.count()
        self._room = 0
        self.nbytes = 0

    def begin(self, ids: Sequence[int]) -> tuple[Any, int]:
        """A copy of the longest beginning of ``ids`` that is there, and how many tokens it has; (None, 0) if none."""
        wanted = np.asarray(ids, np.int64)
        with self._lock:
            common = {number: _common(kept.ids, wanted) for number, kept in self._kept.items()}
            best = max(common, key=lambda number: common[number], default=None)
            if best is None or not common[best]:
                return None, 0
            self._kept.move_to_end(best)
            states = self._kept[best].states
        return cache_of(states, common[best]), common[best]

    def keep(self, ids: Sequence[int], cache: Any) -> None:
        """A copy of ``cache``, which holds ``ids``, in the place of all that it begins with."""
        added = np.asarray(ids, np.int64)
        with self._lock:
            for number, kept in list(self._kept.items()):
                common = _common(kept.ids, added)
                if common == len(added):
                    self._kept.move_to_end(number)
                    return
                if common == len(kept.ids):
                    self._drop(number)
        states = copied_states(cache)
        if states is None:
            return
        with self._lock:
            kept = self._kept[next(self._numbers)] = _Kept(added, states)
            self.nbytes += kept.nbytes
            self._drop_what_has_no_room()

    def make_room(self, nbytes: int) -> None:
        """From now on all together have at most ``nbytes``."""
        with self._lock:
            self._room = nbytes
            self._drop_what_has_no_room()

    def _drop_what_has_no_room(self) -> None:
        while self._kept and self.nbytes > self._room:
            self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        self.nbytes -= self._kept.pop(number).nbytes


def _common(a: _Ids, b: _Ids) -> int:
    """How many ids both begin with."""
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter
