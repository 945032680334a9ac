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


USE_A_FOLDER = (
    "A folder or hub id with the model's config.json tells what the file lacks: from_pretrained(folder, gguf_path=...)"
)


class Facts:
    """The metadata of a model; keys are below the prefix of its architecture ("block_count").

    ``tensors`` are those of the file, None where metadata are all there is; ``name`` stands for the file in messages.
    ``told`` are whole numbers to take for keys that are missing, since tensors tell them; ``assumed`` are keys that are
    missing and change results, with what was taken in their place; ``remarks`` are sentences about what else of the
    file a user should know.
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
        self.told: Mapping[str, int] = {}
        self.assumed: dict[str, object] = {}
        self.remarks: list[str] = []

    def integer(self, key: str, *, least: int = 1, most: int, default: int | None = None) -> int:
        """A whole number. Raises `GgufFormatError` outside ``least`` to ``most``, or where it is missing."""
        value = self._value(key, self.told.get(key, default))
        if type(value) is not int or not least <= value <= most:
            raise self.nonsense(key, value, f"a whole number from {least} to {most}")
        return value

    def number(
        self, key: str, *, default: float | None = None, above: float = -math.inf, most: float = math.inf
    ) -> float:
        """A finite number. Raises `GgufFormatError` for anything else."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not above < value <= most:
            limits = f" above {above}" if math.isfinite(above) else ""
            limits += f" up to {most:g}" if math.isfinite(most) else ""
            raise self.nonsense(key, value, f"a finite number{limits}")
        return shortest(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Raises `GgufFormatError` for anything else."""
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.nonsense(key, value, "true or false")
        return value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def default_for(self, key: str, default: Any, published: Any = None) -> Any:
        """What to take where ``key`` is missing: the ``published`` value, else ``default``, which is remembered."""
        if published is not None:
            return published
        if not self.has(key):
            self.assumed[key] = default
        return default

    def notes(self) -> tuple[str, ...]:
        """What was taken for granted, a sentence each."""
        if not self.assumed:
            return tuple(self.remarks)
        taken = ", ".join(f"{self.prefix}{key} ({value} is taken)" for key, value in self.assumed.items())
        return (f"The GGUF does not state {taken}. {USE_A_FOLDER}.", *self.remarks)

    def vocab_size(self) -> int:
        """Rows of the embedding, by the tensor where there is one. Raises `GgufFormatError` where nothing says it."""
        if (known := self._known_vocab_size()) is None:
            raise self.nonsense("vocab_size", None, "that key, tokenizer.ggml.tokens or the tensor token_embd.weight")
        return known

    def _known_vocab_size(self) -> int | None:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        listed = len(tokens) if isinstance(tokens, (StringArray, list)) else None
        if self.tensors is not None and "token_embd.weight" in self.tensors:
            rows = self.tensors["token_embd.weight"].shape[0]
        elif self.has("vocab_size"):
            rows = self.integer("vocab_size", most=MOST_VOCAB)
        else:
            return listed
        if listed is not None and listed > rows:
            raise GgufFormatError(
                f"{self.name}: tokenizer.ggml.tokens lists {listed} tokens, but the embedding has {rows} rows; at most "
                "as many tokens as rows are accepted"
            )
        return rows

    def token_ids(self) -> dict[str, Any]:
        """What starts, ends and pads a text, under the names of transformers' configs. All that end a turn are ends."""
        vocab_size = self._known_vocab_size() or MOST_VOCAB
        ends = [self._token_id(which, vocab_size) for which in ("eos", "eot", "eom")]
        distinct = list(dict.fromkeys(token for token in ends if token is not None))
        return {
            "bos_token_id": self._token_id("bos", vocab_size),
            "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
            "pad_token_id": self._token_id("padding", vocab_size),
        }

    def require_neutral(self, values: Mapping[str, float]) -> None:
        """Raise `UnsupportedModelError` where a key of ``values`` is stated with another value than there."""
        for key, neutral in values.items():
            if (found := self.number(key, default=neutral)) != neutral:
                raise self.unsupported(key, found, f"{neutral}, or no such key")

    def nonsense(self, key: str, found: object, accepted: str) -> GgufFormatError:
        if found is None:
            missing = f"{self.name}: {self.prefix}{key} is missing"
            return GgufFormatError(f"{missing}; {accepted} is expected. {USE_A_FOLDER}")
        return GgufFormatError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def unsupported(self, key: str, found: object, accepted: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name}: {self.prefix}{key} is {found!r}; {accepted} is accepted")

    def _value(self, key: str, default: float | None) -> Any:
        return self.metadata.get(self.prefix + key, default)

    def _token_id(self, which: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{which}_token_id"
        value = self.metadata.get(key, -1)
        if type(value) is not int or not (0 <= value < vocab_size or value in NO_TOKEN):
            raise GgufFormatError(
                f"{self.name}: {key} is {value!r}; the id of one of the {vocab_size} tokens is accepted"
            )
        return None if value in NO_TOKEN else value


def shortest(value: float) -> float:
    """The decimal that was meant: files hold 32-bit floats, where 1e-06 reads as 9.999999974752427e-07."""
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)
