"""A GGUF on the hub, and one that only transformers' own ``gguf_file=`` names, are loaded where we know the
architecture; what we do not know reaches transformers as it came."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from hub_cache import Hub
from tiny_examples import EOS, Example
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    pipeline,
)

from transformers_kt.planning.request import read_request


@pytest.fixture
def hub(v3: Example, tmp_path: Path) -> Hub:
    hub = Hub(tmp_path / "hub")
    hub.put("org/flat", v3.gguf, "model.gguf")
    hub.put("org/deep", v3.gguf, "Q4/model.gguf")
    return hub


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of an architecture that transformers reads and we do not."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(5)
    writer.add_embedding_length(64)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FORMS = {
    "org/flat:model.gguf": {},
    "org/deep:Q4/model.gguf": {},
    "org/flat": {"gguf_file": "model.gguf"},
    "org/deep": {"gguf_file": "model.gguf", "subfolder": "Q4"},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_gguf_on_the_hub_gives_config_tokenizer_and_model(name: str, v3: Example, hub: Hub) -> None:
    options = {**FORMS[name], **hub.options}
    assert AutoConfig.from_pretrained(name, **options).num_hidden_layers == 3
    for auto_class in (AutoTokenizer, AutoProcessor):
        assert auto_class.from_pretrained(name, **options).eos_token_id == EOS
    for model_class in (AutoModelForCausalLM, DeepseekV3ForCausalLM):
        model = model_class.from_pretrained(name, **options)
        with torch.no_grad():
            assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)
    assert GenerationConfig.from_pretrained(name, **options).eos_token_id == EOS


def test_pipeline_takes_a_gguf_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub.options["cache_dir"])
    assert pipeline(model="org/flat:model.gguf").model.kt_report.nbytes


@pytest.mark.parametrize("with_config", [False, True])
def test_gguf_file_in_a_folder_needs_no_argument_of_ours(v3: Example, tmp_path: Path, with_config: bool) -> None:
    """Two files, so that the folder alone says too little."""
    folder = tmp_path / "model"
    shutil.copytree(v3.config_folder, folder) if with_config else folder.mkdir()
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(v3.gguf, folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="two.gguf")
    with torch.no_grad():
        assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)
    assert AutoConfig.from_pretrained(folder, gguf_file="two.gguf").num_hidden_layers == 3
    assert AutoTokenizer.from_pretrained(folder, gguf_file="two.gguf").eos_token_id == EOS


def test_an_architecture_that_we_do_not_know_is_left_to_transformers(llama: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.put("org/llama", llama, "model.gguf")
    for name, options in ((str(llama.parent), {}), ("org/llama", hub.options)):
        config = AutoConfig.from_pretrained(name, gguf_file="model.gguf", **options)
        assert type(config) is LlamaConfig
        assert (config.num_hidden_layers, config.hidden_size) == (5, 64)


def test_a_gguf_file_that_is_not_there_is_left_to_transformers(v3: Example, hub: Hub) -> None:
    for name, options, words in (
        (str(v3.gguf.parent), {}, "does not appear to have a file named other.gguf"),
        ("org/flat", hub.options, "couldn't find them in the cached files"),
    ):
        assert read_request(name, {"gguf_file": "other.gguf", **options}) is None
        with pytest.raises(OSError, match=words):
            AutoConfig.from_pretrained(name, gguf_file="other.gguf", **options)


def test_only_a_gguf_file_is_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: asked.append((args, options)))
    for options in ({}, {"gguf_file": None, "revision": "main"}):
        assert read_request("org/model", options) is None
    assert not asked
    read_request("org/model", {"gguf_file": "model.gguf", "revision": "main", "force_download": True})
    assert asked == [(("org/model", "model.gguf"), {"revision": "main"})]
