"""The name under which models take their cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformers_kt.errors import UnsupportedModelError

_NAMES = ("cache", "past_key_values")


def cache_argument(forwards: Iterable[Callable[..., Any]]) -> str:
    """The name that all of ``forwards`` use.

    Raises UnsupportedModelError if there is none: a cache under a name that the model ignores is lost silently, and
    every token after the first is wrong.
    """
    parameters = [inspect.signature(forward).parameters for forward in forwards]
    for name in _NAMES:
        if all(name in taken for taken in parameters):
            return name
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} gives models their cache under a name that this transformers_kt does "
        "not know; 5.22 to 5.24 are tested: pip install 'transformers>=5.22,<5.25'"
    )


CACHE_ARGUMENT = cache_argument([MoeModelOutputWithPast])
"""The name in the installed release."""


def require_cache_argument(stock: type) -> None:
    """Raise UnsupportedModelError unless the class ``stock`` of transformers takes its cache under that name."""
    forward: Callable[..., Any] = stock.forward  # type: ignore[attr-defined]
    cache_argument([MoeModelOutputWithPast, forward])
