"""The projection for real machines counts the bytes that the plan counts, and docs/gpu.md shows what it gives."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

import transformers_kt

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def projection() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("projection")


def test_with_nothing_lost_a_token_takes_what_the_plan_says(projection: Any, tmp_path: Path) -> None:
    model = projection.header(tmp_path, "v3", whole_kv_b=True)
    perfect = {"cpu_bandwidth": 1, "gpu_bandwidth": 1, "handoff_us": 0, "kernel_gap_us": 0, "python_ms": 0}
    changed = {name: projection.Value(value, "") for name, value in perfect.items()}
    for machine in projection.machines(None):
        machine = dataclasses.replace(machine, values={**machine.values, **changed})
        for options in projection.PLACEMENTS.values():
            report = transformers_kt.plan(model.path, **machine.plan, **options)
            load = projection.Load.of(report)
            assert load.cpu + load.gpu == sum(row.read_per_token for row in report.rows)
            assert 0 < load.shared < load.gpu
            hidden = load.shared / (machine.gpu_gb_s * 1e6)
            for cached in (0, report.context):
                taken = sum(projection.decode(machine, load, model, cached)) + hidden
                assert taken == pytest.approx(1000 / report.tokens_per_second(cached), rel=1e-9)


def test_the_documents_show_what_the_projection_gives(projection: Any) -> None:
    table = projection.text().split("\n\n")[0]
    assert table in (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
