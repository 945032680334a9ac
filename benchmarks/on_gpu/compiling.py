"""Compiles what `products` measures, in as many processes as there are cores: Triton keeps kernels on disk, and one
process alone would spend the time of that section on it."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from tempfile import mkdtemp

from . import products
from .report import Report
from .setting import Setting, setting_for


def measure(setting: Setting) -> None:
    types = list(dict.fromkeys(type_name for type_name, _, _ in products.cases(setting)))
    begin = time.perf_counter()
    if setting.is_fake:
        found = [compile_type(type_name, is_fake=True) for type_name in types]
    else:
        workers = max(1, min(len(types), len(os.sched_getaffinity(0)) - 1))
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            found = pool.map(compile_type, types, chunksize=1)
    for type_name, seconds in zip(types, found, strict=True):
        setting.report.add("Compiling", {"type": type_name, "s": seconds})
    setting.report.add("Compiling", {"type": "all, side by side", "s": time.perf_counter() - begin})


def compile_type(type_name: str, *, is_fake: bool = False) -> float:
    """Call once what is measured with matrices of ``type_name``; the seconds that took."""
    begin = time.perf_counter()
    setting = setting_for(Report(Path(mkdtemp()), "compiling"), is_fake=is_fake)
    for own, name, tokens in products.cases(setting):
        if own == type_name:
            rows, cols = products.shape_of(name)
            setting.matrix(type_name, rows, cols).multiply(setting.values(tokens, cols))
    return time.perf_counter() - begin
