"""What metadata values mean, whatever the model: each is checked for its type and range before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.reader import GgufFile, StringArray, TensorInfo

NO_TOKEN = (-1, 0xFFFFFFFF)
"""What converters write as the id of a token that does not exist."""

# Far above any model; the product of two still fits into 64 bits.
MOST_WIDTH = 1 << 20
MOST_LAYERS = 1 << 12
MOST_VOCAB = 1 << 24
MOST_CONTEXT = 1 << 31


class Facts:
    """The metadata of a model; keys are below the prefix of its architecture ("block_count").

    ``tensors`` are those of the file, None where metadata are all there is; ``name`` stands for the file in messages.
    """

    def __init__(self, source: Checkpoint | GgufFile | Mapping[str, Any]) -> None:
        self.tensors: Mapping[str, TensorInfo] | None = None
        self.name = "the GGUF metadata"
        if isinstance(source, (Checkpoint, GgufFile)):
            self.metadata: Mapping[str, Any] = source.metadata
            self.tensors = source.tensors
            self.name = str(source.path)
        else:
            self.metadata = source
        self.architecture: Any = self.metadata.get("general.architecture")
        self.prefix = f"{self.architecture}."

    def integer(self, key: str, *, least: int = 1, most: int, default: int | None = None) -> int:
        """A whole number. Raises `GgufFormatError` outside ``least`` to ``most``, or where it is missing."""
        value = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.nonsense(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, *, default: float | None = None, above: float = -math.inf) -> float:
        """A finite number. Raises `GgufFormatError` for anything else."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            raise self.nonsense(key, value, "a finite number" + (f" above {above}" if math.isfinite(above) else ""))
        return _shortest(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Raises `GgufFormatError` for anything else."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.nonsense(key, value, "true or false")
        return value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def vocab_size(self) -> int:
        """Rows of the embedding, by the tensor where there is one. Raises `GgufFormatError` where nothing says it."""
        if self.tensors is not None and "token_embd.weight" in self.tensors:
            return self.tensors["token_embd.weight"].shape[0]
        if self.has("vocab_size"):
            return self.integer("vocab_size", most=MOST_VOCAB)
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, (StringArray, list)):
            raise self.nonsense("vocab_size", None, "that key, tokenizer.ggml.tokens or the tensor token_embd.weight")
        return len(tokens)

    def token_ids(self) -> dict[str, Any]:
        """What starts, ends and pads a text, under the names of transformers' configs. All that end a turn are ends."""
        ends = [self._token_id(which) for which in ("eos", "eot", "eom")]
        distinct = list(dict.fromkeys(token for token in ends if token is not None))
        return {
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
            "pad_token_id": self._token_id("padding"),
        }

    def require_neutral(self, values: Mapping[str, float]) -> None:
        """Raise `UnsupportedModelError` where a key of ``values`` is stated with another value than there."""
        for key, neutral in values.items():
            if (found := self.number(key, default=neutral)) != neutral:
                raise self.unsupported(key, found, f"{neutral}, or no such key")

    def nonsense(self, key: str, found: object, accepted: str) -> GgufFormatError:
        if found is None:
            return GgufFormatError(f"{self.name}: {self.prefix}{key} is missing; {accepted} is expected")
        return GgufFormatError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def unsupported(self, key: str, found: object, accepted: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def _value(self, key: str, default: float | None) -> Any:
        return self.metadata.get(self.prefix + key, default)

    def _token_id(self, which: str) -> int | None:
        key = f"tokenizer.ggml.{which}_token_id"
        value = self.metadata.get(key, -1)
        if type(value) is not int or not (0 <= value < MOST_VOCAB or value in NO_TOKEN):
            raise GgufFormatError(f"{self.name}: {key} is {value!r}; a token id is accepted")
        return None if value in NO_TOKEN else value


def _shortest(value: float) -> float:
    """The decimal that was meant: files hold 32-bit floats, where 1e-06 reads as 9.999999974752427e-07."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)
