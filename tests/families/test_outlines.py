"""Outlines are the trees of the models that transformers makes, and stand aside where they might not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

from transformers_kt.assets import bundled_model
from transformers_kt.families.deepseek.outline import OUTLINE, SEEN
from transformers_kt.families.from_gguf import config_values
from transformers_kt.families.outline import digest
from transformers_kt.families.plain_config import plain_config
from transformers_kt.families.tree import TORCH_CLASSES, dotted, tree_of
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.rules.matching import is_subclass

V2_SIZES = {"num_hidden_layers": 60, "first_k_dense_replace": 1, "num_experts_per_tok": 6}
LITE_SIZES = {"num_hidden_layers": 27, "first_k_dense_replace": 1, "num_experts_per_tok": 6, "q_lora_rank": None}
CONFIGS: dict[str, Any] = {
    "V3": DeepseekV3Config(),
    "V3 without low-rank queries": DeepseekV3Config(num_hidden_layers=4, q_lora_rank=None),
    "V3, all dense": DeepseekV3Config(num_hidden_layers=3, first_k_dense_replace=3),
    "V3, none dense": DeepseekV3Config(num_hidden_layers=3, first_k_dense_replace=0),
    "V3, embeddings double as the head": DeepseekV3Config(num_hidden_layers=2, tie_word_embeddings=True),
    "V2": DeepseekV2Config(**V2_SIZES),
    "V2-Lite": DeepseekV2Config(**LITE_SIZES),
    "GLM-4.7-Flash": Glm4MoeLiteConfig(),
    "GLM-4.7-Flash, layers in another order": Glm4MoeLiteConfig(
        num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"], first_k_dense_replace=3
    ),
}


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_outline_is_the_tree_of_the_model_that_transformers_makes(name: str) -> None:
    """Paths and their order, classes with all they derive from, names of parameters and buffers and whose they are."""
    config = CONFIGS[name]
    found, expected = OUTLINE.make(config), tree_of(skeleton(config))  # also of a transformers that is not in SEEN
    assert found is not None
    assert [path for path, _ in found.modules()] == [path for path, _ in expected.modules()]
    for (path, node), (_, real) in zip(found.modules(), expected.modules(), strict=True):
        assert node == real, path
    assert found == expected


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("golden/*.gguf")), ids=lambda path: path.stem)
def test_the_files_of_the_tests_have_outlines(path: Path) -> None:
    config = plain_config(config_values(open_checkpoint(path)))
    assert config is not None
    assert OUTLINE.tree(config) is not None


@pytest.mark.parametrize("name", ["V3", "V2-Lite"])
def test_a_tree_says_what_its_model_saves_and_holds(name: str) -> None:
    config = CONFIGS[name]
    tree, model = tree_of(skeleton(config)), skeleton(config)
    saved = {f"{path}.{tensor}" for path, node in tree.modules() for tensor in node.saved}
    assert saved == set(model.state_dict())
    for path, module in model.named_modules():
        assert tree.at(path).holds_tensors == any(True for _ in (*module.parameters(), *module.buffers())), path
        assert tree.at(path).class_name == dotted(type(module))


@pytest.mark.parametrize("model_type", SEEN)
def test_the_installed_transformers_has_been_seen(model_type: str) -> None:
    """If not: see that the other tests here and those of `plain_config` pass, then add its digest to SEEN."""
    assert digest(model_type) in SEEN[model_type]


def test_a_transformers_that_was_not_seen_has_no_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEEN, "deepseek_v3", ())
    assert OUTLINE.tree(CONFIGS["V3"]) is None
    assert OUTLINE.tree(CONFIGS["V2"]) is not None


@pytest.mark.parametrize("values", [{"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}])
def test_modules_of_other_kinds_have_no_outline(values: dict[str, Any]) -> None:
    assert OUTLINE.tree(DeepseekV2Config(**LITE_SIZES, **values)) is None


# ---- Names of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["V3", "V2", "GLM-4.7-Flash"])
def test_every_class_of_the_models_is_known(name: str) -> None:
    tree = tree_of(skeleton(CONFIGS[name]))
    assert all(OUTLINE.knows_class(cls) for _, node in tree.modules() for cls in node.classes)


def test_names_that_models_may_have_elsewhere_are_not_known() -> None:
    assert not OUTLINE.knows_class("transformers.DeepseekV3ForCausalLM")
    assert not OUTLINE.knows_class("transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Mlp")


def test_the_short_names_of_torchs_classes_stand_for_them() -> None:
    for name, defined in TORCH_CLASSES.items():
        assert dotted(vars(nn)[name]) == defined
        assert is_subclass((defined,), f"torch.nn.{name}")
    assert is_subclass((dotted(nn.Conv1d),), "torch.nn.Conv1d")
    assert not is_subclass((dotted(nn.Conv1d),), "torch.nn.Linear")


def test_the_bundled_model_has_an_outline() -> None:
    config = plain_config(config_values(open_checkpoint(bundled_model())))
    assert config is not None
    assert OUTLINE.tree(config) == tree_of(skeleton(DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=1)))
