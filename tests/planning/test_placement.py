"""The automatic device map: what each GPU gets, what stays in RAM, and what max_memory and device_map= mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import convert_file_size_to_int
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_kt.errors import RuleError, UnsupportedOperationError
from transformers_kt.planning.costs import FastMemory
from transformers_kt.planning.device_map import (
    PlacementRequest,
    read_device_map,
    read_max_memory,
    require_coverage,
)
from transformers_kt.planning.hardware import Hardware, MemoryLimit, parse_bytes
from transformers_kt.planning.placement import AUTOMATIC_DEVICE_MAPS, auto_device_map, cpu_expert_layers
from transformers_kt.text import longest_prefix

NOTHING_ELSE = FastMemory(kv_cache_per_layer=0, buffers=0)
FAST, EXPERTS, HEAD = 10, 100, 5
LAYERS, DENSE = 6, 1


def sizes(layers: int = LAYERS) -> dict[str, int]:
    """A model of round numbers: FAST per layer, EXPERTS in all layers but the first, HEAD for the head."""
    found = {"model.embed_tokens": 7}
    for layer in range(layers):
        found[f"model.layers.{layer}.self_attn"] = FAST - 1
        if layer >= DENSE:
            found[f"model.layers.{layer}.mlp.experts"] = EXPERTS
        found[f"model.layers.{layer}.input_layernorm"] = 1
    return {**found, "model.norm": 0, "model.rotary_emb": 0, "lm_head": HEAD}


def placed(gpus: list[int], needs: FastMemory = NOTHING_ELSE, **options: Any) -> dict[str, str]:
    return auto_device_map(sizes(), Hardware(tuple(gpus), 10**6), needs, **options)


def device_of(module: str, device_map: dict[str, str]) -> str | None:
    prefix = longest_prefix(module, device_map)
    return None if prefix is None else device_map[prefix]


def experts_on_gpus(device_map: dict[str, str]) -> list[int]:
    names = {layer: f"model.layers.{layer}.mlp.experts" for layer in range(DENSE, LAYERS)}
    return [layer for layer, name in names.items() if device_of(name, device_map) != "cpu"]


def layers_of(device_map: dict[str, str]) -> list[str]:
    return [device_map[f"model.layers.{layer}"] for layer in range(LAYERS)]


# ---- The automatic map -----------------------------------------------------------------------------------------------


def test_without_a_gpu_everything_is_on_the_cpu() -> None:
    assert placed([]) == {"": "cpu"}


def test_what_every_token_reads_goes_to_the_gpu_and_the_embedding_does_not() -> None:
    found = placed([FAST * LAYERS + HEAD])
    assert layers_of(found) == ["cuda:0"] * LAYERS
    assert (found["lm_head"], found["model.norm"], found["model.rotary_emb"]) == ("cuda:0",) * 3
    assert found["model.embed_tokens"] == "cpu"
    assert experts_on_gpus(found) == []


def test_memory_that_is_left_takes_the_experts_of_whole_layers_from_the_last_one_back() -> None:
    assert experts_on_gpus(placed([FAST * LAYERS + HEAD + 2 * EXPERTS])) == [4, 5]
    assert experts_on_gpus(placed([FAST * LAYERS + HEAD + 2 * EXPERTS - 1])) == [5]


def test_a_layer_that_lies_on_one_device_whole_is_named_once() -> None:
    found = placed([10**6])
    assert experts_on_gpus(found) == [1, 2, 3, 4, 5]
    assert not [name for name in found if name.endswith("experts")]


def test_layers_that_do_not_fit_are_on_the_cpu_from_the_first_of_them_on() -> None:
    found = placed([3 * FAST + FAST // 2])
    assert layers_of(found) == ["cuda:0"] * 3 + ["cpu"] * 3
    assert found["lm_head"] == "cpu"


def test_room_for_the_cache_of_each_layer_and_for_buffers_is_kept() -> None:
    needs = FastMemory(kv_cache_per_layer=4, buffers=9)
    enough = (FAST + 4) * LAYERS + HEAD + 9
    assert placed([enough], needs)["lm_head"] == "cuda:0"
    assert placed([enough - 1], needs)["lm_head"] == "cpu"


def test_balanced_gpus_share_the_layers_by_their_memory_in_order() -> None:
    assert layers_of(placed([100] * 3, mode="balanced")) == ["cuda:0"] * 2 + ["cuda:1"] * 2 + ["cuda:2"] * 2
    assert layers_of(placed([200, 100], mode="balanced")) == ["cuda:0"] * 4 + ["cuda:1"] * 2


def test_left_to_us_a_gpu_is_used_only_if_it_holds_more_layers_or_experts() -> None:
    def used(gpus: list[int], **options: Any) -> set[str]:
        return {device for device in placed(gpus, **options).values() if device != "cpu"}

    everything = FAST * LAYERS + HEAD + EXPERTS * (LAYERS - DENSE)
    assert used([everything, everything]) == {"cuda:0"}
    assert used([everything - 1, everything]) == {"cuda:0", "cuda:1"}
    assert used([100, 100, 100]) == {"cuda:0"}  # none has room for experts
    assert used([100, 200, 100]) == {"cuda:0", "cuda:1"}
    assert used([100, 100], cpu_layers=LAYERS) == {"cuda:0"}
    assert used([100, 100], cpu_layers=LAYERS - 1) == {"cuda:0", "cuda:1"}
    assert used([50, 50, 50]) == {"cuda:0", "cuda:1"}


def test_shares_give_way_where_only_full_gpus_hold_everything() -> None:
    found = placed([FAST * LAYERS, HEAD + FAST - 1])
    assert layers_of(found) == ["cuda:0"] * 6
    assert found["lm_head"] == "cuda:1"


def test_experts_lie_on_the_gpu_of_their_own_layer() -> None:
    found = placed([FAST * 3 + EXPERTS, FAST * 3 + HEAD + EXPERTS])
    assert experts_on_gpus(found) == [2, 5]
    assert device_of("model.layers.2.mlp.experts", found) == "cuda:0"


def test_sequential_fills_the_first_gpu_first_and_low_0_spares_it() -> None:
    assert layers_of(placed([100, 100], mode="sequential")) == ["cuda:0"] * 6
    assert layers_of(placed([100, 100], mode="balanced_low_0")) == ["cuda:1"] * 6
    assert layers_of(placed([100, 45], mode="balanced_low_0")) == ["cuda:0"] * 2 + ["cuda:1"] * 4


@settings(max_examples=200, deadline=None)
@given(
    gpus=st.lists(st.integers(0, 800), max_size=4),
    cache=st.integers(0, 30),
    buffers=st.integers(0, 30),
    mode=st.sampled_from(AUTOMATIC_DEVICE_MAPS),
)
def test_no_gpu_is_overfull_and_every_module_has_a_device(gpus: list[int], cache: int, buffers: int, mode: str) -> None:
    found = auto_device_map(sizes(), Hardware(tuple(gpus), 0), FastMemory(cache, buffers), mode=mode)
    used = [0] * len(gpus)
    for module, nbytes in sizes().items():
        device = device_of(module, found)
        assert device is not None
        if device != "cpu":
            used[int(device.removeprefix("cuda:"))] += nbytes + cache * module.endswith("self_attn")
    assert all(use + buffers <= gpu for use, gpu in zip(used, gpus, strict=True) if use)


# ---- One integer -----------------------------------------------------------------------------------------------------


def test_kt_cpu_layers_counts_decoder_layers_from_the_first_and_gpu_experts_from_the_last() -> None:
    moe_layers = list(range(DENSE, LAYERS))
    for number, layers_on_gpus in ((0, [1, 2, 3, 4, 5]), (1, [1, 2, 3, 4, 5]), (4, [4, 5]), (6, [])):
        cpu_layers = cpu_expert_layers(LAYERS, moe_layers, number, None)
        assert experts_on_gpus(placed([1000], cpu_layers=cpu_layers)) == layers_on_gpus
    for number, layers_on_gpus in ((0, []), (2, [4, 5]), (5, [1, 2, 3, 4, 5])):
        cpu_layers = cpu_expert_layers(LAYERS, moe_layers, None, number)
        assert experts_on_gpus(placed([1000], cpu_layers=cpu_layers)) == layers_on_gpus


def test_a_number_is_obeyed_whether_it_fits_or_not() -> None:
    assert experts_on_gpus(placed([FAST * LAYERS + HEAD], cpu_layers=3)) == [3, 4, 5]
    assert layers_of(placed([FAST], cpu_layers=3)) == ["cuda:0"] * 6


@pytest.mark.parametrize(("cpu_layers", "gpu_experts"), [(7, None), (-1, None), (None, 6), (True, None), ("3", None)])
def test_a_number_that_the_model_has_no_layers_for_is_refused(cpu_layers: Any, gpu_experts: Any) -> None:
    with pytest.raises(RuleError, match=r"a whole number from 0 to [56] is accepted: the model has"):
        cpu_expert_layers(LAYERS, range(DENSE, LAYERS), cpu_layers, gpu_experts)


def placement_request(**options: Any) -> PlacementRequest:
    asked = ("kt_rules", "device_map", "max_memory")
    return PlacementRequest.read(**{**dict.fromkeys(asked), "kt_rules": "auto", **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kt_rules": "cpu", "kt_cpu_layers": 3}, 'kt_cpu_layers= shapes the placement of kt_rules="auto"'),
        ({"device_map": "cpu", "kt_gpu_experts": 3}, "but device_map= names devices; leave one out"),
        ({"kt_cuda_graph": "no"}, "kt_cuda_graph='no'; True .the default. is accepted, and False"),
    ],
)
def test_an_option_that_says_nothing_or_beside_what_contradicts_it_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RuleError, match=said):
        placement_request(**options)


def test_both_numbers_at_once_are_refused() -> None:
    with pytest.raises(RuleError, match="say the same thing from two ends"):
        cpu_expert_layers(LAYERS, range(DENSE, LAYERS), 1, 1)


# ---- accelerate's words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (None, None),
        ("auto", "auto"),
        ("balanced_low_0", "balanced_low_0"),
        ("cpu", {"": "cpu"}),
        (torch.device("cpu"), {"": "cpu"}),
        (1, {"": "cuda:1"}),
        ("cuda", {"": "cuda:0"}),
        (torch.device("cuda", 2), {"": "cuda:2"}),
        ({"": "cpu", "lm_head": 0, "model.norm": "cuda:1"}, {"": "cpu", "lm_head": "cuda:0", "model.norm": "cuda:1"}),
    ],
)
def test_device_map_is_read_as_accelerate_reads_it(said: Any, meant: Any) -> None:
    assert read_device_map(said) == meant


@pytest.mark.parametrize("said", ["gpu", "cuda:x", "", -1, True, 1.5, {"lm_head": "gpu"}, {3: "cpu"}, "meta"])
def test_what_names_no_device_is_refused(said: Any) -> None:
    with pytest.raises(RuleError, match="device_map"):
        read_device_map(said)


def test_weights_on_disk_are_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"device_map\['lm_head'\] is 'disk'"):
        read_device_map({"": "cpu", "lm_head": "disk"})


def test_the_longest_prefix_decides_and_a_part_of_a_name_is_none() -> None:
    device_map = {"model": "cpu", "model.layers.1": "cuda:1", "model.layers.1.mlp.experts": "cpu"}
    assert device_of("model.layers.1.mlp.gate", device_map) == "cuda:1"
    assert device_of("model.layers.1.mlp.experts", device_map) == "cpu"
    assert device_of("model.layers.10.mlp", device_map) == "cpu"
    assert device_of("lm_head", device_map) is None


def test_a_map_that_leaves_modules_out_or_misspells_one_is_refused_with_their_names() -> None:
    modules = ["", "model", "model.norm", "lm_head"]
    require_coverage({"": "cpu"}, modules, modules[2:])
    with pytest.raises(RuleError, match=r'says nothing of lm_head; add them, or ""'):
        require_coverage({"model": "cpu"}, modules, modules[2:])
    with pytest.raises(RuleError, match=r"names 'lm_heat', .*did you mean 'lm_head'"):
        require_coverage({"": "cpu", "lm_heat": "cpu"}, modules, modules[2:])


def test_max_memory_limits_what_there_is_and_leaves_unnamed_gpus_out() -> None:
    limits = placement_request(max_memory={0: "10GiB", "cpu": 5000})
    assert limits.limited(Hardware((24 << 30, 24 << 30), 10**9)) == Hardware((10 << 30, 0), 5000)
    assert limits.tightest(MemoryLimit(10**9, "this machine")) == MemoryLimit(5000, 'max_memory["cpu"]')
    assert limits.tightest(MemoryLimit(10, "this machine")).nbytes == 10
    assert placement_request().limited(Hardware((24 << 30,), 7)) == Hardware((24 << 30,), 7)


@pytest.mark.parametrize("said", ["10GiB", {"cpu": "lots"}, {"cpu": -1}, {"elsewhere": 5}, {"cpu": 1.5}])
def test_a_max_memory_that_is_none_is_refused(said: Any) -> None:
    with pytest.raises(RuleError, match="max_memory"):
        read_max_memory(said)


@pytest.mark.parametrize(
    ("said", "nbytes"),
    [("24GiB", 24 << 30), ("512 GB", 512 * 10**9), ("1.5mib", 3 << 19), (17, 17), ("17", 17), ("2 TiB", 2 << 40)],
)
def test_sizes_are_read_in_binary_and_decimal_units(said: Any, nbytes: int) -> None:
    assert parse_bytes(said, "ram") == nbytes


@pytest.mark.parametrize("said", ["24GiB", "1.5MiB", "512KiB", "512GB", "0.5MB", "7KB", 17])
def test_sizes_mean_what_they_mean_to_accelerate(said: Any) -> None:
    assert parse_bytes(said, "ram") == convert_file_size_to_int(said)


@pytest.mark.parametrize("said", ["", "GiB", "24 GiB each", "-1", -1, True, 1.5, None, "24Gb/s"])
def test_a_size_that_is_none_is_refused(said: Any) -> None:
    with pytest.raises(RuleError, match=r"^ram is "):
        parse_bytes(said, "ram")
