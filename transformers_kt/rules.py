"""Placement rules: which operation computes which module. Pure: nothing here loads, imports or changes a model.

A rule is a mapping of three keys::

    match:                      # one of the two or both
      name: ^model\\.layers\\..*\\.mlp$   # regex, searched in the module's path
      class: torch.nn.Linear    # dotted name; subclasses match
    replace:
      op: linear_cpu            # a registered operation, or auto, torch, default
    recursive: true             # false: leave everything below a kept module as it is

The module tree is walked from the root and the first rule that matches a module decides. ``torch`` (``default`` is
KTransformers' word for it) keeps the stock module, with dequantized weights; ``auto`` takes the operation that stands
for the module's class, if there is one. The walk goes on inside a kept module and ends at a replaced one. A module that
no rule matches is kept.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from torch import nn

from transformers_kt.errors import RuleError

if TYPE_CHECKING:
    from transformers_kt.modules.base import KtModule

    Operations: TypeAlias = Mapping[str, type[KtModule]]

KtRules: TypeAlias = "str | os.PathLike[str] | Sequence[Mapping[str, Any]]"

AUTO = "auto"
TORCH = "torch"
_DEFAULT = "default"

_SOURCE_OF_A_LIST = "kt_rules"
_RULE_KEYS = ("match", "replace", "recursive")
_MATCH_KEYS = ("name", "class")
_REPLACE_KEYS = ("op",)
_YAML_SUFFIXES = (".yaml", ".yml")
_MOST_YAML_BYTES = 1 << 20  # 733 lines, the longest file that KTransformers shipped, are 30 KB
_INSTALLED_RULES = Path(__file__).parent / "rules"
_BUNDLED_RULES = _INSTALLED_RULES if _INSTALLED_RULES.is_dir() else Path(__file__).parent.parent / "rules"  # a checkout


@dataclass(frozen=True, slots=True)
class Rule:
    """One validated rule. ``number`` counts from 1; ``line`` is None where the rule came from no file."""

    number: int
    source: str
    line: int | None
    name: re.Pattern[str] | None
    class_name: str | None
    op: str
    recursive: bool

    @property
    def label(self) -> str:
        return _label(self.source, self.number, self.line)

    def matches(self, path: str, module: nn.Module) -> bool:
        """Whether the rule speaks of ``module``, which lies at ``path`` ("" for the root)."""
        if self.name is not None and self.name.search(path) is None:
            return False
        return self.class_name is None or _is_instance(module, self.class_name)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What computes the module at path ``module``: the operation ``op``, or "torch" for the stock module itself.

    ``rule`` is the number of the rule that decided, None where none matched.
    """

    module: str
    op: str
    device: str
    rule: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One entry per replaced module and per kept module that owns tensors itself, in the order of the walk.

    ``source`` is "auto", the path of the YAML file, or "kt_rules" for a list.
    """

    entries: tuple[PlanEntry, ...]
    source: str

    def uses(self, op: str) -> bool:
        return any(entry.op == op for entry in self.entries)


@dataclass(frozen=True, slots=True)
class RuleList:
    """Rules in order of precedence, and where they came from."""

    rules: tuple[Rule, ...]
    source: str


def load_rules(kt_rules: KtRules, operations: Operations) -> RuleList:
    """Validated rules from what a user passes as ``kt_rules``: "auto", a YAML path, a bundled name, a list of dicts.

    Raises `RuleError`, naming file, rule number and line, if the file is not there or anything in it is not understood.
    """
    if not isinstance(kt_rules, str | os.PathLike):
        return _validated(kt_rules, _SOURCE_OF_A_LIST, None, operations)
    if kt_rules == AUTO:
        everything = Rule(1, AUTO, None, re.compile(""), None, AUTO, recursive=True)
        return RuleList((everything,), AUTO)
    path = _rules_path(kt_rules)
    items, lines = _read_yaml(path)
    return _validated(items, str(path), lines, operations)


def bundled_rules() -> dict[str, Path]:
    """Name to file of the rules that come with the package."""
    return {path.stem: path for path in sorted(_BUNDLED_RULES.glob("*.yaml"))}


def make_plan(
    model: nn.Module, rule_list: RuleList, operations: Operations, not_by_itself: Collection[str] = ()
) -> Plan:
    """What computes each module of ``model`` (a skeleton on the meta device will do) under ``rule_list``.

    ``auto`` chooses none of ``not_by_itself``; a rule that names one of them still gets it.

    Raises `RuleError` if a rule decides about no module, or gives a module to an operation made for other classes.
    """
    entries: list[PlanEntry] = []
    decided: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        rule = next((rule for rule in rule_list.rules if rule.matches(path, module)), None)
        if rule is not None:
            decided.add(rule.number)
            op = _operation_for(rule, path, module, operations, not_by_itself)
            if op is not None:
                entries.append(PlanEntry(path, op, "cpu", rule.number))
                return
        number = None if rule is None else rule.number
        if rule is not None and not rule.recursive:
            entries.extend(PlanEntry(below, TORCH, "cpu", number) for below in _owners(path, module))
            return
        if _owns_tensors(module):
            entries.append(PlanEntry(path, TORCH, "cpu", number))
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    for rule in rule_list.rules:
        if rule.number not in decided and rule.source != AUTO:
            raise RuleError(f"{rule.label} decides nothing: {_why_idle(rule, model, rule_list, entries)}")
    return Plan(tuple(entries), rule_list.source)


def _operation_for(
    rule: Rule, path: str, module: nn.Module, operations: Operations, not_by_itself: Collection[str]
) -> str | None:
    """The operation that ``rule`` gives ``module`` to; None if the stock module stays."""
    if rule.op == TORCH:
        return None
    if rule.op == AUTO:
        # The exact class: a subclass may compute something else, and nobody asked for it by name.
        claims = (op for op, cls in operations.items() if type(module) in cls.replaces and op not in not_by_itself)
        return next(claims, None)
    accepted = operations[rule.op].replaces
    if not isinstance(module, accepted):
        raise RuleError(
            f"{rule.label}: {rule.op} cannot stand for {_shown(path)}, which is a {_dotted(type(module))}; it stands "
            f"for {', '.join(map(_dotted, accepted))}. Narrow the match by class"
        )
    if not path:
        raise RuleError(f"{rule.label} matches the whole model, which no operation replaces; narrow the match by name")
    return rule.op


def _why_idle(rule: Rule, model: nn.Module, rule_list: RuleList, entries: Sequence[PlanEntry]) -> str:
    matched = next((path for path, module in model.named_modules() if rule.matches(path, module)), None)
    if matched is None:
        examples = [entry.module for entry in entries[:3]]
        return (
            f"no module matches {_criteria(rule)}. Modules have names like {', '.join(examples)}; "
            "a regex is searched in the name, a class is a dotted name. Correct the match or remove the rule"
        )
    for earlier in rule_list.rules[: rule.number - 1]:
        if earlier.matches(matched, model.get_submodule(matched)):
            return (
                f"what it matches first, {_shown(matched)}, is taken by rule {earlier.number} before it; put it above "
                f"rule {earlier.number} or remove it"
            )
    return (
        f"what it matches first, {_shown(matched)}, lies inside a module that another rule replaced or left as it is; "
        "keep that module (op: torch) or remove this rule"
    )


def _owns_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _owners(path: str, module: nn.Module) -> Iterator[str]:
    for below, submodule in module.named_modules(prefix=path):
        if _owns_tensors(submodule):
            yield below


def _is_instance(module: nn.Module, class_name: str) -> bool:
    if any(_dotted(cls) == class_name for cls in type(module).__mro__):
        return True
    # torch.nn.Linear is defined in torch.nn.modules.linear. Looking only into modules that are loaded already keeps a
    # rules file from importing anything.
    package, _, name = class_name.rpartition(".")
    alias = vars(sys.modules[package]).get(name) if package in sys.modules else None
    return isinstance(alias, type) and isinstance(module, alias)


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _shown(path: str) -> str:
    return path or "the model itself"


def _criteria(rule: Rule) -> str:
    parts = [] if rule.name is None else [f"name {rule.name.pattern!r}"]
    if rule.class_name is not None:
        parts.append(f"class {rule.class_name}")
    return " and ".join(parts)


def _label(source: str, number: int, line: int | None) -> str:
    return f"{source}, rule {number}" + (f" (line {line})" if line is not None else "")


def _rules_path(kt_rules: str | os.PathLike[str]) -> Path:
    text = os.fspath(kt_rules)
    path = Path(text).expanduser()
    if path.suffix.lower() in _YAML_SUFFIXES or os.sep in text or path.is_file():
        if not path.is_file():
            raise RuleError(f"{path} is no file; kt_rules= takes {_accepted_kt_rules()}")
        return path
    bundled = bundled_rules()
    if text not in bundled:
        hint = _nearest(text, [AUTO, *bundled])
        raise RuleError(f"there are no rules named {text!r}{hint}; kt_rules= takes {_accepted_kt_rules()}")
    return bundled[text]


def _accepted_kt_rules() -> str:
    names = ", ".join(f'"{name}"' for name in [AUTO, *bundled_rules()])
    return f"{names}, the path of a YAML file, or a list of rules"


def _read_yaml(path: Path) -> tuple[Any, list[int]]:
    """The document and the line of each of its items."""
    size = path.stat().st_size
    if size > _MOST_YAML_BYTES:
        raise RuleError(f"{path} has {size} bytes; files of rules of up to {_MOST_YAML_BYTES} bytes are accepted")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        items = [] if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        # ValueError: text that is not UTF-8, dates such as 2001-99-99.
        raise RuleError(f"{path} is not valid YAML: {error}") from None
    return items, [item.start_mark.line + 1 for item in node.value] if isinstance(node, yaml.SequenceNode) else []


def _validated(items: Any, source: str, lines: list[int] | None, operations: Operations) -> RuleList:
    if isinstance(items, str | bytes) or not isinstance(items, Sequence):
        raise RuleError(f"{source} holds a {type(items).__name__}; a list of rules is expected")
    rules = []
    for number, item in enumerate(items, start=1):
        line = lines[number - 1] if lines is not None else None
        rules.append(_validated_rule(item, number, source, line, operations))
    if not rules:
        raise RuleError(f"{source} holds no rules; for the usual placement pass kt_rules={AUTO!r}")
    return RuleList(tuple(rules), source)


def _validated_rule(item: Any, number: int, source: str, line: int | None, operations: Operations) -> Rule:
    label = _label(source, number, line)
    _require_keys(item, _RULE_KEYS, label, "a rule")
    for key in ("match", "replace"):
        if key not in item:
            raise RuleError(f"{label} has no {key!r}; a rule has {', '.join(_RULE_KEYS)}")
    match = item["match"]
    _require_keys(match, _MATCH_KEYS, f"{label}, match", "match")
    if not match:
        raise RuleError(f"{label}, match is empty; it needs {' or '.join(_MATCH_KEYS)}")
    for key, value in match.items():
        if not isinstance(value, str):
            raise RuleError(f"{label}, match.{key} is {_brief(value)}; a string is expected")
    recursive = item.get("recursive", True)
    if not isinstance(recursive, bool):
        raise RuleError(f"{label}, recursive is {_brief(recursive)}; true or false is expected")
    return Rule(
        number,
        source,
        line,
        _compiled(match["name"], label) if "name" in match else None,
        match.get("class"),
        _validated_op(item["replace"], label, operations),
        recursive,
    )


def _validated_op(replace: Any, label: str, operations: Operations) -> str:
    if isinstance(replace, str):
        op: Any = replace
    else:
        _require_keys(replace, _REPLACE_KEYS, f"{label}, replace", "replace")
        op = replace.get("op")
    accepted = [*operations, AUTO, TORCH, _DEFAULT]
    if not isinstance(op, str) or op not in accepted:
        found = "names no op" if op is None else f"has the unknown op {_brief(op)}"
        raise RuleError(f"{label}, replace {found}{_nearest(op, accepted)}; known are {', '.join(accepted)}")
    return TORCH if op == _DEFAULT else op


def _compiled(pattern: str, label: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RuleError(f"{label}, match.name is no valid regex: {pattern!r}: {error}") from None


def _require_keys(item: Any, accepted: Sequence[str], label: str, what: str) -> None:
    if not isinstance(item, Mapping):
        raise RuleError(f"{label} is {_brief(item)}; {what} is a mapping of {', '.join(accepted)}")
    for key in item:
        if key not in accepted:
            raise RuleError(
                f"{label} has the unknown key {_brief(key)}{_nearest(key, accepted)}; known are {', '.join(accepted)}"
            )


# YAML aliases make a few lines into gigabytes of repr.
_brief = reprlib.repr


def _nearest(word: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) and len(word) < 100 else []
    return f" (did you mean {close[0]!r}?)" if close else ""
