"""KTransformers' YAML files, and the bundled rules, on skeletons of the real models: what each plan gives to whom."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_files import random_tokens
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Model

from transformers_kt.errors import RuleError
from transformers_kt.families.tree import tree_of
from transformers_kt.planning.operations import replaced_classes
from transformers_kt.rules import Plan, load_rules, make_plan

FILES = Path(__file__).parent / "ktransformers"
# File -> the model it is written for, a random model of the same classes.
MODELS = {
    "v2-lite-one-gpu": ("v2-lite", "v2-lite-BF16"),
    "v2-lite-gpu-and-cpu": ("v2-lite", "v2-lite-BF16"),
    "v2-four-gpus": ("v2", "v2-mixed"),
    "v3-one-gpu": ("v3", "v3-like-Q4_K_M"),
    "v3-two-gpus": ("v3", "v3-like-Q4_K_M"),
}
SHIPPED = {"deepseek-v2-lite": "v2-lite", "deepseek-v2": "v2", "deepseek-v3": "v3"}


@functools.cache
def skeleton(name: str) -> Any:
    """The real model without weights: 27, 60 and 61 layers."""
    with torch.device("meta"):
        if name == "v3":
            return DeepseekV3ForCausalLM(DeepseekV3Config())
        if name == "v2":
            return DeepseekV2ForCausalLM(DeepseekV2Config(num_hidden_layers=60, first_k_dense_replace=1))
        config = DeepseekV2Config(num_hidden_layers=27, first_k_dense_replace=1, q_lora_rank=None)
        return DeepseekV2ForCausalLM(config)


def plan_of(kt_rules: Any, model: str, **options: Any) -> Plan:
    return make_plan(tree_of(skeleton(model)), load_rules(kt_rules, replaced_classes()), replaced_classes(), **options)


def path_of(name: str) -> Path:
    return FILES / f"{name}.yaml"


def places(plan: Plan) -> dict[str, str]:
    """Module -> "operation device"."""
    return {entry.module: f"{entry.op} {entry.device}" for entry in plan.entries}


def computes(plan: Plan) -> list[tuple[str, str, str]]:
    return [(entry.module, entry.op, entry.device) for entry in plan.entries]


def in_layers(found: dict[str, str], module: str, place: str) -> list[int]:
    """The layers in which ``module`` is at ``place``."""
    return [layer for layer in range(61) if found.get(f"model.layers.{layer}.{module}") == place]


def their_rule(replace: Any, **match: str) -> dict[str, Any]:
    return {"match": match or {"name": "^lm_head$"}, "replace": replace}


def linear(**kwargs: Any) -> dict[str, Any]:
    return {"class": "ktransformers.operators.linear.KTransformersLinear", "kwargs": kwargs}


def experts(**kwargs: Any) -> dict[str, Any]:
    return their_rule(
        {"class": "ktransformers.operators.experts.KTransformersExperts", "kwargs": kwargs}, name=r"\.mlp\.experts$"
    )


def refusal(*rules: Any, model: str = "v3") -> str:
    with pytest.raises(RuleError) as caught:
        plan_of(list(rules), model)
    return str(caught.value)


# --- Files ---


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_theirs_mapped_to_the_cpu_is_the_auto_plan(name: str) -> None:
    model, _ = MODELS[name]
    assert computes(plan_of(path_of(name), model, device_map={"": "cpu"})) == computes(plan_of("auto", model))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_theirs_on_the_cpu_gives_the_logits_of_auto(
    kt_model: Callable[[str], Any], gguf_file: Callable[[str], Path], name: str
) -> None:
    _, small = MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(
        None, gguf_path=gguf_file(small), kt_rules=path_of(name), device_map="cpu"
    )
    with torch.no_grad():
        ids = random_tokens(40)
        assert torch.equal(model(ids).logits, kt_model(small)(ids).logits)


def test_a_linear_layer_that_is_to_be_torchs_is_dequantized_on_a_gpu_where_it_stands_alone() -> None:
    def asked(op: str, device: str) -> dict[str, Any]:
        return their_rule(linear(generate_device=device, generate_op=op), name=r"lm_head$|_proj$")

    found = places(plan_of([asked("KLinearTorch", "cuda:1")], "v3"))
    assert found["lm_head"] == "torch cuda:1"
    assert places(plan_of([asked("KLinearMarlin", "cuda:1")], "v3"))["lm_head"] == "linear_gpu cuda:1"
    assert places(plan_of([asked("KLinearTorch", "cpu")], "v3"))["lm_head"] == "linear_cpu cpu"
    whole = places(plan_of([asked("KLinearTorch", "cuda:0")], "v3"))
    assert whole["model.layers.5.self_attn"] == "attention_gpu cuda:0"


def test_one_gpu_has_all_of_v3_but_experts_and_embedding() -> None:
    found = plan_of(path_of("v3-one-gpu"), "v3")
    assert Counter(f"{entry.op} {entry.device}" for entry in found.entries) == {
        "attention_gpu cuda:0": 61,
        "mlp_gpu cuda:0": 3 + 58,
        "norm_gpu cuda:0": 61 + 61 + 1,
        "experts_cpu cpu": 58,
        "torch cuda:0": 58,  # routers
        "embedding_cpu cpu": 1,
        "rotary_gpu cuda:0": 1,
        "linear_gpu cuda:0": 1,
    }


def test_two_gpus_share_v3_as_the_file_says() -> None:
    found = places(plan_of(path_of("v3-two-gpus"), "v3"))
    first, second = list(range(30)), list(range(30, 61))
    assert in_layers(found, "self_attn", "attention_gpu cuda:0") == first
    assert in_layers(found, "self_attn", "attention_gpu cuda:1") == second
    assert in_layers(found, "input_layernorm", "norm_gpu cuda:1") == second
    assert in_layers(found, "mlp", "mlp_gpu cuda:0") == [0, 1, 2]
    assert in_layers(found, "mlp", "moe_gpu cuda:0") == [4, 5, 6, 7, 8]  # whole layers: their experts are there too
    assert in_layers(found, "mlp", "moe_gpu cuda:1") == [30]
    assert in_layers(found, "mlp.experts", "experts_cpu cpu") == [3, *range(9, 30), *range(31, 61)]
    assert in_layers(found, "mlp.shared_experts", "mlp_gpu cuda:1") == list(range(31, 61))
    assert found["model.embed_tokens"] == "embedding_cpu cpu"
    assert found["model.rotary_emb"] == "rotary_gpu cuda:0"  # no rule speaks of it
    assert found["model.norm"] == "norm_gpu cuda:1"
    assert found["lm_head"] == "linear_gpu cuda:1"


def test_four_gpus_share_v2_as_the_file_says() -> None:
    found = places(plan_of(path_of("v2-four-gpus"), "v2"))
    for gpu, layers in enumerate([range(10), range(10, 20), range(20, 30), range(30, 60)]):
        assert in_layers(found, "self_attn", f"attention_gpu cuda:{gpu}") == list(layers)
        assert in_layers(found, "mlp.shared_experts", f"mlp_gpu cuda:{gpu}") == [layer for layer in layers if layer]
    assert in_layers(found, "mlp.experts", "experts_cpu cpu") == list(range(1, 60))
    assert found["lm_head"] == "linear_gpu cuda:3"


def test_layers_of_v2_lite_that_lie_on_the_cpu_whole_are_computed_as_by_auto() -> None:
    found = places(plan_of(path_of("v2-lite-gpu-and-cpu"), "v2-lite"))
    auto = places(plan_of("auto", "v2-lite"))
    in_file = {module: place for module, place in found.items() if module.startswith("model.layers.2")}
    assert {module: auto[module] for module in in_file if ".2." not in module} == {
        module: place for module, place in in_file.items() if ".2." not in module
    }
    assert in_layers(found, "mlp", "moe_cpu cpu") == list(range(10, 27))
    assert in_layers(found, "mlp.experts", "experts_cpu cpu") == list(range(1, 10))


def test_one_gpu_for_v2_lite_with_the_head_on_the_cpu() -> None:
    found = places(plan_of(path_of("v2-lite-one-gpu"), "v2-lite"))
    assert found["lm_head"] == "linear_cpu cpu"
    assert in_layers(found, "self_attn", "attention_gpu cuda:0") == list(range(27))
    assert in_layers(found, "mlp.experts", "experts_cpu cpu") == list(range(1, 27))
    assert found["model.rotary_emb"] == "rotary_gpu cuda:0"  # a rule by class alone finds it


def test_what_has_no_meaning_here_is_said_once() -> None:
    plan = plan_of(path_of("v3-two-gpus"), "v3")
    said = [note.partition(": ")[2] for note in plan.notes]
    assert len(said) == len(set(said))
    path = path_of("v3-two-gpus")
    rotary = "nothing to do: transformers has one rotary embedding per model, not one in every attention"
    assert f"{path}, rules 14, 15: {rotary}" in plan.notes
    for part in ("generate_op KLinearMarlin", "generate_op KExpertsMarlin", "backend AMXInt8", "prefill_device"):
        assert sum(note.startswith(part) for note in said) == 1
    by_module = {entry.module: entry.notes for entry in plan.entries}
    assert any("AMXInt8" in note for note in by_module["model.layers.3.mlp.experts"])
    assert by_module["model.norm"] == ()


def test_a_plan_for_v3_is_made_in_half_a_second() -> None:
    tree, rules = tree_of(skeleton("v3")), load_rules(path_of("v2-four-gpus"), replaced_classes())
    started = time.process_time()
    make_plan(tree, rules, replaced_classes())  # 26 rules, most of which match nothing: the slowest case
    assert time.process_time() - started < 0.5


# --- The language ---


def test_what_no_rule_matches_is_on_the_first_gpu() -> None:
    found = places(plan_of([their_rule(linear(generate_device="cuda:1"))], "v3"))
    assert found["lm_head"] == "linear_gpu cuda:1"
    assert found["model.layers.5.mlp"] == "moe_gpu cuda:0"


def test_a_rule_speaks_of_what_it_matches_and_not_of_the_inside() -> None:
    found = places(plan_of([their_rule({"kwargs": {"generate_device": "cpu"}}, name=r"layers\.5$")], "v3"))
    assert found["model.layers.5.self_attn"] == "attention_gpu cuda:0"


def test_recursive_false_keeps_the_inside_with_the_module() -> None:
    rule = {
        **their_rule({"class": "default", "kwargs": {"generate_device": "cpu"}}, name=r"layers\.5$"),
        "recursive": False,
    }
    found = places(plan_of([rule, their_rule(linear(generate_device="cuda:1"), name=r"\.5\.|lm_head")], "v3"))
    assert found["model.layers.5.self_attn"] == "attention_cpu cpu"
    assert found["lm_head"] == "linear_gpu cuda:1"


@pytest.mark.parametrize(
    "replace", [{"class": "default"}, {"kwargs": {}}, {"class": "default", "kwargs": None}, linear()]
)
def test_a_rule_without_a_device_means_the_first_gpu(replace: Any) -> None:
    plan = plan_of([their_rule(replace)], "v3", device_map={"model": "cpu"})
    assert places(plan)["lm_head"] == "linear_gpu cuda:0"
    assert plan.entries[-1].rule == 1


def test_experts_without_a_device_are_on_the_cpu() -> None:
    assert places(plan_of([experts()], "v3"))["model.layers.5.mlp.experts"] == "experts_cpu cpu"


def test_names_of_their_first_version_mean_what_later_ones_do() -> None:
    operators = "ktransformers.operators."
    former = [
        their_rule(
            {"class": f"{operators}linear.KTransformerLinear", "kwargs": {"generate_op": "QuantizedLinearMarlin"}}
        ),
        their_rule(
            {
                "class": f"{operators}experts.KTransformersMLPExpert",
                "device": "cpu",
                "kwargs": {"generate_device": "cuda:1", "generate_mlp_type": "MLPExpertsTorch"},
            },
            name=r"\.mlp\.experts$",
        ),
        their_rule({"class": f"{operators}experts.DeepseekV2MoEInjected"}, name=r"\.[1-9]\d?\.mlp$"),
        their_rule({"class": f"{operators}attention.DeepseekV2AttentionInjected"}, name=r"\.self_attn$"),
        their_rule({"class": f"{operators}layer_wise_prefill.DeepseekV2ModelPerLayerPrefill"}, name="^model$"),
    ]
    found = places(plan_of(former, "v2"))
    assert in_layers(found, "mlp.experts", "experts_gpu cuda:1") == list(range(1, 60))
    assert in_layers(found, "self_attn", "attention_gpu cuda:0") == list(range(60))
    assert found["lm_head"] == "linear_gpu cuda:0"


@pytest.mark.parametrize("none", [None, "None"])
def test_without_a_generate_op_a_module_is_where_it_prefills(none: Any) -> None:
    rule = experts(generate_op=none, prefill_op="KExpertsTorch", prefill_device="cuda:1", generate_device="cpu")
    plan = plan_of([rule], "v3")
    assert places(plan)["model.layers.5.mlp.experts"] == "experts_gpu cuda:1"
    assert any("generate_op None" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", "cuda:0"), ("cuda:7", "cuda:7"), ("xpu", "xpu:0"), ("cpu", "cpu"), (2, "cuda:2")]
)
def test_devices_are_read_as_torch_reads_them(device: Any, expected: str) -> None:
    assert places(plan_of([their_rule(linear(generate_device=device))], "v3"))["lm_head"].endswith(f" {expected}")


def test_the_first_rule_that_matches_decides_and_a_later_one_is_a_note() -> None:
    plan = plan_of([their_rule(linear(generate_device="cpu")), their_rule(linear(generate_device="cuda"))], "v3")
    assert places(plan)["lm_head"] == "linear_cpu cpu"
    assert plan.notes == (
        "kt_rules, rule 2: nothing to do: what it matches first, lm_head, is taken by rule 1 before it",
    )


def test_a_rule_for_another_model_is_a_note() -> None:
    plan = plan_of(
        [their_rule({"class": "default"}, **{"class": "ktransformers.models.modeling_deepseek.MoEGate"})], "v3"
    )
    (note,) = plan.notes
    assert "nothing to do: no module matches class" in note


def test_a_class_that_is_nearly_one_of_the_model_is_named() -> None:
    stock = "transformers.models.deepseek_v3.modeling_deepseek_v3"
    message = refusal({"match": {"class": f"{stock}.DeepseekV3Moe"}, "replace": {"device": "cpu"}})
    assert f"(did you mean '{stock}.DeepseekV3MoE'?)" in message


def test_loading_says_once_what_rules_asked_for_and_did_not_get(
    gguf_file: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        None, gguf_path=gguf_file("v3-like-Q4_K_M"), kt_rules=path_of("v3-one-gpu"), device_map="cpu"
    )
    said = [record.getMessage() for record in caplog.records if record.name.startswith("transformers_kt")]
    assert [line for message in said for line in message.splitlines()[1:]] == list(model.kt_report.notes) != []


def test_rules_of_both_forms_keep_to_their_own() -> None:
    theirs, ours = their_rule(linear(generate_device="cuda:1")), {"match": {"layers": 7}, "replace": {"device": "cpu"}}
    found = places(plan_of([theirs, ours], "v3"))
    assert found["lm_head"] == "linear_gpu cuda:1"
    assert found["model.layers.7.mlp"] == "moe_cpu cpu"
    assert found["model.layers.8.mlp"] == "moe_gpu cuda:0"
    idle = {"match": {"layers": 99}, "replace": {"device": "cpu"}}
    assert "rule 2 decides nothing" in refusal(theirs, idle)


def test_a_model_without_head_has_the_names_of_one_with_it() -> None:
    with torch.device("meta"):
        model = DeepseekV3Model(DeepseekV3Config(num_hidden_layers=5))
    plan = make_plan(tree_of(model), load_rules(path_of("v3-two-gpus"), replaced_classes()), replaced_classes())
    assert places(plan)["layers.4.mlp"] == "moe_gpu cuda:0"
    assert places(plan)["embed_tokens"] == "embedding_cpu cpu"


def test_attention_that_the_call_keeps_stock_falls_into_its_parts() -> None:
    plan = plan_of(path_of("v3-one-gpu"), "v3", device_map={"": "cpu"}, not_by_itself=["attention", "rotary"])
    found = places(plan)
    assert found["model.layers.5.self_attn.o_proj"] == "linear_cpu cpu"
    assert found["model.rotary_emb"] == "torch cpu"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (their_rule({"clas": "default"}), "'clas' (did you mean 'class'?)"),
        (their_rule(linear(generate_devise="cuda")), "'generate_devise' (did you mean 'generate_device'?)"),
        (their_rule(linear(per_layer_prefill_input_threshold=0)), "did you mean 'per_layer_prefill_intput_threshold'?"),
        (their_rule({"class": "ktransformers.operators.linear.KTransfomersLinear"}), "linear.KTransformersLinear'?"),
        (their_rule({"class": "os.system"}), "unknown class 'os.system'"),
        (their_rule({"class": ["default"]}), "unknown class ['default']"),
        (their_rule({"class": "default", "device": "cpu"}), "in theirs, devices stand in kwargs"),
        (their_rule({"class": "default", "kwargs": "cpu"}), "kwargs is 'cpu'"),
        (
            their_rule({"class": "default"}, **{"class": "ktransformers.models.modeling_deepseek_v3.MoeGate"}),
            "MoEGate'?",
        ),
        (their_rule(linear(generate_device="cuda:a")), "generate_device is 'cuda:a'"),
        (their_rule(linear(generate_device="cdua")), "(did you mean 'cuda'?)"),
        (their_rule(linear(generate_device=None)), "generate_device is None"),
        (their_rule(linear(generate_op="KLinearMarlim")), "(did you mean 'KLinearMarlin'?)"),
        (their_rule(linear(generate_op="KExpertsCPU")), "known are KLinearMarlin, VLinearMarlin"),
        (their_rule(linear(prefill_op=3)), "prefill_op is 3"),
        (experts(backend="AMXInt9"), "(did you mean 'AMXInt8'?)"),
        (experts(n_deferred_experts=[1, "x"]), "n_deferred_experts is 'x'"),
        (their_rule(linear(absorb_for_prefill="no")), "absorb_for_prefill is 'no'"),
        (their_rule(linear(per_layer_prefill_intput_threshold=-1)), "per_layer_prefill_intput_threshold is -1"),
        (their_rule(linear(transfer_map=30)), "transfer_map is 30"),
        (their_rule(linear(transfer_map={"x": "cuda"})), "the layer is 'x'"),
        (their_rule(linear(transfer_map={30: "cud:1"})), "the device of layer 30 is 'cud:1'"),
        (their_rule(linear(), name=r"\.self_attn$"), "linear cannot stand for model.layers.0.self_attn"),
        (their_rule({"class": "ktransformers.operators.gate.KMoEGate"}), "router cannot stand for lm_head"),
    ],
)
def test_what_is_not_of_their_language_is_refused(rule: Any, said: str) -> None:
    message = refusal(their_rule({"class": "default"}, name="norm"), rule)
    assert "kt_rules, rule 2" in message
    assert said in message


# --- The bundled rules ---


@pytest.mark.parametrize(("name", "model"), SHIPPED.items())
def test_bundled_rules_put_all_but_experts_and_embedding_on_one_gpu(name: str, model: str) -> None:
    plan = plan_of(name, model)
    on_cpu = [entry for entry in plan.entries if entry.device == "cpu"]
    assert {entry.op for entry in on_cpu} == {"embedding_cpu", "experts_cpu"}
    sparse = len(skeleton(model).model.layers) - skeleton(model).config.first_k_dense_replace
    assert len(on_cpu) == 1 + sparse
    assert {entry.device for entry in plan.entries} == {"cpu", "cuda:0"}
    assert in_layers(places(plan), "self_attn", "attention_gpu cuda:0") == list(
        range(len(skeleton(model).model.layers))
    )


@pytest.mark.parametrize(("name", "model"), [*SHIPPED.items(), ("cpu", "v3")])
def test_bundled_rules_without_gpu_are_the_auto_plan(name: str, model: str) -> None:
    query = "" if name == "cpu" else "?gpus=0"
    assert computes(plan_of(f"{name}{query}", model)) == computes(plan_of("auto", model))
    assert computes(plan_of(name, model, device_map={"": "cpu"})) == computes(plan_of("auto", model))


@pytest.mark.parametrize(("name", "model"), SHIPPED.items())
def test_bundled_rules_split_the_layers_over_gpus(name: str, model: str) -> None:
    found = places(plan_of(f"{name}?gpus=4", model))
    last = len(skeleton(model).model.layers) - 1
    gpus = [
        next(gpu for gpu in range(4) if found[f"model.layers.{layer}.self_attn"].endswith(f":{gpu}"))
        for layer in range(last + 1)
    ]
    assert gpus == sorted(gpus)
    assert max(Counter(gpus).values()) - min(Counter(gpus).values()) <= 1
    assert found["model.rotary_emb"] == "rotary_gpu cuda:0"
    assert found["model.norm"] == "norm_gpu cuda:3"
    assert found["lm_head"] == "linear_gpu cuda:3"


@pytest.mark.parametrize(("name", "model"), SHIPPED.items())
def test_bundled_rules_keep_the_experts_of_first_layers_on_gpus(name: str, model: str) -> None:
    found = places(plan_of(f"{name}?cpu_experts_from=12", model))
    first = skeleton(model).config.first_k_dense_replace
    assert in_layers(found, "mlp", "moe_gpu cuda:0") == list(range(first, 12))
    assert in_layers(found, "mlp.experts", "experts_cpu cpu")[0] == 12
