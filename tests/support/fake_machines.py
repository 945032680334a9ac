"""Folders that look like the /sys and /proc of machines which are not at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def write_machine(
    root: Path,
    nodes: Mapping[int, Sequence[Sequence[int]]],
    *,
    online: str | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Writes a machine under ``root`` and returns that path for ``_C.use_topology``.

    Args:
        nodes: number of each NUMA node -> the logical CPUs of each of its cores; a node without cores has only memory.
        online: CPUs that are switched on, in the form of sysfs; all of them by default. The others keep their place in
            their node's list, and have no siblings.
        files: path under ``root`` -> content of whatever else there is, such as cgroups.
    """
    all_cpus = [cpu for cores in nodes.values() for core in cores for cpu in core]
    on = set(all_cpus) if online is None else {int(cpu) for cpu in online.split(",")}
    content = {
        "sys/devices/system/cpu/online": online or _listed(all_cpus),
        "sys/devices/system/node/online": _listed(list(nodes)),
    }
    for node, cores in nodes.items():
        content[f"sys/devices/system/node/node{node}/cpulist"] = _listed([cpu for core in cores for cpu in core])
        for core in cores:
            for cpu in on.intersection(core):
                content[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = _listed(core)
    for path, text in {**content, **(files or {})}.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")
    return str(root)


def _listed(numbers: Sequence[int]) -> str:
    """The form of the kernel: "0-3,8"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
