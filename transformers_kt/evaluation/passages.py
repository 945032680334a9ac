"""Texts as the windows of token ids that models are run on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from transformers_kt.assets import bundled_texts
from transformers_kt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts: TypeAlias = "str | Sequence[str] | Mapping[str, str]"
"""One text, several, or several by name."""

_LEAST_TOKENS = 2  # of one alone there is no standard error


class Window(NamedTuple):
    """Token ids that are run from an empty cache; each of the last ``scored`` is predicted from those before it."""

    text: int
    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True)
class Passages:
    """Names of texts, and the windows that they were cut into, text after text."""

    names: tuple[str, ...]
    windows: tuple[Window, ...]

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(window.scored for window in self.windows)

    def first_difference(self, other: Passages) -> str | None:
        """Where ``other`` has other ids, in words; None where it has the same."""
        for mine, theirs in zip(self.windows, other.windows, strict=False):
            for place, pair in enumerate(zip(mine.ids, theirs.ids, strict=False)):
                if pair[0] != pair[1]:
                    return f"token {place} of a window of {self.names[mine.text]} is {pair[0]} there and {pair[1]} here"
        counts = [[len(window.ids) for window in passages.windows] for passages in (self, other)]
        return None if counts[0] == counts[1] else f"it has {self.tokens:,} tokens to predict, these {other.tokens:,}"


def named_texts(texts: Texts | None) -> dict[str, str]:
    """Name -> text; the bundled ones for None."""
    if texts is None:
        return bundled_texts()
    if isinstance(texts, str):
        return {"text": texts}
    if isinstance(texts, Mapping):
        return dict(texts)
    return {f"text {number}": text for number, text in enumerate(texts, 1)}


def cut(texts: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, context: int) -> Passages:
    """``texts`` in windows of at most ``context`` tokens, which do not overlap.

    Each begins with what the tokenizer puts in front of a text. Raises `InputError` where a text is too short.
    """
    front = tuple(tokenizer("").input_ids)
    size = context - len(front)
    if size < _LEAST_TOKENS:
        raise InputError(f"context={context}; at least {len(front) + _LEAST_TOKENS} tokens are accepted")
    if not texts:
        raise InputError("there is no text: texts= is empty. At least one is accepted, or None for the bundled ones")
    windows = []
    for number, (name, text) in enumerate(texts.items()):
        ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        ids = ids[len(front) :] if ids[: len(front)] == front else ids  # a rendered chat brings its own
        pieces = [front + ids[start : start + size] for start in range(0, len(ids), size)]
        of_text = [Window(number, piece, len(piece) - max(1, len(front))) for piece in pieces]
        if sum(window.scored for window in of_text) < _LEAST_TOKENS:
            raise InputError(f"{name} is {len(ids)} tokens long; a text of at least {_LEAST_TOKENS + 1} is accepted")
        windows += [window for window in of_text if window.scored > 0]
    return Passages(tuple(texts), tuple(windows))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for two tokenizers whose ids stand for the same tokens: SHA-256 of the vocabulary, 16 hex digits."""
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode()).hexdigest()[:16]
