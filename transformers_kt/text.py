"""Small functions on text: how messages shorten what they show, and what paths of modules say."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Container, Iterable

LAYER = re.compile(r"(?<=\blayers\.)\d{1,9}(?=\.|$)")
"""Finds the number of the decoder layer in a module's path."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_LONGEST_WORD = 200  # difflib compares words of any length, in time that grows with the square of it

_shortening = reprlib.Repr()
_shortening.maxstring = 100  # names of classes are up to 80 characters long


def nearest(word: object, known: Collection[str]) -> str:
    """ " (did you mean ...?)" with the one of ``known`` that ``word`` looks like; "" where none does."""
    if not isinstance(word, str) or len(word) >= _LONGEST_WORD:
        return ""
    spelt = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(word.casefold(), spelt, n=1)
    return f" (did you mean {spelt[close[0]]!r}?)" if close else ""


def listed(names: Iterable[str], most: int = 5, separator: str = ", ", before_more: str = " ") -> str:
    """ "a, b and 3 more": up to ``most`` of ``names``."""
    names = list(names)
    more = f"{before_more}and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def brief(value: object) -> str:
    """A short repr, of whatever size ``value`` is: aliases in YAML make a few lines into gigabytes."""
    try:
        return _shortening.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


def format_bytes(nbytes: int) -> str:
    """Three digits and a decimal unit, as file managers show sizes: 4.10 GB."""
    size = float(nbytes)
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{nbytes} bytes" if unit == 0 else f"{size:#.3g}".rstrip(".") + f" {_UNITS[unit]}"


def longest_prefix(path: str, prefixes: Container[str]) -> str | None:
    """The longest of the dotted ``prefixes`` of ``path``, which may be all of it; "" is a prefix of every path."""
    while path not in prefixes:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def layer_number(path: str) -> int | None:
    """The decoder layer that the module at ``path`` lies in or is; None outside the layers."""
    match = LAYER.search(path)
    return None if match is None else int(match[0])
