"""Examples of models, and fake operations in place of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fakes
import gguf
import pytest
import torch
from tiny_examples import Example, make_example
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transformers_kt.integration import from_pretrained, quantizer


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example("v3", tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="session")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example("v2", tmp_path_factory.mktemp("v2"), split_kv_b=False)


@pytest.fixture(scope="session")
def v3_f16(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make_example("v3", tmp_path_factory.mktemp("v3_f16"), weight_type=gguf.GGMLQuantizationType.F16)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """These models are too small to share: on a busy machine torch's threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fake_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integration is tested apart from the kernels; tests of real operations undo this."""
    quantizer.install()
    mapping = AttentionInterface._global_mapping
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(mapping, "kt", sdpa_attention_forward)
    monkeypatch.setitem(masks, "kt", sdpa_mask)
    monkeypatch.setattr(from_pretrained, "_modules", lambda: fakes.MODULES)


@pytest.fixture(params=["fakes", "kernels"])
def either_operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the fakes, and on the real operations where the extension is built."""
    if request.param == "kernels":
        pytest.importorskip("transformers_kt._C")
        monkeypatch.setattr(from_pretrained, "_modules", fakes.REAL_MODULES)
    return str(request.param)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that took memory."""
    called: list[str] = []
    original = fakes.FakeOperation.load

    def noted(self: Any, *args: Any) -> int:
        called.append(self.path)
        return original(self, *args)

    monkeypatch.setattr(fakes.FakeOperation, "load", noted)
    return called
