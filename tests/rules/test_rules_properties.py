"""Whatever is passed as kt_rules: rules, or a RuleError, and soon."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rules_model import OPERATIONS, TREE, Model

from transformers_kt.errors import RuleError
from transformers_kt.rules import load_rules, make_plan

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)
WORDS = """match replace recursive name class layers op device include variables rules kwargs generate_device
generate_op transfer_map torch auto linear_cpu attention default range .* ( 0-1 cuda cuda*2 ${x} torch.nn.Linear
ktransformers.operators.linear.KTransformersLinear"""
words = st.sampled_from(WORDS.split())
likely = st.recursive(
    words | scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)
# These are rules by and large, and come as far as the plan.
nearly = st.fixed_dictionaries(
    {
        "match": st.dictionaries(
            st.sampled_from(["name", "name", "class", "layers"]),
            st.sampled_from(["", "attn", "attn$", "up", "proj", "0", "1-", "torch.nn.Linear"]) | words,
            max_size=2,
        ),
        "replace": st.sampled_from(["torch", "auto", "linear"])
        | st.dictionaries(st.sampled_from(["op", "device"]), words, max_size=2)
        | st.fixed_dictionaries({"device": st.sampled_from(["cpu", "cuda*2", "cuda:1"])})
        | st.fixed_dictionaries({"class": words, "kwargs": st.dictionaries(words, words, max_size=2)}),
    },
    optional={"recursive": st.booleans()},
)
valid = st.fixed_dictionaries(
    {
        "match": st.fixed_dictionaries(
            {"name": st.sampled_from(["", "attn", r"1\.attn$", "up", "q_proj", "layers", "norm"])}
        ),
        "replace": st.sampled_from(
            [{"op": "auto"}, {"op": "torch"}, {"device": "cuda*2"}, {"device": "cuda:1"}, {"class": "default"}]
        ),
    },
    optional={"recursive": st.booleans()},
)
kt_rules_alike = documents | likely | st.lists(likely, max_size=3) | st.lists(nearly, min_size=1, max_size=4)
names = st.text(max_size=8) | st.sampled_from(
    ["~x", "a/b", "x.yaml", "x?y=1", "\0", "x" * 5000, "\ud800.yaml", "/", "?"]
)

HAZARDS = """&a *a <<: { } [ ] ? - match: replace: name: x torch !!set !!omap !!bool !!int !!timestamp !!float !!binary
'' \" : | > %YAML --- ... 1:2 0x 2001-99-99 \\x00 \\ud800"""
hazards = st.sampled_from(
    [*HAZARDS.split(), " ", "\n", "\n  ", "- ", "match: {name: x}", "0x" + "f" * 5000, "9" * 5000]
)


def try_out(kt_rules: Any) -> None:
    with contextlib.suppress(RuleError):
        make_plan(TREE, load_rules(kt_rules, OPERATIONS), OPERATIONS)


@given(kt_rules=kt_rules_alike | names | st.binary(max_size=5))
@example(kt_rules=[{"match": {"name": 1 << 20_000}, "replace": "torch"}])
@example(kt_rules={"variables": {"x": {"default": 1 << 20_000, "range": "0-1"}}})
@settings(max_examples=150, deadline=None)
def test_no_value_raises_anything_but_a_rule_error(kt_rules: Any) -> None:
    try_out(kt_rules)


@given(document=kt_rules_alike)
@settings(max_examples=100, deadline=None)
def test_no_document_raises_anything_but_a_rule_error(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document))
    try_out(path)


@given(text=st.text(max_size=60) | st.lists(hazards, max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_text_raises_anything_but_a_rule_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try_out(path)


@given(rules=st.lists(valid, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_plan_has_one_entry_for_every_tensor_and_names_rules_that_were_given(rules: Any) -> None:
    try:
        plan = make_plan(TREE, load_rules(rules, OPERATIONS), OPERATIONS)
    except RuleError:
        return
    assert {entry.rule for entry in plan.entries} <= {None, *range(1, len(rules) + 1)}
    for name, _ in Model().named_parameters():
        assert sum(name.startswith(f"{entry.module}.") for entry in plan.entries) == 1
