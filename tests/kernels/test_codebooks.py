"""The codebooks in the C++ files are those that the gguf package publishes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_codebooks_are_what_the_script_makes_of_the_gguf_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ROOT / "tools" / "make_codebooks.py"
    names = runpy.run_path(str(script))
    made = tmp_path / "codebooks.cpp"
    monkeypatch.setitem(names["main"].__globals__, "TARGET", made)
    names["main"]()
    assert made.read_text() == (ROOT / "csrc" / "formats" / "codebooks.cpp").read_text()
