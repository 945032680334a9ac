"""Packed weights, which torch does not know, under the numbers that operators take."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_next_handle = itertools.count(1)


def register_object(packed: object) -> int:
    """Returns a handle for ``packed``, valid while the caller keeps ``packed`` alive."""
    handle = next(_next_handle)
    _objects[handle] = packed
    return handle


def object_of(handle: int) -> Any:
    """The packed object of ``handle``. Raises RuntimeError where it was deleted."""
    found = _objects.get(handle)
    if found is None:
        raise RuntimeError(f"weights with handle {handle} are gone: the module that held them was deleted")
    return found
