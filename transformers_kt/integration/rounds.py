"""Several threads in one model: one of them runs at a time, and passes over one token are computed together.

Each thread calls the stock ``generate`` with options of its own. Where a pass through the model begins it waits until
all others have come to the beginning of one too, or have ended; then one of them computes the passes of all. A thread
comes and goes at any time, and its result has the bits that it has alone.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from transformers_kt.modules.gathering import Compute, gathering


class _Seat:
    """A thread's place in the round."""

    def __init__(self, seed: int | None) -> None:
        self.turn = threading.Semaphore(0)
        self.compute: Compute | None = None
        self.call: Any = None
        self.begins_pass = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._seed = seed
        self._own: torch.Tensor | None = None
        self._outside: torch.Tensor | None = None

    def take_random_numbers(self) -> None:
        """Until they are given back, torch's default generator goes on where this thread left it: a seed is heard by
        nobody else, and no draw of others is heard here."""
        generator = torch.default_generator
        if self._own is None:
            # Drawn from the generator that all begin with, which so is another one for the next.
            drawn = int(torch.randint(2**63 - 1, ())) if self._seed is None else self._seed
            self._outside = generator.get_state()
            generator.manual_seed(drawn)
        else:
            self._outside = generator.get_state()
            generator.set_state(self._own)

    def give_back_random_numbers(self) -> None:
        if self._outside is not None:
            self._own = torch.default_generator.get_state()
            torch.default_generator.set_state(self._outside)
            self._outside = None


class Rounds:
    """Threads that take turns.

    A prompt is computed in pieces, one between two rounds of the others: so long nobody waits longer than for one.
    """

    def __init__(self, on_pass: Callable[[int], None] = lambda together: None) -> None:
        """``on_pass`` is told of each pass for how many threads it was."""
        self._on_pass = on_pass
        self._lock = threading.Lock()  # of the two below; all else belongs to whoever has the turn
        self._ready: deque[_Seat] = deque()
        self._is_idle = True
        self._calls: list[_Seat] = []
        self._pieces: deque[_Seat] = deque()
        self._piece_was_last = False

    @contextmanager
    def taking_part(self, seed: int | None = None) -> Iterator[Callable[[], bool]]:
        """The thread runs when it is its turn, until the block ends; its random numbers are its own, from ``seed``.

        Gives what to call before each piece of a prompt: it returns when that may be computed, and whether others wait
        for it.
        """
        seat = _Seat(seed)
        with self._lock:
            starts, self._is_idle = self._is_idle, False
            if not starts:
                self._ready.append(seat)
        if not starts:
            seat.turn.acquire()
        try:
            seat.take_random_numbers()
            with gathering(functools.partial(self._computed, seat)):
                yield functools.partial(self._before_piece, seat)
        finally:
            seat.give_back_random_numbers()
            self._pass_on()

    def _before_piece(self, seat: _Seat) -> bool:
        self._pieces.append(seat)
        self._wait(seat)
        return bool(self._calls or self._pieces)

    def _computed(self, seat: _Seat, compute: Compute, call: Any, *, begins_pass: bool) -> Any:
        seat.compute, seat.call, seat.begins_pass = compute, call, begins_pass
        self._calls.append(seat)
        self._wait(seat)
        result, error = seat.result, seat.error
        seat.result = seat.error = seat.call = seat.compute = None
        if error is not None:
            raise error
        return result

    def _wait(self, seat: _Seat) -> None:
        seat.give_back_random_numbers()
        self._pass_on()
        seat.turn.acquire()
        seat.take_random_numbers()

    def _pass_on(self) -> None:
        """Give the turn to another, or back to who has it, computing first what all wait for."""
        while True:
            with self._lock:
                if self._ready:
                    following = self._ready.popleft()
                    break
                if not self._calls and not self._pieces:
                    self._is_idle = True
                    return
            self._go_on()
        following.turn.release()

    def _go_on(self) -> None:
        """All wait: let some of them go on. Who is amid a pass comes first, then pieces and passes in turn."""
        amid = [seat for seat in self._calls if not seat.begins_pass]
        beginning = [seat for seat in self._calls if seat.begins_pass]
        if amid:
            freed, self._calls = amid, beginning
            self._compute(freed)
        elif self._pieces and not (beginning and self._piece_was_last):
            freed, self._piece_was_last = [self._pieces.popleft()], True
        else:
            freed, self._calls, self._piece_was_last = beginning, [], False
            self._compute(freed)
        with self._lock:
            self._ready.extend(freed)

    def _compute(self, seats: list[_Seat]) -> None:
        groups: dict[Compute | None, list[_Seat]] = {}
        for seat in seats:
            groups.setdefault(seat.compute, []).append(seat)
        for compute, group in groups.items():
            assert compute is not None
            try:
                for seat, result in zip(group, compute([seat.call for seat in group]), strict=True):
                    seat.result = result
                if group[0].begins_pass:
                    self._on_pass(len(group))
            except BaseException as error:
                if len(group) == 1:
                    group[0].error = error
                else:  # such as memory for the keys of one: the others go on
                    for seat in group:
                        self._compute([seat])
