"""Filling a model: the report, the progress bar, what is checked before memory is taken, what failures leave."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as GgmlType
from random_files import RANDOM_FILES
from tiny_examples import Example, make_example, make_stock, make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import transformers_kt._C as _C
from transformers_kt.errors import (
    GgufFormatError,
    KtError,
    OutOfMemoryError,
    UnsupportedModelError,
    UnsupportedTypeError,
)
from transformers_kt.families.deepseek import DEEPSEEK
from transformers_kt.families.deepseek.export import export_gguf
from transformers_kt.gguf.checkpoint import Checkpoint
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.integration import loading
from transformers_kt.integration.loading import KtReport, ReportRow
from transformers_kt.planning import hardware, operations
from transformers_kt.planning.assignments import Assignment
from transformers_kt.planning.hardware import MemoryLimit
from transformers_kt.rules import PlanEntry

KEEP_ALL = [{"match": {"name": ""}, "replace": {"op": "torch"}}]
FINE = [{"match": {"class": "torch.nn.Linear"}, "replace": {"op": "linear_cpu"}}]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A V3-like model whose rows of keys are 32 wide, so that blocks fit."""
    stock = RANDOM_FILES["small-v3-F32"].stock()
    path = tmp_path / "small.gguf"
    RANDOM_FILES["small-v3-F32"].write(stock, make_tokenizer(), path)
    return path


def load(example: Example, kt_rules: Any = "auto", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(example.folder, kt_rules=kt_rules, **options)


# --- The report ---


def test_the_report_has_every_module_of_the_plan_with_operation_device_types_and_bytes(v3: Example) -> None:
    report = load(v3).kt_report
    found = {row.module: row for row in report.rows}
    assert found["lm_head"] == ReportRow("lm_head", "linear_cpu", "cpu", ("F32",), 320 * 64 * 4)
    assert found["model.layers.1.mlp"].operation == "moe_cpu"
    assert next(iter(found)) == "model.embed_tokens"
    assert report.nbytes == sum(row.nbytes for row in report.rows)
    assert (report.title, report.rules) == ("tiny-v3", "auto")


def test_the_report_names_every_type_inside_a_module(v3_f16: Example) -> None:
    found = {row.module: row.types for row in load(v3_f16).kt_report.rows}
    assert found["model.layers.1.mlp"] == ("F16", "F32")
    assert found["lm_head"] == ("F16",)


def test_the_report_counts_what_stock_modules_hold_in_float32(v3_f16: Example) -> None:
    found = {row.module: row for row in load(v3_f16, KEEP_ALL).kt_report.rows}
    assert found["lm_head"] == ReportRow("lm_head", "torch", "cpu", ("F16",), 320 * 64 * 4)


def test_the_report_names_the_kernels(v3: Example) -> None:
    report = load(v3).kt_report
    assert report.kernels == _C.isa()  # experts as small as these are not timed
    assert str(report).splitlines()[-1] == f"Kernels: {report.kernels}"


def test_the_report_is_fit_for_json(v3: Example) -> None:
    report = load(v3).kt_report
    stated = json.loads(json.dumps(report.to_dict()))
    assert stated["kernels"] == report.kernels
    assert stated["nbytes"] == report.nbytes
    assert stated["rows"][-1]["module"] == "lm_head"
    assert stated["rows"][-1]["types"] == ["F32"]


def test_the_table_puts_equal_layers_on_one_line() -> None:
    rows = [ReportRow(f"model.layers.{n}.mlp", "mlp_cpu", "cpu", ("Q4_K",), 500_000) for n in (0, 2, 3, 4)]
    rows.append(ReportRow("model.layers.1.mlp", "mlp_cpu", "cpu", ("Q6_K",), 700_000))
    text = str(KtReport("tiny", "auto", tuple(rows)))
    (line,) = (line for line in text.splitlines() if "Q4_K" in line)
    assert line.split() == ["model.layers.{0,2-4}.mlp", "mlp_cpu", "cpu", "Q4_K", "2.00", "MB"]
    assert "model.layers.1.mlp" in text
    assert "2.70 MB" in text.splitlines()[-1]


def test_the_footprint_of_the_model_is_that_of_the_report(v3: Example) -> None:
    model = load(v3)
    assert model.get_memory_footprint() == model.kt_report.nbytes > 800_000


# --- Progress ---


def test_a_bar_shows_title_and_size(v3: Example, capfd: pytest.CaptureFixture[str]) -> None:
    load(v3)
    assert "Loading tiny-v3 (908 kB): 100%" in capfd.readouterr().err


def test_the_bar_is_off_where_those_of_transformers_are(v3: Example, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.logging.disable_progress_bar()
    try:
        load(v3)
    finally:
        transformers.logging.enable_progress_bar()
    assert capfd.readouterr().err == ""


class Recorder:
    """A checkpoint that notes which tensors are read, and a progress bar."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.held: list[weakref.ref[Any]] = []
        self.handed_out: set[str] = set()
        self.read = 0

    def data(self, name: str, start: int, end: int) -> Any:
        assert not any(stored() is not None for stored in self.held[:-3]), "memory of earlier reads is held on to"
        stored = self.checkpoint.data(name, start, end)
        self.held.append(weakref.ref(stored))
        return stored

    def places(self, name: str) -> list[tuple[int, int]]:
        self.handed_out.add(name)
        return self.checkpoint.places(name)

    def reading(self, name: str) -> Any:
        return self.checkpoint.reading(name)

    def update(self, n: int) -> None:
        self.read += n


def bytes_read_by_the_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("kt_rules", ["auto", KEEP_ALL, FINE])
def test_every_tensor_is_read_once_let_go_afterwards_and_counted(
    v3: Example, kt_rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[Recorder] = []
    in_all: list[int] = []
    fill = loading.fill

    def recorded(model: Any, assignments: Any, source: Any, progress: Any, devices: Any) -> Any:
        recorders.append(Recorder(source))
        before = bytes_read_by_the_process()
        try:
            return fill(model, assignments, recorders[0], recorders[0], devices)
        finally:
            in_all.append(bytes_read_by_the_process() - before)

    monkeypatch.setattr(loading, "fill", recorded)
    load(v3, kt_rules)
    (recorder,) = recorders
    tensors = recorder.checkpoint.tensors
    assert recorder.handed_out == tensors.keys()
    # The last page is looked at once more, and this test reads /proc.
    assert recorder.checkpoint.nbytes <= in_all[0] < recorder.checkpoint.nbytes + 3 * 4096
    assert not any(stored() is not None for stored in recorder.held)
    assert recorder.read == recorder.checkpoint.nbytes


def test_a_piece_counts_as_used_when_the_next_is_asked_for() -> None:
    events: list[str] = []

    class Source:
        def data(self, name: str, start: int, end: int) -> Any:
            events.append(f"read {name} {start} {end}")
            return np.arange(start, end, dtype=np.uint8)

        def places(self, name: str) -> list[tuple[int, int]]:
            return [(0, 0)]

        def update(self, n: int) -> None:
            events.append(f"used {n}")

    reader = loading._Reader(Source(), Source())
    gate, up = (TensorInfo(name, GgmlType.F32, (2,), 0, 8, Path()) for name in ("gate", "up"))
    assert reader(gate).tolist() == [*range(8)]
    assert reader(up, 0, 4).tolist() == [*range(4)]
    assert reader(up, 4, 8).tolist() == [*range(4, 8)]
    reader.finish()
    assert events == ["used 0", "read gate 0 8", "used 8", "read up 0 4", "used 4", "read up 4 8", "used 4"]


# --- Damage, and what writers do ---


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the GGUF whose tensors, name to (stored rows, type), went through ``change``."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    change(tensors)
    copy = path.with_name(f"changed-{path.name}")
    writer = gguf.GGUFWriter(copy, "deepseek2")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            of_items = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], of_items)
    for name, (stored, ggml_type) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


DAMAGE = {
    "nan_in_an_expert": ("blk.1.ffn_down_exps.weight", float("nan"), "block 0 of tensor blk.1.ffn_down_exps.weight"),
    "infinity_in_a_norm": ("blk.0.attn_norm.weight", float("inf"), "block 0 of tensor blk.0.attn_norm.weight"),
    "nan_in_the_embedding": ("token_embd.weight", float("nan"), "block 0 of tensor token_embd.weight"),
    "nan_in_the_router": ("blk.2.ffn_gate_inp.weight", float("nan"), "block 0 of tensor blk.2.ffn_gate_inp.weight"),
    "a_norm_of_zeros": ("output_norm.weight", None, "tensor output_norm.weight is nothing but zeros"),
    "a_stack_of_zeros": (
        "blk.1.ffn_up_exps.weight",
        None,
        "tensor blk.1.ffn_up_exps.weight is nothing but zeros",
    ),
}


@pytest.mark.parametrize("kt_rules", ["auto", KEEP_ALL, FINE], ids=["auto", "torch", "fine"])
@pytest.mark.parametrize("which", DAMAGE)
def test_damaged_data_is_refused_before_the_model_is_handed_out(
    v3: Example, tmp_path: Path, which: str, kt_rules: Any
) -> None:
    name, value, said = DAMAGE[which]

    def damage(tensors: dict[str, Any]) -> None:
        stored = tensors[name][0]
        if value is None:
            stored[:] = 0
        else:
            stored.reshape(-1)[0] = value

    shutil.copy(v3.gguf, tmp_path)
    path = rewritten(tmp_path / v3.gguf.name, damage)
    with pytest.raises(GgufFormatError, match=said.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_rules=kt_rules)


@pytest.mark.parametrize(
    "ggml_type", [GgmlType.Q4_1, GgmlType.Q5_1, GgmlType.Q5_0, GgmlType.Q8_0], ids=lambda t: t.name
)
@pytest.mark.parametrize("kt_rules", ["auto", FINE], ids=["auto", "fine"])
def test_keys_of_any_type_compute_what_stock_modules_compute(small: Path, ggml_type: GgmlType, kt_rules: Any) -> None:
    def convert(tensors: dict[str, Any]) -> None:
        for name, (stored, stored_type) in tensors.items():
            if name.endswith("attn_k_b.weight"):
                values = gguf.dequantize(stored, stored_type)
                tensors[name] = (gguf.quantize(values, ggml_type), ggml_type)

    path = rewritten(small, convert)
    ids = torch.arange(3, 40)[None]
    logits, expected = (
        AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_rules=rules)(ids).logits.detach()
        for rules in (kt_rules, KEEP_ALL)
    )
    # Packed keys meet queries of int8, one scale for 32 values: 0.009 of the largest logit. Those of float16: 0.0003.
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("ggml_type", [GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.Q8_1, GgmlType.Q8_K])
@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.1.ffn_gate_inp.weight", "token_embd.weight"])
def test_types_that_cannot_be_dequantized_are_refused_before_memory_is_taken(
    v3: Example, monkeypatch: pytest.MonkeyPatch, ggml_type: GgmlType, name: str
) -> None:
    made = Checkpoint.__init__

    def with_type(self: Checkpoint, *args: Any) -> None:
        made(self, *args)
        self.tensors[name] = dataclasses.replace(self.tensors[name], ggml_type=ggml_type)

    monkeypatch.setattr(Checkpoint, "__init__", with_type)
    monkeypatch.setattr(loading, "fill", lambda *args: pytest.fail("filling began"))
    for rules in ("auto", FINE, KEEP_ALL):
        with pytest.raises(UnsupportedTypeError, match=rf"tensor {name} .*has type {ggml_type.name}"):
            load(v3, rules)


# --- Stock modules ---


@pytest.mark.parametrize("example", ["v2", "v3"])
def test_kept_modules_hold_the_dequantized_tensors(example: str, request: pytest.FixtureRequest) -> None:
    found = load(request.getfixturevalue(example), KEEP_ALL).state_dict()
    expected = request.getfixturevalue(example).stock.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


def test_kept_modules_hold_float16_tensors_in_float32(v3_f16: Example) -> None:
    found = load(v3_f16, KEEP_ALL).state_dict()
    for name, values in v3_f16.stock.state_dict().items():
        is_matrix = values.ndim > 1 and not name.endswith("mlp.gate.weight")
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], values.half().float() if is_matrix else values), name


@pytest.mark.parametrize(
    "ggml_type", [GgmlType.Q8_0, GgmlType.Q4_0, GgmlType.BF16, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_NL]
)
def test_dequantizing_in_pieces_gives_what_it_gives_at_once(
    ggml_type: GgmlType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_DEQUANTIZED_AT_ONCE", 3 * 256)
    elements, nbytes = gguf.GGML_QUANT_SIZES[ggml_type]
    stored = np.random.default_rng(1).integers(0, 60, (2 * 5, 256 // elements * nbytes), dtype=np.uint8)
    stored.flags.writeable = False
    info = TensorInfo("t", ggml_type, (2, 5, 256), 0, stored.nbytes, Path("x.gguf"))
    found = loading._dequantized(info, lambda _, start, end: stored.reshape(-1)[start:end])
    expected = gguf.dequantize(stored, ggml_type).reshape(2, 5, 256)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_a_correction_bias_that_the_file_leaves_out_is_zero() -> None:
    config = make_stock("v3").config
    with torch.device("meta"):
        router = DeepseekV3TopkRouter(config)
    info = TensorInfo("w", GgmlType.F32, (8, 64), 0, 8 * 64 * 4, Path("x.gguf"))
    nbytes = loading._load_stock(router, DEEPSEEK, {"weight": info}, lambda *_: np.ones(8 * 64 * 4, dtype=np.uint8))
    assert torch.equal(router.e_score_correction_bias, torch.zeros(8))
    assert nbytes == (8 * 64 + 8) * 4


@pytest.mark.parametrize("kt_rules", ["auto", KEEP_ALL])
def test_embeddings_that_double_as_the_output_fill_both(kt_rules: Any, tmp_path: Path) -> None:
    stock = make_stock("v3")
    stock.config.tie_word_embeddings = True
    stock.lm_head.weight = stock.model.embed_tokens.weight
    path = tmp_path / "tied.gguf"
    export_gguf(stock, make_tokenizer(), path, name="tied", pre_tokenizer="gpt-2")
    example = Example(stock, path.parent, path.parent, path)
    stock.config.save_pretrained(tmp_path)
    for options in ({"gguf_path": path}, {}):  # config from the folder, which says tied, and from the file
        model = AutoModelForCausalLM.from_pretrained(tmp_path if options else path, kt_rules=kt_rules, **options)
        with torch.no_grad():
            assert torch.equal(model(example.prompt).logits, stock(example.prompt).logits)


# --- Checks before memory is taken ---


def test_weights_that_do_not_fit_are_refused_with_numbers_before_any_is_read(
    v3: Example, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: MemoryLimit(500_000, "a test"))
    with pytest.raises(OutOfMemoryError) as caught:
        load(v3)
    message = str(caught.value)
    for part in ("tiny-v3", "908 kB", "500 kB", "a test", "408 kB too little"):
        assert part in message
    assert loads == []


def test_what_stays_stock_is_counted_as_float32(v3_f16: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: MemoryLimit(600_000, "a test"))
    load(v3_f16)  # 456 kB of blocks
    with pytest.raises(OutOfMemoryError, match="908 kB"):
        load(v3_f16, KEEP_ALL)


def test_a_type_without_kernel_is_refused_with_file_and_tensor_before_any_is_read(
    v3_f16: Example, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(operations.KERNEL_TYPES, int(GgmlType.F16))
    with pytest.raises(UnsupportedTypeError) as caught:
        load(v3_f16)
    for part in (".gguf", "blk.0.attn_kv_a_mqa.weight", "F16", "types with kernels: "):
        assert part in str(caught.value)
    assert loads == []


def test_a_type_without_kernel_names_the_rule_that_decided(
    v3_f16: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(operations.KERNEL_TYPES, int(GgmlType.F16))
    rules = tmp_path / "my.yaml"
    rules.write_text(
        "# heads first\n- {match: {name: lm_head}, replace: torch}\n- {match: {name: ''}, replace: auto}\n"
    )
    with pytest.raises(UnsupportedTypeError) as caught:
        load(v3_f16, rules)
    assert f"{rules}, rule 2 (line 3)" in str(caught.value)


def test_a_type_that_cannot_be_dequantized_is_refused_with_file_tensor_and_module() -> None:
    info = TensorInfo("blk.0.x", GgmlType.Q8_K, (1, 256), 0, 292, Path("model.gguf"))
    entry = PlanEntry("model.x", "torch", "cpu", None)
    assignment = Assignment(entry, operations.OPERATIONS["torch"], {"weight": info})
    with pytest.raises(UnsupportedTypeError) as caught:
        assignment.check_types()
    for part in ("model.gguf", "blk.0.x", "weight of model.x", "Q8_K", "cannot dequantize"):
        assert part in str(caught.value)


def test_a_tensor_that_an_operation_cannot_use_is_refused_with_both_names(
    v3: Example, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = dataclasses.replace(fakes.FakeMoe.operation, roles=frozenset({"gate.weight"}))
    monkeypatch.setitem(operations.OPERATIONS, "moe_cpu", narrow)
    with pytest.raises(UnsupportedModelError, match=r"moe_cpu at model\.layers\.1\.mlp has no use for experts\.down"):
        load(v3)
    assert loads == []


# --- Failures ---


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("kt_rules", ["auto", KEEP_ALL])
def test_a_failure_while_loading_leaves_nothing_behind_even_if_its_traceback_is_kept(
    v3: Example, failure: type[BaseException], kt_rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    original = loading._dequantized

    def fail_late(info: TensorInfo, data: Any) -> torch.Tensor:
        if info.name == "output.weight":
            raise failure
        values = original(info, data)
        alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(loading, "_dequantized", fail_late)
    with pytest.raises(failure) as caught:
        load(v3, kt_rules)
    assert caught.tb is not None  # as a notebook keeps it
    assert len(alive) > 20
    assert not any(reference() is not None for reference in alive)


def test_a_model_can_be_loaded_after_a_failure(v3: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(fakes.FakeNorm, "load", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load(v3)
    with torch.no_grad():
        assert torch.equal(load(v3)(v3.prompt).logits, v3.stock(v3.prompt).logits)


def test_a_loaded_model_keeps_no_hold_of_the_file(v3: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Checkpoint]] = []
    original = Checkpoint.__init__

    def noted(self: Checkpoint, *args: Any) -> None:
        original(self, *args)
        opened.append(weakref.ref(self))

    monkeypatch.setattr(Checkpoint, "__init__", noted)
    model = load(v3)
    assert len(opened) == 1
    assert opened[0]() is None
    assert model.kt_report.nbytes


def test_a_deleted_model_gives_its_weights_back(v3: Example) -> None:
    model = load(v3)
    weight = weakref.ref(model.lm_head.stock.weight)
    del model
    import gc

    gc.collect()
    assert weight() is None


def test_every_refusal_is_one_of_our_classes() -> None:
    assert all(issubclass(cls, KtError) for cls in (OutOfMemoryError, UnsupportedTypeError, UnsupportedModelError))


def test_a_file_of_the_older_layout_loads_as_well(tmp_path: Path) -> None:
    example = make_example("v3", tmp_path, split_kv_b=False)
    with torch.no_grad():
        assert torch.equal(load(example)(example.prompt).logits, example.stock(example.prompt).logits)
