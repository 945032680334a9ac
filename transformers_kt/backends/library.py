"""The library of operators, which outlives every thread that may call one."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch


def kt_library(kind: str) -> Any:
    """``torch.library.Library("kt", kind)`` that is never taken back.

    At exit torch takes operators back while daemon threads go on calling them, which ended 10 of 12 processes with
    SIGSEGV.
    """
    library = torch.library.Library("kt", kind)  # type: ignore[no-untyped-call]
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        alive = finalizer.peek()
        if alive is not None and alive[0] is library:
            finalizer.atexit = False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(library))  # nor when modules are torn down
    return library
