"""A transformers tokenizer from GGUF metadata alone: byte-level BPE.

Where a model folder with tokenizer.json is at hand, that is the better source: the file says how text is cut, and which
tokens belong to it, by a name alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.facts import NO_TOKEN
from transformers_kt.gguf.reader import GgufFile, StringArray
from transformers_kt.gguf.tokenizer_rules import COMMON_RULES, SINGLE_DIGITS, TokenizerRules
from transformers_kt.text import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MODEL = "gpt2"  # tokenizer.ggml.model of byte-level BPE
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values in tokenizer.ggml.token_type
_NO_TOKEN = "[PAD{}]"  # what converters write for a row of the embedding that no token has
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
_USE_A_FOLDER = "Pass a model folder or hub id that has a tokenizer (AutoTokenizer.from_pretrained(folder))"


def build_tokenizer(
    source: Checkpoint | GgufFile | Mapping[str, Any], rules: Mapping[str, TokenizerRules], **options: Any
) -> PreTrainedTokenizerFast:
    """The tokenizer that ``source`` describes, with its chat template; ``options`` override what it says.

    ``rules`` are those of each tokenizer.ggml.pre. Decoding gives back the text that was encoded, byte for byte; rows
    of the embedding that no token has decode to nothing. Raises `UnsupportedModelError` for any tokenizer but
    byte-level ones that ``rules`` has, `GgufFormatError` where the vocabulary contradicts itself.
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary(source, rules)
    described: dict[str, Any] = {
        **vocabulary.named_tokens(),
        "add_bos_token": vocabulary.flag("add_bos_token"),
        "add_eos_token": vocabulary.flag("add_eos_token"),
        "padding_side": "left",  # generation needs it
        **vocabulary.extras(),
        **options,
    }
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary.backend(), **described)


def require_vocabulary(source: Checkpoint | GgufFile | Mapping[str, Any], rules: Mapping[str, TokenizerRules]) -> None:
    """Raise what `build_tokenizer` would raise, but for what only building the merges shows: a second of work."""
    _vocabulary(source, rules).named_tokens()


def _vocabulary(source: Checkpoint | GgufFile | Mapping[str, Any], rules: Mapping[str, TokenizerRules]) -> _Vocabulary:
    name, metadata = "the GGUF metadata", source
    if isinstance(source, (Checkpoint, GgufFile)):
        name, metadata = str(source.path), source.metadata
    return _Vocabulary(name, cast("Mapping[str, Any]", metadata), {**rules, **COMMON_RULES})


# A merge makes a token, and few tokens are made in several ways: vocabularies converted from tiktoken have 2.2.
_MOST_MERGES_PER_TOKEN = 8


class _Vocabulary:
    """The ``tokenizer.*`` keys, checked."""

    def __init__(self, name: str, metadata: Mapping[str, Any], rules: Mapping[str, TokenizerRules]) -> None:
        self.name, self.metadata = name, metadata
        self._demand("tokenizer.ggml.model", (_MODEL,))
        self._demand("tokenizer.ggml.pre", tuple(rules))
        self._rules = rules[metadata["tokenizer.ggml.pre"]]
        self.tokens = self._strings("tokenizer.ggml.tokens")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for number, token in enumerate(self.tokens) if self.ids[token] != number)
            raise GgufFormatError(
                f"{name}: tokenizer.ggml.tokens has {twice!r} more than once; distinct tokens are accepted"
            )

    def backend(self) -> Tokenizer:
        types, named = self._types(), self.named_tokens().values()
        vocab = {
            token: number
            for token, number in self.ids.items()
            if types[number] != _UNUSED or token != _NO_TOKEN.format(number) or token in named
        }
        try:
            model = models.BPE(
                vocab=vocab, merges=self._merges(), fuse_unk=False, ignore_merges=self._rules.ignore_merges
            )
        except Exception as error:  # the tokenizers package raises no class of its own
            raise GgufFormatError(f"{self.name}: tokenizer.ggml.merges does not fit the tokens: {error}") from error
        tokenizer = Tokenizer(model)
        cuts: list[PreTokenizer] = [
            Digits(individual_digits=True) if cut == SINGLE_DIGITS else Split(Regex(cut), behavior="isolated")
            for cut in self._rules.cuts
        ]
        tokenizer.pre_tokenizer = PreTokenizers([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        text_tokens = self._rules.text_tokens_of(self.ids)
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL and token not in text_tokens, normalized=False)
                for token, kind in zip(self.tokens, types, strict=True)
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
                f"{self.name}: tokenizer.ggml.token_type is {brief(types)}; an array of {len(self.tokens)} whole "
                "numbers, one for each token, is accepted"
            )
        return [int(number) for number in numbers]

    def _merges(self) -> list[tuple[str, str]]:
        merges: list[tuple[str, str]] = []
        listed = self.metadata.get("tokenizer.ggml.merges")
        if isinstance(listed, StringArray) and len(listed) > _MOST_MERGES_PER_TOKEN * len(self.tokens):
            raise GgufFormatError(
                f"{self.name}: tokenizer.ggml.merges lists {len(listed)} merges for {len(self.tokens)} tokens; at most "
                f"{_MOST_MERGES_PER_TOKEN} for each are accepted"
            )
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
