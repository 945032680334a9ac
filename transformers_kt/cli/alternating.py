"""`bench` against llama.cpp: rounds in turns, each in a process of its own, for two copies of a model rarely fit."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers_kt.cli import peer
from transformers_kt.cli.bench_report import OURS, BenchReport, Figure, Limits, Setting
from transformers_kt.cli.inspect import inspect_model
from transformers_kt.errors import InputError, UnsupportedOperationError

LLAMA_CPP = "llama.cpp"
LLAMA_CPP_WAYS = {True: f"{LLAMA_CPP} repacked", False: f"{LLAMA_CPP} tiled"}
"""Whether weights are repacked at loading -> what that is called."""
_VERSION = "from importlib.metadata import version; print(version('llama-cpp-python'))"


def llama_cpp_version(against: str, interpreter: str) -> str:
    """The version of llama-cpp-python that the interpreter has; raises what says how to come by it."""
    if against != LLAMA_CPP:
        raise InputError(f"against={against!r}; {LLAMA_CPP} is accepted")
    try:
        done = subprocess.run([interpreter, "-c", _VERSION], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"llama_python={interpreter!r}: {error}; a Python interpreter is accepted") from None
    if done.returncode != 0:
        raise UnsupportedOperationError(
            f"llama.cpp is measured through its Python package, which {interpreter} does not have: pip install "
            "llama-cpp-python, or give the interpreter that has it (--llama-python)"
        )
    return done.stdout.strip()


def alternating(
    model: str, title: str, settings: Sequence[Setting], new_tokens: int, rounds: int, interpreter: str, version: str
) -> BenchReport:
    """Rounds of ours and of each way of llama.cpp in turns; llama.cpp computes one sequence at a time."""
    single = [setting for setting in settings if setting.batch == 1]
    wanted = {
        "path": inspect_model(model, 1).files[0],
        "threads": sorted({setting.threads for setting in single}),
        "prompts": sorted({setting.prompt for setting in single if setting.prompt is not None}),
        "depths": sorted({setting.depth for setting in single if setting.depth is not None}),
        "new_tokens": new_tokens,
    }
    reports: list[Any] = []
    theirs: dict[tuple[str, Setting], list[float]] = {}
    for _ in range(rounds):
        ours = [sys.executable, "-m", "transformers_kt.cli", "bench", model, "--rounds", "1", "--json"]
        reports.append(_json_of([*ours, *_as_options(settings, new_tokens)], "bench"))
        for repacked, name in LLAMA_CPP_WAYS.items():
            command = [interpreter, str(peer.__file__), json.dumps({**wanted, "repacked": repacked})]
            for each in _json_of(command, name) if single else ():
                setting = Setting(each["threads"], 1, each.get("prompt"), each.get("depth"))
                seconds = statistics.median(each["seconds"])
                theirs.setdefault((name, setting), []).append((setting.prompt or 1) / seconds)
    return merged(title, reports, theirs, version)


def merged(
    title: str, reports: Sequence[Any], theirs: Mapping[tuple[str, Setting], list[float]], version: str
) -> BenchReport:
    """One report of those of the rounds: the rounds of each figure together, the highest of each limit."""
    figures = []
    for each in zip(*(report["figures"] for report in reports), strict=True):
        first = each[0]
        setting = Setting(*(first[key] for key in Setting._fields))
        limit = max(one["limit"] for one in each)
        figures.append(Figure(OURS, *setting, tuple(one["rounds"][0] for one in each), limit, first["bound"]))
    figures += [Figure(name, *setting, tuple(found), None, None) for (name, setting), found in theirs.items()]
    limits = {
        int(count): Limits(*(max(report["limits"][count][key] for report in reports) for key in ("read", "products")))
        for count in reports[0]["limits"]
    }
    about = {**reports[0]["about"], LLAMA_CPP: f"llama-cpp-python {version}"}
    return BenchReport(title, about, reports[0]["bytes_per_token"], limits, figures)


def _as_options(settings: Iterable[Setting], new_tokens: int) -> Iterator[str]:
    for option, of in (("--threads", "threads"), ("--batch", "batch"), ("--prompt", "prompt"), ("--depth", "depth")):
        numbers = dict.fromkeys(getattr(setting, of) for setting in settings)
        yield from (option, ",".join(str(number) for number in numbers if number is not None))
    yield from ("--new-tokens", str(new_tokens))


def _json_of(command: Sequence[str], name: str) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UnsupportedOperationError(f"{name} ended with {done.returncode}; its own message stands above")
    return json.loads(done.stdout)
