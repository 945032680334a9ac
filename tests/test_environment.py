"""What the package says about the environment and the CPU it finds."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest
from transformers import AutoModelForCausalLM

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


def test_an_old_transformers_is_named_with_the_version_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, {"transformers": "4.57.1"})
    with pytest.raises(ImportError, match=r"transformers 4\.57\.1.*5\.23 or newer"):
        check_environment()


@pytest.mark.parametrize("version", ["5.23.0", "5.24.0.dev0", "6.0.1"])
def test_newer_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    with_versions(monkeypatch, {"transformers": version})
    check_environment()


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
