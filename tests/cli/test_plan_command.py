"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import transformers_kt
from transformers_kt import plan
from transformers_kt.assets import bundled_model
from transformers_kt.cli import build_app
from transformers_kt.errors import KtError, RuleError

MODEL = str(bundled_model())
MACHINE = ("--gpu", "24GiB,24GiB", "--ram", "64GiB", "--bandwidth", "100,900")
SAME_MACHINE: dict[str, Any] = {"gpus": ["24GiB", "24GiB"], "ram": "64GiB", "bandwidth": (100, 900)}


def run(*args: str) -> str:
    """What ``transformers-kt plan`` prints; its errors are raised."""
    result = CliRunner().invoke(build_app(), ["plan", *args], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def transformers_kt_command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "transformers_kt.cli", *args], capture_output=True, text=True)


def test_plan_prints_the_table_of_plan() -> None:
    assert run(MODEL, *MACHINE) == f"{plan(MODEL, **SAME_MACHINE)}\n"


def test_a_gguf_alone_is_enough_and_a_folder_with_config_takes_its_weights_from_elsewhere() -> None:
    (gguf,) = Path(MODEL).glob("*.gguf")
    alone = json.loads(run(str(gguf), "--json", *MACHINE))
    named = json.loads(run(MODEL, "--gguf-path", str(gguf), "--json", *MACHINE))
    assert alone["rows"] == named["rows"]


def test_json_holds_what_the_report_holds() -> None:
    assert json.loads(run(MODEL, "--json", *MACHINE)) == plan(MODEL, **SAME_MACHINE).to_dict()


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("--device-map", "cpu"), {"device_map": "cpu"}),
        (("--device-map", '{"": "cpu", "lm_head": 1}'), {"device_map": {"": "cpu", "lm_head": 1}}),
        (("--kt-cpu-layers", "3"), {"kt_cpu_layers": 3}),
        (("--kt-gpu-experts", "1"), {"kt_gpu_experts": 1}),
        (("--kt-gpu-experts", "0", "--kt-expert-slots", "2"), {"kt_gpu_experts": 0, "kt_expert_slots": 2}),
        (
            ("--kt-gpu-experts", "0", "--kt-expert-slots", "2MiB", "--kt-prefill-stream-tokens", "0"),
            {"kt_gpu_experts": 0, "kt_expert_slots": "2MiB", "kt_prefill_stream_tokens": 0},
        ),
        (("--context", "100"), {"context": 100}),
        (("--kt-rules", "cpu"), {"kt_rules": "cpu"}),
        (("--gpu", "none"), {"gpus": []}),
    ],
)
def test_each_option_is_that_of_plan(args: tuple[str, ...], options: dict[str, Any]) -> None:
    expected = plan(MODEL, **{**SAME_MACHINE, **options}).to_dict()
    assert json.loads(run(MODEL, "--json", *MACHINE, *args)) == expected
    assert expected != plan(MODEL, **SAME_MACHINE).to_dict()


def test_a_picture_is_written_beside_the_table(tmp_path: Path) -> None:
    said = run(MODEL, *MACHINE, "--plot", str(tmp_path / "plan.png"))
    assert "model.embed_tokens" in said
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_refusal_is_one_of_our_errors() -> None:
    with pytest.raises(RuleError, match=r"ram is 'lots'"):
        run(MODEL, "--ram", "lots")
    with pytest.raises(KtError, match=r"--device-map '\{cpu' is no JSON"):
        run(MODEL, "--device-map", "{cpu")


def test_an_error_is_one_message_without_a_traceback_and_ends_with_1() -> None:
    result = transformers_kt_command("plan", MODEL, "--kt-rules", "nowhere.yaml")
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"transformers-kt: nowhere\.yaml is no file; .*\n", result.stderr)


@pytest.mark.parametrize("args", [("plan", MODEL, "--contxt", "5"), ("plan", MODEL, "--context", "many"), ("plam",)])
def test_a_command_line_that_is_not_understood_ends_with_2(args: tuple[str, ...]) -> None:
    result = CliRunner().invoke(build_app(), list(args))
    assert result.exit_code == 2


def test_help_names_every_option_of_plan() -> None:
    said = CliRunner().invoke(build_app(), ["plan", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    options = {option for parameter in _parameters() for option in parameter.opts if option.startswith("--")}
    assert len(options) == 14
    assert all(option in said for option in options)


def _parameters() -> Any:
    command = typer.main.get_command(build_app())
    return command.commands["plan"].params  # type: ignore[attr-defined]


def test_the_package_installs_the_command() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\ntransformers-kt = "_transformers_kt_command:main"\n' in pyproject


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--gpu", "24GiB,foo"), "--gpu, entry 2, is 'foo'"),
        (("--ram", "1xx"), "--ram is '1xx'"),
        (("--bandwidth", "abc"), "--bandwidth abc; "),
        (("--bandwidth", "1,2,3"), "--bandwidth 1,2,3; "),
        (("--kt-cpu-layers", "99"), "--kt-cpu-layers 99; "),
        (("--kt-gpu-experts", "99"), "--kt-gpu-experts 99; "),
        (("--context", "0"), "--context 0; "),
        (("--kt-rules", "nope"), "--kt-rules takes"),
        (("--device-map", "cuda:7"), "Name more with --gpu, or pass --device-map cpu"),
        (("--device-map", "disk"), "--device-map is 'disk'"),
        (("--kt-cpu-layers", "1", "--kt-rules", "cpu"), "--kt-cpu-layers shapes the placement of --kt-rules auto"),
    ],
)
def test_errors_speak_of_options(args: tuple[str, ...], said: str) -> None:
    result = transformers_kt_command("plan", MODEL, *args)
    assert said in result.stderr
    assert not re.search(r"\w+_\w+\b=|gpus|\bkt_|device_map", result.stderr)
    assert (result.returncode, result.stdout) == (1, "")


def test_a_missing_model_and_a_wrong_file_are_told_in_the_same_words(tmp_path: Path) -> None:
    assert "with --gguf-path (a file" in transformers_kt_command("plan", "nowhere").stderr
    (tmp_path / "device_map").mkdir()
    text = tmp_path / "device_map" / "README.md"
    text.write_text("# transformers_kt")
    said = transformers_kt_command("plan", str(text)).stderr
    assert f"{text} is not a GGUF file: it starts with '# tr'" in said


def test_the_version_is_told() -> None:
    assert transformers_kt_command("--version").stdout == f"transformers-kt {transformers_kt.__version__}\n"


@pytest.mark.parametrize(("picture", "said"), [("x.foo", ".png"), ("nowhere/x.png", "no folder")])
def test_a_picture_that_cannot_be_written_is_refused_before_the_plan(tmp_path: Path, picture: str, said: str) -> None:
    result = transformers_kt_command("plan", MODEL, "--plot", str(tmp_path / picture))
    assert said in result.stderr
    assert (result.returncode, result.stdout) == (1, "")


def test_a_missing_matplotlib_is_told_before_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    asked: list[Any] = []
    monkeypatch.setattr("transformers_kt.cli.plan.plan", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(KtError, match="pip install"):
        run(MODEL, "--plot", str(tmp_path / "x.png"))
    assert asked == []
