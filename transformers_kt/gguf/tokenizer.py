"""A transformers tokenizer from GGUF metadata alone: byte-level BPE, as every DeepSeek model has.

Where a model folder with tokenizer.json is at hand, that is the better source: converters turn some ordinary added
tokens (those of a turn's speaker) into control tokens, which `skip_special_tokens` then drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import PreTrainedTokenizerFast

from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.facts import NO_TOKEN
from transformers_kt.gguf.reader import GgufFile, StringArray

_MODEL = "gpt2"  # tokenizer.ggml.model of byte-level BPE
_CONTROL, _USER_DEFINED = 3, 4  # values in tokenizer.ggml.token_type
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
_USE_A_FOLDER = "Pass a model folder or hub id that has a tokenizer (AutoTokenizer.from_pretrained(folder))"

# Letters with case, spelt out range by range in deepseek-llm's tokenizer. Escaped, because normalizing the
# source text turns ends of ranges such as U+1F7D into others (U+03CE) and the ranges around.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # in deepseek-llm and deepseek-coder
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"  # in deepseek-v3
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

# tokenizer.ggml.pre to what cuts text before the merges apply, in order. The models' own tokenizer.json say the same;
# "default" is what llama.cpp does for files that name nothing better.
_SINGLE_DIGITS = r"\p{N}"
_CUTS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        _HAN_AND_KANA,
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _EAST_ASIAN,
        _SINGLE_DIGITS,
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _SINGLE_DIGITS),
    "gpt-2": (_GPT2 + r"|\s+",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def tokenizer_from_gguf(
    source: Checkpoint | GgufFile | Mapping[str, Any],
    **kwargs: Any,
) -> PreTrainedTokenizerFast:
    """The tokenizer that ``source`` describes, with its chat template; ``kwargs`` override what it says.

    Decoding gives back the text that was encoded, byte for byte. Raises `UnsupportedModelError` for any tokenizer but
    the byte-level ones of `_CUTS`, `GgufFormatError` where the vocabulary contradicts itself.
    """
    name, metadata = "the GGUF metadata", source
    if isinstance(source, (Checkpoint, GgufFile)):
        name, metadata = str(source.path), source.metadata
    vocabulary = _Vocabulary(name, cast("Mapping[str, Any]", metadata))
    options: dict[str, Any] = {
        **vocabulary.named_tokens(),
        "add_bos_token": vocabulary.flag("add_bos_token"),
        "add_eos_token": vocabulary.flag("add_eos_token"),
        "padding_side": "left",  # as in DeepSeek's folders; generation needs it
        **vocabulary.extras(),
        **kwargs,
    }
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary.backend(), **options)


class _Vocabulary:
    """The ``tokenizer.*`` keys, checked."""

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        self.name, self.metadata = name, metadata
        self._demand("tokenizer.ggml.model", (_MODEL,))
        self._demand("tokenizer.ggml.pre", tuple(_CUTS))
        self.tokens = self._strings("tokenizer.ggml.tokens")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise GgufFormatError(
                f"{name}: tokenizer.ggml.tokens has {twice!r} more than once; distinct tokens are accepted"
            )

    def backend(self) -> Tokenizer:
        try:
            model = models.BPE(vocab=self.ids, merges=self._merges(), fuse_unk=False)
        except Exception as error:  # the tokenizers package raises no class of its own
            raise GgufFormatError(f"{self.name}: tokenizer.ggml.merges does not fit the tokens: {error}") from error
        tokenizer = Tokenizer(model)
        cuts: list[PreTokenizer] = [
            # Digits also cuts numerals that newer Unicode than the regex engine's knows; the models use it.
            Digits(individual_digits=True) if cut == _SINGLE_DIGITS else Split(Regex(cut), behavior="isolated")
            for cut in _CUTS[self.metadata["tokenizer.ggml.pre"]]
        ]
        tokenizer.pre_tokenizer = PreTokenizers([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(self.tokens, self._types(), strict=True)
                if kind in (_CONTROL, _USER_DEFINED) and token
            ]
        )
        return tokenizer

    def named_tokens(self) -> dict[str, str]:
        """bos_token and so on, as text."""
        named = {}
        for role, key in _NAMED_TOKENS.items():
            number = self.metadata.get(f"tokenizer.ggml.{key}_token_id", -1)
            if type(number) is not int or not (0 <= number < len(self.tokens) or number in NO_TOKEN):
                raise GgufFormatError(
                    f"{self.name}: tokenizer.ggml.{key}_token_id is {number!r}; a number below the token count "
                    f"{len(self.tokens)} is accepted"
                )
            if number not in NO_TOKEN:
                named[role] = self.tokens[number]
        return named

    def flag(self, key: str) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", False)
        if type(value) is not bool:
            raise GgufFormatError(f"{self.name}: tokenizer.ggml.{key} is {value!r}; true or false is accepted")
        return value

    def extras(self) -> dict[str, Any]:
        """The chat template and the longest input, where they are stated."""
        extras: dict[str, Any] = {}
        template = self.metadata.get("tokenizer.chat_template")
        if isinstance(template, str) and template:
            extras["chat_template"] = template
        context_length = self.metadata.get(f"{self.metadata.get('general.architecture')}.context_length")
        if type(context_length) is int:
            extras["model_max_length"] = context_length
        return extras

    def _types(self) -> list[int]:
        types = self.metadata.get("tokenizer.ggml.token_type")
        if types is None:
            return [0] * len(self.tokens)
        numbers = np.asarray(types) if isinstance(types, (np.ndarray, list)) else np.empty(0)
        if numbers.dtype.kind not in "iu" or numbers.shape != (len(self.tokens),):
            raise GgufFormatError(
                f"{self.name}: tokenizer.ggml.token_type is {types!r}; an array of {len(self.tokens)} whole numbers, "
                "one for each token, is accepted"
            )
        return [int(number) for number in numbers]

    def _merges(self) -> list[tuple[str, str]]:
        merges = []
        for number, merge in enumerate(self._strings("tokenizer.ggml.merges")):
            left, _, right = merge.partition(" ")
            if not left or not right:
                raise GgufFormatError(
                    f"{self.name}: tokenizer.ggml.merges[{number}] is {merge!r}; two tokens with a space between are "
                    "accepted"
                )
            merges.append((left, right))
        return merges

    def _strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, (StringArray, list)) or not all(isinstance(item, str) for item in value):
            found = "missing" if value is None else repr(value)
            raise GgufFormatError(f"{self.name}: {key} is {found}; an array of strings is accepted")
        return list(value)

    def _demand(self, key: str, accepted: tuple[str, ...]) -> None:
        found = self.metadata.get(key)
        if not isinstance(found, str) or found not in accepted:
            raise UnsupportedModelError(
                f"{self.name}: {key} is {found!r}; {', '.join(accepted)} is accepted. {_USE_A_FOLDER}"
            )
