"""Where the calls of several threads can be computed as one.

A pass over one token reads as many weights as one over ten. A server answers each request in a thread of its own, which
sets what gathers there; in all other threads a call is computed as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

Compute = Callable[[Sequence[Any]], Sequence[Any]]
"""Results of several calls, in order: each has the bits that it has alone."""


class Gather(Protocol):
    def __call__(self, compute: Compute, call: Any, *, begins_pass: bool) -> Any:
        """The result of ``compute`` for ``call``, whichever thread computes it and with which others.

        ``begins_pass`` where it is the first of a pass through the model: whoever is amid one comes to its end before.
        """


_gather: ContextVar[Gather | None] = ContextVar("gather", default=None)


@contextmanager
def gathering(gather: Gather) -> Iterator[None]:
    """Calls of this thread go to ``gather``."""
    token = _gather.set(gather)
    try:
        yield
    finally:
        _gather.reset(token)


def computed(compute: Compute, call: Any, *, begins_pass: bool = False) -> Any:
    """The result of ``compute`` for ``call``, alone or with those of other threads."""
    gather = _gather.get()
    return compute([call])[0] if gather is None else gather(compute, call, begins_pass=begins_pass)
