"""A system that refuses calls or memory, and a file that is cut while it is loaded: no crash, no other tokens."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp, limits of a process")

# A filter for system calls (linux/seccomp.h, linux/filter.h): those of `NUMBERS` answer EPERM, as in a sandbox.
REFUSE_CALLS = """
import ctypes, struct
NUMBERS = {"madvise": 28, "mlock": 149, "mlockall": 151, "sched_setaffinity": 203, "mbind": 237, "set_mempolicy": 238,
           "get_mempolicy": 239, "mlock2": 325}
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050000 | 1
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
steps = [(LOAD_WORD, 0, 0, 0)]  # the number of the call
steps += [(JUMP_IF_EQUAL, len(NUMBERS) - i, 0, number) for i, number in enumerate(NUMBERS.values())]
steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
header = struct.pack("@HP", len(steps), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
def prctl(option, *arguments):
    values = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)][:4]
    assert libc.prctl(option, *values) == 0, ctypes.get_errno()
keep = ctypes.create_string_buffer(header)
prctl(PR_SET_NO_NEW_PRIVS, 1)
prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(keep))
import os
try:
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    raise SystemExit("the filter does nothing")
except PermissionError:
    pass
"""

GENERATE = """
import torch, transformers_kt
from transformers import AutoModelForCausalLM
from transformers_kt.assets import bundled_model
import transformers_kt._C as _C
model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
tokens = model.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)[0].tolist()
"""


def in_child(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return done.stdout.strip()


def test_refused_system_calls_cost_a_note_and_nothing_else(tmp_path: Path) -> None:
    large = "\n_C.PackedMatrix(0, 1, 2048, 1024)\n"  # of the size for which huge pages are asked
    two_nodes = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent / "support")!r})
import pathlib, fake_machines
import transformers_kt._C as _C
root = fake_machines.write_machine(pathlib.Path({str(tmp_path)!r}), {{0: [[0]], 1: [[1]]}})
_C.use_topology(root, [0, 1])
"""
    say = "print((tokens, model.kt_report.notes))"
    free_tokens, free_notes = ast.literal_eval(in_child(GENERATE + say))
    tokens, notes = ast.literal_eval(
        in_child(REFUSE_CALLS + "import transformers_kt._C as _C" + large + two_nodes + GENERATE + say)
    )
    assert tokens == free_tokens
    refused = {note.split(":")[0] for note in set(notes) - set(free_notes)}
    assert {"the system refuses madvise", "the system refuses mbind"} <= refused
    assert refused <= {f"the system refuses {call}" for call in ("madvise", "mbind", "sched_setaffinity")}


def test_bandwidth_is_measured_where_calls_are_refused() -> None:
    measure = "from transformers_kt.planning.bandwidth import ram_bandwidth\nprint(ram_bandwidth([0]) > 0)"
    assert in_child(REFUSE_CALLS + measure) == "True"


def test_a_file_that_is_cut_while_it_is_loaded_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, shutil
import transformers_kt
from transformers import AutoModelForCausalLM
from transformers_kt.assets import bundled_model
from transformers_kt.errors import GgufFormatError
from transformers_kt.integration import loading
whole = next(pathlib.Path(bundled_model()).glob("*.gguf"))
path = pathlib.Path({str(tmp_path)!r}) / "cut.gguf"
pack = loading._Reader.pack
for when in (0, 1, 7, 20):
    shutil.copy(whole, path)
    names = []
    def cut(self, info, matrix):
        if len(names) == when:
            os.truncate(path, info.offset + info.nbytes // 2)
        names.append(info.name)
        pack(self, info, matrix)
    loading._Reader.pack = cut
    try:
        AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
        print("loaded")
    except GgufFormatError as error:
        print(len(names) == when + 1 and f"{{path}}: tensor '{{names[-1]}}' ends after" in str(error) or error)
"""
    assert in_child(code).split() == ["True"] * 4


LIMITED = """
import re, resource
def limited(call):
    "What `call` raises with no room for another mapping"
    taken = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken, -1))
    try:
        call()
    except BaseException as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_refused_while_threads_pack_or_compute_is_a_memory_error(tmp_path: Path, threads: int) -> None:
    code = f"""
{LIMITED}
import os
import numpy as np
import transformers_kt._C as _C
_C.use_topology("no-sysfs", range(2))
_C.set_thread_count({threads})
rows = np.random.default_rng(0).standard_normal((4096, 512)).astype("float32")
with open({str(tmp_path / "rows")!r}, "wb") as file:
    file.write(rows.tobytes())
file = os.open({str(tmp_path / "rows")!r}, os.O_RDONLY)
def tensor():
    return _C.StoredTensor(0, [(file, 0)], rows.nbytes)
_C.PackedMatrix(0, 1, 64, 16).pack_floats(np.zeros((1, 64, 16), "float32"))  # the threads are there
matrix = _C.PackedMatrix(0, 1, 4096, 512)
print(limited(lambda: matrix.pack_stored(tensor(), 0, 1)))
matrix.pack_stored(tensor(), 0, 1)
quantized = _C.PackedMatrix(8, 1, 4096, 512)
x, out, expected = rows[:2048], np.zeros((2048, 4096), "float32"), np.zeros((2048, 4096), "float32")
print(limited(lambda: _C.linear(quantized, x, out)))
_C.linear(matrix, x, out)
np.matmul(x, rows.T, out=expected)
print(np.allclose(out, expected, atol=1e-3))
"""
    # Else malloc would serve the threads from what numpy gave back to it.
    found = in_child(code, MALLOC_MMAP_THRESHOLD_="65536")
    assert found.split() == ["MemoryError", "MemoryError", "True"]
