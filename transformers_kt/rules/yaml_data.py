"""YAML as plain data with line numbers: safe loader, no key twice, aliases and nesting bounded.

PyYAML's errors for text that is no YAML are of many classes; here each is a `RuleError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from transformers_kt.errors import RuleError
from transformers_kt.text import brief

_MOST_BYTES = 1 << 18  # 733 lines, the longest file that KTransformers shipped, are 25 KB; PyYAML reads 200 KB/s
_MOST_VALUES = 100_000  # with each alias counted as what it stands for
_DEEPEST = 32
_LONGEST_QUOTE = 200
_DASH = re.compile(r"( *)-(?:\s|$)")
# Part of PyYAML's words -> what to do.
_REMEDIES = {
    "found unknown escape character": "in double quotes a backslash counts for YAML; put regexes in single quotes",
    "found character '\\t'": "indent with spaces, not with tabs",
    "found another document": "a file holds one list of rules; remove the line ---",
    "could not determine a constructor": "a file of rules holds plain data, no tags",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML document, and the line at which each item of its list of rules starts."""

    value: Any
    lines: tuple[int, ...]


def read_yaml(path: Path, rules_key: str) -> Document:
    """The document in ``path``. Its list of rules is the document itself, or what lies at ``rules_key`` of a mapping.

    Raises `RuleError`, with file, rule and line, if it is no YAML, has a key twice in a mapping, or grows beyond
    measure through aliases.
    """
    text = _text(path)
    with _in_rule_errors(path, text):
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Document([], ())
        items = _rule_nodes(node, rules_key)
        _check(node, {id(item): number for number, item in enumerate(items, start=1)}, path)
        return Document(loader.construct_document(node), tuple(_line(item) for item in items))


@contextmanager
def _in_rule_errors(path: Path, text: str) -> Iterator[None]:
    try:
        yield
    except RuleError:
        raise
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        problem = str(error.problem or error.context)
        remedy = "".join(f" ({remedy})" for words, remedy in _REMEDIES.items() if words in problem)
        said = f"{problem[:_LONGEST_QUOTE]}{remedy}"
        where = "" if line is None else f" in line {line}"
        raise RuleError(f"{path}{_rule_before(text, line)} is not valid YAML{where}: {said}") from None
    except Exception as error:  # !!bool with another word in it is a KeyError, a date in month 99 a ValueError
        raise RuleError(f"{path} is not valid YAML: {brief(error)}") from None


def _rule_before(text: str, line: int | None) -> str:
    """ ", rule 2 (line 5)": the last that starts up to ``line`` in a text that is no YAML; "" where none does."""
    found = enumerate(map(_DASH.match, text.splitlines()[:line]), start=1)
    dashes = [(len(match[1]), number) for number, match in found if match is not None]
    starts = [number for indent, number in dashes if indent == dashes[0][0]]
    return f", rule {len(starts)} (line {starts[-1]})" if starts and line is not None else ""


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise RuleError(f"{path} has {size} bytes; files of rules of up to {_MOST_BYTES} bytes are accepted")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RuleError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RuleError(f"{path} is not UTF-8 from byte {error.start} on; save it as UTF-8") from None


def _rule_nodes(node: yaml.Node, rules_key: str) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == rules_key), node)
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check(root: yaml.Node, numbers: dict[int, int], path: Path) -> None:
    """Walk the graph of nodes as the tree that it stands for; an alias is an edge to a node met before."""
    values = 0

    def visit(node: yaml.Node, depth: int, where: str) -> None:
        nonlocal values
        if id(node) in numbers and depth <= 2:
            where = f"{path}, rule {numbers[id(node)]} (line {_line(node)})"
        values += 1
        if values > _MOST_VALUES:
            raise RuleError(
                f"{where} repeats aliases until the file holds more than {_MOST_VALUES} values; write it without "
                "aliases"
            )
        if depth > _DEEPEST:
            raise RuleError(f"{where} is nested deeper than {_DEEPEST} levels, or an alias in it contains itself")
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys(node, where)
        for child in _children(node):
            visit(child, depth + 1, where)

    visit(root, 0, str(path))


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _require_unique_keys(node: yaml.MappingNode, where: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        identity = (key.tag, key.value)
        if identity in lines:
            raise RuleError(
                f"{where} has the key {brief(key.value)} twice, in lines {lines[identity]} and {_line(key)}; only the "
                "last would count. Remove one of them"
            )
        lines[identity] = _line(key)


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line
