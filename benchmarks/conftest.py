"""What bench_kernels.py and bench_moe.py add to pytest-benchmark: shares of the limits of the machine.

    make bench BENCH="--threads 2 --isas avx2,avx512 -k 'Q4_K and v3-gate' --benchmark-save before"
    make bench BENCH="--benchmark-compare"

``extra_info`` of a saved run holds them (`shares.Measure`); a table at the end of the run shows them.
"""

from __future__ import annotations

import sys
from typing import Any

import measuring
import pytest
from measuring import Limits, median, share
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table
from shares import Measure

import transformers_kt._C as _C

_MEASURED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("transformers_kt")
    group.addoption("--threads", type=int, default=_C.thread_count())
    group.addoption("--isas", default=_C.isa(), help="comma-separated: " + ",".join(_C.supported_isas()))
    group.addoption("--rounds", type=int, default=5)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MEASURED] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", metafunc.config.getoption("--isas").split(","), scope="module")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(measuring.machine(), threads=config.getoption("--threads"))


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> Limits:
    return Limits(request.config.getoption("--threads"))


@pytest.fixture
def measure(benchmark: BenchmarkFixture, limits: Limits, request: pytest.FixtureRequest, isa: str) -> Measure:
    config = request.config
    _C.set_thread_count(config.getoption("--threads"))
    _C.select_isa(isa)
    return Measure(benchmark, limits, config.getoption("--rounds"), isa, config.stash[_MEASURED])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[_MEASURED]
    if not measured:
        return
    table = Table(title=f"{config.getoption('--threads')} threads, medians of {config.getoption('--rounds')} rounds")
    for column in ("", "ms", "spread", "GB/s", "of read", "GOPS", "of peak", "of limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in measured:
        table.add_row(
            entry["name"].partition("[")[2].rstrip("]"),
            f"{entry['ms']:.3f}",
            f"{entry['spread']:.0%}",
            f"{entry['gb_per_s']:.1f}",
            share(entry["of_read"], 1.0),
            f"{entry['gops']:.0f}",
            share(entry["of_peak"], 1.0),
            share(entry["of_limit"], 1.0),
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for key in ("read_gb_per_s", "dot_gops", "fma_gflops"):
        values = [entry[key] for entry in measured if key in entry]
        if values:
            print(f"{key} {median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
