"""The thread pool and the choice of kernels: defaults, limits, forks, callers on several threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fake_machines import write_machine
from transformers import AutoModelForCausalLM

import transformers_kt._C as _C
from transformers_kt import set_thread_count, thread_count
from transformers_kt.assets import bundled_model
from transformers_kt.errors import UnsupportedCpuError

ROWS, COLS = 1000, 512
X = np.random.default_rng(0).standard_normal((3, COLS)).astype(np.float32)
CHILD_TIMEOUT_S = 20.0

# Loads the extension alone: importing the package costs seconds, for it imports torch and transformers.
LOAD_EXTENSION = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("transformers_kt._C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)

def running_threads():
    return len(os.listdir("/proc/self/task"))
"""


@pytest.fixture(autouse=True)
def _four_threads(eight_cpus: None) -> None:
    _C.set_thread_count(4)


@pytest.fixture(scope="module")
def matrix() -> Any:
    weights = np.random.default_rng(1).standard_normal((ROWS, COLS)).astype(np.float32)
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    packed = _C.PackedMatrix(int(gguf.GGMLQuantizationType.Q8_0), 1, ROWS, COLS)
    packed.pack(0, blocks.reshape(-1))
    return packed


@pytest.fixture(scope="module")
def expected(matrix: Any) -> np.ndarray:
    """The product of ``matrix`` and ``X`` on one thread."""
    _C.set_thread_count(1)
    product = multiply(matrix, X)
    assert np.abs(product).max() > 1
    return product


def multiply(matrix: Any, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    _C.linear(matrix, x, out)
    return out


def running_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def in_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- How many threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, -(2**31)])
def test_less_than_one_thread_is_refused(count: int) -> None:
    before = thread_count()
    with pytest.raises(ValueError, match=f"at least 1, got {count}"):
        set_thread_count(count)
    assert thread_count() == before


@pytest.mark.parametrize("count", [5, 1, 8, 2, 3, 7, 4, 6])
def test_any_number_of_threads_computes_the_same(matrix: Any, expected: np.ndarray, count: int) -> None:
    set_thread_count(count)
    assert thread_count() == count
    for _ in range(20):
        np.testing.assert_array_equal(multiply(matrix, X), expected)


def test_the_pool_has_as_many_threads_as_were_asked_for(matrix: Any, expected: np.ndarray) -> None:
    set_thread_count(1)
    multiply(matrix, X)
    others = running_threads()
    for count in (6, 2, 8, 1):
        set_thread_count(count)
        multiply(matrix, X)
        assert running_threads() == others + count - 1


def test_threads_beyond_the_cpus_are_refused_with_a_warning_and_never_started(
    matrix: Any, expected: np.ndarray
) -> None:
    set_thread_count(1)
    multiply(matrix, X)
    others = running_threads()
    with pytest.warns(UserWarning, match="64 threads were asked for, 8 are used: ") as said:
        set_thread_count(64)
    assert said[0].filename == __file__
    assert thread_count() == 8
    np.testing.assert_array_equal(multiply(matrix, X), expected)
    assert running_threads() == others + 7


def test_more_cpus_later_give_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    _C.use_topology(write_machine(tmp_path, {0: [[0], [1]]}), range(2))
    with pytest.warns(UserWarning, match="5 threads were asked for, 2 are used"):
        set_thread_count(5)
    _C.use_topology(str(tmp_path / "no-sysfs"), range(8))
    assert thread_count() == 5


def test_no_thread_runs_before_the_first_loop() -> None:
    code = f"""
import numpy, torch, transformers, gguf, psutil, yaml, tqdm, huggingface_hub, tokenizers
from transformers.models.deepseek_v2 import modeling_deepseek_v2
{LOAD_EXTENSION}
before = running_threads()
import transformers_kt
from transformers_kt import modules
from transformers_kt.integration import from_pretrained
after_import = running_threads()
transformers_kt._C.use_topology("no-sysfs", range(8))
transformers_kt.set_thread_count(5)
after_choice = running_threads()
matrix = transformers_kt._C.PackedMatrix(0, 1, 64, 64)
transformers_kt._C.linear(matrix, numpy.zeros((1, 64), "float32"), numpy.zeros((1, 64), "float32"))
print(after_import - before, after_choice - before, running_threads() - before)
"""
    assert in_fresh_process(code) == "0 0 4"


def test_affinity_limits_the_default() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\n{LOAD_EXTENSION}\nprint(_C.thread_count())"
    assert in_fresh_process(code) == "1"


def test_the_default_is_no_more_than_the_cpus_of_this_process() -> None:
    count = int(in_fresh_process(f"{LOAD_EXTENSION}\nprint(_C.thread_count())"))
    assert 1 <= count <= len(os.sched_getaffinity(0))


# ---- Where they run --------------------------------------------------------------------------------------------------


def cpus_of_threads() -> dict[int, set[int]]:
    """Thread -> the CPUs it may use."""
    return {int(thread): os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}


def test_threads_keep_to_the_cpus_of_their_node_and_the_caller_is_left_alone(tmp_path: Path, matrix: Any) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one CPU has no nodes")
    half = len(allowed) // 2
    nodes = [set(allowed[:half]), set(allowed[half:])]
    _C.use_topology(write_machine(tmp_path, {n: [[cpu] for cpu in cpus] for n, cpus in enumerate(nodes)}), allowed)
    set_thread_count(len(allowed))
    expected = sorted(sorted(nodes[node]) for node in _C.nodes_of_threads(len(allowed))[1:])
    before = cpus_of_threads()
    multiply(matrix, X)
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    pool: list[list[int]] = []
    while pool != expected and time.monotonic() < deadline:  # a thread may start after the loop has ended
        after = cpus_of_threads()
        pool = sorted(sorted(cpus) for thread, cpus in after.items() if thread not in before)
    assert pool == expected
    assert {thread: after[thread] for thread in before} == before


def test_on_one_node_threads_run_wherever_the_process_may(matrix: Any) -> None:
    _C.use_topology()
    if len(_C.topology()["nodes"]) > 1 or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs one node of several CPUs")
    set_thread_count(2)
    multiply(matrix, X)
    assert set(map(frozenset, cpus_of_threads().values())) == {frozenset(os.sched_getaffinity(0))}


def test_no_thread_leaves_the_affinity_mask(tmp_path: Path) -> None:
    """Also where that was narrowed after the machine had been looked at."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one CPU has no nodes")
    root = write_machine(tmp_path, {0: [[allowed[0]]], 1: [[allowed[1]]]})
    code = f"""
import time
import numpy as np
{LOAD_EXTENSION}
_C.use_topology({root!r}, {allowed[:2]})
_C.set_thread_count(2)
os.sched_setaffinity(0, {{{allowed[0]}}})
before = set(os.listdir("/proc/self/task"))
_C.linear(_C.PackedMatrix(0, 1, 64, 64), np.zeros((1, 64), "float32"), np.zeros((1, 64), "float32"))
time.sleep(0.1)  # a thread may start after the loop has ended
print([os.sched_getaffinity(int(thread)) for thread in set(os.listdir("/proc/self/task")) - before])
"""
    assert in_fresh_process(code) == f"[{{{allowed[0]}}}]"


# ---- Speed -----------------------------------------------------------------------------------------------------------

# With a thread for each that was asked for, 8 on 2 CPUs had a fifth of the speed of 2, and 64 a thirtieth. Equal pools
# differ by a fifth where other processes come and go, so a half is a collapse and no accident.
COLLAPSE = 0.5


@pytest.mark.filterwarnings("ignore:.*threads were asked for:UserWarning")
def test_no_count_of_threads_collapses() -> None:
    """Loops of some 100 us, of which decoding has hundreds per token."""
    _C.use_topology()
    weights = _C.PackedMatrix(0, 1, 2048, 1024)
    x, out = np.zeros((1, 1024), np.float32), np.zeros((1, 2048), np.float32)
    counts = (1, 2, 3, 4, 5, 6, 7, 8, 64)
    times: dict[int, list[float]] = {count: [] for count in counts}
    order = np.random.default_rng(0)  # a fixed one falls in step with the time slices of a busy machine
    for _ in range(24):
        for count in order.permutation(counts).tolist():
            set_thread_count(count)
            _C.linear(weights, x, out)  # starts the pool
            start = time.perf_counter()
            for _ in range(20):
                _C.linear(weights, x, out)
            times[count].append(time.perf_counter() - start)
    # The fastest tenth: other processes only slow us down, and a collapse slows nearly every loop.
    speeds = {count: 1 / float(np.quantile(times[count], 0.1)) for count in counts}
    for count in counts:
        assert speeds[count] > COLLAPSE * max(speeds[fewer] for fewer in counts if fewer <= count), speeds


# ---- Several callers -------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Runs ``work(index)`` on ``count`` threads at once and raises what the first of them raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_callers_on_several_threads_get_their_own_results(matrix: Any, expected: np.ndarray) -> None:
    def work(index: int) -> None:
        for _ in range(100):
            np.testing.assert_array_equal(multiply(matrix, X[index : index + 1])[0], expected[index])

    in_threads(work, 3)


def test_the_thread_count_may_change_while_others_compute(matrix: Any, expected: np.ndarray) -> None:
    def work(index: int) -> None:
        for step in range(60):
            if index == 0:
                set_thread_count(1 + step % 4)
            np.testing.assert_array_equal(multiply(matrix, X), expected)

    in_threads(work, 3)


def test_the_interpreter_runs_on_while_kernels_compute() -> None:
    """They release the GIL: else a streamer's reader, or Ctrl-C, would wait for them."""
    wide = _C.PackedMatrix(0, 1, 2048, 4096)
    x = np.zeros((16, 4096), np.float32)
    _C.select_isa("scalar")  # for a call of some tenths of a second
    started, finished = threading.Event(), threading.Event()

    def compute() -> None:
        started.set()
        multiply(wide, x)
        finished.set()

    thread = threading.Thread(target=compute)
    thread.start()
    started.wait()
    turns = 0
    while not finished.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 5


# ---- Bodies that throw ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_memory_refused_in_a_loop_is_a_memory_error_and_the_pool_goes_on(
    matrix: Any, expected: np.ndarray, threads: int
) -> None:
    """In whichever thread: the first tasks are the caller's, the last ones a worker's."""
    set_thread_count(threads)
    for tasks in (1, 2, 1000):
        for failing in {0, tasks // 2, tasks - 1}:
            for _ in range(20):
                with pytest.raises(MemoryError):
                    _C.failing_loop(tasks, failing)
            np.testing.assert_array_equal(multiply(matrix, X), expected)


# ---- Signals ---------------------------------------------------------------------------------------------------------

# What is promised. It is counted in processor time of the threads that compute, of which the threads of other processes
# take none; by the clock a machine that does ten other things needs several seconds for the same.
ANSWER_S = 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_call_and_the_next_one_computes(threads: int) -> None:
    code = f"""
import os, signal, threading, time
import numpy as np
{LOAD_EXTENSION}
_C.use_topology("no-sysfs", range(8))
_C.set_thread_count({threads})
w = _C.PackedMatrix(0, 1, 8192, 8192)
x, out = np.zeros((8192, 8192), "float32"), np.zeros((8192, 8192), "float32")  # ten seconds and more
sent = []
def send():
    sent.append(time.process_time())
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.3, send).start()
try:
    _C.linear(w, x, out)
    print("was not interrupted")
except KeyboardInterrupt:
    print("late" if time.process_time() - sent[0] > {threads * ANSWER_S} else "interrupted")
out = np.ones((1, 8192), "float32")
_C.linear(w, x[:1], out)
print(out.any())
"""
    assert in_fresh_process(code).split() == ["interrupted", "False"]


def test_a_signal_handler_may_compute_and_ask_in_the_middle_of_a_call() -> None:
    code = f"""
import signal, time
import numpy as np
{LOAD_EXTENSION}
_C.use_topology("no-sysfs", range(8))
_C.set_thread_count(2)
_C.select_isa("scalar")
w = _C.PackedMatrix(0, 1, 1024, 1024)
x = np.ones((256, 1024), "float32")
w.pack_floats(x[None, :1] * np.ones((1, 1024, 1), "float32"))
inside = []
def handle(*_):
    out = np.zeros((1, 1024), "float32")
    _C.linear(w, x[:1], out)
    _C.set_thread_count(3)
    inside.append((_C.thread_count(), bool((out == 1024).all())))
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.05)
outs = []
while not inside:
    outs.append(np.zeros((256, 1024), "float32"))
    _C.linear(w, x, outs[-1])
print(inside[0], all((out == 1024).all() for out in outs))
"""
    assert in_fresh_process(code) == "(3, True) True"


# ---- Jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_computes_what_the_call_does_beside_other_callers(matrix: Any, expected: np.ndarray) -> None:
    random = np.random.default_rng(3)
    parts = [_C.PackedMatrix(0, 4, *shape) for shape in ((96, 64), (96, 64), (64, 96))]
    for part in parts:
        part.pack_floats(random.standard_normal((part.count, part.rows, part.cols)).astype(np.float32))
    experts = _C.Experts(*parts)
    x = random.standard_normal((5, 64)).astype(np.float32)
    indices = np.stack([random.permutation(4)[:2] for _ in range(5)])
    weights = random.random((5, 2)).astype(np.float32)
    whole = np.zeros_like(x)
    experts.forward_routed(x, indices, weights, whole)
    assert np.abs(whole).max() > 1
    for _ in range(20):
        outs = [np.zeros_like(x) for _ in range(3)]
        jobs = [experts.submit_routed(x, indices, weights, out) for out in outs]
        np.testing.assert_array_equal(multiply(matrix, X), expected)
        for job, out in zip(jobs, outs, strict=True):
            job.wait()
            assert job.is_done()
            np.testing.assert_array_equal(out, whole)


def test_a_job_that_is_dropped_is_waited_for() -> None:
    experts = _C.Experts(*(_C.PackedMatrix(0, 1, 512, 512) for _ in range(3)))
    x, out = np.ones((64, 512), np.float32), np.ones((64, 512), np.float32)
    experts.submit_routed(x, np.zeros((64, 1), np.int64), np.ones((64, 1), np.float32), out)
    assert not out.any()


# ---- Forks -----------------------------------------------------------------------------------------------------------


def exit_code_of_fork(work: Callable[[], bool]) -> int | None:
    """Forks; the child exits with 0 if ``work`` says True. None where it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + CHILD_TIMEOUT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_computes_on_threads_of_its_own_and_the_parent_goes_on(
    matrix: Any, expected: np.ndarray
) -> None:
    _C.set_thread_count(4)
    multiply(matrix, X)
    for _ in range(3):
        assert exit_code_of_fork(lambda: np.array_equal(multiply(matrix, X), expected) and running_threads() == 4) == 0
        np.testing.assert_array_equal(multiply(matrix, X), expected)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_uses_the_cpus_that_it_was_given(matrix: Any, expected: np.ndarray) -> None:
    _C.use_topology()
    cpus = os.sched_getaffinity(0)
    set_thread_count(len(cpus))
    multiply(matrix, X)

    def child() -> bool:
        os.sched_setaffinity(0, {min(cpus)})
        return thread_count() == 1 and np.array_equal(multiply(matrix, X), expected) and running_threads() == 1

    assert exit_code_of_fork(child) == 0
    assert thread_count() == len(cpus)


def test_a_fork_while_other_threads_compute_computes() -> None:
    """Whatever lock they hold at that moment. Products are small, so that they take and give back buffers much of the
    time: without regard for that lock about one child in a hundred hung."""
    forks = 300
    code = f"""
import os, signal, threading, time
import numpy as np
{LOAD_EXTENSION}
weights = _C.PackedMatrix(8, 1, 16, 512)  # zeros in Q8_0

def product():
    out = np.ones((1, 16), np.float32)
    _C.linear(weights, np.ones((1, 512), np.float32), out)
    return out

def exit_code_of_child():
    child = os.fork()
    if child == 0:
        signal.alarm({CHILD_TIMEOUT_S:.0f})
        os._exit(1 if product().any() else 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(0.001)  # else the next fork comes when the others wait for the GIL
    return code

def compute():
    while not stop.is_set():
        product()

_C.set_thread_count(2)
product()
stop = threading.Event()
threads = [threading.Thread(target=compute) for _ in range(6)]
for thread in threads:
    thread.start()
codes = [0]
while len(codes) <= {forks} and codes[-1] == 0:
    codes.append(exit_code_of_child())
stop.set()
for thread in threads:
    thread.join()
print(len(codes) - 1, codes[-1])
"""
    assert in_fresh_process(code) == f"{forks} 0"


def _child_of_multiprocessing(matrix: Any, queue: Any) -> None:
    queue.put(multiply(matrix, X))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_multiprocessing_computes(matrix: Any, expected: np.ndarray) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_child_of_multiprocessing, args=(matrix, queue))
    process.start()
    process.join(CHILD_TIMEOUT_S)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()
    np.testing.assert_array_equal(queue.get(), expected)


# ---- Exit ------------------------------------------------------------------------------------------------------------


def test_the_interpreter_exits_quietly_while_threads_generate() -> None:
    """Each child of a process that has loaded a model exits at another moment of what its three threads compute."""
    children = 12
    code = f"""
import os, sys, threading, time
import transformers_kt
from transformers import AutoModelForCausalLM
from transformers_kt.assets import bundled_model
import torch
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
ids = torch.tensor([[1, 2, 3]])

def generate():
    while True:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40)

codes = []
for index in range({children}):
    child = os.fork()
    if child == 0:
        for _ in range(3):
            threading.Thread(target=generate, daemon=True).start()
        time.sleep(0.2 + 0.013 * index)
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.stdout.strip() == str([0] * children), done.stderr
    assert "rror" not in done.stderr, done.stderr


# ---- Which kernels ---------------------------------------------------------------------------------------------------


def test_an_unknown_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_KT_ISA", "avx1024")
    _C.select_isa("")  # forget what was chosen, so that the variable is read again
    with pytest.raises(RuntimeError) as error:
        _C.isa()
    assert str(error.value) == (
        f"TRANSFORMERS_KT_ISA=avx1024 is not known; this CPU supports: {', '.join(_C.supported_isas())}"
    )


def test_a_cpu_without_the_instruction_set_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_KT_ISA", "avx1024")
    _C.select_isa("")
    monkeypatch.setattr(_C, "PackedMatrix", None)  # no memory may be asked for
    with pytest.raises(UnsupportedCpuError, match=r"avx1024 is not known; .*scalar"):
        AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")


@pytest.mark.parametrize("name", _C.supported_isas())
def test_the_instruction_set_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, matrix: Any, expected: np.ndarray, name: str
) -> None:
    monkeypatch.setenv("TRANSFORMERS_KT_ISA", name)
    _C.select_isa("")
    assert _C.isa() == name
    np.testing.assert_array_equal(multiply(matrix, X), expected)


def test_the_best_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_KT_ISA", raising=False)
    _C.select_isa("")
    assert _C.isa() == _C.supported_isas()[0]
