"""One file makes a family: it plans and loads, its experts on our kernels, and nothing outside it names the models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from toy_qwen import CLASSES, TOY_QWEN
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import transformers_kt
from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families import registry
from transformers_kt.families.from_gguf import config_from_gguf, tokenizer_from_gguf
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.gguf.tokenizer_rules import TokenizerRules
from transformers_kt.modules.experts import KtExperts

# Weights are the same floats in both; what differs is the order of additions in the experts (and, for "auto", in every
# matrix): some 2^-24 of the sums for each, over 3 layers. 5e-6 was the largest difference at a standard deviation of
# 1.6; one matrix rounded to float16 makes 1.7e-3.
FLOAT_TOLERANCE = 3e-5

PACKAGE = Path(transformers_kt.__file__).parent
EXPERTS_ALONE = [
    {"match": {"class": CLASSES + "Experts"}, "replace": {"op": "experts_cpu"}},
    {"match": {"name": ".*"}, "replace": {"op": "torch"}},
]
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "max_position_embeddings": 512,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
IDS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    registry.register(TOY_QWEN)
    yield
    registry.unregister(TOY_QWEN)


@pytest.fixture(scope="module")
def stock() -> Any:
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[-1] ** 0.5
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=spread)
    return model


@pytest.fixture(scope="module")
def path(stock: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with F32 weights, its names by the table of the gguf package."""
    found = tmp_path_factory.mktemp("toy") / "toy.gguf"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, SIZES["num_hidden_layers"])
    writer = gguf.GGUFWriter(found, "qwen3moe")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(stock.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(SIZES["num_experts"])
    writer.add_expert_used_count(SIZES["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(SIZES["moe_intermediate_size"])
    for name, values in tensors_as_published(stock).items():
        writer.add_tensor(f"{names.get_name(name)}.weight", np.ascontiguousarray(values.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def tensors_as_published(stock: Any) -> dict[str, torch.Tensor]:
    """Module path -> weight, gate and up of the experts apart, as converters see them."""
    tensors = {}
    for name, values in stock.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), values.chunk(2, dim=1), strict=True):
                tensors[name.replace("gate_up_proj", part)] = half
        else:
            tensors[name.removesuffix(".weight")] = values
    return tensors


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_rules=EXPERTS_ALONE)


def test_its_experts_are_planned_on_our_kernels_and_the_rest_on_torch(path: Path) -> None:
    rows = transformers_kt.plan(path, kt_rules=EXPERTS_ALONE, gpus=[]).rows
    layers = range(SIZES["num_hidden_layers"])
    assert {row.module for row in rows if row.operation == "experts_cpu"} == {
        f"model.layers.{layer}.mlp.experts" for layer in layers
    }
    assert {row.operation for row in rows} == {"experts_cpu", "torch"}
    per_expert = 3 * SIZES["moe_intermediate_size"] * SIZES["hidden_size"] * 4
    experts = [row for row in rows if row.operation == "experts_cpu"]
    assert [row.nbytes for row in experts] == [SIZES["num_experts"] * per_expert] * len(layers)
    assert [row.read_per_token for row in experts] == [SIZES["num_experts_per_tok"] * per_expert] * len(layers)


def test_its_cache_is_keys_and_values_of_every_layer(path: Path) -> None:
    (cpu,) = transformers_kt.plan(path, gpus=[], context=100).devices
    assert cpu.kv_cache == 100 * SIZES["num_hidden_layers"] * 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * 4


def test_its_automatic_device_map_fills_a_gpu(path: Path) -> None:
    report = transformers_kt.plan(path, gpus=["24GiB"], ram="64GiB")
    assert {row.device for row in report.rows if row.module.endswith("k_proj")} == {"cuda:0"}
    assert next(use for use in report.devices if use.device == "cuda:0").kv_cache > 0


def test_its_config_comes_from_metadata(stock: Any, path: Path) -> None:
    found = config_from_gguf(open_checkpoint(path))
    assert type(found) is Qwen3MoeConfig
    assert {key: getattr(found, key) for key in SIZES} == {key: getattr(stock.config, key) for key in SIZES}
    assert type(AutoConfig.from_pretrained(None, gguf_path=path)) is Qwen3MoeConfig


@torch.no_grad()
@pytest.mark.parametrize("rules", ["experts alone", "auto"])
def test_its_logits_are_those_of_the_stock_model(stock: Any, model: Any, path: Path, rules: str) -> None:
    ours = model if rules == "experts alone" else AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
    kinds = [type(layer.mlp.experts) for layer in ours.model.layers]
    assert kinds == [KtExperts] * SIZES["num_hidden_layers"]
    expected = stock(IDS).logits
    assert expected.std() > 0.5  # otherwise any two tensors would be close
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=0, atol=FLOAT_TOLERANCE)


@torch.no_grad()
def test_it_loads_with_the_config_of_a_folder(stock: Any, path: Path, tmp_path: Path) -> None:
    stock.config.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=path, kt_rules=EXPERTS_ALONE)
    torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, rtol=0, atol=FLOAT_TOLERANCE)


def test_it_generates_the_tokens_of_the_stock_model(stock: Any, model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(IDS, **options)
    got = model.generate(IDS, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(got, expected)


def test_a_missing_tensor_is_named(path: Path, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 4})
    config.save_pretrained(tmp_path)
    with pytest.raises(transformers_kt.KtError, match=r"blk\.3\.attn_norm\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=path)


def test_an_unknown_architecture_is_refused_with_those_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'; deepseek2 \(.*\), qwen3moe \(.*\) are accepted"):
        config_from_gguf({"general.architecture": "gpt2"})


def test_an_unknown_model_type_is_refused_with_those_known(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'; deepseek_v2, .*, kimi_k25 and qwen3_moe are accepted"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=path)


def test_its_tokenizer_rules_are_data() -> None:
    """Letters and digits are cut apart, as the expressions say: no merge joins what they separate."""
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "toy",
        "tokenizer.ggml.tokens": ["a", "b", "1", "ab", "b1"],
        "tokenizer.ggml.merges": ["b 1", "a b"],
    }
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre is 'toy'; deepseek-v3, .* is accepted"):
        tokenizer_from_gguf(facts)
    registry.register(dataclasses.replace(TOY_QWEN, tokenizers={"toy": TokenizerRules((r"\p{N}+",))}))
    try:
        assert tokenizer_from_gguf(facts).tokenize("ab1") == ["ab", "1"]
    finally:
        registry.register(TOY_QWEN)


# ---- Nothing else names the models -----------------------------------------------------------------------------------

_NAME = re.compile(r"(?i:deepseek)|\bV[23]\b")
# The list of families, and data about files of others: rules of KTransformers, the bundled model.
_MAY_NAME_MODELS = ("families/deepseek/", "families/registry.py", "rules/ktransformers.py", "assets/")


FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(_MAY_NAME_MODELS)])
def test_a_model_is_named_by_its_family_alone(name: str) -> None:
    assert _NAME.findall(FILES[name].read_text(encoding="utf-8")) == []
