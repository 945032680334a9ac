"""The table of names fills every weight of transformers' models, once, with names that the converter writes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf_handmade import TINY_V2, TINY_V3, metadata, tiny_tensors
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from transformers_kt.errors import CheckpointError, UnsupportedModelError
from transformers_kt.families.base import TensorSlot
from transformers_kt.families.from_gguf import config_from_gguf
from transformers_kt.families.tensors import check_tensors, tensor_slots

V3_WITHOUT_Q_LORA = {key: value for key, value in TINY_V3.items() if "q_lora" not in key}
V2_WITH_Q_LORA = {**TINY_V2, "attention.q_lora_rank": 48}
ALL_DENSE = {**TINY_V3, "leading_dense_block_count": 3}
NONE_DENSE = {**TINY_V3, "leading_dense_block_count": 0}
KINDS: dict[str, dict[str, Any]] = {
    "v3": TINY_V3,
    "v3_without_q_lora": V3_WITHOUT_Q_LORA,
    "v2_lite": TINY_V2,
    "v2": V2_WITH_Q_LORA,
    "all_dense": ALL_DENSE,
    "none_dense": NONE_DENSE,
}


def config_of(facts: dict[str, Any]) -> Any:
    return config_from_gguf(metadata(facts))


def checkpoint_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    path = SimpleNamespace(name="model-00001-of-00002.gguf")
    return SimpleNamespace(tensors={name: SimpleNamespace(shape=shape, path=path) for name, shape in shapes.items()})


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Parameters and routing biases of the stock model, by name."""
    with torch.device("meta"):
        model = (DeepseekV3ForCausalLM if config.model_type == "deepseek_v3" else DeepseekV2ForCausalLM)(config)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {name: tuple(value.shape) for name, value in {**dict(model.named_parameters()), **buffers}.items()}


def filled_shapes(slots: list[TensorSlot]) -> dict[str, tuple[int, ...]]:
    """What ``slots`` add up to in the stock model's terms: gate and up stacked, the halves of kv_b joined."""
    by_module: dict[str, dict[str, tuple[int, ...]]] = {}
    for slot in slots:
        roles = by_module.setdefault(slot.module, {})
        assert slot.role not in roles, f"{slot.module}.{slot.role} is filled twice"
        roles[slot.role] = slot.shape
    shapes: dict[str, tuple[int, ...]] = {}
    for module, roles in by_module.items():
        match roles:
            case {"gate": gate, "up": up, "down": down}:
                assert gate == up
                shapes[f"{module}.gate_up_proj"] = (gate[0], 2 * gate[1], gate[2])
                shapes[f"{module}.down_proj"] = down
            case {"k_b": (heads, latent, nope), "v_b": (heads_again, value, latent_again)}:
                assert (heads, latent) == (heads_again, latent_again)
                shapes[f"{module}.weight"] = (heads * (nope + value), latent)
            case _:
                shapes |= {f"{module}.{role}": shape for role, shape in roles.items()}
    return shapes


@pytest.mark.parametrize("split_kv_b", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_stock_model_is_filled_once(kind: str, split_kv_b: bool) -> None:
    facts = KINDS[kind]
    config = config_of(facts)
    slots = tensor_slots(config, tiny_tensors(facts, split_kv_b=split_kv_b))
    assert filled_shapes(slots) == model_shapes(config)


@pytest.mark.parametrize("split_kv_b", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_passes_and_is_used_up(kind: str, split_kv_b: bool) -> None:
    shapes = tiny_tensors(KINDS[kind], split_kv_b=split_kv_b)
    slots = check_tensors(checkpoint_of(shapes), config_of(KINDS[kind]))
    assert {slot.gguf_name: slot.shape for slot in slots} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_those_of_the_gguf_package(kind: str) -> None:
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2]}
    for split_kv_b in (False, True):
        for slot in tensor_slots(config_of(KINDS[kind]), tiny_tensors(KINDS[kind], split_kv_b=split_kv_b)):
            stem, suffix = slot.gguf_name.rsplit(".", 1)
            assert re.sub(r"\d+", "{bid}", stem, count=1) in known
            assert suffix == ("bias" if slot.role == "e_score_correction_bias" else "weight")


def test_the_k_half_is_transposed_and_the_v_half_is_not() -> None:
    config = config_of(TINY_V3)
    slots = {slot.role: slot for slot in tensor_slots(config, tiny_tensors(TINY_V3)) if "layers.2" in slot.module}
    assert slots["k_b"] == TensorSlot("blk.2.attn_k_b.weight", "model.layers.2.self_attn.kv_b_proj", "k_b", (4, 32, 16))
    assert slots["v_b"] == TensorSlot("blk.2.attn_v_b.weight", "model.layers.2.self_attn.kv_b_proj", "v_b", (4, 16, 32))


def test_of_both_kv_b_layouts_the_whole_one_is_taken() -> None:
    shapes = {**tiny_tensors(TINY_V3), **tiny_tensors(TINY_V3, split_kv_b=False)}
    used = {slot.gguf_name for slot in check_tensors(checkpoint_of(shapes), config_of(TINY_V3))}
    assert {name for name in shapes if name not in used} == {
        f"blk.{layer}.attn_{half}_b.weight" for layer in range(3) for half in "kv"
    }


def test_half_a_kv_b_is_missing_its_other_half() -> None:
    shapes = tiny_tensors(TINY_V3)
    del shapes["blk.1.attn_v_b.weight"]
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_v_b\.weight is missing"):
        check_tensors(checkpoint_of(shapes), config_of(TINY_V3))


def test_without_an_output_matrix_the_embeddings_double_as_one() -> None:
    shapes = tiny_tensors(TINY_V3)
    del shapes["output.weight"]
    slots = check_tensors(checkpoint_of(shapes), config_of(TINY_V3))
    assert [slot.module for slot in slots if slot.gguf_name == "token_embd.weight"] == ["model.embed_tokens", "lm_head"]


def test_a_model_without_any_correction_bias_is_whole_and_one_without_some_is_not() -> None:
    config = config_of(TINY_V3)
    shapes = tiny_tensors(TINY_V3, bias=False)
    roles = {slot.role for slot in check_tensors(checkpoint_of(shapes), config)}
    assert "e_score_correction_bias" not in roles
    shapes["blk.1.exp_probs_b.bias"] = (8,)
    with pytest.raises(CheckpointError, match=r"blk\.2\.exp_probs_b\.bias is missing"):
        check_tensors(checkpoint_of(shapes), config)


def test_a_correction_bias_has_no_place_in_softmax_routing() -> None:
    shapes = {**tiny_tensors(TINY_V2), "blk.1.exp_probs_b.bias": (8,)}
    with pytest.raises(CheckpointError, match=r"blk\.1\.exp_probs_b\.bias .* is surplus"):
        check_tensors(checkpoint_of(shapes), config_of(TINY_V2))


def test_prediction_layers_are_ignored() -> None:
    shapes = tiny_tensors(TINY_V3)
    extra = {name.replace("blk.2.", "blk.3."): shape for name, shape in shapes.items() if name.startswith("blk.2.")}
    extra |= {"blk.3.nextn.eh_proj.weight": (64, 128), "blk.2.nextn.enorm.weight": (64,)}
    slots = check_tensors(checkpoint_of({**shapes, **extra}), config_of(TINY_V3))
    assert {slot.gguf_name for slot in slots} == set(shapes)


def test_missing_surplus_and_misshapen_tensors_are_reported_together() -> None:
    shapes = tiny_tensors(TINY_V3)
    del shapes["blk.0.ffn_up.weight"]
    shapes["blk.1.attn_q.weight"] = (96, 64)
    shapes["output_norm.weight"] = (65,)
    with pytest.raises(CheckpointError) as caught:
        check_tensors(checkpoint_of(shapes), config_of(TINY_V3))
    message = str(caught.value)
    assert "blk.0.ffn_up.weight is missing (it fills model.layers.0.mlp.up_proj, shape (96, 64))" in message
    assert "blk.1.attn_q.weight in model-00001-of-00002.gguf is surplus" in message
    assert "output_norm.weight in model-00001-of-00002.gguf has shape (65,); the config says (64,)" in message
    assert "more" not in message


def test_a_transposed_stack_is_misshapen() -> None:
    shapes = tiny_tensors(TINY_V3)
    shapes["blk.1.ffn_down_exps.weight"] = (8, 32, 64)
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.* has shape \(8, 32, 64\); .* \(8, 64, 32\)"):
        check_tensors(checkpoint_of(shapes), config_of(TINY_V3))


def test_of_many_problems_some_are_shown_and_the_rest_counted() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(checkpoint_of({}), config_of(TINY_V3))
    total = len(tensor_slots(config_of(TINY_V3), ())) - 2  # the two biases are optional
    assert str(caught.value).count("is missing") == 5
    assert f"and {total - 5} more" in str(caught.value)


DAMAGE_OF_WRITERS = {
    "draft": (
        {"blk.3.nextn.eh_proj.weight": (64, 128), "blk.3.attn_norm.weight": (64,)},
        "multi-token prediction alone",
    ),
    "indexer": ({"blk.0.indexer.k_norm.weight": (64,)}, "indexer of sparse attention"),
    "scales": ({"blk.1.ffn_gate_exps.scale": (8,)}, "scales beside its weights"),
    "one_per_expert": ({"blk.1.ffn_up.3.weight": (32, 64)}, "stacks the experts"),
}


@pytest.mark.parametrize("which", DAMAGE_OF_WRITERS)
def test_the_advice_fits_the_cause(which: str) -> None:
    added, advice = DAMAGE_OF_WRITERS[which]
    shapes = added if which == "draft" else {**tiny_tensors(TINY_V3), **added}
    with pytest.raises(CheckpointError, match=advice) as caught:
        check_tensors(checkpoint_of(shapes), config_of(TINY_V3))
    assert "config of the very model" not in str(caught.value)


def test_one_tensor_per_expert_is_told_to_be_an_old_layout() -> None:
    shapes = {**tiny_tensors(TINY_V3), "blk.1.ffn_gate.0.weight": (32, 64)}
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_gate\.0\.weight .*old layout"):
        check_tensors(checkpoint_of(shapes), config_of(TINY_V3))


def test_a_config_without_experts_per_token_is_refused() -> None:
    """transformers' V2 class has none by default."""
    config = config_of(TINY_V2)
    config.num_experts_per_tok = None
    with pytest.raises(UnsupportedModelError, match="the config has no num_experts_per_tok"):
        check_tensors(checkpoint_of({}), config)
