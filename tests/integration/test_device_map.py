"""device_map=, max_memory= and the two integers of from_pretrained, and devices in rules: honoured, or refused before
memory is taken."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map
from fake_gpus import fake_gpus
from gguf import GGMLQuantizationType as GgmlType
from tiny_examples import Example
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from transformers_kt.errors import (
    KtError,
    OutOfMemoryError,
    RuleError,
    UnsupportedOperationError,
    UnsupportedTypeError,
)
from transformers_kt.planning import operations

WHOLE = {"": "cpu"}
PARTS = {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}


def load(example: Example, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(example.folder, **{"kt_rules": "auto", **options})


# --- Honoured ---


@pytest.mark.parametrize(
    ("device_map", "found"),
    [
        ("cpu", WHOLE),
        (torch.device("cpu"), WHOLE),
        (WHOLE, WHOLE),
        (PARTS, PARTS),
        ("auto", WHOLE),
        ("balanced", WHOLE),
        ("balanced_low_0", WHOLE),
        ("sequential", WHOLE),
    ],
)
def test_the_device_map_of_the_model_is_one_of_accelerate(v3: Example, device_map: Any, found: dict[str, str]) -> None:
    model = load(v3, device_map=device_map)
    assert model.hf_device_map == found
    check_device_map(model, model.hf_device_map)
    with torch.inference_mode():
        assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)


def test_without_a_device_map_there_is_none(v3: Example) -> None:
    assert not hasattr(load(v3), "hf_device_map")


def test_pipeline_takes_a_device_map(v3: Example) -> None:
    generator = pipeline("text-generation", model=str(v3.folder), device_map="auto", model_kwargs={"kt_rules": "auto"})
    assert generator.model.hf_device_map == WHOLE
    assert generator("Hello,", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("Hello,")


def test_the_names_of_a_base_model_have_no_prefix(v3: Example) -> None:
    device_map = {"embed_tokens": "cpu", "layers": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    model = AutoModel.from_pretrained(v3.folder, kt_rules="auto", device_map=device_map)
    assert model.hf_device_map == device_map
    check_device_map(model, device_map)


@pytest.mark.parametrize("numbers", [{"kt_cpu_layers": 3}, {"kt_cpu_layers": 1}, {"kt_gpu_experts": 0}])
def test_an_integer_alone_asks_for_us_and_without_gpus_all_is_on_the_cpu(v3: Example, numbers: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, **numbers)
    assert model.kt_report.rules == "auto"
    assert {row.device for row in model.kt_report.rows} == {"cpu"}


def test_the_integers_do_not_disturb_config_and_tokenizer(v3: Example) -> None:
    options = {"gguf_path": v3.gguf, "kt_cpu_layers": 2}
    assert not hasattr(AutoConfig.from_pretrained(None, **options), "kt_cpu_layers")
    assert "kt_cpu_layers" not in AutoTokenizer.from_pretrained(None, **options).init_kwargs


def test_what_rules_ask_for_and_is_done_otherwise_is_in_the_report(
    v3: Example, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(__file__).parent.parent / "rules" / "ktransformers" / "v3-one-gpu.yaml"
    with caplog.at_level(logging.WARNING, "transformers_kt"):
        report = load(v3, kt_rules=path, device_map="cpu").kt_report
    assert any("backend AMXBF16" in note for note in report.notes)
    assert report.to_dict()["notes"] == list(report.notes)
    assert "Note: " in str(report)
    assert len(set(report.notes)) == len(report.notes)
    (warning,) = caplog.messages
    assert all(note in warning.splitlines() for note in report.notes)
    assert load(v3).kt_report.notes == ()


def test_max_memory_is_a_limit_on_ram(v3: Example, loads: list[str]) -> None:
    with pytest.raises(OutOfMemoryError, match=r'908 kB, but 500 kB is available \(max_memory\["cpu"\]\): 408 kB too'):
        load(v3, max_memory={"cpu": "500KB"})
    assert loads == []
    load(v3, max_memory={"cpu": "909KB", 0: "24GiB"}, device_map="auto")
    assert loads


# --- Refused ---


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, {"": "cpu", "lm_head": "cuda:0"}])
def test_a_device_that_is_not_there_is_refused(v3: Example, loads: list[str], device_map: Any) -> None:
    said = r'device_map puts \S+ on cuda:0, which is not there: this machine has cpu\. device_map="cpu" runs the same'
    with pytest.raises(UnsupportedOperationError, match=said):
        load(v3, device_map=device_map)
    assert loads == []


def test_a_gpu_beyond_those_that_are_there_is_refused(v3: Example, loads: list[str]) -> None:
    with (
        fake_gpus("1GiB", "1GiB"),
        pytest.raises(UnsupportedOperationError, match=r"cuda:2, which is not there: this machine has cpu, cuda:0, c"),
    ):
        load(v3, device_map={"": "cpu", "lm_head": 2})
    assert loads == []


def rules_with_a_gpu(folder: Path) -> Path:
    path = folder / "gpu.yaml"
    path.write_text(
        "- match: {name: embed_tokens}\n  replace: {op: auto}\n"
        "- match: {name: mlp}\n  replace: {op: auto, device: 'cuda:1'}\n"
        "- match: {name: ''}\n  replace: {op: auto}\n"
    )
    return path


def test_a_rule_for_another_device_is_refused_by_file_rule_and_line_and_a_map_to_the_cpu_runs_it(
    v3: Example, loads: list[str], tmp_path: Path
) -> None:
    said = (
        r'gpu\.yaml, rule 2 \(line 3\) puts \S+mlp on cuda:1, which is not there.*device_map="cpu" runs the same plan'
    )
    with pytest.raises(RuleError, match=said):
        load(v3, kt_rules=rules_with_a_gpu(tmp_path), device_map="auto")
    assert loads == []
    model = load(v3, kt_rules=rules_with_a_gpu(tmp_path), device_map="cpu")
    found = [(row.module, row.operation) for row in model.kt_report.rows]
    assert found == [(row.module, row.operation) for row in load(v3).kt_report.rows]


def test_a_rule_whose_operation_cannot_take_a_type_is_named_with_file_and_line(
    v3_f16: Example, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(operations.KERNEL_TYPES, int(GgmlType.F16))
    path = tmp_path / "all.yaml"
    path.write_text("- match: {name: ''}\n  replace: {op: auto}\n")
    with pytest.raises(UnsupportedTypeError, match=r"all\.yaml, rule 1 \(line 1\): .*tiny-v3\.gguf: tensor blk"):
        load(v3_f16, kt_rules=path)
    assert loads == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": {"model": "cpu"}}, r'device_map says nothing of lm_head; add them, or ""'),
        ({"device_map": {"": "cpu", "lm_haed": "cpu"}}, r"did you mean 'lm_head'"),
        ({"device_map": "gpu"}, r"device_map is 'gpu'"),
        ({"device_map": {"": "disk"}}, r"is 'disk', but weights of a GGUF are held in memory"),
        ({"max_memory": {"cpu": "lots"}}, r"max_memory\['cpu'\] is 'lots'"),
        ({"kt_cpu_layers": 4}, r"kt_cpu_layers=4; a whole number from 0 to 3 is accepted"),
        ({"kt_gpu_experts": 2}, r"kt_gpu_experts=2 puts routed experts on GPUs, but there is none to use"),
        ({"kt_cpu_layers": 1, "kt_gpu_experts": 1}, r"leave one of them out"),
        ({"kt_cpu_layers": 1, "kt_rules": "cpu"}, r'shapes the placement of kt_rules="auto", but rules are given'),
        ({"kt_cpu_layers": 1, "device_map": "cpu"}, r"but device_map= names devices"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_before_memory_is_taken(
    v3: Example, loads: list[str], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(KtError, match=said):
        load(v3, **options)
    assert loads == []
