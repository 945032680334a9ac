"""Sizes and budgets: how much memory weights take, how much there is, and the refusal where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from transformers_kt.errors import OutOfMemoryError

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """``nbytes`` that can still be taken before ``source`` (a noun phrase) objects."""

    nbytes: int
    source: str


def format_bytes(nbytes: int) -> str:
    """Three digits and a decimal unit, as file managers show sizes: 4.10 GB."""
    size = float(nbytes)
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{nbytes} bytes" if unit == 0 else f"{size:#.3g}".rstrip(".") + f" {_UNITS[unit]}"


def free_memory(root: Path = Path("/")) -> MemoryLimit:
    """The tightest of what the machine and each control group of this process (version 1 or 2) leave free.

    Page cache counts as free: the kernel gives it up. ``root`` is where ``proc`` and ``sys`` are mounted.
    """
    limits = [MemoryLimit(psutil.virtual_memory().available, "free memory of this machine"), *_cgroup_limits(root)]
    return min(limits, key=lambda limit: limit.nbytes)


def require_memory(needed: int, title: str, limit: MemoryLimit) -> None:
    """Raise `OutOfMemoryError`, with the numbers, if ``needed`` bytes for the weights of ``title`` pass ``limit``."""
    if needed > limit.nbytes:
        raise OutOfMemoryError(
            f"the weights of {title} take {format_bytes(needed)}, but {format_bytes(limit.nbytes)} is available "
            f"({limit.source}): {format_bytes(needed - limit.nbytes)} too little. Nothing was loaded. Free memory, "
            "raise the limit, or take a smaller quantization"
        )


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """What one version of control groups calls its files."""

    folder: str
    limit: str
    used: str
    page_cache: tuple[str, ...]  # keys of memory.stat


_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _CgroupFiles("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file"))


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = _V1 if controllers else _V2
        mount = root / files.folder
        group = mount / path.lstrip("/")
        # In a container the path is often the host's while the mount shows the container's group alone: the walk up
        # then passes folders that do not exist and ends at the mount itself, which is the right one.
        for folder in (group, *group.parents):
            if (limit := _read_limit(folder, files)) is not None:
                yield limit
            if folder == mount:
                break


def _read_limit(folder: Path, files: _CgroupFiles) -> MemoryLimit | None:
    try:
        most = int((folder / files.limit).read_text())  # v2 writes "max" where there is none
        used = int((folder / files.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(key, 0)) for key in files.page_cache)
    except (OSError, ValueError):
        return None
    return MemoryLimit(max(0, most - max(0, used - cached)), f"memory limit of control group {folder}")
