"""How many threads torch computes with, changed for one thread and not for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()


def _in_new_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def _set_here(count: int) -> int:
    """``torch.set_num_threads`` without what else it does: threads that begin later would take the count over.

    Returns the count before, read under the lock: a thread that asks for the first time takes over what it sees, which
    for a moment is that of another.
    """
    with _lock:
        before = torch.get_num_threads()
        seen: list[int] = []
        _in_new_thread(lambda: seen.append(torch.get_num_threads()))
        torch.set_num_threads(count)
        if seen[0] != count:
            _in_new_thread(lambda: torch.set_num_threads(seen[0]))
        return before


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """The calling thread computes with one thread of torch; nested or overlapping uses restore what each found."""
    before = _set_here(1)
    try:
        yield
    finally:
        _set_here(before)
