"""Panels become the numbers that the extension decodes from the file, on whatever device torch computes."""

from __future__ import annotations

import pytest
import torch
from gpu_matrices import decoded_rows, packed_panels, stored_rows

from transformers_kt.backends.gpu.panels import LAYOUTS, dequantize


@pytest.mark.parametrize("rows", [16, 33])
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("name", LAYOUTS)
def test_panels_become_the_numbers_of_the_file(name: str, blocks: int, rows: int) -> None:
    cols = blocks * LAYOUTS[name].block_elements
    stored = stored_rows(name, rows, cols)
    got = dequantize(packed_panels(name, stored, cols), name, rows, cols)
    assert torch.equal(got, decoded_rows(name, stored, cols))
