"""Every way to name config, weights and rules ends in the same model; other calls of from_pretrained stay stock."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
import transformers
from tiny_examples import BOS, EOS, PAD, VOCAB, Example
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    pipeline,
)

from transformers_kt import errors
from transformers_kt.integration import from_pretrained, hooks, loaded_model, quantizer
from transformers_kt.planning import request


def logits(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt).logits


def assert_equals_stock(model: Any, example: Example) -> None:
    assert torch.equal(logits(model, example.prompt), logits(example.stock, example.prompt))


# --- Where things are named ---


def folder_and_gguf(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.config_folder), {"gguf_path": str(example.gguf), "kt_rules": "auto"}


def folder_and_gguf_without_rules(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.config_folder), {"gguf_path": str(example.gguf)}


def paths_in_place_of_strings(example: Example) -> tuple[Any, dict[str, Any]]:
    return example.config_folder, {"gguf_path": example.gguf}


def gguf_folder(example: Example) -> tuple[Any, dict[str, Any]]:
    return example.config_folder, {"gguf_path": example.gguf.parent}


def folder_with_the_gguf_inside(example: Example) -> tuple[Any, dict[str, Any]]:
    return example.folder, {"kt_rules": "auto"}


def gguf_file_of_transformers(example: Example) -> tuple[Any, dict[str, Any]]:
    return example.folder, {"gguf_file": example.gguf.name, "kt_rules": "auto"}


def no_name(example: Example) -> tuple[Any, dict[str, Any]]:
    return None, {"gguf_path": example.gguf}


def gguf_in_the_models_place(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.gguf), {"kt_rules": "auto"}


def gguf_in_the_models_place_and_nothing_else(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.gguf), {}


def folder_with_nothing_but_a_gguf(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.gguf.parent), {}


def gguf_named_twice(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.gguf), {"gguf_path": str(example.gguf)}


def folder_whose_only_weights_are_a_gguf(example: Example) -> tuple[Any, dict[str, Any]]:
    return str(example.folder), {}


def folder_and_gguf_file(example: Example) -> tuple[Any, dict[str, Any]]:
    return example.folder, {"gguf_file": f"{example.folder.name}.gguf"}


FORMS = [
    folder_whose_only_weights_are_a_gguf,
    folder_and_gguf_file,
    folder_and_gguf,
    folder_and_gguf_without_rules,
    paths_in_place_of_strings,
    gguf_folder,
    folder_with_the_gguf_inside,
    gguf_file_of_transformers,
    no_name,
    gguf_in_the_models_place,
    gguf_in_the_models_place_and_nothing_else,
    folder_with_nothing_but_a_gguf,
    gguf_named_twice,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_every_form_gives_the_logits_of_the_stock_model(form: Any, kind: str, request: pytest.FixtureRequest) -> None:
    example: Example = request.getfixturevalue(kind)
    name, options = form(example)
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(name, **options), example)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_config_and_tokenizer(form: Any, v3: Example) -> None:
    name, options = form(v3)
    config = AutoConfig.from_pretrained(name, **options)
    assert isinstance(config, DeepseekV3Config)
    assert config.routed_scaling_factor == 2.5
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    assert tokenizer.decode(tokenizer("Hello, ü")["input_ids"]) == "Hello, ü"
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_the_name_may_be_a_keyword(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=v3.folder, kt_rules="auto")
    assert_equals_stock(model, v3)


def test_the_operations_compute_the_model(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    logits(model, v3.prompt)
    modules = [module for module in model.modules() if isinstance(module, fakes.FakeOperation)]
    assert {module.operation.op for module in modules} == set(fakes.MODULES) - {"experts_cpu"}  # inside moe_cpu
    assert all(module.calls == 1 for module in modules)
    assert model.config._attn_implementation == "kt"


def test_a_model_class_loads_as_an_auto_class_does(v3: Example) -> None:
    assert_equals_stock(DeepseekV3ForCausalLM.from_pretrained(v3.folder, kt_rules="auto"), v3)


def test_the_class_of_a_loaded_model_loads_again(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    assert_equals_stock(type(model).from_pretrained(v3.gguf), v3)


def test_auto_model_gives_the_hidden_states(v3: Example) -> None:
    model = AutoModel.from_pretrained(v3.folder, kt_rules="auto")
    with torch.no_grad():
        found = model(v3.prompt).last_hidden_state
        expected = v3.stock.model(v3.prompt).last_hidden_state
    assert torch.equal(found, expected)
    assert "lm_head" not in {row.module for row in model.kt_report.rows}


def test_subfolder_is_where_the_config_is(v3: Example, tmp_path: Path) -> None:
    shutil.copytree(v3.config_folder, tmp_path / "inner")
    options = {"subfolder": "inner", "gguf_path": v3.gguf}
    assert AutoConfig.from_pretrained(tmp_path, **options).routed_scaling_factor == 2.5
    assert AutoTokenizer.from_pretrained(tmp_path, **options).eos_token_id == EOS
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(tmp_path, **options), v3)


def test_a_folder_without_config_gives_the_gguf_all_the_say(v3: Example, tmp_path: Path) -> None:
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=v3.gguf), v3)


def test_a_folder_without_tokenizer_takes_the_ggufs(v3: Example, tmp_path: Path) -> None:
    shutil.copy(v3.config_folder / "config.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_path=v3.gguf, padding_side="right")
    assert tokenizer.name_or_path == str(v3.gguf)
    assert tokenizer.padding_side == "right"


def test_the_folders_tokenizer_is_preferred_to_the_ggufs(v3: Example, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(v3.config_folder, folder)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "model_max_length": 77}))
    assert AutoTokenizer.from_pretrained(folder, gguf_path=v3.gguf).model_max_length == 77


def test_a_hub_name_is_asked_for_config_only(v3: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_hub(name: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        asked[name] = options
        return json.loads((v3.folder / "config.json").read_text()), {}

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", staticmethod(from_hub))
    monkeypatch.setattr(from_pretrained, "_restore_generation_config", lambda *args: None)
    options = {"revision": "abc", "token": "secret", "cache_dir": "/nowhere"}
    model = AutoModelForCausalLM.from_pretrained("some/model", gguf_path=v3.gguf, **options)
    assert asked == {"some/model": options}
    assert model.name_or_path == model.config.name_or_path == "some/model"


def test_hub_options_reach_the_gguf_but_another_repositorys_revision_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def refuse(gguf: str, **options: Any) -> None:
        opened.append((gguf, options))
        raise errors.CheckpointNotFoundError("no hub here")

    monkeypatch.setattr(request, "open_checkpoint", refuse)
    options: dict[str, Any] = {"revision": "abc", "token": "secret", "kt_rules": "auto"}
    for name, named in [
        ("some/model", {"gguf_path": "some/gguf:Q4_K_M"}),
        ("some/gguf", {"gguf_file": "model.gguf"}),
        ("some/gguf:Q4_K_M", {}),
    ]:
        with pytest.raises(errors.CheckpointNotFoundError):
            AutoModelForCausalLM.from_pretrained(name, **named, **options)
    assert opened == [
        ("some/gguf:Q4_K_M", {"token": "secret"}),
        ("some/gguf:model.gguf", {"token": "secret", "revision": "abc"}),
        ("some/gguf:Q4_K_M", {"token": "secret", "revision": "abc"}),
    ]


def test_gguf_file_on_the_hub_is_the_source_of_config_and_tokenizer_as_for_transformers() -> None:
    found = request.read_request("some/gguf", {"gguf_file": "model.gguf", "kt_rules": "auto"})
    assert found is not None
    assert found.folder is None


def test_a_config_file_may_stand_in_the_models_place(v3: Example) -> None:
    name = v3.config_folder / "config.json"
    model = AutoModelForCausalLM.from_pretrained(name, gguf_path=v3.gguf)
    assert_equals_stock(model, v3)
    assert model.generation_config.eos_token_id == EOS
    assert AutoTokenizer.from_pretrained(name, gguf_path=v3.gguf).eos_token_id == EOS


# --- What the loaded model says of itself ---


def test_a_model_from_a_folder_has_the_folders_name_and_generation_config(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.config_folder, gguf_path=v3.gguf)
    assert model.name_or_path == model.model.name_or_path == model.config._name_or_path == str(v3.config_folder)
    assert model.generation_config.temperature == 0.6
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (EOS, PAD)


def test_a_model_from_a_gguf_alone_has_its_path_and_its_stop_tokens(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=v3.gguf)
    assert model.name_or_path == model.config._name_or_path == str(v3.gguf)
    stated = model.generation_config
    assert (stated.bos_token_id, stated.eos_token_id, stated.pad_token_id) == (BOS, EOS, PAD)


def test_a_generation_config_that_is_passed_wins(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        v3.folder, kt_rules="auto", generation_config=GenerationConfig(max_new_tokens=3)
    )
    assert model.generation_config.max_new_tokens == 3


def test_the_config_says_where_the_weights_are_and_stays_fit_for_json(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.config_folder, gguf_path=v3.gguf)
    stated = json.loads(model.config.to_json_string())["quantization_config"]
    assert stated == {"quant_method": "kt", "gguf_path": str(v3.gguf), "kt_rules": "auto"}
    assert dict(model.config.quantization_config) == stated


def test_a_saved_config_loads_with_the_gguf_and_without_it_says_what_is_missing(v3: Example, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto").config.save_pretrained(tmp_path)
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_path=v3.gguf), v3)
    with pytest.raises(errors.UnsupportedOperationError, match="gguf_path="):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.usefixtures("either_operations")
def test_the_loaded_model_is_in_eval_mode_float32_on_the_cpu(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.dtype, model.device.type, model.config.dtype) == (torch.float32, "cpu", torch.float32)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert isinstance(model, DeepseekV3ForCausalLM)


def test_output_loading_info_says_that_nothing_is_missing(v3: Example) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", output_loading_info=True)
    assert_equals_stock(model, v3)
    assert not any(info.values())


def test_a_clean_load_says_nothing(v3: Example, caplog: pytest.LogCaptureFixture) -> None:
    import warnings

    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), warnings.catch_warnings():
            warnings.simplefilter("error")
            AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
            AutoModelForCausalLM.from_pretrained(None, gguf_path=v3.gguf)
    finally:
        transformers.logging.disable_propagation()
    assert caplog.records == []


# --- Config ---


def changed_config(example: Example, folder: Path, **changes: Any) -> Path:
    shutil.copytree(example.config_folder, folder, dirs_exist_ok=True)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **changes}))
    return folder


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_the_fp8_config_of_the_original_is_dropped(v3: Example, tmp_path: Path) -> None:
    folder = changed_config(v3, tmp_path, quantization_config=FP8)
    assert not hasattr(AutoConfig.from_pretrained(folder, gguf_path=v3.gguf), "quantization_config")
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf), v3)


def test_remote_code_named_in_the_config_is_neither_run_nor_needed(v3: Example, tmp_path: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    folder = changed_config(v3, tmp_path, auto_map=auto_map)
    for trust in (None, True, False):
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf, trust_remote_code=trust)
        assert_equals_stock(model, v3)


def test_a_config_that_is_passed_is_taken_and_not_changed(v3: Example, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(changed_config(v3, tmp_path, quantization_config=FP8))
    before = config.to_dict()
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(None, config=config, gguf_path=v3.gguf), v3)
    assert config.to_dict() == before


def test_a_config_of_remote_code_becomes_transformers_own(v3: Example) -> None:
    class DeepseekV3ConfigOfTheHub(transformers.PreTrainedConfig):
        model_type = "deepseek_v3"

    foreign = DeepseekV3ConfigOfTheHub(**json.loads((v3.folder / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(v3.config_folder, config=foreign, gguf_path=v3.gguf)
    assert type(model.config) is DeepseekV3Config
    assert_equals_stock(model, v3)


def test_a_config_may_be_named_by_its_folder(v3: Example) -> None:
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(None, config=v3.config_folder, gguf_path=v3.gguf), v3)


@pytest.mark.parametrize("alone", [False, True])
def test_options_that_name_config_attributes_change_the_config(v3: Example, alone: bool) -> None:
    name = None if alone else v3.config_folder
    model = AutoModelForCausalLM.from_pretrained(name, gguf_path=v3.gguf, max_position_embeddings=50, use_cache=False)
    assert model.config.max_position_embeddings == 50
    assert model.config.use_cache is False


def test_an_option_that_nobody_knows_is_refused_by_transformers(v3: Example) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", no_such_option=1)


def test_auto_config_returns_the_options_it_did_not_use(v3: Example) -> None:
    config, unused = AutoConfig.from_pretrained(
        v3.config_folder, gguf_path=v3.gguf, return_unused_kwargs=True, num_experts_per_tok=1, foo=2
    )
    assert config.num_experts_per_tok == 1
    assert unused == {"foo": 2}


def test_a_config_that_contradicts_the_file_is_refused_with_tensor_and_both_shapes(v3: Example, tmp_path: Path) -> None:
    folder = changed_config(v3, tmp_path, moe_intermediate_size=16)
    with pytest.raises(errors.CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf)
    for part in ("blk.1.ffn_gate_exps.weight", v3.gguf.name, "(8, 32, 64)", "(8, 16, 64)"):
        assert part in str(caught.value)


def test_a_config_of_another_architecture_is_refused_with_the_accepted_ones(v3: Example, tmp_path: Path) -> None:
    folder = changed_config(v3, tmp_path, model_type="llama")
    accepted = (
        r"'llama'; deepseek_v2, deepseek_v3, .* and kimi_k25 are accepted\. The GGUF states all .*leave the folder"
    )
    with pytest.raises(errors.UnsupportedModelError, match=accepted):
        AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf)


def test_a_model_class_of_another_architecture_is_refused(v3: Example) -> None:
    with pytest.raises(errors.UnsupportedModelError, match="deepseek_v3 model, which DeepseekV2ForCausalLM does not"):
        DeepseekV2ForCausalLM.from_pretrained(v3.folder, kt_rules="auto")


def test_a_head_that_no_gguf_holds_is_refused_by_its_weight(v3: Example) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"has the weight score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(v3.folder, kt_rules="auto")


# --- Options ---


@pytest.mark.parametrize("dtype", [None, "auto", "float32", torch.float32])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_float32_is_taken_in_silence(v3: Example, dtype: Any, key: str, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", **{key: dtype})
    assert_equals_stock(model, v3)
    assert caplog.records == []


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_another_dtype_is_said_once_to_be_unused(v3: Example, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", dtype=dtype)
    assert_equals_stock(model, v3)
    (record,) = caplog.records
    assert "dtype=bfloat16 is not used" in record.getMessage()


def test_the_dtype_that_the_config_states_is_no_request(
    v3: Example, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(changed_config(v3, tmp_path, dtype="bfloat16"), gguf_path=v3.gguf)
    assert_equals_stock(model, v3)
    assert model.config.dtype == torch.float32
    assert caplog.records == []


@pytest.mark.parametrize(
    "option",
    [
        {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)},
        {"quantization_config": quantizer.KtConfig()},
        {"state_dict": {}},
        {"tp_plan": "auto"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_option_that_makes_no_sense_with_a_gguf_is_refused(v3: Example, option: dict[str, Any]) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match=f"{next(iter(option))}= cannot be combined"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", **option)


def options_with_defaults() -> dict[str, Any]:
    """Every option of from_pretrained in transformers, declared or popped, with its default."""
    found: dict[str, Any] = {}
    for function in (PreTrainedModel.from_pretrained, transformers.models.auto.auto_factory._BaseAutoModelClass):
        function = getattr(function, "from_pretrained", function)
        stock = inspect.unwrap(function.__func__)
        for parameter in inspect.signature(stock).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                found[parameter.name] = parameter.default
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(stock)))):
            is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if not is_method or node.func.attr not in ("pop", "get") or len(node.args) != 2:
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "kwargs":
                name, default = node.args
                if isinstance(name, ast.Constant):
                    found.setdefault(name.value, ast.literal_eval(default))
        documented = re.findall(
            r"^ +([a-z_]+) \(`[^)]*?\*optional\*(?:, defaults to `([^`]*)`)?", stock.__doc__ or "", re.M
        )
        for name, default in documented:
            found.setdefault(name, ast.literal_eval(default) if default else None)
    return found


DEFAULTS = {
    **options_with_defaults(),
    # Of wrappers and of earlier releases.
    **dict.fromkeys(("low_cpu_mem_usage", "offload_state_dict", "from_tf", "from_flax", "mirror", "_fast_init")),
    **dict.fromkeys(
        ("attn_implementation", "experts_implementation", "dtype", "torch_dtype", "gguf_file", "code_revision")
    ),
    **dict.fromkeys(request.KT_OPTIONS),
}


def test_the_defaults_are_read_from_transformers() -> None:
    expected = {"quantization_config", "state_dict", "device_map", "token", "revision", "weights_only", "tp_plan"}
    assert set(DEFAULTS) >= expected
    assert len(DEFAULTS) > 35


@pytest.mark.parametrize("option", DEFAULTS)
def test_an_option_with_its_default_changes_nothing(v3: Example, option: str) -> None:
    for given in ({option: DEFAULTS[option]}, {option: None}):
        for name, options in (folder_and_gguf(v3), no_name(v3)):
            if option in options or (option in ("weights_only", "revision", "adapter_name") and given[option] is None):
                continue
            assert_equals_stock(AutoModelForCausalLM.from_pretrained(name, **options, **given), v3)


def test_all_defaults_at_once_change_nothing(v3: Example) -> None:
    name, options = folder_and_gguf(v3)
    model, _info = DeepseekV3ForCausalLM.from_pretrained(name, **{**DEFAULTS, **options, "output_loading_info": True})
    assert_equals_stock(model, v3)


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoTokenizer.from_pretrained])
@pytest.mark.parametrize("alone", [False, True])
def test_options_of_configs_and_tokenizers_with_their_defaults_change_nothing(
    v3: Example, load: Any, alone: bool
) -> None:
    name, options = no_name(v3) if alone else folder_and_gguf(v3)
    hub = {"cache_dir": None, "force_download": False, "local_files_only": False, "token": None, "revision": "main"}
    others = {"proxies": None, "subfolder": "", "trust_remote_code": None, "_from_auto": True}
    only = {"use_fast": True, "tokenizer_type": None, "config": None} if load == AutoTokenizer.from_pretrained else {}
    found = load(name, **options, **hub, **others, **only)
    assert found.to_dict() == load(name, **options).to_dict() if not only else len(found) == len(load(name, **options))


def test_an_adapter_in_the_models_folder_is_refused_with_what_to_do(v3: Example, tmp_path: Path) -> None:
    """Stock transformers applies it; the model without it is another one."""
    folder = shutil.copytree(v3.config_folder, tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(errors.UnsupportedOperationError, match=r"adapter_config\.json.*load_adapter"):
        AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf)


def test_a_default_device_of_torch_does_not_move_the_model() -> None:
    kt_quantizer = quantizer.KtHfQuantizer(quantizer.KtConfig())
    assert kt_quantizer.update_device_map({"": torch.device("cuda:0")}) == {"": torch.device("cpu")}


def test_a_default_dtype_of_torch_does_not_matter(v3: Example) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equals_stock(model, v3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_transformers_can_be_had_with_our_linears_inside(v3: Example, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto", attn_implementation=attention)
    assert model.config._attn_implementation == attention
    found = {row.module: row.operation for row in model.kt_report.rows}
    assert found["model.layers.0.self_attn.q_a_proj"] == "linear_cpu"
    assert not any(row.operation == "attention_cpu" for row in model.kt_report.rows)
    torch.testing.assert_close(logits(model, v3.prompt), logits(v3.stock, v3.prompt), rtol=1e-5, atol=1e-5)


def test_a_config_that_asks_for_eager_attention_is_heard(v3: Example) -> None:
    config = AutoConfig.from_pretrained(v3.folder, kt_rules="auto", attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(v3.folder, config=config, kt_rules="auto")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("attention", [None, "kt"])
def test_the_config_of_a_loaded_model_asks_for_nothing(v3: Example, attention: str | None) -> None:
    first = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    for config in (first.config, v3.stock.config):  # these say "kt" and "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            v3.folder, config=config, kt_rules="auto", attn_implementation=attention
        )
        assert model.config._attn_implementation == "kt"
        assert "attention_cpu" in {row.operation for row in model.kt_report.rows}


def test_rules_for_our_attention_contradict_a_request_for_another(v3: Example) -> None:
    kt_rules = [{"match": {"name": "self_attn$"}, "replace": {"op": "attention_cpu"}}]
    with pytest.raises(errors.RuleError, match="attn_implementation='eager'"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=kt_rules, attn_implementation="eager")


# --- Rules ---


def test_a_list_of_rules_decides_what_is_replaced(v3: Example) -> None:
    kt_rules = [
        {"match": {"name": r"mlp\.experts$"}, "replace": {"op": "experts_cpu"}},
        {"match": {"class": "torch.nn.Linear"}, "replace": {"op": "linear_cpu"}},
    ]
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=kt_rules)
    found = {row.module: row.operation for row in model.kt_report.rows}
    assert found["model.layers.1.mlp.experts"] == "experts_cpu"
    assert found["model.layers.1.mlp.gate"] == "torch"
    assert found["lm_head"] == "linear_cpu"
    assert model.config._attn_implementation == "sdpa"
    assert_equals_stock(model, v3)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_rules_that_keep_everything_give_the_stock_model(kind: str, request: pytest.FixtureRequest) -> None:
    example: Example = request.getfixturevalue(kind)
    model = AutoModelForCausalLM.from_pretrained(
        example.folder, kt_rules=[{"match": {"name": ""}, "replace": {"op": "torch"}}]
    )
    assert_equals_stock(model, example)
    stock = example.stock.state_dict()
    assert model.state_dict().keys() == stock.keys()
    assert all(torch.equal(values, stock[name]) for name, values in model.state_dict().items())


def keep_attention_of_layer_1(then: str) -> list[dict[str, Any]]:
    return [
        {"match": {"name": r"layers\.1\.self_attn$"}, "replace": {"op": "torch"}, "recursive": False},
        {"match": {"name": then}, "replace": {"op": "auto"}},
    ]


def test_beside_stock_attention_masks_and_rotary_embeddings_stay_stock(v3: Example) -> None:
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=keep_attention_of_layer_1(then=""))
    found = {row.module: row.operation for row in model.kt_report.rows}
    assert found["model.layers.0.self_attn"] == "attention_cpu"
    assert found["model.layers.1.self_attn.o_proj"] == "torch"
    assert found["model.rotary_emb"] == "torch"
    assert model.config._attn_implementation == "sdpa"
    assert_equals_stock(model, v3)


def test_rotary_embeddings_of_ours_are_refused_beside_stock_attention(v3: Example) -> None:
    rotary = {"match": {"name": "rotary"}, "replace": {"op": "rotary_cpu"}}
    with pytest.raises(errors.RuleError, match="keep the rotary embedding"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=[rotary, *keep_attention_of_layer_1(then="")])


def test_rules_come_from_a_file(v3: Example, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- {match: {class: torch.nn.Linear}, replace: {op: linear_cpu}}")
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules=str(path))
    assert model.kt_report.rules == str(path)
    assert_equals_stock(model, v3)


def test_an_unknown_rule_name_is_refused_before_the_gguf_is_opened(
    v3: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "open_checkpoint", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(errors.RuleError, match="no rules named 'atuo'"):
        AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="atuo")


# --- What is not there ---


def test_rules_without_weights_are_refused_with_how_to_name_them() -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=r"there is no GGUF: some/model"):
        AutoModelForCausalLM.from_pretrained("some/model", kt_rules="auto")


def test_a_gguf_path_that_is_not_there_is_refused_by_path(v3: Example, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=r"missing\.gguf"):
        AutoModelForCausalLM.from_pretrained(v3.config_folder, gguf_path=tmp_path / "missing.gguf")


def test_a_folder_without_gguf_is_refused_by_path(v3: Example) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match=str(v3.config_folder)):
        AutoModelForCausalLM.from_pretrained(v3.config_folder, kt_rules="auto")


def test_two_different_ggufs_are_refused(v3: Example, v2: Example) -> None:
    with pytest.raises(errors.CheckpointError, match="two GGUF files are named"):
        AutoModelForCausalLM.from_pretrained(v3.gguf, gguf_path=v2.gguf)


# --- Other classes of transformers that take a folder ---


def test_a_generation_config_of_a_gguf_takes_options_as_one_of_a_folder_does(v3: Example, tmp_path: Path) -> None:
    GenerationConfig.from_pretrained(v3.gguf).save_pretrained(tmp_path)
    for options in ({"max_new_tokens": 7}, {"max_new_tokens": 7, "foo": 1, "return_unused_kwargs": True}):
        found, expected = (
            GenerationConfig.from_pretrained(pretrained_model_name=name, **options) for name in (v3.gguf, tmp_path)
        )
        assert found == expected
    assert (found[0].max_new_tokens, found[0].eos_token_id) == (7, EOS)


@pytest.mark.parametrize("with_config", [True, False])
def test_the_folders_own_generation_config_is_preferred(v3: Example, tmp_path: Path, with_config: bool) -> None:
    folder = shutil.copytree(v3.folder, tmp_path / "model")
    if not with_config:
        (folder / "config.json").unlink()
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6
    assert AutoProcessor.from_pretrained(folder).eos_token_id == EOS


def test_a_folder_with_weights_of_its_own_is_left_to_transformers(v3: Example, tmp_path: Path) -> None:
    v3.stock.save_pretrained(tmp_path)
    shutil.copy(v3.gguf, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is DeepseekV3ForCausalLM
    assert_equals_stock(model, v3)


@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', '{"model_type": ["deepseek_v3"]}', "[1]", "{", "\udcff"]
)
def test_a_folder_of_a_model_that_we_do_not_know_is_left_to_transformers(
    v3: Example, tmp_path: Path, content: str
) -> None:
    shutil.copy(v3.gguf, tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert request.read_request(tmp_path, {}) is None
    # gguf_file= makes the file the source of the config, as it does for transformers.
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=v3.gguf.name).model_type == "deepseek_v3"


def test_a_class_that_the_gguf_does_not_make_is_refused_with_the_auto_class(v3: Example) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"DeepseekV3Config, which is no LlamaConfig; load AutoConf"):
        transformers.LlamaConfig.from_pretrained(v3.gguf)
    with pytest.raises(errors.UnsupportedModelError, match=r"which is no \w+; load AutoTokenizer"):
        transformers.LlamaTokenizerFast.from_pretrained(v3.gguf)


# --- pipeline ---


def generated(generator: Any, prompt: str) -> str:
    return generator(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]


def test_pipeline_takes_gguf_path_and_rules_as_model_kwargs(v3: Example) -> None:
    model_kwargs = {"gguf_path": str(v3.gguf), "kt_rules": "auto"}
    generator = pipeline("text-generation", model=str(v3.config_folder), model_kwargs=model_kwargs)
    assert isinstance(generator.model, loaded_model.KtModelMixin)
    assert generated(generator, "Hello,").startswith("Hello,")


def test_pipeline_takes_a_gguf_in_the_models_place(v3: Example) -> None:
    by_file = pipeline("text-generation", model=str(v3.gguf))
    by_folder = pipeline("text-generation", model=str(v3.folder), model_kwargs={"kt_rules": "auto"}, device="cpu")
    assert generated(by_file, "Hello,") == generated(by_folder, "Hello,")


def test_pipeline_takes_a_gguf_where_peft_is_installed(v3: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.pipelines.is_peft_available", lambda: True)
    by_file = pipeline("text-generation", model=str(v3.gguf))
    assert by_file.model.kt_report.nbytes


@pytest.mark.parametrize(
    "form",
    [
        gguf_in_the_models_place_and_nothing_else,
        folder_with_nothing_but_a_gguf,
        folder_whose_only_weights_are_a_gguf,
    ],
)
def test_pipeline_needs_no_task_for_a_gguf(form: Any, v3: Example) -> None:
    name, _options = form(v3)
    generator = pipeline(model=str(name))
    assert generator.task == "text-generation"
    assert generated(generator, "Hello,").startswith("Hello,")


def test_pipeline_leaves_the_model_on_the_cpu_of_a_machine_with_an_accelerator(
    v3: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    model = AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto")
    assert model.hf_device_map == {"": "cpu"}
    monkeypatch.setattr("transformers.pipelines.base.is_torch_cuda_available", lambda: True)
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(v3.folder))
    assert generator.device.type == "cpu"


# --- Pass-through and installation ---


def entries() -> dict[str, Any]:
    return {
        "model": PreTrainedModel,
        "auto": AutoModelForCausalLM,
        "config": AutoConfig,
        "tokenizer": AutoTokenizer,
        "processor": AutoProcessor,
        "config class": transformers.PreTrainedConfig,
        "generation config": GenerationConfig,
    }


@pytest.mark.parametrize("entry", entries())
def test_calls_without_our_arguments_reach_transformers_untouched(
    entry: str, v3: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = entries()[entry]
    seen = []

    def stock(cls: type, *args: Any, **options: Any) -> str:
        seen.append((cls, args, options))
        return "stock"

    monkeypatch.setattr(owner, "from_pretrained", classmethod(stock))
    monkeypatch.setattr(from_pretrained, "load_config", lambda *args: pytest.fail("ours"))
    hooks.wrap(owner, "load_config")
    token, config = object(), object()
    for name in (str(v3.config_folder), "some/model", "some/model-GGUF", Path("nowhere")):
        assert owner.from_pretrained(name, 1, config=config, gguf_file="x.gguf", token=token) == "stock"
        assert seen.pop() == (owner, (name, 1), {"config": config, "gguf_file": "x.gguf", "token": token})
        assert owner.from_pretrained(pretrained_model_name_or_path=name) == "stock"
        assert seen.pop() == (owner, (), {"pretrained_model_name_or_path": name})


def test_a_stock_checkpoint_loads_and_saves_as_ever(v3: Example, tmp_path: Path) -> None:
    v3.stock.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is DeepseekV3ForCausalLM
    assert_equals_stock(model, v3)
    model.train()
    model.save_pretrained(tmp_path / "again")


def test_installing_twice_changes_nothing() -> None:
    def wrapped() -> list[Any]:
        return [owner.__dict__["from_pretrained"] for owner in entries().values()]

    before, finders = wrapped(), list(sys.meta_path)
    hooks.install()
    quantizer.install()
    assert sys.meta_path == finders
    assert wrapped() == before


def test_reloading_the_module_registers_no_second_time_and_goes_on_working(v3: Example) -> None:
    before = AutoModelForCausalLM.__dict__["from_pretrained"]
    reloaded = importlib.reload(quantizer)
    importlib.reload(from_pretrained)._modules = lambda: fakes.MODULES
    reloaded.install()
    assert AutoModelForCausalLM.__dict__["from_pretrained"] is before
    assert reloaded.AUTO_QUANTIZER_MAPPING["kt"] is reloaded.KtHfQuantizer
    assert_equals_stock(AutoModelForCausalLM.from_pretrained(v3.folder, kt_rules="auto"), v3)


def test_a_foreign_quantizer_of_our_name_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantizer.AUTO_QUANTIZER_MAPPING, "kt", fakes.FakeLinear)
    with pytest.raises(ValueError, match="already registered"):
        quantizer.install()


def test_every_auto_class_for_models_is_wrapped() -> None:
    names = [name for name in dir(transformers) if name.startswith("AutoModel")]
    assert len(names) > 20
    for name in names:
        assert hasattr(getattr(transformers, name).from_pretrained.__func__, hooks.WRAPPED), name


def test_the_wrapper_keeps_signature_and_documentation() -> None:
    assert list(inspect.signature(PreTrainedModel.from_pretrained).parameters)[:3] == [
        "pretrained_model_name_or_path",
        "model_args",
        "config",
    ]
    assert "Instantiate" in (AutoModel.from_pretrained.__doc__ or "")


def test_the_file_has_more_rows_than_the_tokenizer_has_tokens(v3: Example) -> None:
    assert v3.stock.config.vocab_size == VOCAB > len(AutoTokenizer.from_pretrained(v3.config_folder))


def test_without_a_generation_config_the_stop_tokens_are_those_of_the_config(v3: Example, tmp_path: Path) -> None:
    folder = changed_config(v3, tmp_path)
    (folder / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_path=v3.gguf)
    assert model.generation_config.eos_token_id == EOS
    assert model.generation_config.temperature is None
