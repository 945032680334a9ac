"""The codebooks in the C++ files are those that the gguf package publishes."""

from __future__ import annotations

import runpy
from pathlib import Path

import gguf
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


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"])
def test_no_entry_of_a_grid_is_larger_than_sums_of_16_bits_allow(name: str) -> None:
    """With an offset of 64 two products have to stay below 2^15. IQ1 types count in eighths, and add one."""
    entries = getattr(gguf.quants, name).grid_map or gguf.quants.IQ1_S.grid_map
    largest = max(abs(value) for value in entries)
    assert 2 * (64 + (8 * largest + 1 if name.startswith("IQ1") else largest)) * 127 < 1 << 15
