"""Tables of modules: what shares a line, and that nothing is lost in 100 columns."""

from __future__ import annotations

import pytest

from transformers_kt.integration.loading import KtReport, ReportRow
from transformers_kt.planning.tables import WIDTH, ranges


def row(module: str, operation: str = "norm_cpu", types: tuple[str, ...] = ("F32",), nbytes: int = 1_000) -> ReportRow:
    return ReportRow(module, operation, "cpu", types, nbytes)


def first_cells(*rows: ReportRow) -> list[str]:
    lines = str(KtReport("tiny", "auto", rows)).splitlines()
    return [line.split()[0] for line in lines if line.startswith("model")]


def test_the_norms_of_a_layer_share_a_line_and_one_norm_keeps_its_name() -> None:
    both = [row(f"model.layers.{layer}.{norm}_layernorm") for layer in (0, 1, 2) for norm in ("input", "post")]
    assert first_cells(*both) == ["model.layers.{0-2}.*_layernorm"]
    assert first_cells(*both[:2]) == ["model.layers.0.*_layernorm"]
    assert first_cells(*both[:4:2]) == ["model.layers.{0-1}.input_layernorm"]
    assert first_cells(row("model.norm")) == ["model.norm"]


def test_whole_layers_share_a_line() -> None:
    assert first_cells(*(row(f"model.layers.{layer}") for layer in (3, 4, 7))) == ["model.layers.{3-4,7}"]


def test_long_names_and_many_types_fold_and_sizes_stay_whole() -> None:
    module, types = f"model.layers.3.{'very_long_name_of_a_module.' * 4}proj", ("BF16", "F16", "F32", "Q4_K", "Q5_K")
    text = str(KtReport("tiny", "a/path/of/rules.yaml", (row(module, "attention_cpu", types, 123_000_000),)))
    assert max(map(len, text.splitlines())) <= WIDTH
    cells = "".join(text.split())
    assert "attention_cpu" in text
    assert "123 MB" in text
    assert all(name in text for name in types)
    folded = "".join(line.split()[0] for line in text.splitlines() if "_" in line)
    assert folded.startswith(module[:30])
    assert cells.endswith("allweights123MB")


@pytest.mark.parametrize(("numbers", "said"), [([1], "1"), ([0, 1, 2, 5], "0-2,5"), ([3, 5, 6], "3,5-6"), ([], "")])
def test_numbers_in_a_row_are_a_range(numbers: list[int], said: str) -> None:
    assert ranges(numbers) == said
