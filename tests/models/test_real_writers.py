"""Files with the headers that llama.cpp's converter and quantizer wrote: the answers of transformers, no further off
than llama.cpp's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from golden import real_writers
from golden.reference import kl_divergence
from transformers import AutoModelForCausalLM

# How much further off than llama.cpp we may be, where 32 places can tell: two standard errors are allowed beside it.
# With Q8_0 and Q4_0 both round activations alike, and either is ahead in half of all samples.
SLACK = 1.05
# Rounded activations move logits, which spread by 3, by 0.1 to 0.3: a token that leads by more has to win, but where
# experts are nearly tied and llama.cpp's rounding, too, picks another one.
LEAD = 1.0


@pytest.fixture(scope="module")
def cases() -> dict[str, real_writers.Case]:
    return real_writers.cases()


@pytest.mark.parametrize("name", real_writers.names())
@torch.no_grad()
def test_a_real_writers_file_gives_the_answers_of_transformers(
    cases: dict[str, real_writers.Case], name: str, tmp_path: Path
) -> None:
    case = cases[name]
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=case.write(tmp_path / "model.gguf"))
    ids = real_writers.prompt(model.config.vocab_size)
    logits = model(ids, use_cache=False).logits[0, -real_writers.STORED :]
    ours, theirs = (kl_divergence(case.transformers, each) for each in (logits, case.llama_cpp))
    print(f"{name}: KL median {ours.median():.2e}, llama.cpp {theirs.median():.2e}")
    further = (ours / theirs).log()
    assert further.mean() <= math.log(SLACK) + 2 * further.std() / math.sqrt(len(further))
    best = case.transformers.topk(2)
    tokens = best.indices[:, 0]
    decided = (best.values[:, 0] - best.values[:, 1] > LEAD) & (case.llama_cpp.argmax(-1) == tokens)
    assert torch.equal(logits.argmax(-1)[decided], tokens[decided])
