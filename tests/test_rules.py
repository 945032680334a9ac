"""The language of kt_rules, on a small tree of torch modules."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformers_kt import rules
from transformers_kt.errors import RuleError
from transformers_kt.rules import PlanEntry, bundled_rules, load_rules, make_plan


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.o_proj = nn.Linear(4, 4)


class SlidingAttention(Attention):
    pass


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": attention, "mlp": Mlp()}) for attention in (Attention(), SlidingAttention())
        )
        self.norm = nn.LayerNorm(4)


class LinearOp(nn.Module):
    replaces = (nn.Linear,)


class AttentionOp(nn.Module):
    replaces = (Attention,)


OPERATIONS: Any = {"linear_cpu": LinearOp, "attention_cpu": AttentionOp}

LINEARS = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("attn.q_proj", "attn.o_proj", "mlp.up")]


def plan_of(*rule_dicts: dict[str, Any], **options: Any) -> dict[str, str]:
    plan = make_plan(Model(), load_rules(list(rule_dicts), OPERATIONS), OPERATIONS, **options)
    return {entry.module: entry.op for entry in plan.entries}


def rule(op: str, recursive: bool | None = None, **match: str) -> dict[str, Any]:
    found: dict[str, Any] = {"match": match, "replace": {"op": op}}
    if recursive is not None:
        found["recursive"] = recursive
    return found


def message_of(*rule_dicts: Any) -> str:
    with pytest.raises(RuleError) as caught:
        plan_of(*rule_dicts)
    return str(caught.value)


# --- What a plan says ---


def test_auto_takes_the_coarsest_operation_that_stands_for_a_class() -> None:
    plan = make_plan(Model(), load_rules("auto", OPERATIONS), OPERATIONS)
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
    found = plan_of(rule("auto", name=""), not_by_itself=["attention_cpu"])
    assert found["layers.0.attn.q_proj"] == "linear_cpu"


def test_a_rule_that_names_an_operation_gets_it_where_auto_may_not() -> None:
    found = plan_of(rule("attention_cpu", name=r"0\.attn$"), not_by_itself=["attention_cpu"])
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
    found = plan_of(rule("attention_cpu", **{"class": f"{__name__}.Attention"}))
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
        Model(), load_rules([rule("torch", name="mlp"), rule("linear_cpu", name="q_")], OPERATIONS), OPERATIONS
    )
    assert PlanEntry("layers.0.mlp.up", "torch", "cpu", 1) in plan.entries
    assert PlanEntry("layers.0.attn.q_proj", "linear_cpu", "cpu", 2) in plan.entries
    assert PlanEntry("norm", "torch", "cpu", None) in plan.entries


def test_a_plan_lists_the_modules_in_the_order_of_the_tree() -> None:
    assert list(plan_of(rule("linear_cpu", **{"class": "torch.nn.Linear"}))) == ["embed", *LINEARS, "norm"]


# --- What is refused ---


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"match": {"name": "x"}, "replce": {"op": "torch"}}, ["'replce'", "did you mean 'replace'?"]),
        ({"match": {"nmae": "x"}, "replace": {"op": "torch"}}, ["match", "'nmae'", "did you mean 'name'?"]),
        ({"match": {"name": "x"}, "replace": {"oop": "torch"}}, ["replace", "'oop'", "did you mean 'op'?"]),
        ({"match": {"name": "x"}, "replace": {"op": "liner_cpu"}}, ["'liner_cpu'", "did you mean 'linear_cpu'?"]),
        ({"match": {"name": "x"}, "replace": {}}, ["names no op", "linear_cpu, attention_cpu, auto, torch, default"]),
        ({"match": {"name": "x"}, "replace": {"op": ["torch"]}}, ["unknown op ['torch']"]),
        ({"match": {"name": "x"}}, ["has no 'replace'"]),
        ({"replace": {"op": "torch"}}, ["has no 'match'"]),
        ({"match": {}, "replace": {"op": "torch"}}, ["match is empty", "name or class"]),
        ({"match": "x", "replace": {"op": "torch"}}, ["match is 'x'", "a mapping of name, class"]),
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
    message = message_of(rule("attention_cpu", **{"class": f"{__name__}.Attention"}), rule("linear_cpu", name="q_proj"))
    assert "rule 2 decides nothing" in message
    assert "lies inside a module" in message


def test_an_operation_is_refused_for_a_class_it_does_not_stand_for() -> None:
    message = message_of(rule("linear_cpu", name="mlp$"))
    assert "rule 1" in message
    assert f"layers.0.mlp, which is a {__name__}.Mlp" in message
    assert "torch.nn.modules.linear.Linear" in message


def test_the_whole_model_cannot_be_replaced() -> None:
    class EverythingOp(nn.Module):
        replaces = (nn.Module,)

    operations: Any = {"everything": EverythingOp}
    with pytest.raises(RuleError, match="matches the whole model"):
        make_plan(Model(), load_rules([rule("everything", name="")], operations), operations)


# --- Files ---


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


GOOD_YAML = """
# a comment
- match:
    class: torch.nn.Linear
    name: ^layers\\.0\\..*$
  replace:
    op: linear_cpu

- match: {name: norm}
  replace: default
  recursive: false
"""


def test_a_yaml_file_says_what_a_list_says(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD_YAML)
    from_file = make_plan(Model(), load_rules(path, OPERATIONS), OPERATIONS)
    from_list = make_plan(Model(), load_rules(yaml.safe_load(GOOD_YAML), OPERATIONS), OPERATIONS)
    assert from_file.entries == from_list.entries
    assert from_file.source == str(path)


def test_an_error_in_a_file_names_file_rule_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD_YAML.replace("recursive", "recursiv"))
    with pytest.raises(RuleError) as caught:
        load_rules(str(path), OPERATIONS)
    assert f"{path}, rule 2 (line 9)" in str(caught.value)
    assert "did you mean 'recursive'?" in str(caught.value)


def test_a_rule_of_a_file_that_matches_nothing_is_named_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD_YAML.replace("name: norm", "name: nrom"))
    with pytest.raises(RuleError) as caught:
        make_plan(Model(), load_rules(path, OPERATIONS), OPERATIONS)
    assert f"{path}, rule 2 (line 9) decides nothing" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- match: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("- !!python/object/apply:os.system [true]", "not valid YAML"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("- 2001-99-99", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("", "holds no rules"),
        ("match: {name: x}", "holds a dict"),
        ("just words", "holds a str"),
        ("- &a [*a]", "rule 1 (line 1)"),
    ],
)
def test_a_file_that_is_no_list_of_rules_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RuleError) as caught:
        load_rules(path, OPERATIONS)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_aliases_do_not_make_a_small_file_into_a_long_message(tmp_path: Path) -> None:
    levels = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(RuleError) as caught:
        load_rules(written(tmp_path, "\n".join(levels)), OPERATIONS)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"- \xff\xfe")
    with pytest.raises(RuleError, match="not valid YAML"):
        load_rules(path, OPERATIONS)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "#" * (rules._MOST_YAML_BYTES + 1))
    with pytest.raises(RuleError, match=r"has 1048577 bytes"):
        load_rules(path, OPERATIONS)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"missing\.yaml is no file"):
        load_rules(tmp_path / "missing.yaml", OPERATIONS)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RuleError) as caught:
        load_rules("atuo", OPERATIONS)
    assert "no rules named 'atuo'" in str(caught.value)
    assert "did you mean 'auto'?" in str(caught.value)
    assert "the path of a YAML file, or a list of rules" in str(caught.value)


def test_bundled_rules_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all-linears.yaml").write_text("- {match: {class: torch.nn.Linear}, replace: {op: linear_cpu}}")
    monkeypatch.setattr(rules, "_BUNDLED_RULES", tmp_path)
    assert list(bundled_rules()) == ["all-linears"]
    assert load_rules("all-linears", OPERATIONS).rules[0].op == "linear_cpu"


def test_reading_rules_imports_nothing(tmp_path: Path) -> None:
    import sys

    module = tmp_path / "kt_rules_must_not_import_this.py"
    module.write_text("raise AssertionError('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        message = message_of(rule("torch", **{"class": "kt_rules_must_not_import_this.Thing"}))
    finally:
        sys.path.remove(str(tmp_path))
    assert "decides nothing" in message


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
words = st.sampled_from(
    ["match", "replace", "recursive", "name", "class", "op", "torch", "auto", "linear_cpu", ".*", "("]
)
likely = st.recursive(
    words | scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


@given(document=documents | likely | st.lists(likely, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_document_raises_anything_but_a_rule_error(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document))
    with contextlib.suppress(RuleError):
        make_plan(Model(), load_rules(path, OPERATIONS), OPERATIONS)


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_text_raises_anything_but_a_rule_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(RuleError):
        load_rules(path, OPERATIONS)
