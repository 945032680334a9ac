"""A plain config has the values of transformers' own, or there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig
from transformers.models.kimi_k25 import Kimi_K25Config

from transformers_kt.assets import bundled_model
from transformers_kt.families.deepseek.config import PLAIN
from transformers_kt.families.from_gguf import config_from_gguf, config_values
from transformers_kt.families.plain_config import plain_config, read_config
from transformers_kt.gguf.checkpoint import open_checkpoint

DEFAULTS = PLAIN.defaults
CLASSES: dict[str, Any] = {cls.model_type: cls for cls in (DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig)}
GOLDEN = sorted(Path(__file__).parents[1].glob("golden/*.gguf"))
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
# As the published config.json files have them: old names for RoPE, keys that transformers' classes do not know.
PUBLISHED: dict[str, dict[str, Any]] = {
    "V3": {
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "ep_size": 1,
        "scoring_func": "sigmoid",
        "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1},
        "rope_theta": 10000,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "torch_dtype": "bfloat16",
    },
    "V2-Lite": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "rope_scaling": YARN,
    },
    "V2 as transformers writes it": {
        "model_type": "deepseek_v2",
        "hidden_size": 5120,
        "num_attention_heads": 128,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0},
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "partial_rotary_factor": 1.0,
    },
    "without RoPE": {"model_type": "deepseek_v3", "rope_theta": 10000},
    "linear": {"model_type": "deepseek_v3", "rope_scaling": {"type": "linear", "factor": 2.0}},
}


def values_of(config: Any) -> dict[str, Any]:
    names = DEFAULTS[config.model_type]
    return {name: getattr(config, name) for name in names} | {"rope_type": config.rope_parameters["rope_type"]}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_the_config_classes(model_type: str) -> None:
    config = CLASSES[model_type]()
    assert {name: getattr(config, name) for name in DEFAULTS[model_type]} == DEFAULTS[model_type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_values_that_transformers_reads_from_it(name: str) -> None:
    facts = PUBLISHED[name]
    plain = plain_config(facts)
    assert plain is not None
    assert values_of(plain) == values_of(CLASSES[facts["model_type"]].from_dict(json.loads(json.dumps(facts))))


KIMI_TEXT = {
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "vocab_size": 163840,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0},
    "rope_theta": 50000.0,
}
KIMI = {
    "K2": {**KIMI_TEXT, "model_type": "kimi_k2"},
    "K2.5": {"model_type": "kimi_k25", "text_config": {**KIMI_TEXT, "model_type": "kimi_k2"}, "hidden_size": 1152},
    "K2.5 as transformers writes it": {"model_type": "kimi_k25", "text_config": {**KIMI_TEXT}},
}


@pytest.mark.parametrize("name", KIMI)
def test_a_language_model_under_another_name_is_read_as_the_one_it_is(name: str) -> None:
    plain = plain_config(KIMI[name])
    assert plain is not None
    assert values_of(plain) == values_of(DeepseekV3Config.from_dict(json.loads(json.dumps(KIMI_TEXT))))


def test_the_language_model_of_a_larger_one_is_the_one_that_transformers_makes_there() -> None:
    text = Kimi_K25Config.from_dict(json.loads(json.dumps(KIMI["K2.5"]))).text_config
    plain = plain_config(KIMI["K2.5"])
    assert plain is not None
    assert values_of(plain) == values_of(text)


@pytest.mark.parametrize("path", [bundled_model(), *GOLDEN], ids=lambda path: path.stem)
def test_a_gguf_gives_the_values_that_loading_takes_from_it(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    plain = plain_config(config_values(checkpoint))
    assert plain is not None
    assert values_of(plain) == values_of(config_from_gguf(checkpoint))


@pytest.mark.parametrize(
    "odd",
    [
        {"model_type": "llama"},
        {"model_type": "kimi_k25"},
        {"model_type": "kimi_k25", "text_config": {"model_type": "llama"}},
        {"model_type": None},
        {"hidden_size": "7168"},
        {"hidden_size": 7168.0},
        {"hidden_size": None},
        {"attention_bias": 0},
        {"hidden_act": None},
        {"num_hidden_layers": True},
        {"num_local_experts": 8},
        {"layer_types": ["full_attention"]},
        {"per_layer_config": {}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": [1]},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"model_type": "deepseek_v2"},  # says nothing of experts per token
        {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "hidden_size": 100},  # of 32 heads
        {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": None},
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_transformers(odd: dict[str, Any]) -> None:
    assert plain_config({"model_type": "deepseek_v3", **odd}) is None


def test_a_config_is_read_from_a_folder_a_file_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "config.json"
    path.write_text('{"hidden_size": 5}')
    asked = []

    def downloaded(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    assert read_config(str(path), {}) == {"hidden_size": 5}
    assert read_config(str(tmp_path), {"subfolder": "sub"}) == {"hidden_size": 5}
    assert asked == []
    assert read_config("some/model", {"revision": "abc"}) == {"hidden_size": 5}
    assert asked == [("some/model", "config.json", {"revision": "abc"})]


@pytest.mark.parametrize("content", ["[1]", "{", "\udcff"])
def test_a_config_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    assert read_config(str(tmp_path), {}) is None
    assert read_config(str(tmp_path / "nowhere"), {"local_files_only": True}) is None
