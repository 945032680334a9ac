"""Which matrices get the prefetch strategy that was fastest."""

from __future__ import annotations

import pytest
from tiny_examples import Example, make_example
from torch import nn
from transformers import AutoModelForCausalLM

import transformers_kt._C as _C
from transformers_kt.integration import tune_prefetch
from transformers_kt.modules.base import KtModule


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example("v3", tmp_path_factory.mktemp("v3"))


def matrices_of(model: nn.Module) -> list[_C.PackedMatrix]:
    return [matrix for module in model.modules() if isinstance(module, KtModule) for matrix in module.matrices]


def test_the_fastest_prefetch_strategy_holds_for_every_matrix_of_its_model_alone(
    v3: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, model = (AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto") for _ in range(2))
    standard = {matrix.prefetch for matrix in matrices_of(before)}
    chosen = next(name for name in _C.PREFETCHES if name not in standard)

    def tune(matrices: list[_C.PackedMatrix]) -> dict[str, float]:
        for matrix in matrices:
            matrix.prefetch = chosen
        return {name: 1.0 if name == chosen else 0.8 for name in _C.PREFETCHES}

    monkeypatch.setattr(_C, "tune_prefetch", tune)
    said = tune_prefetch.tune_prefetch(model)
    slower = ", ".join(f"{name} 0.80" for name in _C.PREFETCHES if name != chosen)
    assert said == f"{_C.isa()}; prefetch strategy: {chosen} ({slower} of its speed)"
    assert {matrix.prefetch for matrix in matrices_of(model)} == {chosen}
    assert {matrix.prefetch for matrix in matrices_of(before)} == standard


def test_every_loaded_matrix_is_found(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    packed = sum(row.nbytes for row in model.kt_report.rows if row.module.endswith(("self_attn", "mlp", "lm_head")))
    assert sum(matrix.nbytes for matrix in matrices_of(model)) == packed
