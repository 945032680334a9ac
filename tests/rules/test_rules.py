"""The language of kt_rules, on a small tree of torch modules."""

from __future__ import annotations

from typing import Any

import pytest
from rules_model import LINEARS, OPERATIONS, TREE, devices_of, message_of, plan_of, rule

from transformers_kt.errors import RuleError
from transformers_kt.rules import PlanEntry, load_rules, make_plan
from transformers_kt.rules.devices import Spread

# --- What a plan says ---


def test_auto_takes_the_coarsest_operation_that_stands_for_a_class() -> None:
    plan = make_plan(TREE, load_rules("auto", OPERATIONS), OPERATIONS)
    found = {entry.module: entry.op for entry in plan.entries}
    assert found["layers.0.attn"] == "attention_cpu"
    assert "layers.0.attn.q_proj" not in found
    assert found["layers.0.mlp.up"] == "linear_cpu"


def test_auto_keeps_what_no_operation_stands_for() -> None:
    found = plan_of(rule("auto", name=""))
    assert found["embed"] == "torch"
    assert found["norm"] == "torch"


def test_auto_does_not_take_a_subclass_for_its_base() -> None:
    found = plan_of(rule("auto", name=""))
    assert "layers.1.attn" not in found
    assert found["layers.1.attn.q_proj"] == "linear_cpu"


def test_auto_leaves_out_what_it_is_told_to_and_goes_on_below() -> None:
    found = plan_of(rule("auto", name=""), not_by_itself=["attention"])
    assert found["layers.0.attn.q_proj"] == "linear_cpu"


def test_a_rule_that_names_an_operation_gets_it_where_auto_may_not() -> None:
    found = plan_of(rule("attention_cpu", name=r"0\.attn$"), not_by_itself=["attention"])
    assert found["layers.0.attn"] == "attention_cpu"


def test_the_first_rule_that_matches_decides() -> None:
    found = plan_of(rule("torch", name="mlp"), rule("linear_cpu", **{"class": "torch.nn.Linear"}))
    assert found["layers.0.mlp.up"] == "torch"
    assert found["layers.0.attn.q_proj"] == "linear_cpu"


def test_a_name_is_searched_not_anchored() -> None:
    found = plan_of(rule("linear_cpu", name="q_pr"))
    assert [module for module, op in found.items() if op == "linear_cpu"] == [
        "layers.0.attn.q_proj",
        "layers.1.attn.q_proj",
    ]


def test_a_class_matches_its_subclasses() -> None:
    found = plan_of(rule("attention_cpu", **{"class": "rules_model.Attention"}))
    assert found["layers.1.attn"] == "attention_cpu"


def test_a_class_is_found_by_the_name_it_is_defined_under_and_by_the_name_it_is_exported_under() -> None:
    by_export = plan_of(rule("linear_cpu", **{"class": "torch.nn.Linear"}))
    by_definition = plan_of(rule("linear_cpu", **{"class": "torch.nn.modules.linear.Linear"}))
    assert by_export == by_definition
    assert [module for module in by_export if by_export[module] == "linear_cpu"] == LINEARS


def test_name_and_class_must_both_match() -> None:
    found = plan_of(rule("linear_cpu", name="attn", **{"class": "torch.nn.Linear"}))
    assert found["layers.0.attn.q_proj"] == "linear_cpu"
    assert found["layers.0.mlp.up"] == "torch"


def test_the_walk_ends_at_a_replaced_module() -> None:
    found = plan_of(rule("attention_cpu", name=r"0\.attn$"))
    assert not any(module.startswith("layers.0.attn.") for module in found)


def test_the_walk_goes_on_inside_a_kept_module() -> None:
    found = plan_of(rule("torch", name=r"0\.attn$"), rule("linear_cpu", name="q_proj"))
    assert found["layers.0.attn.q_proj"] == "linear_cpu"


def test_recursive_false_ends_the_walk_at_a_kept_module() -> None:
    found = plan_of(rule("torch", name=r"0\.attn$", recursive=False), rule("linear_cpu", name="q_proj"))
    assert found["layers.0.attn.q_proj"] == "torch"
    assert found["layers.0.attn.o_proj"] == "torch"
    assert found["layers.1.attn.q_proj"] == "linear_cpu"


def test_a_module_without_a_rule_stays_stock() -> None:
    found = plan_of(rule("linear_cpu", name="q_proj"))
    assert found["layers.0.mlp.up"] == "torch"


@pytest.mark.parametrize("replace", ["default", {"op": "default"}, {"op": "torch"}, "torch"])
def test_default_is_another_word_for_torch(replace: Any) -> None:
    found = plan_of({"match": {"name": "mlp"}, "replace": replace}, rule("linear_cpu", name="proj"))
    assert found["layers.0.mlp.up"] == "torch"


def test_an_entry_says_which_rule_decided() -> None:
    plan = make_plan(
        TREE, load_rules([rule("torch", name="mlp"), rule("linear_cpu", name="q_")], OPERATIONS), OPERATIONS
    )
    assert PlanEntry("layers.0.mlp.up", "torch", "cpu", 1) in plan.entries
    assert PlanEntry("layers.0.attn.q_proj", "linear_cpu", "cpu", 2) in plan.entries
    assert PlanEntry("norm", "torch", "cpu", None) in plan.entries


def test_a_plan_lists_the_modules_in_the_order_of_the_tree() -> None:
    assert list(plan_of(rule("linear_cpu", **{"class": "torch.nn.Linear"}))) == ["embed", *LINEARS, "norm"]


# --- Where things lie ---


def on(device: str, **match: Any) -> dict[str, Any]:
    return {"match": match, "replace": {"device": device}}


def test_a_rule_with_a_device_alone_takes_the_usual_operation_there() -> None:
    plan = make_plan(TREE, load_rules([on("cuda:1", name="")], OPERATIONS), OPERATIONS)
    found = {entry.module: (entry.op, entry.device) for entry in plan.entries}
    assert found["layers.0.attn"] == ("attention_gpu", "cuda:1")
    assert found["layers.1.mlp.up"] == ("linear_gpu", "cuda:1")
    assert found["norm"] == ("torch", "cuda:1")


def test_a_rule_without_a_device_means_the_cpu() -> None:
    assert set(devices_of(rule("auto", name="")).values()) == {"cpu"}


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        ({"op": "linear"}, ("linear_cpu", "cpu")),
        ({"op": "linear_cpu"}, ("linear_cpu", "cpu")),
        ({"op": "linear_gpu"}, ("linear_gpu", "cuda:0")),
        ({"op": "linear", "device": "cuda"}, ("linear_gpu", "cuda:0")),
        ({"op": "linear_gpu", "device": "cuda:2"}, ("linear_gpu", "cuda:2")),
        ({"op": "torch", "device": "cuda:2"}, ("torch", "cuda:2")),
        ({"device": 3}, ("linear_gpu", "cuda:3")),
        ({"device": "cpu"}, ("linear_cpu", "cpu")),
    ],
)
def test_kind_and_device_make_the_operation(replace: dict[str, Any], expected: tuple[str, str]) -> None:
    rules = load_rules([{"match": {"name": "up$"}, "replace": replace}], OPERATIONS)
    entries = {entry.module: entry for entry in make_plan(TREE, rules, OPERATIONS).entries}
    assert (entries["layers.0.mlp.up"].op, entries["layers.0.mlp.up"].device) == expected


@pytest.mark.parametrize("layers", [1, "1", "1-5", "1-", [1], ["1-2", 7], "7,1"])
def test_layers_narrow_a_match(layers: Any) -> None:
    found = devices_of(on("cuda:0", name="up$", layers=layers))
    assert found["layers.0.mlp.up"] == "cpu"
    assert found["layers.1.mlp.up"] == "cuda:0"


def test_layers_alone_are_a_match() -> None:
    found = devices_of(on("cuda:0", layers=0))
    assert {module for module, device in found.items() if device != "cpu"} == {"layers.0.attn", "layers.0.mlp.up"}


@pytest.mark.parametrize("layers", ["", "x", "3-1", -1, 1.5, None, [], [[]], True, "1-2-3", {}])
def test_layers_that_are_none_are_refused(layers: Any) -> None:
    assert "match.layers is" in message_of(on("cuda:0", layers=layers))


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    assert "no module matches layers 2-" in message_of(on("cuda:0", layers="2-"))


def test_layers_are_split_evenly_over_devices() -> None:
    found = devices_of(on("cuda*2", name=""))
    assert found["embed"] == found["layers.0.attn"] == "cuda:0"
    assert found["layers.1.mlp.up"] == found["norm"] == "cuda:1"


@pytest.mark.parametrize(("spread", "expected"), [("cuda*0", {"cpu"}), ("cuda*1", {"cuda:0"})])
def test_a_split_over_one_or_none_is_a_device(spread: str, expected: set[str]) -> None:
    assert set(devices_of(on(spread, name="")).values()) == expected


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [(61, 4, [16, 15, 15, 15]), (61, 8, [8, 8, 7, 8, 8, 7, 8, 7]), (2, 4, [1, 0, 1]), (5, 2, [3, 2])],
)
def test_a_split_is_even_to_one_layer(layers: int, count: int, expected: list[int]) -> None:
    found = [Spread("cuda", count).device(row, layers) for row in range(layers)]
    assert found == sorted(found)
    assert [found.count(f"cuda:{index}") for index in range(len(expected))] == expected


def test_a_split_goes_over_the_layers_of_the_rule() -> None:
    found = devices_of(on("cuda*2", name="up$", layers=1))
    assert found["layers.1.mlp.up"] == "cuda:0"


@pytest.mark.parametrize(
    "device", ["gpu", "cuda:-1", "cuda:1x", "CPU", "", "cpu*2", "cuda*x", "cuda*", -1, True, None, []]
)
def test_a_device_that_is_none_is_refused(device: Any) -> None:
    assert "replace.device is" in message_of(on(device, name=""))


# --- Which rule speaks of what ---


def test_a_rule_speaks_of_all_that_is_inside() -> None:
    found = devices_of(on("cuda:0", name=r"layers\.0$"))
    assert found["layers.0.attn"] == found["layers.0.mlp.up"] == "cuda:0"
    assert found["layers.1.mlp.up"] == "cpu"


def test_of_rules_for_outside_and_inside_the_first_decides() -> None:
    outer, inner = on("cuda:0", name=r"layers\.0$"), on("cuda:1", name="q_proj")
    assert devices_of(inner, outer)["layers.0.attn.q_proj"] == "cuda:1"
    found = devices_of(outer, inner)
    assert found["layers.0.attn"] == "cuda:0"
    assert found["layers.1.attn.q_proj"] == "cuda:1"


def test_a_module_whose_parts_lie_apart_is_no_one_operation() -> None:
    found = plan_of(on("cuda:0", name="q_proj"), rule("auto", name=""))
    assert found["layers.0.attn.q_proj"] == "linear_gpu"
    assert found["layers.0.attn.o_proj"] == "linear_cpu"


def test_a_module_whose_parts_came_together_is_one_operation() -> None:
    assert plan_of(on("cpu", name="q_proj"), rule("auto", name=""))["layers.0.attn"] == "attention_cpu"


def test_an_op_by_name_is_an_order_that_no_coarser_operation_takes_in() -> None:
    found = plan_of(rule("linear", name="q_proj"), rule("auto", name=""))
    assert found["layers.0.attn.q_proj"] == found["layers.0.attn.o_proj"] == "linear_cpu"
    assert plan_of(rule("torch", name="q_proj"), rule("auto", name=""))["layers.0.attn.q_proj"] == "torch"


def test_recursive_false_lets_no_other_rule_look_inside() -> None:
    found = devices_of(
        {**on("cuda:0", name=r"0\.attn$"), "recursive": False}, on("cuda:1", name="q_proj"), rule("auto", name="")
    )
    assert found["layers.0.attn"] == "cuda:0"
    assert found["layers.1.attn.q_proj"] == "cuda:1"


def test_a_rule_whose_modules_are_all_inside_an_earlier_one_is_refused() -> None:
    message = message_of(on("cuda:0", name=r"attn$"), on("cuda:1", name="q_proj"))
    assert "rule 2 decides nothing" in message
    assert "lies inside a module, layers.0.attn, of which rule 1 speaks as a whole" in message
    assert "Put it above rule 1" in message


def test_a_rule_for_nothing_that_holds_weights_is_refused() -> None:
    message = message_of(rule("torch", name="up"), rule("torch", name="proj"), on("cuda:0", name=r"layers\.0\.mlp$"))
    assert "layers.0.mlp, holds no weights, or none that no other rule decides about" in message


# --- Device maps ---


def test_a_device_map_goes_before_the_devices_of_rules() -> None:
    found = devices_of(on("cuda:1", name=""), device_map={"": "cpu", "layers.1": "cuda:3", "layers.1.mlp": 2})
    assert found["embed"] == found["layers.0.attn"] == "cpu"
    assert found["layers.1.attn.q_proj"] == "cuda:3"
    assert found["layers.1.mlp.up"] == "cuda:2"


def test_what_a_device_map_does_not_name_goes_by_the_rules() -> None:
    found = devices_of(on("cuda:1", name=""), device_map={"norm": "cpu"})
    assert found["norm"] == "cpu"
    assert found["embed"] == "cuda:1"


def test_auto_follows_a_device_map_with_the_coarsest_operation_that_lies_whole() -> None:
    def plan(device_map: dict[str, str]) -> dict[str, str]:
        found = make_plan(TREE, load_rules("auto", OPERATIONS), OPERATIONS, device_map=device_map)
        return {entry.module: entry.op for entry in found.entries}

    assert plan({"": "cuda:0"})["layers.0.attn"] == "attention_gpu"
    apart = plan({"": "cuda:0", "layers.0.attn.q_proj": "cpu"})
    assert apart["layers.0.attn.q_proj"] == "linear_cpu"
    assert apart["layers.0.attn.o_proj"] == "linear_gpu"


def test_a_device_map_moves_an_operation_that_a_rule_names() -> None:
    assert plan_of(rule("linear_cpu", name="q_proj"), device_map={"": "cuda"})["layers.0.attn.q_proj"] == "linear_gpu"


def test_a_device_map_cannot_divide_what_a_rule_gives_to_one_operation() -> None:
    with pytest.raises(RuleError, match=r"rule 1 gives layers.0.attn to attention as a whole, but device_map puts"):
        plan_of(rule("attention", name=r"0\.attn$"), device_map={"": "cpu", "layers.0.attn.q_proj": "cuda:0"})


def test_a_device_map_with_something_else_in_it_is_refused() -> None:
    with pytest.raises(RuleError, match=r"device_map: 'norm' is on 'floppy'"):
        plan_of(rule("auto", name=""), device_map={"norm": "floppy"})


# --- What is refused ---


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"match": {"name": "x"}, "replce": {"op": "torch"}}, ["'replce'", "did you mean 'replace'?"]),
        ({"match": {"nmae": "x"}, "replace": {"op": "torch"}}, ["match", "'nmae'", "did you mean 'name'?"]),
        ({"match": {"name": "x"}, "replace": {"oop": "torch"}}, ["replace", "'oop'", "did you mean 'op'?"]),
        ({"match": {"name": "x"}, "replace": {"op": "liner_cpu"}}, ["'liner_cpu'", "did you mean 'linear_cpu'?"]),
        (
            {"match": {"name": "x"}, "replace": {}},
            ["neither op nor device", "linear, attention (each with _cpu or _gpu too), auto, torch, default"],
        ),
        ({"match": {"name": "x"}, "replace": {"op": ["torch"]}}, ["unknown op ['torch']"]),
        ({"match": {"name": "x"}}, ["has no 'replace'"]),
        ({"replace": {"op": "torch"}}, ["has no 'match'"]),
        ({"match": {}, "replace": {"op": "torch"}}, ["match is empty", "name or class or layers"]),
        ({"match": "x", "replace": {"op": "torch"}}, ["match is 'x'", "a mapping of name, class, layers"]),
        ({"match": {"name": 3}, "replace": {"op": "torch"}}, ["match.name is 3", "a string"]),
        ({"match": {"name": "("}, "replace": {"op": "torch"}}, ["no valid regex", "'('"]),
        ({"match": {"name": "x"}, "replace": {"op": "torch"}, "recursive": "no"}, ["recursive is 'no'"]),
        ("torch", ["is 'torch'", "a mapping of match, replace, recursive"]),
    ],
)
def test_a_broken_rule_is_refused_by_number_and_with_what_is_accepted(broken: Any, said: list[str]) -> None:
    message = message_of(rule("torch", name="norm"), broken)
    assert "kt_rules, rule 2" in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("kt_rules", [[], {"match": {}}, 3])
def test_what_is_no_list_of_rules_is_refused(kt_rules: Any) -> None:
    with pytest.raises(RuleError, match=r"kt_rules holds"):
        load_rules(kt_rules, OPERATIONS)


def test_a_rule_that_matches_nothing_is_refused_with_names_that_would_match() -> None:
    message = message_of(rule("torch", name="norm"), rule("linear_cpu", name=r"experts$"))
    assert "kt_rules, rule 2 decides nothing" in message
    assert r"name 'experts$'" in message
    assert "layers.0.attn.q_proj" in message


def test_a_rule_whose_class_is_not_there_is_refused() -> None:
    assert "class torch.nn.Conv1d" in message_of(rule("linear_cpu", **{"class": "torch.nn.Conv1d"}))


def test_a_shadowed_rule_is_refused_with_the_rule_that_shadows_it() -> None:
    message = message_of(rule("torch", name="attn"), rule("linear_cpu", name="q_proj"))
    assert "rule 2 decides nothing" in message
    assert "layers.0.attn.q_proj, is taken by rule 1" in message


def test_a_rule_for_the_inside_of_a_replaced_module_is_refused() -> None:
    message = message_of(rule("attention_cpu", **{"class": "rules_model.Attention"}), rule("linear_cpu", name="q_proj"))
    assert "rule 2 decides nothing" in message
    assert "lies inside a module" in message


def test_an_operation_is_refused_for_a_class_it_does_not_stand_for() -> None:
    message = message_of(rule("linear_cpu", name="mlp$"))
    assert "rule 1" in message
    assert "layers.0.mlp, which is a rules_model.Mlp" in message
    assert "torch.nn.modules.linear.Linear" in message


def test_the_whole_model_cannot_be_replaced() -> None:
    operations: Any = {"everything": ("torch.nn.modules.module.Module",)}
    with pytest.raises(RuleError, match="matches the whole model"):
        make_plan(TREE, load_rules([rule("everything", name="")], operations), operations)
