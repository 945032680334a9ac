"""Random models: GGUF files, the models that transformers_kt loads from them, and the stock models they came from."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# No test asks the hub: without a network its library tries again for five minutes. Before whoever imports that library.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before whoever imports triton first

import torch
from random_files import GOLDEN_FILES, RANDOM_FILES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import transformers_kt._C as _C
from transformers_kt.assets import bundled_model


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The models are too small for more, and torch's threads spin on where ours want to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(bundled_model(), padding_side="left")


@pytest.fixture(scope="session")
def stock_model() -> Callable[[str], Any]:
    """Name in RANDOM_FILES -> the float32 model of transformers that the file was made from."""
    return functools.cache(lambda name: RANDOM_FILES[name].stock())


@pytest.fixture(scope="session")
def gguf_file(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, stock_model: Callable[[str], Any]
) -> Callable[[str], Path]:
    """Name in RANDOM_FILES or GOLDEN_FILES -> path."""
    folder = tmp_path_factory.mktemp("random-files")

    @functools.cache
    def path_of(name: str) -> Path:
        if name in GOLDEN_FILES:
            return GOLDEN_FILES[name]
        path = folder / f"{name}.gguf"
        RANDOM_FILES[name].write(stock_model(name), tokenizer, path)
        return path

    return path_of


@pytest.fixture(scope="session")
def kt_model(gguf_file: Callable[[str], Path]) -> Callable[[str], Any]:
    """Name in RANDOM_FILES or GOLDEN_FILES -> the model that transformers_kt loads from the file."""
    return functools.cache(lambda name: AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file(name)))


@pytest.fixture
def eight_cpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Up to eight threads, also where there are fewer CPUs: they are interrupted wherever they stand."""
    _C.use_topology(str(tmp_path_factory.getbasetemp() / "no-sysfs"), range(8))


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    threads = _C.thread_count()
    yield
    _C.select_isa("")
    _C.use_topology()
    _C.set_thread_count(threads)
