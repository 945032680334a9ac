"""A model whose device computes by kernels, interpreted: prompt, steps and captured steps give what plain forms give.

Tiny beyond the other models: the interpreter takes some milliseconds a program.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_gpus import fake_gpus
from random_files import RandomFile, random_tokens
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("triton")

FILE = RandomFile(
    "v3_narrow",
    {
        "hidden_size": 64,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
)
# Of logits up to 10: float32 in other orders, through two layers.
TOLERANCE = 1e-4


@torch.no_grad()
def test_logits_by_kernels_are_those_of_the_plain_forms(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One layer has its experts in RAM, one on the device."""
    path, ids = tmp_path / "tiny.gguf", random_tokens(4)
    FILE.write(FILE.stock(), tokenizer, path)
    found = []
    for has_kernels in (False, True):
        with fake_gpus("1GiB", has_kernels=has_kernels):
            model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_gpu_experts=1)
        out = model(ids[:, :2], use_cache=True)
        logits = [out.logits]
        for token in ids[0, 2:]:
            out = model(token.reshape(1, 1), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
        found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)
