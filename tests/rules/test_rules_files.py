"""Files of rules: names, YAML and its traps."""

from __future__ import annotations

import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from rules_model import OPERATIONS, RULE_1, TREE, message_of, rule, written

from transformers_kt.errors import RuleError
from transformers_kt.rules import bundled_rules, load_rules, make_plan
from transformers_kt.rules import files as rules_files
from transformers_kt.rules import yaml_data as rules_yaml

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
    from_file = make_plan(TREE, load_rules(path, OPERATIONS), OPERATIONS)
    from_list = make_plan(TREE, load_rules(yaml.safe_load(GOOD_YAML), OPERATIONS), OPERATIONS)
    assert from_file.entries == from_list.entries
    assert from_file.source == str(path)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("- {mtach: {name: norm}, replace: torch}", "unknown key 'mtach' (did you mean 'match'?)"),
        ("- {match: {name: norm, clas: x.Y}, replace: torch}", "unknown key 'clas' (did you mean 'class'?)"),
        ("- {match: {name: norm}, replace: {op: torch, devise: cpu}}", "'devise' (did you mean 'device'?)"),
        ("- {match: {name: norm}, replace: torch, recursiv: no}", "'recursiv' (did you mean 'recursive'?)"),
        ("- {match: {name: norm}, replace: {op: liner}}", "unknown op 'liner' (did you mean 'linear'?)"),
        ("- {match: {class: torch.nn.Linaer}, replace: torch}", "(did you mean 'Linear'?)"),
        ("- {match: {class: Linear}, replace: torch}", "a dotted name such as torch.nn.Linear is expected"),
        ("- {match: {name: 'norm)'}, replace: torch}", "no valid regex: 'norm)': unbalanced parenthesis"),
        ("- {match: {name: norm, layers: 9-3}, replace: torch}", "match.layers is '9-3'"),
        ("- {match: {name: norm}, replace: {device: cudda}}", "replace.device is 'cudda' (did you mean 'cuda'?)"),
        ("- {match: {name: norm}, replace: {device: 'cuda:x'}}", "replace.device is 'cuda:x'"),
        ("- {match: {name: norm}, replace: {op: linear_cpu, device: cuda}}", "write op: linear"),
        ("- {match: {name: norm}, replace: {op: torch, class: default}}", "Write the rule in one of them"),
        ("- {match: {name: norm, name: x}, replace: torch}", "the key 'name' twice, in lines 4 and 4"),
        ("- match: {name: norm}\n  replace: torch\n  match: {name: x}", "the key 'match' twice, in lines 4 and 6"),
        ("- {match: {name: nrom}, replace: torch}", "decides nothing: no module matches name 'nrom'"),
        (
            "- {match: {name: 'mb.d'}, replace: torch}",
            "decides nothing: what it matches first, embed, is taken by rule 1",
        ),
        ("- {match: {name: norm}, replace: linear}", "linear cannot stand for norm, which is a torch.nn.modules.norm"),
        ("- {match: {name: ''}, replace: attention_cpu}", "attention cannot stand for the model itself"),
        ("- &a [*a]", "nested deeper than 32 levels, or an alias in it contains itself"),
    ],
)
def test_an_error_in_a_file_names_file_rule_and_line(tmp_path: Path, broken: str, said: str) -> None:
    path = written(tmp_path, RULE_1 + broken)
    with pytest.raises(RuleError) as caught:
        make_plan(TREE, load_rules(str(path), OPERATIONS), OPERATIONS)
    assert f"{path}, rule 2 (line 4)" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ("- match: {name: x\n  replace: torch\n", 5),
        ("- match:\n    name: x\n\treplace: torch\n", 6),
        ('- match: {name: "\\.x"}\n  replace: torch\n- match: {}\n', 4),
    ],
)
@pytest.mark.parametrize("opening", ["", "rules:\n"])
def test_text_that_is_no_yaml_is_refused_with_file_rule_and_line(
    tmp_path: Path, opening: str, broken: str, line: int
) -> None:
    path = written(tmp_path, opening + RULE_1 + broken)
    below = opening.count("\n")
    with pytest.raises(RuleError, match=rf"rule 2 \(line {4 + below}\) is not valid YAML in line {line + below}: "):
        load_rules(path, OPERATIONS)


def test_an_entry_has_the_label_of_its_rule(tmp_path: Path) -> None:
    path = written(tmp_path, RULE_1 + "- {match: {name: q_proj}, replace: linear}")
    plan = make_plan(TREE, load_rules(path, OPERATIONS), OPERATIONS)
    labels = {entry.module: plan.label(entry) for entry in plan.entries}
    assert labels["layers.1.attn.q_proj"] == f"{path}, rule 2 (line 4)"
    assert labels["norm"] is None
    auto = make_plan(TREE, load_rules("auto", OPERATIONS), OPERATIONS)
    assert {auto.label(entry) for entry in auto.entries} == {None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- match: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("- !!python/object/apply:os.system [true]", "plain data, no tags"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("- 2001-99-99", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        ("", "holds no rules"),
        ("match: {name: x}", 'put "- " before its first line'),
        ("macth: {name: x}", "has the unknown key 'macth'; known are variables, rules"),
        ("- match:\n\tname: x", "indent with spaces, not with tabs"),
        ('- match: {name: "\\.mlp$"}', "put regexes in single quotes"),
        ("- match: {name: x}\n---\n- 1", "remove the line ---"),
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


def test_a_regex_that_would_take_years_is_refused_after_a_second(tmp_path: Path) -> None:
    path = written(tmp_path, RULE_1 + r"- {match: {name: '^(\w|[a-z]|[a-y]|[a-x]|[a-w]|\.)+[^\w.]'}, replace: torch}")
    with pytest.raises(RuleError, match=r"rule 2 \(line 4\), match\.name takes more than 1 s"):
        make_plan(TREE, load_rules(path, OPERATIONS), OPERATIONS)


def test_aliases_that_multiply_are_refused_fast_and_in_few_words(tmp_path: Path) -> None:
    levels = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20)]
    path = written(tmp_path, "\n".join(levels))
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(RuleError, match=r"rule 4 \(line 4\) repeats aliases until .* 100000 values") as caught:
        load_rules(path, OPERATIONS)
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_merge_keys_that_multiply_are_refused(tmp_path: Path) -> None:
    levels = ["- &a0 {x0: 1}"]
    levels += [f"- &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}], x{n}: 1}}" for n in range(1, 20)]
    with pytest.raises(RuleError, match=r"repeats aliases"):
        load_rules(written(tmp_path, "\n".join(levels)), OPERATIONS)


def test_an_alias_saves_writing_a_rule_twice(tmp_path: Path) -> None:
    text = "- {match: {name: q_proj}, replace: &order {op: linear}}\n- {match: {name: o_proj}, replace: *order}"
    plan = make_plan(TREE, load_rules(written(tmp_path, text), OPERATIONS), OPERATIONS)
    assert "linear_cpu" in [entry.op for entry in plan.entries]


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"- \xff\xfe")
    with pytest.raises(RuleError, match="save it as UTF-8"):
        load_rules(path, OPERATIONS)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "#" * (rules_yaml._MOST_BYTES + 1))
    with pytest.raises(RuleError, match=r"has 262145 bytes"):
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
    monkeypatch.setattr(rules_files, "_BUNDLED_RULES", tmp_path)
    assert list(bundled_rules()) == ["all-linears"]
    assert load_rules("all-linears", OPERATIONS).rules[0].op == "linear"


def test_reading_rules_imports_nothing(tmp_path: Path) -> None:
    module = tmp_path / "kt_rules_must_not_import_this.py"
    module.write_text("raise AssertionError('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        message = message_of(rule("torch", **{"class": "kt_rules_must_not_import_this.Thing"}))
    finally:
        sys.path.remove(str(tmp_path))
    assert "decides nothing" in message
