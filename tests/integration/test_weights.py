"""Weights that lie in GGUF blocks are counted, and can be read as the stock model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_examples import Example
from transformers import AutoModelForCausalLM

from transformers_kt.errors import InputError, UnsupportedOperationError


@pytest.mark.usefixtures("either_operations")
@pytest.mark.parametrize("kind", ["v2", "v3"])
@pytest.mark.parametrize("exclude_embeddings", [False, True])
def test_parameters_are_counted_as_in_the_stock_model(
    kind: str, exclude_embeddings: bool, request: pytest.FixtureRequest
) -> None:
    example: Example = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(example.folder, kt_rules="auto")
    expected = example.stock.num_parameters(exclude_embeddings=exclude_embeddings)
    assert model.num_parameters(exclude_embeddings=exclude_embeddings) == expected
    assert model.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("name", ["v3-F32", "v2-F16", "v2-mixed", "v3-like-Q4_K_M", "v2-lite-like-Q4_K_M"])
def test_the_weights_of_embeddings_and_head_are_those_of_the_file(
    kt_model: Callable[[str], Any], gguf_file: Callable[[str], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real operations
    model = kt_model(name)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file(name)).tensors}

    def expected(name: str) -> torch.Tensor:
        tensor = stored[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))

    embeddings = expected("token_embd.weight")
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    head = expected("output.weight") if "output.weight" in stored else embeddings
    found = model.get_output_embeddings().weight
    # A unit vector is 127 times 1/127 in int8: three roundings of 2^-24.
    torch.testing.assert_close(found, head, rtol=1e-6, atol=1e-6 * float(head.abs().max()))


def test_a_weight_that_is_written_into_is_refused(
    kt_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    weight = kt_model("v2-mixed").get_output_embeddings().weight
    for write in (
        lambda: weight.mul_(2),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(weight, "data", weight * 2),
    ):
        with pytest.raises(UnsupportedOperationError, match="can be read but not changed"):
            write()


def test_lora_adds_its_product_to_the_packed_one(
    gguf_file: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("v2-mixed"), kt_rules="observable")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
        config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        layer = model.model.layers[0].self_attn.o_proj
        x = torch.randn(1, 3, layer.in_features)
        adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        torch.testing.assert_close(layer(x), layer.base_layer(x) + adapter)
        assert not torch.equal(adapted(ids).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, before)
    with pytest.raises(UnsupportedOperationError, match="leave adapters unmerged"):
        adapted.merge_and_unload()


def test_an_adapter_that_finds_no_layer_is_refused_with_the_rules_that_keep_it(
    kt_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.undo()
    # transformers 5.24 asks for PEFT 0.22 here, which was not on PyPI when 5.24 came out.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    with pytest.raises(UnsupportedOperationError, match='kt_rules="observable"'):
        kt_model("v2-mixed").add_adapter(peft.LoraConfig(r=4, target_modules=["o_proj"]))


def test_load_adapter_gives_the_logits_that_peft_gives(
    gguf_file: Callable[[str], Any], stock_model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers hands the adapter's weights to the method by which ours leaves a model's own to the quantizer."""
    peft = pytest.importorskip("peft")
    monkeypatch.undo()
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(stock_model("v2-mixed")), config).save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    model, other = (AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("v2-mixed")) for _ in range(2))
    with torch.no_grad():
        before = model(ids).logits
        model.load_adapter(str(tmp_path))
        expected = peft.PeftModel.from_pretrained(other, tmp_path).eval()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(expected, before)


def test_prompt_tuning_runs_with_packed_embeddings(
    gguf_file: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it generates is compared with a model of torch's modules alone: PEFT 0.21 counts a token's place wrongly
    from the second on under transformers 5.24, so that both differ from the same embeddings given by hand.
    """
    peft = pytest.importorskip("peft")
    monkeypatch.undo()
    torch_alone = [{"match": {"name": ""}, "replace": {"op": "torch"}}]
    ids = torch.arange(3, 20)[None]
    generated = []
    for rules in (torch_alone, "auto"):
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("v2-mixed"), kt_rules=rules)
        torch.manual_seed(0)
        with torch.no_grad():
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
            tuned = peft.get_peft_model(model, config).eval()
            embedded = torch.cat([tuned.get_prompt(1), model.get_input_embeddings()(ids)], dim=1)
            assert torch.equal(tuned(input_ids=ids).logits, model(inputs_embeds=embedded).logits)
            greedy: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            generated.append(tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy).tolist())
    assert generated[0] == generated[1]


def test_prefix_tuning_is_refused_as_keys_of_another_attention(
    kt_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.undo()
    tuned = peft.get_peft_model(
        kt_model("v2-mixed"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    for tokens in (2, 40):  # in one call and in several
        with pytest.raises(InputError, match=r"keys of shape \(1, \d+, 4, \d+\) for model\.layers\.0\.self_attn"):
            tuned(input_ids=torch.arange(3, 3 + tokens)[None])


def test_the_embedding_is_one_to_who_looks_for_it(kt_model: Callable[[str], Any]) -> None:
    model = kt_model("v2-mixed")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    weight = embedding.weight
    stock = torch.nn.Embedding(*weight.shape, _weight=weight.as_subclass(torch.Tensor))
    assert str(embedding) == str(stock).replace("Embedding", "KtEmbedding")
    assert {name: getattr(embedding, name) for name in stock.__constants__} == {
        name: getattr(stock, name) for name in stock.__constants__
    }
    ids = torch.tensor([[0, 3], [7, 3]])
    assert torch.equal(embedding(ids), stock(ids))
