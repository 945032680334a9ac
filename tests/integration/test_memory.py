"""Memory budgets: the tightest of machine and control groups, and the refusal past it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from transformers_kt.errors import OutOfMemoryError
from transformers_kt.planning.hardware import MemoryLimit, free_memory, require_memory
from transformers_kt.text import format_bytes

GB = 10**9


@pytest.fixture(autouse=True)
def machine_with_64_gb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB))


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_without_control_groups_the_machine_sets_the_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == MemoryLimit(64 * GB, "free memory of this machine")


def test_a_version_2_group_sets_the_limit_and_its_page_cache_counts_as_free(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 10 * GB,
            "sys/fs/cgroup/memory.current": 7 * GB,
            "sys/fs/cgroup/memory.stat": f"anon 1\nactive_file {GB}\ninactive_file {3 * GB}",
        },
    )
    limit = free_memory(root)
    assert limit.nbytes == 7 * GB
    assert "sys/fs/cgroup" in limit.source


def test_a_group_further_up_may_be_the_tightest(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app",
            "sys/fs/cgroup/user/app/memory.max": "max",
            "sys/fs/cgroup/user/app/memory.current": 0,
            "sys/fs/cgroup/user/app/memory.stat": "active_file 0",
            "sys/fs/cgroup/user/memory.max": 5 * GB,
            "sys/fs/cgroup/user/memory.current": 2 * GB,
            "sys/fs/cgroup/user/memory.stat": "active_file 0",
        },
    )
    assert free_memory(root).nbytes == 3 * GB


def test_the_limit_past_which_a_version_2_group_is_slowed_down_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app",
            "sys/fs/cgroup/app/memory.max": 10 * GB,
            "sys/fs/cgroup/app/memory.high": 6 * GB,
            "sys/fs/cgroup/app/memory.current": 2 * GB,
            "sys/fs/cgroup/app/memory.stat": "active_file 0",
        },
    )
    limit = free_memory(root)
    assert limit.nbytes == 4 * GB
    assert "memory.high" in limit.source


LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max data size             {data}            unlimited            bytes
Max locked memory         {locked}              8388608              bytes
Max address space         {space}           unlimited            bytes
"""
STATUS = "Name:\tpython\nVmSize:\t {space} kB\nVmLck:\t {locked} kB\nVmData:\t {data} kB\n"


@pytest.mark.parametrize(
    ("limits", "taken", "source"),
    [
        ({"space": 20 * GB}, {"space": 10**7}, "ulimit -v"),
        ({"data": 20 * GB}, {"data": 10**7}, "ulimit -d"),
        ({"locked": 20 * GB}, {"locked": 10**7}, "ulimit -l"),
        ({"locked": 8 << 20}, {}, "free memory"),
        ({}, {"space": 10**7}, "free memory"),
    ],
    ids=["address_space", "data", "locked", "nothing_is_locked", "unlimited"],
)
def test_limits_of_the_process_count(
    tmp_path: Path, limits: dict[str, int], taken: dict[str, int], source: str
) -> None:
    kinds = ("data", "locked", "space")
    root = tree(
        tmp_path,
        {
            "proc/self/limits": LIMITS.format(**{kind: limits.get(kind, "unlimited") for kind in kinds}),
            "proc/self/status": STATUS.format(**{kind: taken.get(kind, 0) for kind in kinds}),
        },
    )
    found = free_memory(root)
    assert source in found.source
    if source != "free memory":
        # Loading maps more than it touches: less than what is left, and not by much.
        left = 20 * GB - 1024 * 10**7
        assert 0.85 * left < found.nbytes < 0.9 * left


@pytest.mark.skipif(sys.platform != "linux", reason="sets limits of a process")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_process_with_too_little_room_is_refused_before_anything_is_taken(limit: str) -> None:
    code = f"""
import re, resource, sys
import torch, transformers_kt
from transformers import AutoModelForCausalLM
from transformers_kt.assets import bundled_model
load = lambda: AutoModelForCausalLM.from_pretrained(None, gguf_path=bundled_model())
load()
status = open("/proc/self/status").read()
taken = int(re.search(r"{"VmSize" if limit == "RLIMIT_AS" else "VmData"}:\\s+(\\d+)", status)[1]) * 1024
resource.setrlimit(resource.{limit}, (taken + (6 << 20), -1))
try:
    load()
except transformers_kt.errors.OutOfMemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert "Nothing was loaded" in done.stdout
    assert "ulimit" in done.stdout


@pytest.mark.parametrize("group", ["docker/abc", ""])
def test_a_version_1_group_is_found_at_its_path_or_where_a_container_mounts_it(tmp_path: Path, group: str) -> None:
    folder = f"sys/fs/cgroup/memory/{group}"
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
            f"{folder}/memory.limit_in_bytes": 8 * GB,
            f"{folder}/memory.usage_in_bytes": 6 * GB,
            f"{folder}/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\ntotal_active_file {GB}",
        },
    )
    assert free_memory(root).nbytes == 4 * GB


def test_a_group_past_its_limit_has_nothing_free(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": GB,
            "sys/fs/cgroup/memory.current": 2 * GB,
            "sys/fs/cgroup/memory.stat": "active_file 0",
        },
    )
    assert free_memory(root).nbytes == 0


def test_this_machine_has_a_limit() -> None:
    assert 0 < free_memory().nbytes <= 64 * GB


def test_what_fits_is_accepted_and_a_byte_more_is_not() -> None:
    require_memory(GB, "tiny", MemoryLimit(GB, "a test"))
    with pytest.raises(
        OutOfMemoryError, match=r"the weights of tiny take 1\.00 GB, but 1\.00 GB is available \(a test\)"
    ):
        require_memory(GB + 1, "tiny", MemoryLimit(GB, "a test"))


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (4_100_000_000, "4.10 GB"),
        (377_000_000_000, "377 GB"),
        (1_340_000_000_000, "1.34 TB"),
        (13_400_000_000_000_000, "1.34e+04 TB"),
    ],
)
def test_sizes_are_shown_with_three_digits(nbytes: int, shown: str) -> None:
    assert format_bytes(nbytes) == shown
