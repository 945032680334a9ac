"""The script for ten minutes on a GPU runs from end to end without one, and survives sections that do not."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_gpus import fake_gpus

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _scripts_beside_each_other() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def sections() -> list[str]:
    return [path.stem for path in (BENCHMARKS / "on_gpu").glob("*.py") if "def measure(" in path.read_text()]


@pytest.mark.parametrize("name", sections())
def test_a_section_runs_on_a_fake_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    bench = importlib.import_module("bench_gpu")
    report = importlib.import_module("on_gpu.report")
    assert name in bench.SECTIONS
    with fake_gpus("1GiB"):
        bench.measure(name, tmp_path, is_fake=True)
    rows = [row for table in report.read(tmp_path, name)["tables"].values() for row in table]
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert figures
    assert all(value >= 0 for value in figures)
    assert "FAKE" in report.tables(tmp_path, [name])


def test_what_hangs_or_fails_costs_only_itself(tmp_path: Path) -> None:
    bench = importlib.import_module("bench_gpu")
    report = importlib.import_module("on_gpu.report")
    report.Report(tmp_path, "link").add("Copies", {"GB/s": 25.0})
    ends = {
        "import time; time.sleep(60)": "ended at its limit of 0.5 s",
        "import os; os.abort()": "failed with status -6",
        "print('fine')": "ok",
    }
    begin = time.perf_counter()
    for program, expected in ends.items():
        assert bench.run_apart([sys.executable, "-c", program], tmp_path / "log", 0.5, os.environ) == expected
    assert time.perf_counter() - begin < 30
    report.Report.finish(tmp_path, "link", "failed with status -6", 1.0)
    shown = report.tables(tmp_path, list(bench.SECTIONS))
    assert "| 25 |" in shown
    assert "**Section link failed with status -6.**" in shown
