"""Models whose attention an indexer restricts to the best keys: transformers' attention around our kernels.

The indexer takes every key up to index_topk of them; past that it leaves out all but those that score best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import INDEX_TOPK, v3_like, v32_like
from test_parity import FLOAT_TOLERANCE, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_kt.assets import bundled_model
from transformers_kt.errors import CheckpointError
from transformers_kt.families.deepseek.export import export_gguf
from transformers_kt.families.from_gguf import config_from_gguf
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT

# Two keys whose scores tie within rounding change places, and one of them is left out. None of 200 positions did here,
# one of 700; a mask that is wrong changes nearly every position past INDEX_TOPK.
MOST_TIES = 0.02


@pytest.fixture(scope="module", params=[True, False], ids=["halves of kv_b", "kv_b whole"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    stock = v32_like()
    path = tmp_path_factory.mktemp("v32") / "v32.gguf"
    export_gguf(stock, AutoTokenizer.from_pretrained(bundled_model()), path, name="v32", split_kv_b=request.param)
    return stock, AutoModelForCausalLM.from_pretrained(None, gguf_path=path)


def assert_equal_but_for_ties(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 1  # otherwise any two tensors would be close
    far = (got - expected).abs().amax(dim=-1) > FLOAT_TOLERANCE
    assert far.float().mean() <= MOST_TIES, f"{int(far.sum())} of {far.numel()} positions differ"


@pytest.mark.parametrize("length", [1, INDEX_TOPK - 1, INDEX_TOPK, INDEX_TOPK + 1, 200])
@torch.no_grad()
def test_logits_equal_those_of_transformers_on_both_sides_of_the_limit(pair: tuple[Any, Any], length: int) -> None:
    stock, ours = pair
    ids = random_ids(length, stock.config.vocab_size)
    assert_equal_but_for_ties(ours(ids).logits, stock(ids).logits)


@torch.no_grad()
def test_the_indexers_keys_are_cached_as_transformers_caches_them(pair: tuple[Any, Any]) -> None:
    ids = random_ids(INDEX_TOPK + 20, pair[0].config.vocab_size)
    logits = []
    for model in pair:
        out = model(ids[:, : INDEX_TOPK - 4], use_cache=True)
        steps = [out.logits]
        for position in range(INDEX_TOPK - 4, ids.shape[1]):
            out = model(ids[:, position : position + 1], use_cache=True, **{CACHE_ARGUMENT: out.past_key_values})
            steps.append(out.logits)
        logits.append(torch.cat(steps, dim=1))
    assert_equal_but_for_ties(logits[1], logits[0])


@torch.no_grad()
def test_a_padded_batch_generates_the_tokens_of_transformers(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    ids = random_ids(120, stock.config.vocab_size).reshape(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = ours.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, stock.generate(ids, attention_mask=mask, **options))


def test_a_file_that_was_made_without_the_indexer_attends_to_every_key(tmp_path: Path) -> None:
    """As llama.cpp computes it. With the folder's config, which promises an indexer, it is refused."""
    path = tmp_path / "model.gguf"
    export_gguf(v3_like(), AutoTokenizer.from_pretrained(bundled_model()), path, name="v3")
    assert config_from_gguf(open_checkpoint(path)).model_type == "deepseek_v3"
    v32_like().config.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"(?s)indexer\.attn_q_b\.weight is missing.*leave the config out"
    ) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=path)
    assert "attends to every key" in str(caught.value)


def test_a_config_without_indexer_beside_a_file_with_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(v32_like(), AutoTokenizer.from_pretrained(bundled_model()), path, name="v32")
    v3_like().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)indexer\.proj\.weight.*surplus.*the config does not know"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=path)
