"""Files of rules that have variables or include each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rules_model import OPERATIONS, RULE_1, TREE, message_of, written

from transformers_kt.errors import RuleError
from transformers_kt.rules import files as rules_files
from transformers_kt.rules import load_rules, make_plan

WITH_VARIABLES = """
variables:
  gpus: {default: 1, range: 0-8}
  first: {default: 0, range: 0-1}
rules:
- {match: {name: up, layers: '${first}-'}, replace: {device: 'cuda:${gpus}'}}
- {match: {name: ''}, replace: {device: cpu}}
"""


def devices(kt_rules: Any, **options: Any) -> dict[str, str]:
    plan = make_plan(TREE, load_rules(kt_rules, OPERATIONS, **options), OPERATIONS)
    return {entry.module: entry.device for entry in plan.entries}


def refusal(kt_rules: Any, **options: Any) -> str:
    with pytest.raises(RuleError) as caught:
        devices(kt_rules, **options)
    return str(caught.value)


def test_a_variable_has_its_default(tmp_path: Path) -> None:
    found = devices(written(tmp_path, WITH_VARIABLES))
    assert found["layers.0.mlp.up"] == found["layers.1.mlp.up"] == "cuda:1"


def test_variables_are_set_behind_the_name(tmp_path: Path) -> None:
    path = written(tmp_path, WITH_VARIABLES)
    found = devices(f"{path}?gpus=3&first=1")
    assert found["layers.0.mlp.up"] == "cpu"
    assert found["layers.1.mlp.up"] == "cuda:3"
    assert load_rules(f"{path}?gpus=3", OPERATIONS).source == f"{path}?gpus=3"


def test_variables_are_set_by_an_argument_and_it_goes_before_the_name(tmp_path: Path) -> None:
    path = written(tmp_path, WITH_VARIABLES)
    assert devices(f"{path}?gpus=3", variables={"gpus": 4})["layers.0.mlp.up"] == "cuda:4"


def test_rules_with_variables_may_be_a_mapping(tmp_path: Path) -> None:
    assert devices(yaml.safe_load(WITH_VARIABLES), variables={"gpus": 2})["layers.0.mlp.up"] == "cuda:2"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?gpu=2", "has no variable 'gpu' (did you mean 'gpus'?); its variables: gpus, first"),
        ("?gpus=9", "the variable gpus is 9; an integer from 0 to 8 is expected"),
        ("?gpus=two", '"name?variable=4&other=2"'),
        ("?gpus=1&gpus=2", '"name?variable=4&other=2"'),
        ("?", '"name?variable=4&other=2"'),
    ],
)
def test_a_wrong_variable_is_refused(tmp_path: Path, query: str, said: str) -> None:
    path = written(tmp_path, WITH_VARIABLES)
    message = refusal(f"{path}{query}")
    assert said in message
    assert str(path) in message


@pytest.mark.parametrize("value", [9, -1, True, 1.0, None, "x", [1]])
def test_a_value_that_is_no_integer_in_range_is_refused(tmp_path: Path, value: Any) -> None:
    message = refusal(written(tmp_path, WITH_VARIABLES), variables={"gpus": value})
    assert "an integer from 0 to 8 is expected" in message


def test_auto_has_no_variables() -> None:
    assert "there are no rules named 'auto'" in refusal("auto", variables={"gpus": 1})


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("gpus: 1", "the variable gpus is 1"),
        ("gpus: {default: 1}", "{default: 1, range: 0-8}"),
        ("gpus: {default: 9, range: 0-8}", "{default: 1, range: 0-8}"),
        ("gpus: {default: 1, rnage: 0-8}", "did you mean 'range'?"),
        ("9x: {default: 1, range: 0-8}", "is no name of a variable"),
        ("[]", "variables is []"),
    ],
)
def test_a_declaration_that_is_not_understood_is_refused(tmp_path: Path, variable: str, said: str) -> None:
    path = written(tmp_path, f"variables:\n  {variable}\nrules: []")
    message = refusal(path)
    assert said in message
    assert str(path) in message


def test_a_variable_that_is_not_declared_is_refused_with_its_rule(tmp_path: Path) -> None:
    path = written(tmp_path, WITH_VARIABLES.replace("${gpus}", "${gpsu}"))
    assert f"{path}, rule 1 (line 6) uses the variable 'gpsu' (did you mean 'gpus'?)" in refusal(path)


def test_a_list_has_no_variables_and_keeps_dollars(tmp_path: Path) -> None:
    assert "replace.device is 'cuda:${gpus}'" in message_of(
        {"match": {"name": ""}, "replace": {"device": "cuda:${gpus}"}}
    )


def included(folder: Path, text: str = "- {match: {name: up}, replace: linear}") -> None:
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "inner" / "more.yaml").write_text(text)


def test_included_rules_stand_where_the_include_stands(tmp_path: Path) -> None:
    included(tmp_path)
    path = written(
        tmp_path,
        "- {match: {name: 0.mlp}, replace: torch}\n- include: inner/more.yaml\n"
        "- {match: {name: up|norm}, replace: torch}",
    )
    loaded = load_rules(path, OPERATIONS)
    assert [rule.op for rule in loaded.rules] == ["torch", "linear", "torch"]
    assert [rule.number for rule in loaded.rules] == [1, 2, 3]
    assert [rule.label for rule in loaded.rules] == [
        f"{path}, rule 1 (line 1)",
        f"{tmp_path / 'inner' / 'more.yaml'}, rule 1 (line 1)",
        f"{path}, rule 3 (line 3)",
    ]
    plan = make_plan(TREE, loaded, OPERATIONS)
    assert {entry.module: entry.rule for entry in plan.entries}["layers.1.mlp.up"] == 2


def test_an_include_is_relative_to_the_file_it_stands_in(tmp_path: Path) -> None:
    included(tmp_path, "- include: sibling.yaml")
    (tmp_path / "inner" / "sibling.yaml").write_text("- {match: {name: up}, replace: linear}")
    assert load_rules(written(tmp_path, "- include: inner/more.yaml"), OPERATIONS).rules[0].op == "linear"


def test_an_include_may_name_bundled_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    included(tmp_path)
    monkeypatch.setattr(rules_files, "_BUNDLED_RULES", tmp_path / "inner")
    assert load_rules([{"include": "more"}], OPERATIONS).rules[0].op == "linear"


def test_an_include_hands_on_variables(tmp_path: Path) -> None:
    included(tmp_path, WITH_VARIABLES)
    outer = "variables: {n: {default: 2, range: 0-5}}\nrules: [{include: inner/more.yaml, variables: {gpus: '${n}'}}]"
    path = written(tmp_path, outer)
    assert devices(path)["layers.0.mlp.up"] == "cuda:2"
    assert devices(f"{path}?n=5")["layers.0.mlp.up"] == "cuda:5"
    assert devices(f"{path}?first=1")["layers.0.mlp.up"] == "cpu"  # of the included file, and not set by the include
    assert "has no variable 'gpus'" in refusal(f"{path}?gpus=3")


@pytest.mark.parametrize(
    ("include", "said"),
    [
        ("- include: inner/mroe.yaml", "inner/mroe.yaml is no file"),
        ("- include: no-such-rules", "there are no rules named 'no-such-rules'"),
        ("- include: [x]", "include is ['x']"),
        ("- {include: inner/more.yaml, varables: {}}", "did you mean 'variables'?"),
        ("- {include: inner/more.yaml, variables: 3}", "variables is 3"),
        ("- include: my.yaml", "which includes this file: that has no end"),
    ],
)
def test_a_wrong_include_is_refused_by_file_rule_and_line(tmp_path: Path, include: str, said: str) -> None:
    included(tmp_path)
    path = written(tmp_path, RULE_1 + include)
    message = refusal(path)
    assert f"{path}, rule 2 (line 4)" in message
    assert said in message


def test_an_include_cannot_set_what_the_file_does_not_declare(tmp_path: Path) -> None:
    included(tmp_path)
    assert "more.yaml has no variable 'gpus'" in refusal(
        written(tmp_path, "- {include: inner/more.yaml, variables: {gpus: 1}}")
    )


def test_a_circle_of_includes_is_refused(tmp_path: Path) -> None:
    included(tmp_path, "- include: ../my.yaml")
    assert "that has no end" in refusal(written(tmp_path, "- include: inner/more.yaml"))


def test_includes_are_bounded_in_depth_and_number(tmp_path: Path) -> None:
    for level in range(20):
        (tmp_path / f"chain{level}.yaml").write_text(f"- include: chain{level + 1}.yaml")
        (tmp_path / f"tree{level}.yaml").write_text(f"- include: tree{level + 1}.yaml\n" * 7)
    (tmp_path / "tree3.yaml").write_text("- {match: {name: x}, replace: torch}")
    assert "the 8th include inside another" in refusal(tmp_path / "chain0.yaml")
    assert "includes more than 64 files" in refusal(tmp_path / "tree0.yaml")
