"""The wheel works without compiler and source code. `make test-wheel` builds it and sets WHEEL to its path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHEEL = os.environ.get("WHEEL", "")
NEWEST_GLIBC = (2, 28)

pytestmark = pytest.mark.skipif(not WHEEL, reason="WHEEL is not set: make test-wheel builds one and sets it")

ANSWER = """
import transformers_kt
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_kt.assets import bundled_model

model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="cpu")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
question = [{"role": "user", "content": "What is 486 + 57?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(transformers_kt.__file__)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=300)[0]))
"""


class Environment:
    """A virtual environment with the wheel; torch and the rest come from the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.packages = next(folder.glob("lib/python3.*/site-packages"))
        pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-index", "--no-deps"]
        subprocess.run([*pip, WHEEL], check=True)
        # Paths alone: .pth files there, and so editable installs, are not followed.
        others = [path for path in sys.path if path.endswith("site-packages")]
        (self.packages / "others.pth").write_text("\n".join(others))

    def run(self, script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        path = self.folder / "no-tools"
        path.mkdir(exist_ok=True)
        return subprocess.run(
            [self.folder / "bin" / "python", "-c", script],
            cwd=cwd,
            env={"PATH": str(path), "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", **variables},
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("empty") / "venv")


def test_auditwheel_finds_no_symbol_newer_than_manylinux_2_28() -> None:
    pytest.importorskip("auditwheel")
    command = [sys.executable, "-m", "auditwheel", "show", WHEEL]
    shown = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    tag = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_x86_64"', shown)
    assert tag is not None, shown
    assert (int(tag[1]), int(tag[2])) <= NEWEST_GLIBC, shown
    assert WHEEL.endswith("manylinux_2_28_x86_64.whl")


def test_the_bundled_model_answers_without_compiler_and_source_code(environment: Environment, tmp_path: Path) -> None:
    ran = environment.run(ANSWER, tmp_path)
    assert ran.returncode == 0, ran.stderr
    where, answer = ran.stdout.split("\n", 1)
    assert Path(where).parent == environment.packages / "transformers_kt"
    assert "543" in answer


def test_the_environment_activates_the_installed_package(environment: Environment, tmp_path: Path) -> None:
    script = "import sys, transformers; print('transformers_kt' in sys.modules)"
    for value in ("0", "1"):
        ran = environment.run(script, tmp_path, TRANSFORMERS_KT=value)
        assert (ran.stdout, ran.stderr) == (f"{value == '1'}\n", "")


def test_the_command_is_installed(environment: Environment) -> None:
    command = [environment.folder / "bin" / "transformers-kt", "--version"]
    assert re.fullmatch(r"transformers-kt \d+\.\d+\.\d+\n", subprocess.check_output(command, text=True))


def test_all_bundled_rules_are_installed(environment: Environment, tmp_path: Path) -> None:
    ran = environment.run("from transformers_kt.rules import bundled_rules; print(*bundled_rules())", tmp_path)
    assert set(ran.stdout.split()) == {path.stem for path in ROOT.glob("rules/*.yaml")}, ran.stderr


def test_source_code_that_hides_the_installed_package_says_so(environment: Environment) -> None:
    ran = environment.run("import transformers_kt", ROOT)
    assert "hides the package installed in" in ran.stderr
    assert str(environment.packages) in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("ImportError: ")
