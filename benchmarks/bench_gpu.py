"""What a GPU and this package do together, in ten minutes: one process a section, each with a time limit.

    python benchmarks/bench_gpu.py --out build/gpu                   # all sections, for an H100- or H200-class GPU
    python benchmarks/bench_gpu.py --out build/gpu --sections handoff,products
    python benchmarks/bench_gpu.py --out build/gpu --tables          # what there is, as Markdown
    python benchmarks/bench_gpu.py --out build/fake --fake           # all of it at tiny sizes, without a GPU

A section writes its JSON after each figure, so that one that crashes, or is ended at its limit, loses no figure of its
own or of others; what it printed is in its .log. `tables.md` has all figures. The checkout needs the extension built,
triton and a torch that sees the GPU; figures of --fake mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from on_gpu.report import Report, tables

ROOT = Path(__file__).parents[1]
SECTIONS: Mapping[str, float] = {
    "handoff": 50,
    "compiling": 80,
    "products": 80,
    "attention": 50,
    "layers": 140,
    "streaming": 120,
    "link": 40,
    "waiting": 30,
}
"""In the order in which they run -> seconds after which one is ended. Each is a module of `on_gpu`."""
_LOG_LINES = 12


def run_apart(command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str]) -> str:
    """Run ``command`` and all it starts for at most ``limit_s``: how it ended, "ok" if well."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {limit_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)  # a process inside a driver that hangs may never end: others go on
    return "ok" if status == 0 else f"failed with status {status}"


def run_section(name: str, out: Path, *, is_fake: bool) -> bool:
    """One section in a process of its own; whether it ended well."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if is_fake:
        environment |= {"TRANSFORMERS_KT_FAKE_GPUS": "4GiB", "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--out", str(out), "--section", name, *(["--fake"] if is_fake else [])]
    log, start = out / f"{name}.log", time.perf_counter()
    ended = run_apart(command, log, SECTIONS[name], environment)
    seconds = time.perf_counter() - start
    Report.finish(out, name, ended, seconds)
    print(f"{name:10} {seconds:6.1f} s  {ended}", flush=True)
    if ended != "ok":
        print(*(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_LOG_LINES:]), sep="\n")
    return ended == "ok"


def measure(name: str, out: Path, *, is_fake: bool) -> None:
    """The figures of one section, in this process."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from on_gpu.setting import setting_for

    importlib.import_module(f"on_gpu.{name}").measure(setting_for(Report(out, name), is_fake=is_fake))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, logs, pictures and tables.md")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--fake", action="store_true", help="without a GPU, at tiny sizes: does the script run?")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the figures in --out")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        measure(options.section, options.out, is_fake=options.fake)
        return 0
    if options.tables:
        print(tables(options.out, list(SECTIONS)))
        return 0
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section is called {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    failed = [name for name in sections if not run_section(name, options.out, is_fake=options.fake)]
    (options.out / "tables.md").write_text(tables(options.out, list(SECTIONS)), encoding="utf-8")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
