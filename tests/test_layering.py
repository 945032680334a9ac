"""A file uses only what stands above it in DESIGN's list of layers, and instruction sets stay where they belong."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import transformers_kt._C as _C

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "transformers_kt"
CSRC = ROOT / "csrc"

# Lowest first: a room imports only from rooms above it in this list, and from itself. "__init__" is the package.
PYTHON_LAYERS = (
    ("errors", "text", "_environment", "_C", "assets"),
    ("gguf",),
    ("families",),
    ("rules",),
    ("planning",),
    ("backends",),
    ("modules",),
    ("integration",),
    ("evaluation",),
    ("cli", "__init__"),
)
# Where compiled code may be called from: backends are the boundary, modules make the objects that they look up, plans
# ask which types have kernels.
CALLERS_OF_KERNELS = {"__init__", "planning", "backends", "modules", "integration", "cli"}

# Lowest first: a room includes only headers of rooms above it in this list, and its own.
CPP_LAYERS = (("formats",), ("machine",), ("kernels",), ("layers",), ("bindings",))
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))
# Compiled with flags of their own, so no function of theirs may run elsewhere. CMake makes more of them from TEMPLATE:
# one for each ISA and kind of weights.
_NO_ISA = ("dispatch", "prefetch", "scalar")
ISA_FILES = sorted(path for path in CSRC.glob("kernels/*.cpp") if path.stem not in _NO_ISA)
TEMPLATE = CSRC / "kernels" / "products.cpp.in"


def _rank(layers: tuple[tuple[str, ...], ...], name: str) -> int:
    for rank, layer in enumerate(layers):
        if name in layer:
            return rank
    raise AssertionError(f"{name} stands in no layer: give it a place in {Path(__file__).name}")


# ---- Python ----------------------------------------------------------------------------------------------------------


def _component(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path, *, for_types: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in the file: ("torch", "nn") for ``from torch import nn``, ("os", "")."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not for_types:
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def _own_imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Components of this package that the file imports."""
    components = {entry.stem if entry.suffix == ".py" else entry.name for entry in PACKAGE.iterdir()} | {"_C"}
    found = set()
    for module, name in _imports(path, for_types=for_types):
        if module == "transformers_kt":
            found.add(name if name in components else "__init__")
        elif module.startswith("transformers_kt."):
            found.add(module.split(".")[1])
    return found


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_python_file_imports_only_from_layers_below(path: Path) -> None:
    own = _component(path)
    above = {name for name in _own_imports(path) - {own} if _rank(PYTHON_LAYERS, name) >= _rank(PYTHON_LAYERS, own)}
    assert not above


def test_only_the_boundary_calls_compiled_code() -> None:
    assert {_component(path) for path in PYTHON_FILES if "_C" in _own_imports(path)} <= CALLERS_OF_KERNELS


def test_rules_and_placement_are_pure() -> None:
    """They decide about a model that they neither make nor load."""
    for path in (PACKAGE / "rules").glob("*.py"):
        assert _own_imports(path, for_types=False) <= {"errors", "text", "families", "rules"}
    assert _own_imports(PACKAGE / "planning" / "placement.py", for_types=False) <= {"errors", "text", "planning"}


def test_only_the_integration_knows_the_internals_of_transformers() -> None:
    """Modules may name what they replace; everybody else keeps to the public names of the top level."""
    for path in PYTHON_FILES:
        if _component(path) == "integration":
            continue
        for module, name in _imports(path):
            if module == "transformers" or module.startswith("transformers."):
                assert not name.startswith("_"), f"{path}: {module}.{name}"
                assert module == "transformers" or _component(path) == "modules", f"{path}: {module}"


# ---- C++ -------------------------------------------------------------------------------------------------------------


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', path.read_text(), flags=re.MULTILINE)


def _own_includes(path: Path) -> list[Path]:
    return [(CSRC / include[1:-1]).resolve() for include in _includes(path) if include[0] == '"']


def _cpp_component(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


@pytest.mark.parametrize("path", CPP_FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_cpp_file_includes_only_from_layers_below(path: Path) -> None:
    own = _cpp_component(path)
    included = {_cpp_component(header) for header in _own_includes(path)} - {own}
    above = {name for name in included if _rank(CPP_LAYERS, name) >= _rank(CPP_LAYERS, own)}
    assert not above


def test_parts_of_kernels_are_included_by_kernels_alone() -> None:
    for path in CPP_FILES:
        for header in _own_includes(path):
            if header.stem.endswith("-inl"):
                assert path.suffix == ".cpp" or path.stem.endswith("-inl"), f"{path} includes {header.name}"


def test_python_is_known_to_the_bindings_alone_and_torch_to_no_one() -> None:
    for path in CPP_FILES:
        for include in _includes(path):
            assert not re.search(r"torch|ATen|c10|cuda", include), f"{path} includes {include}"
            if re.search(r"pybind11|Python\.h", include):
                assert path.parent.name == "bindings", f"{path} includes {include}"


def test_the_extension_loads_neither_torch_nor_cuda() -> None:
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("transformers_kt._C", {_C.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert Path(_C.__file__).name in maps
    assert not re.search(r"libtorch|libc10|libcuda|libcublas|libgomp", maps)


# ---- Instruction sets ------------------------------------------------------------------------------------------------


def test_files_of_an_instruction_set_use_no_function_of_the_standard_library() -> None:
    """An inline function compiled there may be the copy that the linker gives to all others."""
    assert ISA_FILES
    for path in (*ISA_FILES, TEMPLATE, *CSRC.glob("kernels/*-inl.h")):
        system = {include for include in _includes(path) if include[0] == "<"}
        assert system <= {"<immintrin.h>", "<arm_neon.h>"}, f"{path} includes {system}"
        code = re.sub(r"//.*", "", path.read_text())
        assert "std::" not in code, path


def test_machine_flags_belong_to_the_files_of_instruction_sets() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    for line in text.splitlines():
        if re.search(r'[\s";]-m[a-z0-9]|_FLAGS\}', line.partition("#")[0]):
            assert re.match(r"\s*(set\(AVX(2|512)_FLAGS|add_isa\(\w+) ", line), line
    for path in ISA_FILES:
        assert f"add_isa({path.stem} " in text
    # That function gives its flags to the files that it makes and lists, and to no others.
    made = re.search(r"function\(add_isa ISA\)\n(.*?)endfunction", text, flags=re.DOTALL)
    assert made is not None
    assert re.findall(r"csrc/kernels/\S+", made[1]) == [
        "csrc/kernels/${ISA}.cpp)",
        "csrc/kernels/${ISA}_${KIND}.cpp)",
        "csrc/kernels/products.cpp.in",
        "csrc/kernels/dispatch.cpp",
    ]
    assert text.count("COMPILE_OPTIONS") == 2  # and to a file of the wheel
    assert "set_source_files_properties(${FILES} PROPERTIES COMPILE_OPTIONS" in made[1]


def test_the_compiler_may_not_change_a_rounding() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "-ffp-contract=off" in text
    assert not re.search(r"fast-math|-Ofast|funsafe|fassociative|march=native", text)


@pytest.fixture(scope="module")
def binaries() -> list[Path]:
    """What was built, with its symbols: the extension, or where that was stripped the objects it was linked from."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    extension = Path(_C.__file__)
    if "no symbols" not in _objdump("-t", extension):
        return [extension]
    objects = sorted(ROOT.glob("build/**/csrc/**/*.cpp.o"))
    if not objects:
        pytest.skip(f"{extension} is stripped, and there are no objects under build/")
    return objects


def _objdump(option: str, path: Path) -> str:
    command = ["objdump", option, "-C", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_vector_instructions_stand_only_in_functions_of_their_instruction_set(binaries: list[Path]) -> None:
    """Everything else runs on any x86-64: VEX and EVEX instructions all have names in v."""
    namespaces = tuple(f"tkt::{path.stem}::" for path in ISA_FILES)
    strangers, vector_functions = set(), 0
    for binary in binaries:
        function = ""
        for line in _objdump("-d", binary).splitlines():
            if line.endswith(">:"):
                function = line.partition("<")[2][:-2]
            elif re.search(r"\t(\{vex\} )?v[a-z]", line) and "\tver" not in line:
                vector_functions += 1
                if not any(namespace in function for namespace in namespaces):
                    strangers.add(function)
    assert vector_functions > 1000
    assert not strangers


def test_tables_for_cpus_without_avx512_hold_no_instruction_of_it(binaries: list[Path]) -> None:
    """Instructions that both have, AVX-VNNI's product of bytes, are told apart by their prefix alone."""
    byte_products = 0
    for binary in binaries:
        function = ""
        for line in _objdump("-d", binary).splitlines():
            if line.endswith(">:"):
                function = line.partition("<")[2][:-2]
            elif "tkt::avx2::" in function or "tkt::avx_vnni::" in function:
                assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]|\{evex\}", line), f"{function}: {line}"
                if "vpdpbusd" in line:
                    byte_products += 1
                    assert "tkt::avx_vnni::" in function, function
                    assert "{vex}" in line, f"{function}: {line}"
    if "avx_vnni" in _C.supported_isas():  # a compiler that does not know it leaves the table out
        assert byte_products > 100


def test_an_instruction_set_exports_its_table_and_the_products_of_each_type(binaries: list[Path]) -> None:
    symbols = "\n".join(_objdump("-t", binary) for binary in binaries)
    types = range(len(_C.weight_types()))
    products = {f"Products<(tkt::WeightType){n}>::{kind}" for n in types for kind in ("dot", "gemv")}
    for path in ISA_FILES:
        found = set(re.findall(rf"[\s(](tkt::{path.stem}::\S.*)$", symbols, flags=re.MULTILINE))
        exported = {
            name.partition("(tkt::DotArgs")[0].partition("(tkt::GemvArgs")[0]
            for name in found
            if "(anonymous namespace)" not in name
        }
        assert exported == {f"tkt::{path.stem}::{name}" for name in (*products, "kTable")}
