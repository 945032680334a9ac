"""Checks that every reader of rules makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_kt.errors import RuleError
from transformers_kt.text import brief, nearest


def require_keys(item: Any, accepted: Sequence[str], where: str, what: str) -> None:
    """Raise `RuleError` unless ``item`` is a mapping with no keys but ``accepted``."""
    if not isinstance(item, Mapping):
        raise RuleError(f"{where} is {brief(item)}; {what} is a mapping of {', '.join(accepted)}")
    for key in item:
        if key not in accepted:
            raise RuleError(
                f"{where} has the unknown key {brief(key)}{nearest(key, accepted)}; known are {', '.join(accepted)}"
            )
