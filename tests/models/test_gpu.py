"""Models on the GPUs of this machine: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from golden.reference import NAMES, config_of, dequantized_model, gguf_path, kl_divergence
from random_files import random_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kt.assets import bundled_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: nothing of this was run"),
]


@pytest.mark.parametrize(
    "on_gpus",
    [
        {"kt_gpu_experts": 0},
        {"kt_gpu_experts": 1},
        {"kt_gpu_experts": 0, "kt_expert_slots": 2, "kt_prefill_stream_tokens": 16},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_distance_to_exact_arithmetic_is_no_larger_than_on_the_cpu(name: str, on_gpus: dict[str, int]) -> None:
    """For a prompt, whose products are of many rows, and for tokens after it, whose products are of one."""
    config, path = config_of(name), gguf_path(name)
    ids = random_tokens(80)
    exact = dequantized_model(path, config)(ids).logits[0]
    distances = []
    for options in (on_gpus, {"device_map": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, config=config, **options)
        out = model(ids[:, :50], use_cache=True)
        parts = [out.logits]
        for step in range(50, 80):
            out = model(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        distances.append(kl_divergence(exact, torch.cat(parts, dim=1)[0]).median().item())
    assert distances[0] <= distances[1]


def test_tiny_r1_answers_right() -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto", kt_gpu_experts=1)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    question = [{"role": "user", "content": "What is 486 + 57?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False)
    assert "486 + 57 = 543" in tokenizer.decode(out[0])
