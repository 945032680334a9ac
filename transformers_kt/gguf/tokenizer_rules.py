"""What a file says of its tokenizer by a name alone, tokenizer.ggml.pre, and the names that are no family's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class TokenizerRules(NamedTuple):
    """A tokenizer as far as only its name tells it.

    ``cuts`` are the expressions that cut text before the merges apply, in order. With ``ignore_merges`` a piece that is
    a token is taken whole, whatever the merges make of it. ``text_tokens`` are tokens that belong to the text: the
    converter calls all that look like "<|...|>" control, and skip_special_tokens drops those. ``text_tokens_beside``
    are more of them, in vocabularies that have a certain other token.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    text_tokens: frozenset[str] = frozenset()
    text_tokens_beside: Mapping[str, frozenset[str]] = {}

    def text_tokens_of(self, vocabulary: Collection[str]) -> frozenset[str]:
        more = (tokens for beside, tokens in self.text_tokens_beside.items() if beside in vocabulary)
        return self.text_tokens.union(*more)


SINGLE_DIGITS = r"\p{N}"
"""As a cut of its own, it also takes numerals of newer Unicode than the regular expressions know; the models use it."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

COMMON_RULES: Mapping[str, TokenizerRules] = {
    "gpt-2": TokenizerRules((_GPT2 + r"|\s+",)),
    # What llama.cpp does for files that name nothing better.
    "default": TokenizerRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
