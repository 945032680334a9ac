"""What importing the package says about the environment it finds."""

from __future__ import annotations

import importlib.metadata

import pytest

from transformers_kt._environment import check_environment


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
