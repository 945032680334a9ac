"""What a user passes as kt_rules -> one flat list of items: names and files found, includes and variables resolved.

A file is a list of rules, or a mapping::

    variables:
      gpus: {default: 1, range: 0-8}    # integers; ${gpus} in any string of the rules below
    rules:
    - include: experts-on-cpu.yaml      # beside this file, or a bundled name; its rules stand here
      variables: {gpus: ${gpus}}        # for the included file, optional
    - ...

Variables are set with ``kt_rules="my.yaml?gpus=4"`` or ``variables={"gpus": 4}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from transformers_kt.errors import RuleError
from transformers_kt.rules.checks import require_keys
from transformers_kt.rules.yaml_data import read_yaml
from transformers_kt.text import brief, nearest

KtRules: TypeAlias = "str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Mapping[str, Any]"

AUTO = "auto"
INCLUDE = "include"
_SOURCE_OF_A_LIST = "kt_rules"
_RULES_KEY = "rules"
_FILE_KEYS = ("variables", _RULES_KEY)
_INCLUDE_KEYS = (INCLUDE, "variables")
_VARIABLE_KEYS = ("default", "range")
_YAML_SUFFIXES = (".yaml", ".yml")
_DEEPEST_INCLUDE = 8
_MOST_FILES = 64  # files that include each other twice would double at each level
_DEEPEST_VALUE = 8  # match, replace, kwargs, transfer_map: no rule is as deep
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
_INTEGER = re.compile(r"-?\d{1,9}")
_BUNDLED_RULES = Path(__file__).parent / "bundled"  # in a checkout a link to rules/ at its top level


class Place(NamedTuple):
    """Where an item stands: ``number`` counts from 1 in its own list; ``line`` is None where that is no file."""

    source: str
    number: int
    line: int | None

    def __str__(self) -> str:
        return f"{self.source}, rule {self.number}" + ("" if self.line is None else f" (line {self.line})")


class Item(NamedTuple):
    """One rule, not yet validated."""

    value: Any
    place: Place


def load_items(kt_rules: KtRules, variables: Mapping[str, int] | None) -> tuple[list[Item], str]:
    """The rules of ``kt_rules`` in order of precedence, and what to call their source. Not for "auto".

    Raises `RuleError` if a file is not there or not readable, an include leads round in a circle, or a variable is
    unknown or out of range.
    """
    if isinstance(kt_rules, str | os.PathLike):
        text = _as_text(kt_rules)
        path, asked = _path_and_query(text)
        source = str(path) + ("" if not asked else "?" + "&".join(f"{key}={value}" for key, value in asked.items()))
        asked.update(_checked_names(variables, source))
        reader = _Reader(asked)
        items = reader.file(path, {}, ())
    else:
        source = _SOURCE_OF_A_LIST
        reader = _Reader(_checked_names(variables, source))
        items = reader.document(kt_rules, (), source, Path(), {}, ())
    reader.require_known_variables(source)
    if not items:
        raise RuleError(f"{source} holds no rules; for the usual placement pass kt_rules={AUTO!r}")
    return items, source


def bundled_rules() -> dict[str, Path]:
    """Name to file of the rules that come with the package."""
    return {path.stem: path for path in sorted(_BUNDLED_RULES.glob("*.yaml"))}


@dataclass(frozen=True, slots=True)
class _Variable:
    default: int
    lowest: int
    highest: int


class _Reader:
    """Reads a file and what it includes. ``asked`` are the variables that the user has set."""

    def __init__(self, asked: Mapping[str, int]) -> None:
        self._asked = asked
        self._declared: dict[str, _Variable] = {}
        self._files = 0

    def file(self, path: Path, given: Mapping[str, Any], above: tuple[Path, ...]) -> list[Item]:
        self._files += 1
        if self._files > _MOST_FILES:
            raise RuleError(f"{above[0]} includes more than {_MOST_FILES} files; write some of them into one")
        read = read_yaml(path, _RULES_KEY)
        return self.document(read.value, read.lines, str(path), path.parent, given, (*above, path.resolve()))

    def document(
        self,
        value: Any,
        lines: Sequence[int],
        source: str,
        folder: Path,
        given: Mapping[str, Any],
        above: tuple[Path, ...],
    ) -> list[Item]:
        """The items of a document. ``given`` are variables set by the file that includes it; ``above`` are the files on
        the way here, this one last."""
        declared: dict[str, _Variable] = {}
        substitutes = isinstance(value, Mapping)
        if isinstance(value, Mapping):
            if "match" in value:
                raise RuleError(
                    f'{source} holds a rule where a list of rules belongs; in YAML, put "- " before its first line'
                )
            require_keys(value, _FILE_KEYS, f"{source} holds a mapping, which", "a file of rules, if it is no list,")
            declared = _declared_variables(value.get("variables", {}), source)
            value = value.get(_RULES_KEY, [])
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise RuleError(
                f"{source} holds a {type(value).__name__}; a list of rules, or a mapping of {', '.join(_FILE_KEYS)}, "
                "is expected"
            )
        values = self._resolved(declared, given, source)
        items: list[Item] = []
        for number, item in enumerate(value, start=1):
            place = Place(source, number, lines[number - 1] if number <= len(lines) else None)
            if substitutes:
                item = _substituted(item, values, place)
            if isinstance(item, Mapping) and INCLUDE in item:
                items.extend(self._included(item, place, folder, above))
            else:
                items.append(Item(item, place))
        return items

    def require_known_variables(self, source: str) -> None:
        for name in self._asked:
            if name not in self._declared:
                known = ", ".join(self._declared) if self._declared else "none"
                hint = nearest(name, list(self._declared))
                raise RuleError(f"{source} has no variable {brief(name)}{hint}; its variables: {known}")

    def _resolved(self, declared: dict[str, _Variable], given: Mapping[str, Any], source: str) -> dict[str, int]:
        """Values of the variables of one file: those of the including file first, then the user's, then defaults."""
        for name in given:
            if name not in declared:
                hint = nearest(name, list(declared))
                raise RuleError(f"{source} has no variable {brief(name)}{hint}, which the include sets")
        self._declared.update({name: variable for name, variable in declared.items() if name not in given})
        values = {}
        for name, variable in declared.items():
            value = _integer(given.get(name, self._asked.get(name, variable.default)))
            if value is None or not variable.lowest <= value <= variable.highest:
                raise RuleError(
                    f"{source}: the variable {name} is {brief(given.get(name, self._asked.get(name)))}; an integer "
                    f"from {variable.lowest} to {variable.highest} is expected"
                )
            values[name] = value
        return values

    def _included(self, item: Mapping[str, Any], place: Place, folder: Path, above: tuple[Path, ...]) -> list[Item]:
        require_keys(item, _INCLUDE_KEYS, f"{place}", "an include")
        name, given = item[INCLUDE], item.get("variables", {})
        if not isinstance(name, str):
            raise RuleError(f"{place}: include is {brief(name)}; a file or the name of bundled rules is expected")
        if not isinstance(given, Mapping):
            raise RuleError(f"{place}: variables is {brief(given)}; a mapping of names to integers is expected")
        try:
            path = _rules_path(name, folder)
        except RuleError as error:
            raise RuleError(f"{place}: include: {error}") from None
        if path.resolve() in above:
            raise RuleError(f"{place} includes {path}, which includes this file: that has no end. Remove the include")
        if len(above) >= _DEEPEST_INCLUDE:
            raise RuleError(f"{place} is the {_DEEPEST_INCLUDE}th include inside another; fewer are accepted")
        return self.file(path, given, above)


def _as_text(kt_rules: str | os.PathLike[str]) -> str:
    text = os.fspath(kt_rules)
    if not isinstance(text, str):
        raise RuleError(f"kt_rules is {brief(text)}; {_accepted_kt_rules()} is expected")
    return text


def _path_and_query(text: str) -> tuple[Path, dict[str, int]]:
    """The file that ``text`` names, and the variables after its question mark."""
    name, mark, query = text.partition("?")
    if not mark or _is_file(Path(text)):
        return _rules_path(text, Path()), {}
    asked: dict[str, int] = {}
    for part in query.split("&"):
        key, _, value = part.partition("=")
        number = _integer(value)
        if not key or number is None or key in asked:
            raise RuleError(f'{_shown(text)}: "name?variable=4&other=2", each once and an integer, is expected')
        asked[key] = number
    return _rules_path(name, Path()), asked


def _rules_path(text: str, folder: Path) -> Path:
    """The file of rules that ``text`` names: a path, relative to ``folder``, or a bundled name."""
    try:
        path = folder / Path(text).expanduser()
    except RuntimeError as error:  # "~name" of a user that does not exist
        raise RuleError(f"{brief(text)}: {error}") from None
    if path.suffix.lower() in _YAML_SUFFIXES or os.sep in text or _is_file(path):
        if not _is_file(path):
            raise RuleError(f"{_shown(str(path))} is no file; kt_rules= takes {_accepted_kt_rules()}")
        return path
    bundled = bundled_rules()
    if text not in bundled:
        hint = nearest(text, [AUTO, *bundled])
        raise RuleError(f"there are no rules named {brief(text)}{hint}; kt_rules= takes {_accepted_kt_rules()}")
    return bundled[text]


def _shown(text: str) -> str:
    return text if len(text) < 1000 else brief(text)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _accepted_kt_rules() -> str:
    names = ", ".join(f'"{name}"' for name in [AUTO, *bundled_rules()])
    return f"{names}, the path of a YAML file, or a list of rules"


def _checked_names(variables: Mapping[str, int] | None, source: str) -> dict[str, int]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise RuleError(f"{source}: variables is {brief(variables)}; a mapping of names to integers is expected")
    return dict(variables)


def _declared_variables(variables: Any, source: str) -> dict[str, _Variable]:
    if not isinstance(variables, Mapping):
        raise RuleError(f"{source}: variables is {brief(variables)}; a mapping of names is expected")
    declared = {}
    for name, facts in variables.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RuleError(f"{source}: {brief(name)} is no name of a variable; letters, digits and _ are accepted")
        where = f"{source}: the variable {name}"
        require_keys(facts, _VARIABLE_KEYS, where, "a variable")
        limits = _RANGE.fullmatch(facts["range"]) if isinstance(facts.get("range"), str) else None
        default = _integer(facts.get("default"))
        if limits is None or default is None or not int(limits[1]) <= default <= int(limits[2]):
            raise RuleError(
                f"{where} is {brief(facts)}; {{default: 1, range: 0-8}}, the one within the other, is expected"
            )
        declared[name] = _Variable(default, int(limits[1]), int(limits[2]))
    return declared


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if _INTEGER.fullmatch(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _substituted(value: Any, values: Mapping[str, int], place: Place, depth: int = 0) -> Any:
    """``value`` with every ``${name}`` in its strings replaced."""
    if depth > _DEEPEST_VALUE:
        return value
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: str(_value_of(match[1], values, place)), value)
    if isinstance(value, Mapping):
        return {key: _substituted(inner, values, place, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_substituted(inner, values, place, depth + 1) for inner in value]
    return value


def _value_of(name: str, values: Mapping[str, int], place: Place) -> int:
    if name not in values:
        known = ", ".join(values) if values else "none"
        raise RuleError(
            f"{place} uses the variable {brief(name)}{nearest(name, list(values))}, which the file does not "
            f"declare; it declares: {known}"
        )
    return values[name]
