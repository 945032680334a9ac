"""The same answers as transformers' own models and as llama.cpp on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
from golden.reference import NAMES, config_of, dequantized_model, gguf_path, golden_prompts, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kt.assets import bundled_model
from transformers_kt.families.deepseek.export import export_gguf

# Float weights leave two differences to transformers: the order of additions and the absorbed form of attention. Each
# is worth some 2^-24 of the sums involved, amplified layer by layer; 27 layers of random weights gave 6e-5 at a
# standard deviation of 3. Ten times that still is a hundredth of what one wrong rounding of a weight would do.
FLOAT_TOLERANCE = 6e-4

LENGTHS = [1, 7, 64, 700]  # 700: past the 128 positions that YaRN stretches, and over six attention splits


@pytest.fixture(scope="module", params=["v3_like", "v2_like", "v2_lite_like", "glm_lite_like", "kimi_like"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model of transformers in float32, and the same read back from its F32 GGUF."""
    stock = getattr(random_models, request.param)()
    path = tmp_path_factory.mktemp("parity") / f"{request.param}.gguf"
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    # Both layouts of kv_b are covered: V2-Lite's in the older one.
    export_gguf(stock, tokenizer, path, name=request.param, split_kv_b=request.param != "v2_lite_like")
    return stock, AutoModelForCausalLM.from_pretrained(None, gguf_path=path)


def random_ids(length: int, vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_without_cache(pair: tuple[Any, Any], length: int) -> None:
    stock, ours = pair
    ids = random_ids(length, stock.config.vocab_size)
    expected = stock(ids, use_cache=False).logits
    got = ours(ids, use_cache=False).logits
    assert expected.std() > 1  # otherwise any two tensors would be close
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_with_cache(pair: tuple[Any, Any], length: int) -> None:
    stock, ours = pair
    ids = random_ids(length + 3, stock.config.vocab_size)
    expected = stock(ids, use_cache=False).logits[:, -4:]
    out = ours(ids[:, :length], use_cache=True)
    steps = [out.logits[:, -1:]]
    for i in range(length, length + 3):
        out = ours(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=FLOAT_TOLERANCE)


@pytest.fixture(scope="module", params=NAMES)
def quantized(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """A file that llama.cpp quantized: its name, transformers' model on the dequantized weights, ours on the blocks."""
    path: Path = gguf_path(request.param)
    config = config_of(request.param)
    ours = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, config=config)
    return request.param, dequantized_model(path, config), ours


@torch.no_grad()
def test_distance_to_exact_arithmetic_is_no_larger_than_that_of_llama_cpp(quantized: tuple[str, Any, Any]) -> None:
    """KL divergence to float32 on dequantized weights. All that differs is how activations are rounded on the way."""
    name, exact, ours = quantized
    mine, theirs = [], []
    for prompt in golden_prompts(name):
        stored = len(prompt.logits)
        reference = exact(prompt.input_ids).logits[0, -stored:]
        mine.append(kl_divergence(reference, ours(prompt.input_ids).logits[0, -stored:]))
        theirs.append(kl_divergence(reference, prompt.logits))
    median, limit = torch.cat(mine).median().item(), torch.cat(theirs).median().item()
    print(f"{name}: KL median {median:.2e}, llama.cpp {limit:.2e}")
    assert median <= limit


@torch.no_grad()
def test_llama_cpp_and_we_choose_the_same_tokens(quantized: tuple[str, Any, Any]) -> None:
    """Its greedy tokens fed back: ours must be the same where exact arithmetic agrees with it by more than our noise.

    Elsewhere it is llama.cpp's own rounding that decided: in random models, where experts are nearly tied, it now and
    then picks another one and is off by more than any bound.
    """
    name, exact, ours = quantized
    compared = 0
    for prompt in golden_prompts(name):
        if not prompt.greedy:
            continue
        ids = torch.cat([prompt.input_ids, torch.tensor([prompt.greedy])], dim=1)
        rows = slice(prompt.input_ids.shape[1] - 1, -1)
        logits, reference = ours(ids).logits[0, rows], exact(ids).logits[0, rows]
        noise = (logits - reference).abs().amax(-1)
        best = reference.topk(2)
        for position, token in enumerate(prompt.greedy):
            agreed = int(best.indices[position, 0]) == token
            # Both the winner's logit and the second best may be off by the noise.
            if not agreed or best.values[position].diff().abs() <= 2 * noise[position]:
                continue
            compared += 1
            assert int(logits[position].argmax()) == token, f"{prompt.name}: token {position}"
    assert compared >= 8


@torch.no_grad()
def test_tiny_r1_answers_as_llama_cpp_does() -> None:
    name = NAMES[0]
    ours = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
    for prompt in golden_prompts(name):
        if not prompt.greedy:
            continue
        out = ours.generate(prompt.input_ids, do_sample=False, max_new_tokens=len(prompt.greedy))
        assert out[0, prompt.input_ids.shape[1] :].tolist() == prompt.greedy, prompt.name
