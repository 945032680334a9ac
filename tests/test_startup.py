"""TRANSFORMERS_KT=1 brings the package into any Python that imports transformers, and costs the others nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from transformers_kt._environment import default_threads
from transformers_kt.assets import bundled_model
from transformers_kt.planning.plan import plan
from transformers_kt.planning.request import read_request

VARIABLES = {"TRANSFORMERS_KT", "TRANSFORMERS_KT_RULES", "TRANSFORMERS_KT_THREADS"}


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True)


def modules_after_start(**variables: str) -> set[str]:
    done = python("import sys, json; print(json.dumps(sorted(sys.modules)))", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("variables", [{}, {"TRANSFORMERS_KT": ""}])
def test_a_python_that_asks_for_nothing_imports_nothing_of_ours(variables: dict[str, str]) -> None:
    assert not {name for name in modules_after_start(**variables) if "transformers_kt_startup" in name}


def test_activation_alone_imports_neither_this_package_nor_what_it_needs() -> None:
    modules = modules_after_start(TRANSFORMERS_KT="1")
    assert "_transformers_kt_startup" in modules
    assert not {"transformers_kt", "transformers", "torch", "numpy"} & modules


def test_a_program_that_never_heard_of_us_loads_a_gguf_by_gguf_file_rules_and_threads_of_the_environment() -> None:
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(bundled_model())!r}, gguf_file="tiny-r1-Q4_K_M.gguf")
from transformers_kt import thread_count
print(thread_count(), any(row.module == "model.layers.0.mlp.down_proj" for row in model.kt_report.rows))
"""
    done = python(code, TRANSFORMERS_KT="1", TRANSFORMERS_KT_THREADS="1", TRANSFORMERS_KT_RULES="observable")
    assert done.stdout == "1 True\n", done.stderr


def test_what_goes_wrong_is_said_once_and_transformers_goes_on() -> None:
    code = "import transformers, transformers.pipelines; print(transformers.__version__ > '5')"
    done = python(code, TRANSFORMERS_KT="1", TRANSFORMERS_KT_THREADS="many")
    assert done.stdout == "True\n"
    assert done.stderr == (
        "transformers_kt: TRANSFORMERS_KT=1 is without effect: TRANSFORMERS_KT_THREADS=many is no thread count: "
        "a whole number from 1 is accepted\n"
    )


@pytest.mark.parametrize("threads", ["0", "-1", "1.5", "²", "99999999999", " 2"])
def test_a_thread_count_that_is_none_is_refused(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_KT_THREADS", threads)
    with pytest.raises(ImportError, match=f"^TRANSFORMERS_KT_THREADS={threads} is no thread count: a whole number"):
        default_threads()


@pytest.mark.parametrize(("value", "says"), [("0", ""), ("yes", "TRANSFORMERS_KT=yes is without effect: 1 (on)")])
def test_only_1_activates(value: str, says: str) -> None:
    done = python("import sys; print(len(sys.meta_path))", TRANSFORMERS_KT=value)
    assert done.stdout == python("import sys; print(len(sys.meta_path))").stdout
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)


def test_rules_of_the_call_win_over_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_KT_RULES", "observable")
    name = str(bundled_model())
    for given, rules in ((None, "observable"), ("auto", "auto"), ("cpu", "cpu")):
        request = read_request(name, {"kt_rules": given})
        assert request is not None
        assert request.rules == rules
    assert len(plan(name, gpus=[]).rows) > len(plan(name, gpus=[], kt_rules="auto").rows)
