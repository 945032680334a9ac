#!/usr/bin/env python3
"""Atheris on the reader of GGUF files: any bytes are read, or refused with an error of ours.

Inputs are damaged by structure and by bytes, as tests/support/damaged_files.py does it, and by what libFuzzer learns
from the branches that they reach. Options are libFuzzer's: `make fuzz-reader` passes those of a run of half an hour.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from damaged_files import damaged
from gguf_handmade import TINY_V2, TINY_V3, small_file, tiny_tensors, write_model

from transformers_kt.errors import KtError
from transformers_kt.families.from_gguf import config_values, notes_from_gguf, require_tokenizer
from transformers_kt.families.tensors import check_tensors
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.gguf.facts import Facts
from transformers_kt.gguf.generation import generation_options

INSTRUMENTED = ("transformers_kt.gguf.", "transformers_kt.families.")
FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
MOST_SECONDS = 10  # of a CPU, for one file
SMALL = {
    "block_count": 2,
    "embedding_length": 32,
    "feed_forward_length": 32,
    "expert_feed_forward_length": 8,
    "attention.head_count": 2,
    "attention.kv_lora_rank": 8,
    "attention.key_length_mla": 12,
    "attention.value_length_mla": 4,
    "expert_count": 4,
    "expert_group_count": 2,
    "expert_group_used_count": 1,
    "vocab_size": 8,
}
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "deepseek-v3",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
    "general.sampling.temp": 0.6,
}


def seeds(folder: Path) -> None:
    """A small file of every kind of value, and models in both layouts of kv_b."""
    small_file().write(folder / "values.gguf")
    for name, facts in {"v3": {**TINY_V3, **SMALL, "attention.q_lora_rank": 8}, "v2": {**TINY_V2, **SMALL}}.items():
        shapes = tiny_tensors(facts, split_kv_b=name == "v3")
        write_model(folder / f"{name}.gguf", facts, shapes, more=TOKENIZER)


def read(raw: bytes) -> None:
    """All that loading reads of a file before it takes memory for weights, and the weights."""
    path = FOLDER / "input.gguf"
    path.write_bytes(raw)
    checkpoint = open_checkpoint(path)
    for value in checkpoint.metadata.values():
        list(value) if not isinstance(value, (int, float, str)) else value
    for name in checkpoint.tensors:
        checkpoint.data(name)
    checkpoint.require_weights()
    values = config_values(checkpoint)
    notes_from_gguf(checkpoint)
    generation_options(Facts(checkpoint))
    check_tensors(checkpoint, SimpleNamespace(**values))
    require_tokenizer(checkpoint)


def try_one(raw: bytes) -> None:
    began = time.process_time()
    with contextlib.suppress(KtError):
        read(raw)
    assert time.process_time() - began < MOST_SECONDS


def mutated(raw: bytes, most_bytes: int, seed: int) -> bytes:
    """One of both ways to damage, by turns; a file that cannot be taken apart is damaged by bytes."""
    if seed % 2:
        try:
            return damaged(raw, seed)[1][:most_bytes]
        except Exception:  # no GGUF any more
            pass
    found: bytes = atheris.Mutate(raw, most_bytes)
    return found


def instrument(owner: Any, module: str) -> None:
    """Have the functions of a module, or of a class in it, count their branches.

    Not by `atheris.instrument_imports`: an editable install finds the package by a loader that it does not know.
    """
    for value in list(vars(owner).values()):
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(value, type) and value.__module__ == module and value is not owner:
            instrument(value, module)
        elif inspect.isfunction(function) and function.__module__ == module:
            atheris.instrument_func(function)


def main() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(INSTRUMENTED):
            instrument(module, name)
    corpus = next((Path(option) for option in sys.argv[1:] if not option.startswith("-")), None)
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        seeds(corpus)
    atheris.Setup(sys.argv, try_one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
