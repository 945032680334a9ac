"""The logits of every golden file have, on every instruction set, the bits that they had when their hash was taken.

Parity tests allow for the rounding that lies between us and others; this one says that a change of the code was none of
the results. A change that is meant to change them writes the new hashes: ``python tests/models/test_logit_hashes.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS / "support")]

from golden.reference import NAMES, gguf_path, golden_prompts  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import transformers_kt._C as _C  # noqa: E402

HASHES = TESTS / "golden" / "logits.sha256.json"


@torch.no_grad()
def hashes(model: Any, name: str) -> dict[str, str]:
    """Name of a prompt -> SHA-256 of its float32 logits (tokens, vocab), little-endian as they lie in memory."""
    found = {}
    for prompt in golden_prompts(name):
        logits = model(prompt.input_ids, use_cache=False).logits[0]
        found[prompt.name] = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("name", NAMES)
def test_logits_have_the_bits_of_their_hash(name: str, isa: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_path(name))
    _C.select_isa(isa)
    assert hashes(model, name) == json.loads(HASHES.read_text())[name]


def main() -> None:
    models = {name: AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_path(name)) for name in NAMES}
    HASHES.write_text(json.dumps({name: hashes(model, name) for name, model in models.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
