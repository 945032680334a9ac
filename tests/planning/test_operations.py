"""What operations say of themselves, of which plans are made."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from transformers_kt.backends.gpu.panels import LAYOUTS
from transformers_kt.errors import UnsupportedModelError, UnsupportedTypeError
from transformers_kt.families.deepseek.outline import OUTLINE, V2, V3
from transformers_kt.families.tree import TORCH_CLASSES, ModuleNode
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.modules import MODULES
from transformers_kt.planning import operations
from transformers_kt.planning.operations import OPERATIONS

USUAL: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "qk_rope_head_dim": 64,
    "attention_bias": False,
    "topk_method": "greedy",
    "rope_parameters": {"rope_type": "yarn"},
    "num_attention_heads": 4,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "kv_lora_rank": 256,
}


def config(**values: Any) -> Any:
    return SimpleNamespace(**{**USUAL, **values})


def tensor(ggml_type: GgmlType, shape: tuple[int, ...] = (64, 256), nbytes: int = 1000) -> TensorInfo:
    return TensorInfo("t", ggml_type, shape, 0, nbytes, Path("model.gguf"))


def test_every_operation_has_one_module() -> None:
    ours = {op: operation for op, operation in OPERATIONS.items() if operation.backend != "torch"}
    assert {name: module.operation for name, module in MODULES.items()} == ours


def test_every_operation_of_the_cpu_is_planned_for_gpus_too_and_torch_is_one_for_both() -> None:
    backends: dict[str, set[str]] = {}
    for operation in OPERATIONS.values():
        backends.setdefault(operation.kind, set()).add(operation.backend)
    assert backends.pop("torch") == {"torch"}
    assert set(map(frozenset, backends.values())) == {frozenset({"cpu", "gpu"})}
    assert all(operation.op == op for op, operation in OPERATIONS.items())


def test_operations_replace_classes_that_the_models_have() -> None:
    for name in (name for operation in OPERATIONS.values() for name in operation.replaces):
        module, _, cls = name.rpartition(".")
        assert hasattr(importlib.import_module(module), cls), name
        assert OUTLINE.knows_class(name) or module.split(".")[2] in ("deepseek_v32", "youtu")  # have no outline


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_operation_stands_for_its_classes_in_a_usual_config(op: str) -> None:
    for name in OPERATIONS[op].replaces:
        OPERATIONS[op].require_supported(ModuleNode((name,)), config(), "layers.0.it")


@pytest.mark.parametrize(
    ("op", "values", "said"),
    [
        ("attention_cpu", {"attention_bias": True}, "attention_bias is set"),
        ("attention_cpu", {"rope_interleave": False}, "rope_interleave is off"),
        ("moe_cpu", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ("moe_cpu", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported: greedy, group_limited_greedy"),
        ("mlp_cpu", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("experts_cpu", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("rotary_cpu", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'; supported: default"),
    ],
)
def test_what_an_operation_does_not_compute_is_refused_with_the_modules_name(
    op: str, values: dict[str, Any], said: str
) -> None:
    node = ModuleNode((OPERATIONS[op].replaces[0],))
    with pytest.raises(UnsupportedModelError, match=rf"^layers\.0\.it: {said}"):
        OPERATIONS[op].require_supported(node, config(**values), "layers.0.it")


def test_only_the_router_of_v2_has_methods() -> None:
    OPERATIONS["moe_cpu"].require_supported(ModuleNode((V3 + "DeepseekV3MoE",)), config(topk_method="noaux_tc"), "mlp")
    assert OPERATIONS["moe_cpu"].replaces[:2] == (V2 + "DeepseekV2Moe", V3 + "DeepseekV3MoE")


def test_a_linear_layer_with_a_bias_is_refused() -> None:
    node = ModuleNode((TORCH_CLASSES["Linear"],), parameters=("weight", "bias"))
    with pytest.raises(UnsupportedModelError, match="head: linear layers with a bias"):
        OPERATIONS["linear_cpu"].require_supported(node, config(), "head")


def test_matrices_need_kernels_but_those_that_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(operations.KERNEL_TYPES, int(GgmlType.Q2_K))
    unpacked = tensor(GgmlType.Q2_K)
    for op, role in (("linear_cpu", "weight"), ("moe_cpu", "experts.up"), ("attention_cpu", "o_proj.weight")):
        with pytest.raises(UnsupportedTypeError, match="has type Q2_K, for which there is no kernel"):
            OPERATIONS[op].check_types({role: unpacked}, "it")
    OPERATIONS["moe_cpu"].check_types({"gate.weight": unpacked}, "it")
    OPERATIONS["embedding_cpu"].check_types({"weight": unpacked}, "it")
    OPERATIONS["norm_cpu"].check_types({"weight": tensor(GgmlType.Q2_K, (256,))}, "it")


@pytest.mark.parametrize(("ggml_type", "float_bytes"), [(GgmlType.Q4_K, 2), (GgmlType.F16, 2), (GgmlType.BF16, 4)])
def test_the_key_half_of_kv_b_counts_as_floats(ggml_type: GgmlType, float_bytes: int) -> None:
    tensors = {"kv_b_proj.weight": tensor(ggml_type, (4 * 128, 256), 80_000), "o_proj.weight": tensor(ggml_type)}
    found = OPERATIONS["attention_cpu"].memory_needed(tensors, config())
    assert found == 1000 + 80_000 / 2 + 4 * 64 * 256 * float_bytes


def test_the_key_half_of_kv_b_alone_is_float16_where_its_type_has_no_kernel() -> None:
    for ggml_type, nbytes in ((GgmlType.Q8_0, 1000), (GgmlType.IQ1_S, 1000), (GgmlType.Q8_K, 4 * 64 * 256 * 2)):
        half = {"kv_b_proj.k_b": tensor(ggml_type, (4, 64, 256))}
        for name, device in (("attention_cpu", "cpu"), ("attention_gpu", "cuda:0")):
            assert OPERATIONS[name].memory_needed(half, config(), device) == nbytes


def test_gpus_read_every_type_that_the_cpu_does() -> None:
    assert set(LAYOUTS) == set(operations.KERNEL_TYPES.values())


def test_what_stays_stock_counts_as_float32_on_the_cpu_and_in_16_bits_on_a_gpu_where_the_file_has_blocks() -> None:
    for ggml_type, on_gpu in ((GgmlType.Q4_K, 2), (GgmlType.F16, 2), (GgmlType.F32, 4)):
        tensors = {"weight": tensor(ggml_type)}
        assert OPERATIONS["torch"].memory_needed(tensors, config(), "cpu") == 64 * 256 * 4
        assert OPERATIONS["torch"].memory_needed(tensors, config(), "cuda:0") == 64 * 256 * on_gpu


def test_a_linear_layer_counts_what_merging_the_halves_of_kv_b_takes() -> None:
    halves = {role: tensor(GgmlType.F16, shape) for role, shape in (("k_b", (2, 64, 16)), ("v_b", (2, 16, 64)))}
    with torch.device("meta"):
        stock = nn.Linear(64, 64, bias=False)
    linear = MODULES["linear_cpu"].from_module(stock, config(), "kv_b_proj")
    taken = linear.load(halves, lambda info, *_: np.zeros(2 * math.prod(info.shape), dtype=np.uint8))
    assert OPERATIONS["linear_cpu"].memory_needed(halves, config()) == taken
