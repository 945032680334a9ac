"""What the package says about the environment and the CPU it finds."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import transformers_kt
import transformers_kt._C as _C
from transformers_kt._environment import check_environment
from transformers_kt.assets import bundled_model
from transformers_kt.errors import UnsupportedCpuError


def with_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_fork_that_installs_over_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"transformers-kt": "4.51.0", "transformers": "5.23.0"})
    with pytest.raises(ImportError, match=r"transformers-kt 4\.51\.0.*pip uninstall"):
        check_environment()


def test_the_command_names_the_fork_without_a_traceback(tmp_path: Path) -> None:
    fork = tmp_path / "transformers_kt-4.51.0.dist-info"
    fork.mkdir()
    (fork / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers-kt\nVersion: 4.51.0\n")
    startup = Path(__file__).parents[1] / "startup"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, startup)))}
    command = [sys.executable, "-c", "from _transformers_kt_command import main; main()", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("transformers-kt: the distribution transformers-kt 4.51.0 is installed: it is a fork")
    assert done.stderr.endswith("pip install transformers-kt-experts\n")


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {})
    with pytest.raises(ImportError, match="transformers is not installed"):
        check_environment()


def test_an_old_transformers_is_named_with_the_version_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"transformers": "4.57.1"})
    with pytest.raises(ImportError, match=r"transformers 4\.57\.1.*5\.22 or newer"):
        check_environment()


@pytest.mark.parametrize("version", ["5.22.2", "5.24.0.dev0", "6.0.1"])
def test_newer_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    with_versions(monkeypatch, {"transformers": version})
    check_environment()


def import_from(folder: Path, *others: Path) -> str:
    """What importing the package's source code in ``folder`` prints last. Editable installs are not seen (-S)."""
    shutil.copytree(
        Path(transformers_kt.__file__).parent, folder / "transformers_kt", ignore=SOURCE_CODE_ONLY, dirs_exist_ok=True
    )
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [folder, *others, *packages]))}
    command = [sys.executable, "-S", "-c", "import transformers_kt"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stderr


SOURCE_CODE_ONLY = shutil.ignore_patterns("*.so", "__pycache__")


def test_source_code_without_the_extension_names_the_command_that_builds_it(tmp_path: Path) -> None:
    error = import_from(tmp_path)
    assert f"ImportError: {tmp_path / 'transformers_kt'} is source code without the compiled extension" in error
    assert f"pip install --editable {tmp_path}" in error


def test_source_code_that_hides_the_installed_package_names_its_folder(tmp_path: Path) -> None:
    installed = tmp_path / "site" / "transformers_kt"
    installed.mkdir(parents=True)
    shutil.copy(_C.__file__, installed)
    error = import_from(tmp_path / "checkout", installed.parent)
    assert f"hides the package installed in {installed.parent}. Run Python in another folder" in error


def test_an_extension_of_another_python_is_named_with_both(tmp_path: Path) -> None:
    folder = tmp_path / "transformers_kt"
    folder.mkdir()
    (folder / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    error = import_from(tmp_path)
    assert f"built for cpython-39-x86_64-linux-gnu; this is {sys.implementation.cache_tag}" in error


@pytest.fixture
def _own_cpu_afterwards() -> Iterator[None]:
    yield
    _C.hide_cpu_features("")
    _C.select_isa("")


@pytest.mark.usefixtures("_own_cpu_afterwards")
@pytest.mark.parametrize("missing", ["avx2", "fma", "f16c"])
def test_a_cpu_without_the_instructions_is_refused_at_loading_by_their_name(missing: str) -> None:
    _C.hide_cpu_features(missing)
    _C.select_isa("")
    with pytest.raises(UnsupportedCpuError, match=rf"lacks {missing};.*needs avx2, fma and f16c"):
        AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")


@pytest.mark.skipif(not {"avx512_vnni", "avx_vnni"} <= set(_C.supported_isas()), reason="needs a CPU with all of them")
@pytest.mark.usefixtures("_own_cpu_afterwards")
@pytest.mark.parametrize(
    ("missing", "chosen"),
    [
        ("", "avx512_vnni"),
        ("avx512_vnni", "avx512"),
        ("avx512bw", "avx_vnni"),
        ("avx512f avx_vnni", "avx2"),
        ("avx512bw avx_vnni", "avx2"),
    ],
)
def test_the_best_kernels_that_the_cpu_has_are_chosen(missing: str, chosen: str) -> None:
    _C.hide_cpu_features(missing)
    _C.select_isa("")
    assert _C.isa() == chosen


@pytest.mark.usefixtures("_own_cpu_afterwards")
def test_an_isa_asked_for_that_is_missing_or_unknown_is_refused_with_what_there_is() -> None:
    _C.hide_cpu_features("avx2")
    with pytest.raises(UnsupportedCpuError, match=r"KT_ISA=avx2: this CPU lacks avx2; it supports: scalar"):
        _C.select_isa("avx2")
    with pytest.raises(UnsupportedCpuError, match=r"avx9 is not known; this CPU supports: scalar"):
        _C.select_isa("avx9")
