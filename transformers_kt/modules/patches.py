"""Methods of stock classes that somebody replaced, as libraries of training kernels do: ``Class.forward = other``."""

from __future__ import annotations

from torch import nn

METHODS = ("forward", "__call__")


def patched_method(cls: type[nn.Module]) -> str | None:
    """What stands in for a method of ``cls`` and came from neither its library nor that of a base: "forward, which is
    other.module.function now". None where all is as it was.

    The globals of a function tell, which `functools.wraps` does not change: its names do not.
    """
    libraries = {base.__module__.partition(".")[0] for base in cls.__mro__}
    for name in METHODS:
        method = getattr(cls, name)
        where = getattr(method, "__globals__", {}).get("__name__", type(method).__module__)
        if where.partition(".")[0] not in libraries:
            return f"{name}, which is {where}.{getattr(method, '__name__', '?')} now"
    return None
