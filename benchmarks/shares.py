"""Times of a call under pytest-benchmark, and which share of the limits of the machine they are.

A round lasts SAMPLE_SECONDS, and a measurement is the median of its rounds. After each round the limits are sampled
by as many threads (limits.cpp), and shares are medians of the ratios of each round: where memory jumps between two
speeds, two medians may be of different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import measuring
from measuring import Limits, median
from pytest_benchmark.fixture import BenchmarkFixture


class Measure:
    """Measures one call; what it found is appended to ``measured`` too."""

    def __init__(
        self, benchmark: BenchmarkFixture, limits: Limits, rounds: int, isa: str, measured: list[dict[str, Any]]
    ) -> None:
        self._benchmark = benchmark
        self._limits = limits
        self._rounds = rounds
        self._isa = isa
        self._measured = measured

    def __call__(self, call: Callable[[], object], *, nbytes: int, operations: int, peak: str = "dot_gops") -> None:
        """``call`` reads ``nbytes`` of weights and does ``operations``, as fast as the limit named ``peak`` at most."""
        samples: dict[str, list[float]] = {name: [] for name in self._limits.samplers}

        def after_round() -> None:
            for name, sample in self._limits.samplers.items():
                samples[name].append(sample())
            call()  # the threads of the samples ran last: ours have to wake up and to find CPUs, a third of a round

        self._benchmark.pedantic(
            call,
            teardown=after_round,
            rounds=self._rounds,
            iterations=measuring.calls_per_sample(call),
            warmup_rounds=1,
        )
        seconds = self._benchmark.stats.stats.data
        reads = samples["read_gb_per_s"][1 : 1 + self._rounds]
        peaks = samples[peak][1 : 1 + self._rounds]
        each = list(zip(seconds, reads, peaks, strict=True))
        found = {
            "isa": self._isa,
            "nbytes": nbytes,
            "operations": operations,
            "gb_per_s": nbytes / median(seconds) / 1e9,
            "gops": operations / median(seconds) / 1e9,
            "of_read": median([nbytes / s / 1e9 / read for s, read, _ in each]),
            "of_peak": median([operations / s / 1e9 / most for s, _, most in each]),
            "of_limit": median([measuring.least_seconds(nbytes, operations, read, most) / s for s, read, most in each]),
            "read_gb_per_s": median(reads),
            peak: median(peaks),
        }
        shown = {"name": self._benchmark.name, "ms": median(seconds) * 1e3, "spread": measuring.spread(seconds)}
        self._measured.append({**shown, **found})
        # JSON has no NaN: a limit that could not be measured is null.
        self._benchmark.extra_info.update(
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in found.items()}
        )
