"""The folder of a model that llama.cpp writes as `deepseek2` under another name, or whose config says what no GGUF can,
beside the GGUF: the same logits as transformers' own model, every layer computed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_models
import torch
from test_parity import FLOAT_TOLERANCE, random_ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from transformers_kt import plan
from transformers_kt.assets import bundled_model
from transformers_kt.families.deepseek.export import export_gguf

# What the folders of Kimi-K2 say of code that they bring, which is not run.
REMOTE_CODE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}


def as_it_is(config: dict[str, Any]) -> dict[str, Any]:
    return config


def kimi_k2(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "model_type": "kimi_k2", "auto_map": REMOTE_CODE}


def kimi_k25(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": kimi_k2(config),
        "vision_config": {"model_type": "kimi_k25_vision"},
        "tie_word_embeddings": False,
    }


def v3_with_two_mscales() -> Any:
    """YaRN that scales cosines and sines too; a GGUF holds only the factor of the softmax."""
    rope = {**random_models.v3_like().config.rope_parameters, "mscale": 0.6, "mscale_all_dim": 1.0}
    return random_models.v3_like(rope_parameters=rope)


def v3_with_linear_rope() -> Any:
    return random_models.v3_like(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})


def v2_that_normalizes() -> Any:
    return random_models.v2_like(norm_topk_prob=True)


FOLDERS = {
    "glm4_moe_lite": (random_models.glm_lite_like, as_it_is, "Glm4MoeLiteForCausalLM"),
    "kimi_k2": (random_models.kimi_like, kimi_k2, "DeepseekV3ForCausalLM"),
    "kimi_k25": (random_models.kimi_like, kimi_k25, "DeepseekV3ForCausalLM"),
    "youtu": (random_models.youtu_like, as_it_is, "YoutuForCausalLM"),
    "two mscales": (v3_with_two_mscales, as_it_is, "DeepseekV3ForCausalLM"),
    "linear rope": (v3_with_linear_rope, as_it_is, "DeepseekV3ForCausalLM"),
    "v2 that normalizes": (v2_that_normalizes, as_it_is, "DeepseekV2ForCausalLM"),
}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path, str]:
    """Transformers' model, a folder with its config as it is published, its GGUF, and the class to expect."""
    make, published, name = FOLDERS[request.param]
    stock = make()
    export_gguf(stock, AutoTokenizer.from_pretrained(bundled_model()), tmp_path / "model.gguf", name=request.param)
    (tmp_path / "folder").mkdir()
    facts = published(json.loads(stock.config.to_json_string(use_diff=False)))
    (tmp_path / "folder" / "config.json").write_text(json.dumps(facts))
    return stock, tmp_path / "folder", tmp_path / "model.gguf", name


@torch.no_grad()
def test_a_folder_with_a_gguf_beside_it_gives_the_logits_of_transformers(folder: tuple[Any, Path, Path, str]) -> None:
    stock, path, gguf_path, name = folder
    ours = AutoModelForCausalLM.from_pretrained(path, gguf_path=gguf_path)
    assert type(ours).__name__ == name
    assert type(AutoConfig.from_pretrained(path, gguf_path=gguf_path)) is type(ours.config) is type(stock.config)
    ids = random_ids(200, stock.config.vocab_size)
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=FLOAT_TOLERANCE)
    alone = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_path)
    if stock.config.rope_parameters.get("mscale") == stock.config.rope_parameters.get("mscale_all_dim"):
        assert torch.equal(alone(ids).logits, ours(ids).logits)
    else:
        assert (alone(ids).logits - ours(ids).logits).abs().max() > 0.1
        assert "the same is taken for mscale" in str(alone.kt_report)
        assert "taken for mscale" not in str(ours.kt_report)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **greedy), stock.generate(ids, **greedy))


def test_the_plan_of_such_a_folder_replaces_every_operation(folder: tuple[Any, Path, Path, str]) -> None:
    stock, path, gguf_path, _ = folder
    report = plan(path, gguf_path=gguf_path)
    assert not report.problems
    moes = sum("experts.gate_up_proj" in name for name, _ in stock.named_parameters())
    operations = {"embedding_cpu", "attention_cpu", "mlp_cpu", "norm_cpu", "rotary_cpu", "linear_cpu"}
    assert {row.operation for row in report.rows} == operations | ({"moe_cpu"} if moes else set())
    assert sum(row.operation == "moe_cpu" for row in report.rows) == moes
