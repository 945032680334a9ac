"""``transformers-kt profile`` counts what transformers' own model would choose; what it writes is read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import TINY_R1_NAME, config_of, dequantized_model, gguf_path
from transformers import AutoTokenizer
from typer.testing import CliRunner

from transformers_kt.assets import bundled_model, bundled_texts
from transformers_kt.cli import build_app
from transformers_kt.errors import InputError
from transformers_kt.planning.expert_profile import ExpertProfile

MODEL = bundled_model().name
LAYERS, EXPERTS, TOP_K = (1, 2, 3), 8, 2

# Our activations have 8 bits, transformers' 32: a token in a few hundred is at a near tie and goes elsewhere.
CHOICES_ELSEWHERE = 0.02


def profile(*args: str) -> str:
    result = CliRunner().invoke(build_app(), ["profile", MODEL, *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@torch.no_grad()
def choices_of_transformers(text: str) -> dict[int, torch.Tensor]:
    stock: Any = dequantized_model(gguf_path(TINY_R1_NAME), config_of(TINY_R1_NAME))
    counts = {layer: torch.zeros(EXPERTS, dtype=torch.int64) for layer in LAYERS}
    for layer, own in counts.items():

        def count(module: Any, args: tuple[Any, ...], own: torch.Tensor = own) -> None:
            own += torch.bincount(args[1].reshape(-1), minlength=EXPERTS)

        stock.model.layers[layer].mlp.experts.register_forward_pre_hook(count)
    stock(AutoTokenizer.from_pretrained(bundled_model())(text, return_tensors="pt").input_ids, use_cache=False)
    return counts


def test_it_counts_the_choices_of_transformers_own_model_and_writes_them(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "experts.json"
    text.write_text("What is 486 + 57?\n" * 20, encoding="utf-8")
    command = [sys.executable, "-m", "transformers_kt.cli", "profile", MODEL, str(text), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(out.read_text())
    expected = choices_of_transformers(text.read_text())
    assert said["layers"].keys() == {str(layer) for layer in LAYERS}
    for layer, counts in expected.items():
        found = torch.tensor(said["layers"][str(layer)])
        assert found.sum() == counts.sum() == said["tokens"] * TOP_K
        assert (found - counts).abs().sum() / 2 <= CHOICES_ELSEWHERE * counts.sum()
    assert f"{said['tokens']} tokens chose 2 of 8 experts in each of 3 layers" in done.stdout
    read = ExpertProfile.read(out)
    read.require_fits(MODEL, dict.fromkeys(LAYERS, EXPERTS))
    busiest = read.busiest(1)
    assert sorted(busiest) == list(range(EXPERTS))
    assert said["layers"]["1"][busiest[0]] == max(said["layers"]["1"])


def test_without_a_text_it_reads_the_bundled_ones(tmp_path: Path) -> None:
    out = tmp_path / "experts.json"
    profile("-o", str(out))
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    assert ExpertProfile.read(out).tokens == sum(len(tokenizer(text).input_ids) for text in bundled_texts().values())


def test_what_cannot_be_counted_or_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", None)
    binary = tmp_path / "text.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for args, said in (
        ((str(binary),), "is no text in UTF-8"),
        (("-o", str(tmp_path / "missing" / "experts.json")), "there is no folder"),
    ):
        with pytest.raises(InputError, match=said):
            profile(*args)


GOOD = {
    "format": "transformers-kt expert profile",
    "version": 1,
    "model": "m",
    "tokens": 3,
    "top_k": 2,
    "layers": {"1": [1, 5]},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("{", "is no JSON"),
        ([1], "its \"format\" is not 'transformers-kt expert profile'"),
        ({"format": "x"}, 'its "format" is not'),
        ({"version": 2}, "is of version 2; 1 is accepted"),
        ({"tokens": 0}, "'tokens' is 0; a whole number from 1 is accepted"),
        ({"top_k": True}, "'top_k' is True"),
        ({"layers": {}}, "'layers' is {}"),
        ({"layers": {"one": [1, 5]}}, "layer 'one' is"),
        ({"layers": {"1": [7, -1]}}, r"layer '1' is \[7, -1\]"),
        ({"layers": {"1": [1, 4]}}, "the counts of layer 1 sum to 5, not to 3 tokens times 2 choices"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_what_is_wrong(tmp_path: Path, changed: Any, said: str) -> None:
    path = tmp_path / "experts.json"
    whole = {**GOOD, **changed} if isinstance(changed, dict) else changed
    path.write_text(changed if isinstance(changed, str) else json.dumps(whole))
    with pytest.raises(InputError, match=said):
        ExpertProfile.read(path)


def test_a_profile_of_another_model_is_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match=r"made with m, which has 1 layers of 2 routed experts; v3 has 2 layers of 8"):
        ExpertProfile.read(path).require_fits("v3", {1: 8, 2: 8})
