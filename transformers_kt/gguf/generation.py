"""How a GGUF says that generation ends and which tokens it samples, as llama.cpp reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transformers_kt.errors import GgufFormatError
from transformers_kt.gguf.facts import Facts, shortest
from transformers_kt.gguf.reader import StringArray

# Of what a vocabulary calls its tokens, what ends generation in llama.cpp whatever the keys say: the keys name one
# token, and models are trained to end a turn with another ("<|im_end|>" beside "[EOS]").
_ENDS_OF_TURNS = frozenset(
    {
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<end_of_turn>", "<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    }
)  # fmt: skip
# The same where the token is special: as ordinary text these are HTML or end nothing.
_SPECIAL_ENDS_OF_TURNS = frozenset({"</s>", "<eos>", "[EOS]", "[EOT]", "<EOT>", "_<EOT>", "<turn|>"})
_SPECIAL_TYPES = (3, 4)  # tokenizer.ggml.token_type: control, user-defined

# general.sampling.* to the option of GenerationConfig, its least and most value.
_SAMPLING = {
    "temp": ("temperature", 0.0, math.inf),
    "top_k": ("top_k", 0, 1 << 31),
    "top_p": ("top_p", 0.0, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "penalty_repeat": ("repetition_penalty", 0.0, math.inf),
}
_SAMPLING_PREFIX = "general.sampling."


def generation_options(facts: Facts) -> dict[str, Any]:
    """Options of transformers' GenerationConfig: the ids that start, end and pad a text, and how to sample.

    Every id that ends a turn is an end: those of the keys, and the tokens whose text says it. A temperature of 0 is
    greedy decoding. Raises `GgufFormatError` for values that make no sense.
    """
    ids = facts.token_ids()
    ends = ids["eos_token_id"]
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    distinct = list(dict.fromkeys((*ends, *_ends_in_vocabulary(facts))))
    ids["eos_token_id"] = distinct[0] if len(distinct) == 1 else distinct or None
    return {**ids, **_sampling(facts)}


def sampling_notes(facts: Facts) -> tuple[str, ...]:
    """A sentence about the sampling options that generate() has no sampler for."""
    unused = [key for key in _sampling_keys(facts) if key not in _SAMPLING and key != "sequence"]
    if not unused:
        return ()
    shown = ", ".join(_SAMPLING_PREFIX + key for key in unused)
    return (f"Of the GGUF's sampling options, {shown} are not used: generate() has no such samplers.",)


def _ends_in_vocabulary(facts: Facts) -> Iterator[int]:
    """Ids of the tokens whose text says that a turn ends."""
    tokens: Sequence[str] | None = facts.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, (StringArray, list)):
        return
    types = facts.metadata.get("tokenizer.ggml.token_type")
    types = types if isinstance(types, (np.ndarray, list)) and len(types) == len(tokens) else [0] * len(tokens)
    for number, token in enumerate(tokens):
        is_special = types[number] in _SPECIAL_TYPES
        if token in _ENDS_OF_TURNS or (is_special and token in _SPECIAL_ENDS_OF_TURNS):
            yield number


def _sampling_keys(facts: Facts) -> list[str]:
    keys = (key for key in facts.metadata if key.startswith(_SAMPLING_PREFIX))
    return [key.removeprefix(_SAMPLING_PREFIX) for key in keys]


def _sampling(facts: Facts) -> dict[str, Any]:
    """The options of GenerationConfig that general.sampling.* states; none where it states nothing."""
    options: dict[str, Any] = {}
    for key, (option, least, most) in _SAMPLING.items():
        value = facts.metadata.get(_SAMPLING_PREFIX + key)
        if value is None:
            continue
        kinds = (int,) if type(least) is int else (int, float)
        if type(value) not in kinds or not math.isfinite(value) or not least <= value <= most:
            raise GgufFormatError(
                f"{facts.name}: {_SAMPLING_PREFIX}{key} is {value!r}; a number from {least} to {most} is accepted"
            )
        options[option] = value if type(least) is int else shortest(value)
    if options.get("repetition_penalty") == 0.0:
        del options["repetition_penalty"]
    if options.get("temperature") == 0.0:
        return {"do_sample": False}
    return {**options, "do_sample": True} if options else {}
