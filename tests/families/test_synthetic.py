"""The files that tests/support/synthetic.py writes have the types and sizes of published ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from gguf import GGML_QUANT_SIZES, dequantize
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

import transformers_kt  # noqa: F401
from transformers_kt.gguf.reader import GgufFile


# How llama.cpp lists Unsloth's files of DeepSeek-R1 when it loads them, and the sizes that it gives.
@pytest.mark.parametrize(
    ("quantization", "counts", "gib"),
    [
        ("q4_k_m", {"F32": 361, "Q4_K": 606, "Q6_K": 58}, 376.65),
        ("ud-q2_k_xl", {"F32": 361, "Q2_K": 171, "Q3_K": 3, "Q4_K": 306, "Q6_K": 184}, 211.03),
    ],
)
def test_sparse_v3_has_the_types_and_the_size_of_the_published_r1_file(
    tmp_path: Path, quantization: str, counts: dict[str, int], gib: float
) -> None:
    path = tmp_path / "v3.gguf"
    synthetic.write("v3", quantization, path, whole_kv_b=True, sparse=True)
    tensors = GgufFile(path).tensors.values()
    assert Counter(Type(tensor.ggml_type).name for tensor in tensors) == counts
    assert sum(tensor.nbytes for tensor in tensors) / 2**30 == pytest.approx(gib, abs=0.005)
    assert path.stat().st_blocks * 512 < 16 << 20


@pytest.mark.parametrize("model", ["v2-lite", "v2", "v3"])
def test_a_written_file_loads_and_its_logits_are_finite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    full = synthetic.MODELS[model]

    def small() -> Any:
        config = full()
        config.update({
            "vocab_size": 64, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
            "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 1,
        })  # fmt: skip
        return config

    monkeypatch.setitem(synthetic.MODELS, model, small)
    path = tmp_path / "small.gguf"
    synthetic.write(model, "q4_k_m", path, layers=2, experts=16)
    loaded = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([[3, 1, 4]])).logits
    assert logits.shape == (1, 3, 64)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "name", [name.removeprefix("only-").upper() for name in synthetic.QUANTIZATIONS if name.startswith("only-")]
)
def test_random_blocks_have_the_deviation_asked_for(name: str) -> None:
    blocks = synthetic.random_blocks(Type[name], 4096, 0.02, np.random.default_rng(0))
    assert blocks.shape == (4096, GGML_QUANT_SIZES[Type[name]][1])
    values = dequantize(blocks, Type[name])
    # Levels are evenly spread only on average, and some types have one more below zero than above.
    assert abs(values.mean()) < 0.3 * 0.02
    assert values.std() == pytest.approx(0.02, rel=0.05)
