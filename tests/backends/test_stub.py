"""The stub ``_C.pyi``, by which type checkers and readers know the extension, says what the extension has."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from typing import Any

import pytest

import transformers_kt._C as _C

STUB = ast.parse(files("transformers_kt").joinpath("_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = node
    return found


def names_of(thing: Any) -> set[str]:
    """Of what was defined there, without what every module and object has."""
    names = {name for name in vars(thing) if not name.startswith("_")}
    constructor = vars(thing).get("__init__")
    is_bound = constructor is not None and "->" in constructor.__doc__  # else there is none to call from Python
    return names | {"__init__"} if is_bound else names


def arguments_of_stub(node: ast.FunctionDef) -> list[str]:
    arguments = [each.arg for each in node.args.args if each.arg != "self"]
    return arguments + [each.arg for each in node.args.kwonlyargs]


def arguments_of_extension(function: Any) -> list[str]:
    """As pybind11 writes them into the first line of the docstring."""
    assert function.__doc__ is not None
    signature = function.__doc__.splitlines()[0]
    names = re.findall(r"[(,] ?(\w+):", re.sub(r"\[[^()]*?\]", "", signature))
    return [name for name in names if name != "self"]


def functions_of(owner: Any, body: list[ast.stmt], prefix: str = "") -> list[Any]:
    return [
        pytest.param(node, getattr(owner, name), id=prefix + name)
        for name, node in names_in(body).items()
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    ]


FUNCTIONS = functions_of(_C, STUB.body)
for _name, _node in CLASSES.items():
    FUNCTIONS += functions_of(getattr(_C, _name), _node.body, f"{_name}.")


def test_the_stub_lists_exactly_what_the_module_has() -> None:
    stub = {name for name in names_in(STUB.body) if not name.startswith("_")}
    assert stub == names_of(_C)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_of_the_stub_lists_exactly_its_members(name: str) -> None:
    assert set(names_in(CLASSES[name].body)) == names_of(getattr(_C, name))


@pytest.mark.parametrize(("node", "function"), FUNCTIONS)
def test_a_function_of_the_stub_has_the_arguments_of_the_module(node: ast.FunctionDef, function: Any) -> None:
    assert arguments_of_stub(node) == arguments_of_extension(function)


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert files("transformers_kt").joinpath("py.typed").is_file()
