"""``transformers-kt inspect``: what it says of a file is what the `gguf` package reads there, and what loading says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import synthetic
from typer.testing import CliRunner

from transformers_kt.assets import bundled_model
from transformers_kt.cli import build_app
from transformers_kt.families.from_gguf import config_from_gguf, tokenizer_from_gguf
from transformers_kt.gguf.checkpoint import open_checkpoint

(TINY,) = bundled_model().glob("*.gguf")


def inspect(*args: str) -> tuple[int, str]:
    """Exit code and what is printed; refusals of the file itself are raised."""
    result = CliRunner().invoke(build_app(), ["inspect", *args], standalone_mode=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def inspected(path: Path) -> tuple[int, dict[str, Any]]:
    code, said = inspect(str(path), "--json")
    return code, json.loads(said)


def test_tensors_types_and_parameters_are_those_that_the_gguf_package_reads() -> None:
    tensors = gguf.GGUFReader(TINY).tensors
    code, said = inspected(TINY)
    types: Counter[str] = Counter()
    for tensor in tensors:
        types[tensor.tensor_type.name] += int(tensor.n_bytes)
    assert code == 0
    assert said["types"] == dict(types)
    assert said["nbytes"] == types.total()
    assert said["parameters"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert sum(group["count"] for group in said["groups"]) == len(tensors)


def test_tensors_of_a_group_are_alike_in_all_but_the_layer() -> None:
    tensors = open_checkpoint(TINY).tensors
    groups = inspected(TINY)[1]["groups"]
    down = [(group["layers"], group["ggml_type"]) for group in groups if group["name"] == "blk.*.ffn_down_exps.weight"]
    assert sorted(down) == [("1", "Q4_K"), ("2-3", "Q6_K")]
    assert [tensors[f"blk.{layer}.ffn_down_exps.weight"].ggml_type.name for layer in (1, 2, 3)] == [
        "Q4_K",
        "Q6_K",
        "Q6_K",
    ]


def test_tokenizer_and_sizes_are_those_that_loading_takes() -> None:
    said = inspected(TINY)[1]
    tokenizer, config = tokenizer_from_gguf(open_checkpoint(TINY)), config_from_gguf(open_checkpoint(TINY))
    assert said["tokenizer"]["tokens"] == len(tokenizer)
    assert said["tokenizer"]["special"] == {"begins a text": tokenizer.bos_token, "ends an answer": tokenizer.eos_token}
    assert said["tokenizer"]["template_characters"] == len(tokenizer.chat_template)
    assert said["sizes"]["layers"] == config.num_hidden_layers
    assert said["sizes"]["experts per token"] == config.num_experts_per_tok


def test_a_header_of_full_size_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "v3.gguf"
    synthetic.write("v3", "q4_k_m", path, sparse=True)
    code = f"""
import sys, time
from transformers_kt.cli.inspect import inspect_model
report = inspect_model({str(path)!r})
assert not {{"torch", "transformers"}} & set(sys.modules)
assert report.refusals == []
print(report.parameters, time.process_time())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    parameters, seconds = done.stdout.split()
    assert round(int(parameters) / 1e9) == 671
    assert float(seconds) < 1  # of the process, whatever else the machine does


def test_a_file_that_would_be_refused_ends_with_3_and_says_why(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(TINY.read_bytes().replace(b"deepseek2", b"deepseek9", 1))
    code, said = inspect(str(unknown))
    assert code == 3
    assert "Would be refused: " in said
    assert "general.architecture is 'deepseek9'" in said
    assert "blk.*.ffn_gate_exps.weight" in said  # what is in the file is told all the same


def test_every_reason_to_refuse_is_told(tmp_path: Path) -> None:
    stored = TINY.read_bytes()
    assert stored.count(b"deepseek-v3") == 1
    path = tmp_path / "two.gguf"
    path.write_bytes(
        stored.replace(b"deepseek-v3", b"deepseek-v9").replace(b"output_norm.weight", b"output_torm.weight")
    )
    code, said = inspected(path)
    tokenizer, tensors = sorted(said["refusals"], key=lambda reason: "tokenizer.ggml.pre" not in reason)
    assert code == 3
    assert "tokenizer.ggml.pre is 'deepseek-v9'" in tokenizer
    assert "output_norm.weight is missing" in tensors
    assert said["memory"] is None


def test_a_file_too_large_for_this_machine_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers_kt.planning import hardware

    monkeypatch.setattr(hardware, "free_memory", lambda: hardware.MemoryLimit(1 << 20, "a test"))
    code, said = inspect(str(TINY))
    assert code == 0
    assert "The file is in order, but does not fit into this machine: " in said


def test_a_file_that_cannot_be_read_is_one_message_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(TINY.read_bytes()[:20000])
    for path in (tmp_path / "cut.gguf", tmp_path / "none.gguf"):
        command = [sys.executable, "-m", "transformers_kt.cli", "inspect", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("transformers-kt: ")
        assert str(path) in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_bundled_model_has_a_name_and_brings_its_own_tokenizer() -> None:
    code, said = inspect(bundled_model().name, "--json")
    assert code == 0
    assert json.loads(said)["tokenizer"]["source"] == str(bundled_model())
