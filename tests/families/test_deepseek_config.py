"""The config from GGUF metadata is the one the model was published with, or an error that names the key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_handmade import TINY_V2, TINY_V3, metadata, refusal, tiny_tensors, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    Glm4MoeLiteConfig,
)

from transformers_kt.assets import bundled_model
from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.families.from_gguf import config_from_gguf, generation_config_from_gguf, notes_from_gguf
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.gguf.reader import GgufFile

# What the converter writes for the published models, in its old and its new way.
YARN = {
    "rope.freq_base": 10000.0,
    "rope.dimension_count": 64,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 40.0,
    "rope.scaling.original_context_length": 4096,
    "context_length": 163840,
    "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "attention.kv_lora_rank": 512,
}
OLD_HEADS = {"attention.key_length": 192, "attention.value_length": 128}
NEW_HEADS = {
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
}
V3_FILE: dict[str, Any] = {
    **YARN,
    "block_count": 61,
    "embedding_length": 7168,
    "feed_forward_length": 18432,
    "attention.head_count": 128,
    "attention.q_lora_rank": 1536,
    "leading_dense_block_count": 3,
    "vocab_size": 129280,
    "expert_feed_forward_length": 2048,
    "expert_count": 256,
    "expert_used_count": 8,
    "expert_shared_count": 1,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "rope.scaling.yarn_log_multiplier": 0.10000000149011612,
}
V2_FILE: dict[str, Any] = {
    **YARN,
    "block_count": 60,
    "embedding_length": 5120,
    "feed_forward_length": 12288,
    "attention.head_count": 128,
    "attention.q_lora_rank": 1536,
    "leading_dense_block_count": 1,
    "vocab_size": 102400,
    "expert_feed_forward_length": 1536,
    "expert_count": 160,
    "expert_used_count": 6,
    "expert_shared_count": 2,
    "expert_weights_scale": 16.0,
    "rope.scaling.yarn_log_multiplier": 0.07069999724626541,
}
V2_LITE_FILE: dict[str, Any] = {
    **YARN,
    "block_count": 27,
    "embedding_length": 2048,
    "feed_forward_length": 10944,
    "attention.head_count": 16,
    "leading_dense_block_count": 1,
    "vocab_size": 102400,
    "expert_feed_forward_length": 1408,
    "expert_count": 64,
    "expert_used_count": 6,
    "expert_shared_count": 2,
    "expert_weights_scale": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.07069999724626541,
}

# The published config.json files, as far as the models depend on them.
MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
COMMON = {**MLA, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "attention_bias": False, "head_dim": 64}
V3_CONFIG: dict[str, Any] = {
    **COMMON,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "rope_interleave": True,
}
V2_CONFIG: dict[str, Any] = {
    **COMMON,
    "model_type": "deepseek_v2",
    "num_hidden_layers": 60,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
}
V2_LITE_CONFIG: dict[str, Any] = {
    **COMMON,
    "model_type": "deepseek_v2",
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
}
KIMI_FILE: dict[str, Any] = {
    **V3_FILE,
    "context_length": 131072,
    "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "attention.head_count": 64,
    "leading_dense_block_count": 1,
    "vocab_size": 163840,
    "expert_count": 384,
    "expert_weights_scale": 2.8269999027252197,
    "rope.freq_base": 50000.0,
    "rope.scaling.factor": 32.0,
}
KIMI_CONFIG: dict[str, Any] = {
    **V3_CONFIG,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "vocab_size": 163840,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
}
GLM_FILE: dict[str, Any] = {
    "block_count": 48,
    "nextn_predict_layers": 1,
    "context_length": 202752,
    "embedding_length": 2048,
    "feed_forward_length": 10240,
    "attention.head_count": 20,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "attention.q_lora_rank": 768,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 256,
    "attention.value_length_mla": 256,
    "rope.freq_base": 1000000.0,
    "rope.dimension_count": 64,
    "leading_dense_block_count": 1,
    "vocab_size": 154880,
    "expert_feed_forward_length": 1536,
    "expert_count": 64,
    "expert_used_count": 4,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.7999999523162842,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
}
GROUPS = {"expert_group_count", "expert_group_used_count"}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "v3_of_2025_01": ({**V3_FILE, **OLD_HEADS, "attention.head_count_kv": 128}, V3_CONFIG, 1.0),
    "v3_of_2025_05": ({**V3_FILE, **NEW_HEADS}, V3_CONFIG, 1.0),
    "v3_of_2026": ({**V3_FILE, **NEW_HEADS, "expert_group_count": 8, "expert_group_used_count": 4}, V3_CONFIG, 1.0),
    "v3_with_mtp": ({**V3_FILE, **NEW_HEADS, "block_count": 62, "nextn_predict_layers": 1}, V3_CONFIG, 1.0),
    "v2_of_2024": ({**V2_FILE, **OLD_HEADS, "attention.head_count_kv": 128}, V2_CONFIG, 0.707),
    "v2_of_2026": (
        {**V2_FILE, **NEW_HEADS, "expert_gating_func": 1, "expert_group_count": 8, "expert_group_used_count": 3},
        V2_CONFIG,
        0.707,
    ),
    "v2_lite_of_2024": ({**V2_LITE_FILE, **OLD_HEADS, "attention.head_count_kv": 16}, V2_LITE_CONFIG, 0.707),
    "v2_lite_of_2026": (
        {**V2_LITE_FILE, **NEW_HEADS, "expert_gating_func": 1, "expert_group_count": 1, "expert_group_used_count": 1},
        V2_LITE_CONFIG,
        0.707,
    ),
}


@pytest.mark.parametrize("which", PUBLISHED)
def test_the_published_config_comes_back(which: str) -> None:
    facts, published, mscale = PUBLISHED[which]
    config = config_from_gguf(metadata(facts))
    assert isinstance(config, DeepseekV3Config if published["model_type"] == "deepseek_v3" else DeepseekV2Config)
    assert {key: getattr(config, key) for key in published} == published
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    assert config.architectures == [type(config).__name__.replace("Config", "ForCausalLM")]
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_kimis_yarn_comes_back_though_the_file_has_no_betas() -> None:
    """Its ramp has no width, which the converter of 2025 left out; others mean 32 where they say nothing."""
    config = config_from_gguf(metadata({**KIMI_FILE, **NEW_HEADS}))
    assert {key: getattr(config, key) for key in KIMI_CONFIG} == KIMI_CONFIG
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


V32_INDEXER = {
    "deepseek32.attention.indexer.head_count": 64,
    "deepseek32.attention.indexer.key_length": 128,
    "deepseek32.attention.indexer.top_k": 2048,
}


def test_v32_comes_back_with_its_indexer() -> None:
    facts = {f"deepseek32.{key}": value for key, value in {**V3_FILE, **NEW_HEADS, "block_count": 62}.items()}
    facts |= {"general.architecture": "deepseek32", "deepseek32.nextn_predict_layers": 1, **V32_INDEXER}
    config = config_from_gguf(facts)
    assert type(config) is DeepseekV32Config
    published = {key: value for key, value in V3_CONFIG.items() if key not in ("model_type", "rope_interleave")}
    assert {key: getattr(config, key) for key in published} == published
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    assert config.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 58
    for key in V32_INDEXER:
        with pytest.raises(GgufFormatError, match=key.replace(".", r"\.")):
            config_from_gguf({name: value for name, value in facts.items() if name != key})


# What the values of a GLM-4.7-Flash are called in the class that a GGUF alone is loaded with.
GLM_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts", "routed_scaling_factor"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "n_group", "topk_group"),
    *("num_experts_per_tok", "norm_topk_prob", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "rope_interleave", "tie_word_embeddings"),
)


@pytest.mark.parametrize("missing", [(), (*GROUPS, "expert_weights_scale", "expert_weights_norm", "rope.freq_base")])
def test_glm_lite_comes_back_as_the_class_that_computes_it(missing: tuple[str, ...]) -> None:
    """Glm4MoeLiteConfig's defaults are the published model; the GGUF names no class."""
    config = config_from_gguf(metadata({key: value for key, value in GLM_FILE.items() if key not in missing}))
    published = Glm4MoeLiteConfig()
    assert {key: getattr(config, key) for key in GLM_KEYS} == {key: getattr(published, key) for key in GLM_KEYS}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert [layer >= config.first_k_dense_replace for layer in range(47)] == [
        kind == "sparse" for kind in published.mlp_layer_types
    ]


@pytest.mark.parametrize("facts", [TINY_V3, TINY_V2], ids=["v3", "v2"])
def test_yarn_leaves_cos_and_sin_and_squares_the_softmax_scale(facts: dict[str, Any]) -> None:
    config = config_from_gguf(metadata(facts))
    model = (DeepseekV3ForCausalLM if facts is TINY_V3 else DeepseekV2ForCausalLM)(config)
    factor, mscale_all_dim = 4.0, 10 * facts["rope.scaling.yarn_log_multiplier"]
    mscale = 0.1 * mscale_all_dim * math.log(factor) + 1
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1.0, rel=1e-6)
    # 24: width of a head's key with its rotary part. rel: the multiplier went through a 32-bit float.
    assert model.model.layers[0].self_attn.scaling == pytest.approx(mscale**2 / math.sqrt(24), rel=1e-6)


def test_without_the_multiplier_cos_and_sin_are_scaled_and_the_softmax_is_not() -> None:
    facts = {key: value for key, value in TINY_V3.items() if not key.endswith("log_multiplier")}
    model = DeepseekV3ForCausalLM(config_from_gguf(metadata(facts)))
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4.0) + 1)
    assert model.model.layers[0].self_attn.scaling == pytest.approx(1 / math.sqrt(24))


def test_without_scaling_rope_is_plain() -> None:
    facts = {key: value for key, value in TINY_V3.items() if not key.startswith("rope.scaling")}
    config = config_from_gguf(metadata({**facts, "rope.freq_base": 50000.0}))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 50000.0}


@pytest.mark.parametrize("facts", [TINY_V3, TINY_V2], ids=["v3", "v2"])
def test_the_stock_model_runs_with_the_config(facts: dict[str, Any]) -> None:
    config = config_from_gguf(metadata(facts))
    model = (DeepseekV3ForCausalLM if facts is TINY_V3 else DeepseekV2ForCausalLM)(config)
    logits = model(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 50)
    assert logits.isfinite().all()


def test_softmax_routing_with_groups_is_group_limited() -> None:
    config = config_from_gguf(metadata({**TINY_V2, "expert_group_count": 4, "expert_group_used_count": 2}))
    assert (config.n_group, config.topk_group, config.topk_method) == (4, 2, "group_limited_greedy")


def test_groups_that_are_not_stated_are_not_made_up_for_other_models() -> None:
    facts = {key: value for key, value in TINY_V3.items() if key not in GROUPS}
    config = config_from_gguf(metadata(facts))
    assert (config.n_group, config.topk_group) == (1, 1)
    one_group = config_from_gguf(metadata({**V3_FILE, **NEW_HEADS, "expert_group_count": 1}))
    assert (one_group.n_group, one_group.topk_group) == (1, 1)


@pytest.mark.parametrize(("mscale_all_dim", "stored"), [(0.707, 0.0707), (1.0, 0.1), (1.5, 0.15), (0.3, 0.03)])
def test_floats_come_back_as_the_decimals_they_were(tmp_path: Path, mscale_all_dim: float, stored: float) -> None:
    facts = {**TINY_V3, "rope.scaling.yarn_log_multiplier": stored, "expert_weights_scale": 2.446}
    config = config_from_gguf(open_checkpoint(write_model(tmp_path / "m.gguf", facts)))
    assert config.rope_parameters["mscale_all_dim"] == mscale_all_dim
    assert config.rms_norm_eps == 1e-6
    assert config.routed_scaling_factor == 2.446


def test_tensors_and_metadata_alone_say_the_same(tmp_path: Path) -> None:
    for name, facts in {"v3": TINY_V3, "v2": TINY_V2}.items():
        path = write_model(tmp_path / f"{name}.gguf", facts)
        expected = config_from_gguf(metadata(facts)).to_dict()
        assert config_from_gguf(open_checkpoint(path)).to_dict() == expected
        assert config_from_gguf(GgufFile(path)).to_dict() == expected


def test_the_vocabulary_is_as_large_as_the_embeddings_else_as_stated_else_as_listed(tmp_path: Path) -> None:
    facts = {key: value for key, value in TINY_V3.items() if key != "vocab_size"}
    tokens = {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert config_from_gguf(metadata(facts, **tokens)).vocab_size == 3
    assert config_from_gguf(metadata(TINY_V3, **tokens)).vocab_size == 50
    path = write_model(tmp_path / "m.gguf", facts, tiny_tensors(TINY_V3), more=tokens)
    assert config_from_gguf(GgufFile(path)).vocab_size == 50
    with pytest.raises(GgufFormatError, match="vocab_size is missing"):
        config_from_gguf(metadata(facts))


def test_an_output_matrix_of_its_own_or_the_embeddings(tmp_path: Path) -> None:
    shapes = tiny_tensors(TINY_V3)
    assert config_from_gguf(GgufFile(write_model(tmp_path / "own.gguf"))).tie_word_embeddings is False
    del shapes["output.weight"]
    assert config_from_gguf(GgufFile(write_model(tmp_path / "tied.gguf", shapes=shapes))).tie_word_embeddings is True
    # A vocabulary holds no tensors at all, which says nothing of a model's.
    assert config_from_gguf(GgufFile(write_model(tmp_path / "vocab.gguf", shapes={}))).tie_word_embeddings is False


def with_prediction_layer(shapes: dict[str, tuple[int, ...]], layer: int) -> dict[str, tuple[int, ...]]:
    copied = {name.replace("blk.2.", f"blk.{layer}."): shape for name, shape in shapes.items() if "blk.2." in name}
    return {**shapes, **copied, f"blk.{layer}.nextn.eh_proj.weight": (64, 128)}


@pytest.mark.parametrize(
    ("stated", "prediction", "has_tensors"),
    [(4, 1, True), (4, 1, False), (4, None, True), (3, None, False), (3, 1, False), (3, None, True)],
    ids=["counted", "counted_but_dropped", "counted_unsaid", "absent", "said_but_uncounted", "uncounted_unsaid"],
)
def test_prediction_layers_are_no_layers(
    tmp_path: Path, stated: int, prediction: int | None, has_tensors: bool
) -> None:
    shapes = tiny_tensors(TINY_V3)
    facts = {**TINY_V3, "block_count": stated}
    if prediction is not None:
        facts["nextn_predict_layers"] = prediction
    path = write_model(tmp_path / "m.gguf", facts, with_prediction_layer(shapes, 3) if has_tensors else shapes)
    config = config_from_gguf(GgufFile(path))
    assert config.num_hidden_layers == 3
    assert has_tensors == any("from blk.3 on, are not loaded" in note for note in notes_from_gguf(GgufFile(path)))
    if isinstance(config, DeepseekV3Config):
        assert config.num_mtp_layers == 0


def test_a_correction_bias_means_sigmoid_where_the_file_does_not_say(tmp_path: Path) -> None:
    facts = {key: value for key, value in TINY_V3.items() if key != "expert_gating_func"}
    assert config_from_gguf(GgufFile(write_model(tmp_path / "m.gguf", facts, tiny_tensors(TINY_V3)))).model_type == (
        "deepseek_v3"
    )
    silent = {**facts, "expert_weights_norm": False}
    assert config_from_gguf(metadata(silent)).model_type == "deepseek_v2"


def test_the_query_tensors_decide_on_q_lora(tmp_path: Path) -> None:
    plain = tiny_tensors({key: value for key, value in TINY_V3.items() if "q_lora" not in key})
    path = write_model(tmp_path / "m.gguf", TINY_V3, plain)
    assert config_from_gguf(GgufFile(path)).q_lora_rank is None


# Nothing that changes results is left to a default.
STATED_V3 = {**TINY_V3, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
STATED_V2 = {
    **TINY_V2,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "expert_group_count": 1,
}


def file_without(tmp_path: Path, facts: dict[str, Any], *keys: str, **more: Any) -> GgufFile:
    left = {key: value for key, value in facts.items() if key not in keys}
    return GgufFile(write_model(tmp_path / "m.gguf", left, tiny_tensors(facts), **more))


TOLD_BY_TENSORS = [
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "attention.head_count",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "rope.dimension_count",
    "leading_dense_block_count",
    "expert_count",
    "expert_shared_count",
    "vocab_size",
]


@pytest.mark.parametrize(
    "facts", [STATED_V3, STATED_V2, {**STATED_V2, "expert_shared_count": 3}], ids=["v3", "v2", "shared"]
)
@pytest.mark.parametrize(
    "keys", [*([key] for key in TOLD_BY_TENSORS), TOLD_BY_TENSORS], ids=lambda keys: str(len(keys))
)
def test_what_tensors_tell_need_not_be_stated(tmp_path: Path, facts: dict[str, Any], keys: list[str]) -> None:
    source = file_without(tmp_path, facts, *keys)
    assert config_from_gguf(source).to_dict() == config_from_gguf(metadata(facts)).to_dict()
    assert notes_from_gguf(source) == notes_from_gguf(metadata(facts))


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        ("expert_weights_scale", 1.0),
        ("expert_weights_norm", False),
        ("rope.freq_base", 10000.0),
        ("rope.scaling.original_context_length", 256),
        ("expert_group_count", (1, 1)),
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.yarn_beta_slow", 1.0),
    ],
)
def test_a_default_that_changes_results_is_noted(tmp_path: Path, key: str, taken: Any) -> None:
    note, *_ = notes_from_gguf(file_without(tmp_path, STATED_V3, key))
    assert f"deepseek2.{key} ({taken} is taken)" in note
    assert "folder" in note


def test_a_model_that_states_everything_has_no_notes(tmp_path: Path) -> None:
    plain = {key: value for key, value in STATED_V3.items() if "scaling" not in key}
    assert notes_from_gguf(file_without(tmp_path, plain)) == ()


def test_the_notes_say_what_no_file_tells_of_yarn_unless_the_model_is_known(tmp_path: Path) -> None:
    (note,) = notes_from_gguf(file_without(tmp_path, STATED_V3))
    assert "mscale_all_dim alone, 1; the same is taken for mscale" in note
    assert "folder or hub id" in note
    assert notes_from_gguf(metadata({**V3_FILE, **NEW_HEADS, "rope.scaling.yarn_log_multiplier": 0.1})) == ()
    assert notes_from_gguf(open_checkpoint(bundled_model())) == ()


def test_transformers_v2_never_normalizes_the_weights_of_experts_which_is_noted() -> None:
    source = metadata({**STATED_V2, "expert_weights_norm": True})
    assert config_from_gguf(source).norm_topk_prob is True
    assert any("expert_weights_norm" in note and "llama.cpp does" in note for note in notes_from_gguf(source))


def test_yarn_without_the_multiplier_is_refused_where_the_model_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(GgufFormatError, match=r"yarn_log_multiplier is missing; .*folder or hub id"):
        config_from_gguf(file_without(tmp_path, TINY_V3, "rope.scaling.yarn_log_multiplier"))
    stated = {**TINY_V3, "rope.scaling.yarn_log_multiplier": 0.0}
    assert "mscale_all_dim" not in config_from_gguf(file_without(tmp_path, stated)).rope_parameters


@pytest.mark.parametrize("which", PUBLISHED)
def test_keys_that_first_files_lack_come_from_the_published_config(which: str) -> None:
    lacking = (
        "rope.scaling.yarn_log_multiplier",
        "expert_weights_scale",
        "rope.freq_base",
        "expert_group_count",
        "expert_group_used_count",
    )
    facts, published, mscale = PUBLISHED[which]
    source = metadata({key: value for key, value in facts.items() if key not in lacking})
    config = config_from_gguf(source)
    assert {key: getattr(config, key) for key in published} == published
    assert config.rope_parameters["mscale"] == config.rope_parameters["mscale_all_dim"] == mscale
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert notes_from_gguf(source) == ()


def test_kimi_k2_without_beta_keys_has_its_published_betas() -> None:
    # config.json of moonshotai/Kimi-K2-Instruct: beta_fast 1.0, beta_slow 1.0, factor 32, theta 50000.
    kimi = {
        **V3_FILE,
        **NEW_HEADS,
        "attention.head_count": 64,
        "expert_count": 384,
        "expert_weights_scale": 2.827,
        "leading_dense_block_count": 1,
        "rope.freq_base": 50000.0,
        "rope.scaling.factor": 32.0,
        "vocab_size": 163840,
    }
    config = config_from_gguf(metadata(kimi))
    assert (config.rope_parameters["beta_fast"], config.rope_parameters["beta_slow"]) == (1.0, 1.0)
    assert (config.n_group, config.norm_topk_prob) == (1, True)
    stated = config_from_gguf(metadata({**kimi, "rope.scaling.yarn_beta_fast": 16.0}))
    assert stated.rope_parameters["beta_fast"] == 16.0


def test_linear_scaling_is_that_of_transformers() -> None:
    facts = {**TINY_V3, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = config_from_gguf(metadata(facts))
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    scaled = DeepseekV3ForCausalLM(config).model.rotary_emb
    plain = DeepseekV3ForCausalLM(config_from_gguf(metadata({**facts, "rope.scaling.factor": 1.0}))).model.rotary_emb
    torch.testing.assert_close(scaled.inv_freq, plain.inv_freq / 4)
    assert scaled.attention_scaling == 1.0


@pytest.mark.parametrize("which", ["bos", "eos", "eot", "eom", "padding"])
def test_a_token_beyond_the_vocabulary_is_named(which: str) -> None:
    source = metadata(TINY_V3, **{f"tokenizer.ggml.{which}_token_id": 50})
    for read in (config_from_gguf, generation_config_from_gguf):
        with pytest.raises(GgufFormatError, match=rf"tokenizer\.ggml\.{which}_token_id is 50; .* 50 tokens"):
            read(source)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    source = file_without(tmp_path, TINY_V3, more={"tokenizer.ggml.tokens": [f"t{n}" for n in range(51)]})
    with pytest.raises(GgufFormatError, match="lists 51 tokens, but the embedding has 50 rows"):
        config_from_gguf(source)


def vocabulary(**named: str) -> dict[str, Any]:
    """Fifty tokens, those of ``named`` (t7="<|im_end|>") in place of others; even ones are special."""
    tokens = [named.get(f"t{number}", f"t{number}") for number in range(50)]
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3 if n % 2 == 0 else 1 for n in range(50)]}


@pytest.mark.parametrize(
    ("tokens", "keys", "ends"),
    [
        ({"t7": "<|im_end|>", "t8": "[EOS]"}, {"eos": 8}, [8, 7]),
        ({"t7": "<|im_end|>"}, {}, 7),
        ({"t9": "<|eot_id|>", "t10": "<|end|>"}, {"eos": 3, "eot": 9}, [3, 9, 10]),
        ({"t4": "[EOT]", "t5": "</s>"}, {"eos": 3}, [3, 4]),
        ({"t4": "x<|im_end|>"}, {"eos": 3}, 3),
    ],
    ids=["another_key", "no_key", "several", "ordinary_html_is_none", "part_of_a_token_is_none"],
)
def test_texts_that_end_a_turn_end_generation(tokens: dict[str, str], keys: dict[str, int], ends: Any) -> None:
    ids = {f"tokenizer.ggml.{which}_token_id": number for which, number in keys.items()}
    generation = generation_config_from_gguf(metadata(TINY_V3, **vocabulary(**tokens), **ids))
    assert generation.eos_token_id == ends


@pytest.mark.parametrize(
    ("stated", "options"),
    [
        ({"temp": 0.6, "top_p": 0.95}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
        ({"top_k": 20, "min_p": 0.05}, {"do_sample": True, "top_k": 20, "min_p": 0.05}),
        ({"temp": 0.0, "top_k": 20}, {"do_sample": False}),
        ({"penalty_repeat": 1.1}, {"do_sample": True, "repetition_penalty": 1.1}),
        ({"mirostat": 0}, {}),
    ],
)
def test_sampling_options_reach_the_generation_config(stated: dict[str, Any], options: dict[str, Any]) -> None:
    source = metadata(STATED_V3, **{f"general.sampling.{key}": value for key, value in stated.items()})
    found = generation_config_from_gguf(source)
    assert {key: getattr(found, key) for key in options} == options
    notes = [note for note in notes_from_gguf(source) if "sampling" in note]
    assert len(notes) == ("mirostat" in stated)
    assert all("general.sampling.mirostat" in note for note in notes)


@pytest.mark.parametrize(
    ("key", "nonsense"),
    [
        ("temp", -1.0),
        ("temp", "hot"),
        ("top_p", 1.5),
        ("top_k", 0.5),
        ("min_p", float("nan")),
        ("penalty_repeat", True),
    ],
)
def test_a_sampling_option_that_makes_no_sense_is_named(key: str, nonsense: Any) -> None:
    with pytest.raises(GgufFormatError, match=rf"general\.sampling\.{key} is {nonsense!r}"):
        generation_config_from_gguf(metadata(TINY_V3, **{f"general.sampling.{key}": nonsense}))


def test_a_model_without_experts_is_youtus(tmp_path: Path) -> None:
    dense = {key: value for key, value in TINY_V3.items() if "expert" not in key}
    dense |= {"leading_dense_block_count": 3, "expert_shared_count": 0, "expert_feed_forward_length": 96}
    shapes = tiny_tensors({**TINY_V3, "leading_dense_block_count": 3})
    for source in (metadata(dense), GgufFile(write_model(tmp_path / "m.gguf", dense, shapes))):
        config = config_from_gguf(source)
        assert (config.model_type, config.intermediate_size, config.rope_interleave) == ("youtu", 96, True)
    # Where a layer has a router, or is said to have one, the key is missing.
    for facts in ({**TINY_V3, "expert_count": 0}, {**dense, "leading_dense_block_count": 1}):
        with pytest.raises(GgufFormatError, match=r"deepseek2\.expert_count is"):
            config_from_gguf(metadata(facts))


def test_token_ids_reach_both_configs() -> None:
    ids = {"bos": 0, "eos": 1, "padding": 2}
    source = metadata(TINY_V3, **{f"tokenizer.ggml.{which}_token_id": number for which, number in ids.items()})
    for config in (config_from_gguf(source), generation_config_from_gguf(source)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_every_token_that_ends_a_turn_ends_generation() -> None:
    ids = {"eos": 1, "eot": 7, "eom": 1, "bos": 0xFFFFFFFF}
    source = metadata(TINY_V3, **{f"tokenizer.ggml.{which}_token_id": number for which, number in ids.items()})
    generation = generation_config_from_gguf(source)
    assert generation.eos_token_id == [1, 7]
    assert generation.bos_token_id is None
    assert generation.pad_token_id is None


def test_without_token_ids_there_are_none() -> None:
    config = config_from_gguf(metadata(TINY_V3))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize("architecture", ["llama", "deepseek", "deepseek2-ocr", "clip", None, 7])
def test_another_architecture_is_named_with_what_is_accepted(architecture: Any) -> None:
    source = {**metadata(TINY_V3), "general.architecture": architecture}
    with pytest.raises(UnsupportedModelError, match=rf"general\.architecture is {architecture!r}; deepseek2"):
        config_from_gguf(source)
    with pytest.raises(UnsupportedModelError):
        generation_config_from_gguf({})


def test_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: general\.architecture is 'llama'"):
        config_from_gguf(GgufFile(write_model(tmp_path / "m.gguf", {}, {}, architecture="llama")))


REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "expert_feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "attention.kv_lora_rank",
    "attention.value_length_mla",
    "rope.dimension_count",
    "expert_count",
    "expert_used_count",
    "expert_shared_count",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(GgufFormatError, match=rf"deepseek2\.{key} is missing"):
        config_from_gguf(metadata({name: value for name, value in TINY_V3.items() if name != key}))


@pytest.mark.parametrize("nonsense", [0, -1, 2**40, 2**64 - 1, "many", 1.5, float("nan"), True, [1, 2], b"x"])
@pytest.mark.parametrize("key", [key for key in REQUIRED if "epsilon" not in key])
def test_a_number_that_makes_no_sense_is_named(key: str, nonsense: Any) -> None:
    with pytest.raises(GgufFormatError, match=rf"deepseek2\.{key} is "):
        config_from_gguf(metadata({**TINY_V3, key: nonsense}))


@pytest.mark.parametrize(
    ("key", "nonsense"),
    [
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", float("inf")),
        ("rope.dimension_count", 5),
        ("rope.freq_base", -1.0),
        ("rope.freq_base", 1.0),
        ("rope.freq_base", 10**31),
        ("rope.scaling.factor", 1e9),
        ("rope.scaling.yarn_beta_fast", 1e-30),
        ("rope.scaling.factor", float("nan")),
        ("rope.scaling.factor", 0.5),
        ("rope.scaling.factor", "4"),
        ("rope.scaling.original_context_length", 0),
        ("rope.scaling.yarn_beta_fast", 0.0),
        ("expert_weights_scale", 0.0),
        ("expert_weights_scale", float("nan")),
        ("expert_weights_norm", 1),
        ("expert_used_count", 9),
        ("expert_group_count", 3),
        ("expert_group_count", 8),
        ("expert_group_used_count", 5),
        ("expert_group_count", "4"),
        ("leading_dense_block_count", 4),
        ("nextn_predict_layers", 3),
        ("attention.key_length_mla", 8),
        ("attention.q_lora_rank", -3),
        ("expert_gating_func", -1),
    ],
)
def test_a_value_out_of_range_is_named(key: str, nonsense: Any) -> None:
    with pytest.raises(GgufFormatError, match=rf"deepseek2\.{key} is {nonsense!r}"):
        config_from_gguf(metadata({**TINY_V3, key: nonsense}))


@pytest.mark.parametrize(
    ("facts", "key", "value"),
    [
        (TINY_V3, "expert_gating_func", 3),
        (TINY_V3, "attention.temperature_scale", 0.1),
        (TINY_V3, "rope.scaling.type", "none"),
        (TINY_V3, "rope.scaling.type", "longrope"),
        (TINY_V3, "rope.scaling.yarn_attn_factor", 2.0),
        (TINY_V3, "rope.scaling.yarn_ext_factor", 0.5),
        (TINY_V3, "attention.head_count_kv", 2),
    ],
)
def test_a_feature_the_models_lack_is_refused(facts: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"deepseek2\.{key} is {value!r}"):
        config_from_gguf(metadata({**facts, key: value}))


def test_a_config_that_transformers_refuses_is_our_error() -> None:
    with pytest.raises(GgufFormatError, match="not a multiple of the number of attention"):
        config_from_gguf(metadata({**TINY_V2, "embedding_length": 63}))


NUMBERS = st.integers(-(2**63), 2**64) | st.integers(0, 70) | st.floats()
ARRAYS = st.lists(st.integers(-2, 70), max_size=3).map(np.array)
VALUES = NUMBERS | ARRAYS | st.text(max_size=3) | st.booleans() | st.none()
KEYS = sorted({*metadata(TINY_V3), "deepseek2.nextn_predict_layers", "tokenizer.ggml.eos_token_id"})


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_only_our_errors_come_out_of_any_metadata(changed: dict[str, Any]) -> None:
    source = {**metadata(TINY_V3), **changed}
    for read in (config_from_gguf, generation_config_from_gguf):
        said = refusal(lambda read=read: read(source))  # type: ignore[misc]
        assert said is None or any(key in said for key in ("deepseek2.", "tokenizer.", "general.architecture"))
