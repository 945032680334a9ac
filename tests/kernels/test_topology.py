"""Where threads may run and where weights lie, on machines written into a folder: nodes, cores, siblings, affinity and
quotas."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fake_machines import write_machine
from transformers import AutoModelForCausalLM

import transformers_kt._C as _C
from transformers_kt.assets import bundled_model

TWO_NODES = {0: [[0], [1], [2], [3]], 1: [[4], [5], [6], [7]]}
UNEVEN = {0: [[0], [1], [2], [3]], 1: [[4], [5]]}
SIBLINGS = {0: [[0, 4], [1, 5]], 1: [[2, 6], [3, 7]]}
ALL_EIGHT = range(8)

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"
GROUPS = "proc/self/cgroup"


def quota_v1(folder: str, quota_us: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota_us), f"{folder}/cpu.cfs_period_us": "100000"}


# ---- Nodes, cores, siblings ------------------------------------------------------------------------------------------


def test_nodes_hold_their_cores(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, TWO_NODES), ALL_EIGHT)
    assert _C.topology() == {"nodes": list(TWO_NODES.items()), "quota": 0.0, "default_threads": 8, "most_threads": 8}


def test_siblings_share_a_core_and_raise_only_the_limit(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, SIBLINGS), ALL_EIGHT)
    assert _C.topology() == {"nodes": list(SIBLINGS.items()), "quota": 0.0, "default_threads": 4, "most_threads": 8}


def test_a_cpuset_leaves_cores_of_both_nodes(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, TWO_NODES), [3, 5, 7])
    assert _C.topology() == {
        "nodes": [(0, [[3]]), (1, [[5], [7]])],
        "quota": 0.0,
        "default_threads": 3,
        "most_threads": 3,
    }


def test_a_cpuset_that_leaves_one_sibling_of_each_core_leaves_the_cores(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, SIBLINGS), [3, 5, 7])
    assert _C.topology()["nodes"] == [(0, [[5]]), (1, [[3, 7]])]
    assert (_C.topology()["default_threads"], _C.topology()["most_threads"]) == (2, 3)


def test_a_node_outside_the_cpuset_is_none(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, UNEVEN), [4, 5])
    assert _C.topology()["nodes"] == [(1, [[4], [5]])]


def test_a_node_with_memory_alone_is_none(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, {0: [], 1: [[0], [1]], 4: []}), [0, 1])
    assert _C.topology()["nodes"] == [(1, [[0], [1]])]


def test_cpus_that_are_off_do_not_count(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, SIBLINGS, online="0,1,2,5"), ALL_EIGHT)
    assert _C.topology()["nodes"] == [(0, [[0], [1, 5]]), (1, [[2]])]


def test_without_sysfs_each_allowed_cpu_is_a_core_of_one_node(tmp_path: Path) -> None:
    _C.use_topology(str(tmp_path / "nothing"), [2, 9])
    assert _C.topology() == {"nodes": [(0, [[2], [9]])], "quota": 0.0, "default_threads": 2, "most_threads": 2}


def test_a_cpu_number_may_be_larger_than_a_fixed_set_holds(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, {0: [[0]], 3: [[4000]]}), [0, 4000])
    assert _C.topology()["nodes"] == [(0, [[0]]), (3, [[4000]])]


@pytest.mark.parametrize("text", ["", "x", "-", "0-", "7-3", ",,", "0-2147483647"])
def test_a_list_that_makes_no_sense_is_not_fatal(tmp_path: Path, text: str) -> None:
    files = {"sys/devices/system/node/online": text, "sys/devices/system/cpu/online": text}
    _C.use_topology(write_machine(tmp_path, TWO_NODES, files=files), [0, 1])
    assert _C.topology()["most_threads"] in (1, 2)
    assert len(_C.topology()["nodes"]) == 1


def test_the_real_machine_is_that_of_this_process() -> None:
    found = _C.topology()
    assert sorted(cpu for _, cores in found["nodes"] for core in cores for cpu in core) == sorted(
        os.sched_getaffinity(0)
    )
    assert 1 <= found["default_threads"] <= found["most_threads"] <= len(os.sched_getaffinity(0))


# ---- Quotas ----------------------------------------------------------------------------------------------------------

QUOTAS = [
    pytest.param({GROUPS: "0::/", f"{V2}/cpu.max": "150000 100000"}, 1.5, id="v2-container"),
    pytest.param({GROUPS: "0::/", f"{V2}/cpu.max": "max 100000"}, 0.0, id="v2-unlimited"),
    pytest.param({f"{V2}/cpu.max": "150000 100000"}, 1.5, id="v2-without-proc"),
    pytest.param(
        {GROUPS: "0::/a/b", f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "300000 200000"}, 1.5, id="v2-parent"
    ),
    pytest.param(
        {GROUPS: "0::/a/b", f"{V2}/a/b/cpu.max": "150000 100000", f"{V2}/a/cpu.max": "400000 100000"}, 1.5, id="v2-own"
    ),
    pytest.param(
        {GROUPS: "0::/a", f"{V2}/b/cpu.max": "100000 100000", f"{V2}/a/cpu.max": "150000 100000"}, 1.5, id="v2-other"
    ),
    pytest.param({GROUPS: "0::/of/the/host", f"{V2}/cpu.max": "150000 100000"}, 1.5, id="v2-path-of-the-host"),
    pytest.param({GROUPS: "0::/../outside", f"{V2}/cpu.max": "150000 100000"}, 1.5, id="v2-outside-the-namespace"),
    pytest.param({GROUPS: "4:memory:/\n3:cpu,cpuacct:/", **quota_v1(V1, 150000)}, 1.5, id="v1-container"),
    pytest.param({GROUPS: "3:cpuacct,cpu:/a/b", **quota_v1(f"{V1}/a", 150000)}, 1.5, id="v1-parent"),
    pytest.param({GROUPS: "3:cpu:/", **quota_v1(V1, -1)}, 0.0, id="v1-unlimited"),
    pytest.param({GROUPS: "5:cpuset:/a\n2:cpuacct:/a", **quota_v1(f"{V1}/a", 150000)}, 0.0, id="v1-other-controller"),
    pytest.param({GROUPS: "3:cpu:/\n0::/", f"{V2}/cpu.max": "max 100000", **quota_v1(V1, 150000)}, 1.5, id="v1-and-v2"),
    pytest.param({f"{V2}/cpu.max": "nonsense"}, 0.0, id="nonsense"),
    pytest.param({f"{V2}/cpu.max": "150000 0"}, 0.0, id="no-period"),
]


@pytest.mark.parametrize(("files", "quota"), QUOTAS)
def test_the_tightest_quota_of_the_group_and_those_above_it_counts(
    tmp_path: Path, files: dict[str, str], quota: float
) -> None:
    _C.use_topology(write_machine(tmp_path, TWO_NODES, files=files), ALL_EIGHT)
    assert _C.topology()["quota"] == quota


@pytest.mark.parametrize(
    ("quota", "default_threads", "most_threads"), [(0.3, 1, 1), (1, 1, 1), (1.5, 1, 2), (3, 3, 3), (20, 8, 8)]
)
def test_a_quota_limits_the_default_and_what_can_be_asked_for(
    tmp_path: Path, quota: float, default_threads: int, most_threads: int
) -> None:
    files = {f"{V2}/cpu.max": f"{quota * 100000:.0f} 100000"}
    _C.use_topology(write_machine(tmp_path, TWO_NODES, files=files), ALL_EIGHT)
    assert _C.topology()["default_threads"] == default_threads
    assert _C.topology()["most_threads"] == most_threads


# ---- Where n threads go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "threads_of_nodes"),
    [
        pytest.param(TWO_NODES, [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)], id="even"),
        pytest.param(UNEVEN, [(1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (4, 2)], id="4-and-2"),
        pytest.param(SIBLINGS, [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4)], id="siblings"),
        pytest.param({0: [[0, 1], [2, 3]], 1: [[4]]}, [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1)], id="cores-first"),
    ],
)
def test_threads_spread_over_nodes_in_proportion_to_cores(
    tmp_path: Path, machine: dict[int, list[list[int]]], threads_of_nodes: Sequence[tuple[int, int]]
) -> None:
    _C.use_topology(write_machine(tmp_path, machine), ALL_EIGHT)
    for count, expected in enumerate(threads_of_nodes, 1):
        places = _C.nodes_of_threads(count)
        assert (places.count(0), places.count(1)) == expected
        assert places == _C.nodes_of_threads(len(threads_of_nodes))[:count]


# ---- What lies where -------------------------------------------------------------------------------------------------

Q8_0 = gguf.GGMLQuantizationType.Q8_0
COLS = 64


def packed(count: int, rows: int, cols: int) -> Any:
    """``count`` matrices in Q8_0, the same at each call, packed for the machine of the moment."""
    weights = np.random.default_rng(0).standard_normal((count, rows, cols)).astype(np.float32)
    matrix = _C.PackedMatrix(int(Q8_0), count, rows, cols)
    for index in range(count):
        matrix.pack(index, gguf.quantize(weights[index], Q8_0).reshape(-1))
    return matrix


def products(gate: Any, down: Any, x: np.ndarray) -> np.ndarray:
    """Of all experts: what each panel holds takes part."""
    tokens = len(x)
    out = np.full((tokens, down.rows), np.nan, np.float32)
    indices = np.tile(np.arange(gate.count, dtype=np.int64), (tokens, 1))
    _C.Experts(gate, gate, down).forward_routed(x, indices, np.ones(indices.shape, np.float32), out)
    return out


@pytest.mark.parametrize(
    ("machine", "rows", "panels"),
    [
        pytest.param({0: [[0], [1]]}, 160, [(0, 10)], id="one-node"),
        pytest.param(TWO_NODES, 192, [(0, 6), (6, 12)], id="even"),
        pytest.param(UNEVEN, 191, [(0, 8), (8, 12)], id="4-and-2"),
        pytest.param(TWO_NODES, 33, [(0, 2), (2, 3)], id="odd-panel-last"),
        pytest.param(TWO_NODES, 5, [(0, 0), (0, 1)], id="less-than-a-pair-each"),
        pytest.param({0: [[0]], 2: [[1]], 5: [[2]]}, 320, [(0, 6), (6, 12), (12, 20)], id="three"),
    ],
)
def test_each_node_has_pairs_of_panels_in_proportion_to_its_cores_and_nothing_is_there_twice(
    tmp_path: Path, machine: dict[int, list[list[int]]], rows: int, panels: list[tuple[int, int]]
) -> None:
    whole = _C.PackedMatrix(int(Q8_0), 3, rows, COLS)
    _C.use_topology(write_machine(tmp_path, machine), ALL_EIGHT)
    split = _C.PackedMatrix(int(Q8_0), 3, rows, COLS)
    assert split.panels_of_nodes == panels
    assert split.nbytes == whole.nbytes == 3 * panels[-1][1] * 16 * COLS // 32 * 34


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("machine", [TWO_NODES, UNEVEN, {1: [[0]], 2: [[1]], 7: [[2], [3]]}])
def test_weights_on_several_nodes_give_the_same_bits(
    tmp_path: Path, machine: dict[int, list[list[int]]], threads: int
) -> None:
    hidden, intermediate = 160, 192
    x = np.random.default_rng(1).standard_normal((70, hidden)).astype(np.float32)
    gate, down = packed(5, intermediate, hidden), packed(5, hidden, intermediate)
    expected = products(gate, down, x)
    _C.use_topology(write_machine(tmp_path, machine), ALL_EIGHT)
    _C.set_thread_count(min(threads, _C.topology()["most_threads"]))
    split_gate, split_down = packed(5, intermediate, hidden), packed(5, hidden, intermediate)
    products(gate, down, -x)  # or a result left out would be found in a buffer of before
    np.testing.assert_array_equal(products(split_gate, split_down, x), expected)
    np.testing.assert_array_equal(products(gate, split_down, x), expected)
    _C.use_topology()  # a forked child may be given fewer nodes than its parent packed for
    np.testing.assert_array_equal(products(split_gate, split_down, x), expected)


def test_floats_packed_on_several_nodes_give_the_same_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(2).standard_normal((1, 150, COLS)).astype(np.float32)
    found = []
    for root in (None, write_machine(tmp_path, UNEVEN)):
        _C.use_topology(root, ALL_EIGHT)
        matrix = _C.PackedMatrix(int(gguf.GGMLQuantizationType.F16), 1, 150, COLS)
        matrix.pack_floats(values)
        found.append(np.full((COLS, 150), np.nan, np.float32))
        _C.linear(matrix, np.eye(COLS, dtype=np.float32), found[-1])
    np.testing.assert_array_equal(found[0], values[0].T.astype(np.float16))
    np.testing.assert_array_equal(found[1], found[0])


def policies_of_memory() -> set[str]:
    """Such as "default" or "prefer:1": of all mappings of this process."""
    try:
        return {line.split()[1] for line in Path("/proc/self/numa_maps").read_text().splitlines()}
    except OSError:
        pytest.skip("this system does not tell where memory lies")


def test_memory_prefers_its_node_and_is_not_bound_to_it(tmp_path: Path) -> None:
    """A bound process is killed when the node is full. A node that does not exist is no error."""
    real, absent = _C.topology()["nodes"][0][0], 63
    before = policies_of_memory()
    _C.use_topology(write_machine(tmp_path, {real: [[0]], absent: [[1]]}), [0, 1])
    matrix = _C.PackedMatrix(int(Q8_0), 64, 4096, COLS)
    assert f"prefer:{real}" in policies_of_memory()
    assert not any(policy.startswith("bind") for policy in policies_of_memory() - before)
    assert matrix.panels_of_nodes == [(0, 128), (128, 256)]


def test_on_one_node_memory_is_left_as_it_is(tmp_path: Path) -> None:
    before = policies_of_memory()
    _C.use_topology(write_machine(tmp_path, {0: [[0], [1]]}), [0, 1])
    matrix = _C.PackedMatrix(int(Q8_0), 64, 4096, COLS)
    assert policies_of_memory() <= before
    assert matrix.panels_of_nodes == [(0, 256)]


@pytest.mark.filterwarnings("ignore:.*threads were asked for:UserWarning")
def test_a_model_on_two_nodes_gives_the_same_logits(tmp_path: Path) -> None:
    def logits() -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
        with torch.no_grad():
            found: torch.Tensor = model(torch.arange(3, 60)[None]).logits
        return found

    expected = logits()
    _C.use_topology(write_machine(tmp_path, TWO_NODES), ALL_EIGHT)
    _C.set_thread_count(4)
    assert torch.equal(logits(), expected)
