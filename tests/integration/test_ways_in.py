"""Whatever of transformers takes a folder takes what leads to a GGUF, or refuses in transformers' words and ours."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_cache import Hub
from tiny_examples import EOS, Example
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from transformers_kt import errors

FORMS = (
    "model.gguf",
    "folder of a GGUF",
    "folder of a model whose only weights are a GGUF",
    "org/alone:model.gguf",
    "org/alone",
    "org/whole",
)
UNRECOGNIZED = r"Unrecognized configuration class .*; load AutoModelForCausalLM"
HEADLESS = "which no GGUF of this architecture holds; load AutoModelForCausalLM"


@pytest.fixture(scope="module")
def hub(v3: Example, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    hub = Hub(tmp_path_factory.mktemp("hub"))
    hub.put("org/alone", v3.gguf, "model.gguf")
    for file in v3.folder.iterdir():
        hub.put("org/whole", file, file.name)
    for name in ("one.gguf", "two.gguf"):
        hub.put("org/several", v3.gguf, name)
    return hub


@pytest.fixture(autouse=True)
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by options, which some of these classes do not take."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub.options["cache_dir"])


@pytest.fixture(params=FORMS)
def name(request: pytest.FixtureRequest, v3: Example) -> str:
    local = {
        "model.gguf": v3.gguf,
        "folder of a GGUF": v3.gguf.parent,
        "folder of a model whose only weights are a GGUF": v3.folder,
    }
    return str(local.get(request.param, request.param))


def loaded(name: str, auto_class: str) -> Any:
    if auto_class == "pipeline":
        return transformers.pipeline(model=name).model
    return getattr(transformers, auto_class).from_pretrained(name)


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "DeepseekV3ForCausalLM", "AutoModel", "pipeline"])
def test_it_is_a_model(name: str, auto_class: str, v3: Example) -> None:
    model = loaded(name, auto_class)
    body, expected = (each.model if hasattr(each, "model") else each for each in (model, v3.stock))
    with torch.no_grad():
        assert torch.equal(body(v3.prompt).last_hidden_state, expected(v3.prompt).last_hidden_state)
    if auto_class != "AutoModel":
        assert model.generation_config.eos_token_id == EOS


@pytest.mark.parametrize(
    ("auto_class", "attribute", "expected"),
    [
        ("AutoConfig", "num_hidden_layers", 3),
        ("DeepseekV3Config", "num_hidden_layers", 3),
        ("AutoTokenizer", "eos_token_id", EOS),
        ("PreTrainedTokenizerFast", "eos_token_id", EOS),
        ("AutoProcessor", "eos_token_id", EOS),
        ("GenerationConfig", "eos_token_id", EOS),
    ],
)
def test_it_is_what_belongs_to_a_model(name: str, auto_class: str, attribute: str, expected: Any) -> None:
    assert getattr(loaded(name, auto_class), attribute) == expected


@pytest.mark.parametrize(
    ("auto_class", "words"),
    [
        ("AutoModelForImageTextToText", UNRECOGNIZED),
        ("AutoModelForSequenceClassification", HEADLESS),
        ("AutoModelForTokenClassification", HEADLESS),
    ],
)
def test_it_is_no_other_kind_of_model(name: str, auto_class: str, words: str) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=words):
        loaded(name, auto_class)


def test_every_other_kind_of_model_is_refused_in_the_words_that_wrappers_look_for(v3: Example) -> None:
    others = [
        auto_class
        for auto_class in vars(modeling_auto).values()
        if isinstance(auto_class, type)
        and issubclass(auto_class, modeling_auto._BaseAutoModelClass)
        and auto_class._model_mapping is not None  # it is a base
        and type(v3.stock.config) not in auto_class._model_mapping
    ]
    assert len(others) > 20
    for auto_class in others:
        with pytest.raises(errors.UnsupportedModelError, match=UNRECOGNIZED):
            auto_class.from_pretrained(v3.gguf)


@pytest.mark.parametrize(
    ("module", "auto_class"),
    [
        ("image_processing_auto", "AutoImageProcessor"),
        ("video_processing_auto", "AutoVideoProcessor"),
        ("feature_extraction_auto", "AutoFeatureExtractor"),
    ],
)
def test_what_prepares_images_and_sound_is_refused_as_for_a_folder_without_it(
    name: str, module: str, auto_class: str, v3: Example
) -> None:
    # Not from transformers itself, which has stand-ins where torchvision is missing.
    owner = getattr(importlib.import_module(f"transformers.models.auto.{module}"), auto_class)
    for given in (name, str(v3.config_folder)):
        with pytest.raises(OSError, match=f"Can't load .* for '{given}'") as caught:
            owner.from_pretrained(given)
        if ".gguf" in given:
            assert isinstance(caught.value, errors.KtError)


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "pipeline"])
def test_a_repository_of_several_files_says_which_in_both_words(auto_class: str) -> None:
    with pytest.raises(OSError, match=r'.+ has 2 GGUF models: one.gguf, two.gguf. Name one .* "org/several:one.gguf"'):
        loaded("org/several", auto_class)


def test_a_repository_with_rules_is_one_of_a_gguf(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained("org/whole", kt_rules="auto")
    with torch.no_grad():
        assert torch.equal(model(v3.prompt).logits, v3.stock(v3.prompt).logits)
    with pytest.raises(errors.CheckpointNotFoundError, match="has 2 GGUF models"):
        AutoModelForCausalLM.from_pretrained("org/several", kt_rules="auto")


def test_a_repository_without_a_gguf_of_ours_fails_in_transformers_words_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    hub.put("org/llama", tmp_path / "config.json", "config.json")
    for file in (None, "model.gguf", "other.safetensors"):
        if file is not None:
            shutil.copy(tmp_path / "config.json", tmp_path / file)
            hub.put("org/llama", tmp_path / file, file)
        with pytest.raises((OSError, ValueError)) as caught:
            AutoModelForCausalLM.from_pretrained("org/llama")
        assert not isinstance(caught.value, errors.KtError)
