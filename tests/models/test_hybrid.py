"""Models on fake GPUs, alone and with their experts on the CPU, give the answers of transformers' own models.

The fakes compute in float32 in the order of torch, so that where a file holds floats, or all of a model lies on the
device, answers are those of transformers to the noise of float32.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpus import fake_gpus
from golden.reference import NAMES, config_of, dequantized_model, gguf_path, kl_divergence
from random_files import left_padded, random_tokens
from test_parity import FLOAT_TOLERANCE
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache, TextStreamer, pipeline

import transformers_kt._C as _C
from transformers_kt import plan
from transformers_kt.assets import bundled_model
from transformers_kt.backends.gpu import fake
from transformers_kt.errors import OutOfMemoryError, UnsupportedOperationError
from transformers_kt.planning.costs import _CUDA_BYTES

LENGTHS = [1, 7, 64, 700]
THEIRS = Path(__file__).parents[1] / "rules" / "ktransformers"
# File, GPUs, layers with their experts on a GPU.
PLACEMENTS = [
    ("v3-F32", 1, 0),
    ("v3-F32", 1, 1),
    ("v3-F32", 2, 2),
    ("v2-F32", 2, 0),
    ("v2-F32", 1, 1),
    ("small-v2-F32", 1, 0),
    ("small-v2-F32", 2, 2),
]


def load(path: Path, gpus: int = 1, *, delays: Any = None, **options: Any) -> Any:
    """On so many GPUs, of which left alone one would do."""
    with fake_gpus(*["1GiB"] * gpus, **(delays or {})):
        shared = {"device_map": "balanced"} if gpus > 1 else {}
        return AutoModelForCausalLM.from_pretrained(None, gguf_path=path, **{**shared, **options})


@pytest.fixture(scope="module", params=PLACEMENTS, ids=lambda each: "-".join(map(str, each)))
def pair(request: pytest.FixtureRequest, stock_model: Callable[[str], Any], gguf_file: Callable[[str], Path]) -> Any:
    """transformers' model, and ours on fake GPUs."""
    name, gpus, experts = request.param
    ours = load(gguf_file(name), gpus, kt_gpu_experts=experts)
    used = {row.device for row in ours.kt_report.rows}
    assert used == {"cpu", *(f"cuda:{number}" for number in range(gpus))}
    return stock_model(name), ours


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_logits_of_a_prompt_and_of_tokens_after_it_equal_those_of_transformers(
    pair: tuple[Any, Any], length: int
) -> None:
    stock, ours = pair
    ids = random_tokens(length + 3)
    out = ours(ids[:, :length], use_cache=True)
    parts = [out.logits]
    for step in range(length, length + 3):
        out = ours(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), stock(ids).logits, rtol=0, atol=FLOAT_TOLERANCE)


@torch.no_grad()
def test_a_left_padded_batch_of_four_equals_its_prompts_alone(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    prompts = [random_tokens(count, seed=count) for count in (3, 20, 11, 1)]
    ids, mask = left_padded(prompts)
    out = ours.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    for row, prompt in zip(out, prompts, strict=True):
        alone = stock.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1)
        assert row[-4:].tolist() == alone[0, -4:].tolist()


@torch.no_grad()
def test_module_by_module_under_hooks_it_gives_the_same(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    ids, seen = random_tokens(9), []
    fused = ours(ids).logits
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.append(out.device.type))
        for layer in ours.model.layers
    ]
    watched = ours(ids).logits
    for hook in hooks:
        hook.remove()
    assert seen == ["cpu"] * len(hooks)
    # Products of nine rows are the same calls; only where states are kept differs.
    torch.testing.assert_close(watched, fused, rtol=0, atol=FLOAT_TOLERANCE / 10)
    recorded = ours(ids, output_hidden_states=True)
    torch.testing.assert_close(recorded.logits, fused, rtol=0, atol=FLOAT_TOLERANCE / 10)
    assert len(recorded.hidden_states) == len(hooks) + 1


@torch.no_grad()
def test_beams_crops_and_caches_of_other_kinds_give_what_transformers_gives(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    ids = random_tokens(12)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}):
        assert ours.generate(ids, **options, **more).tolist() == stock.generate(ids, **options, **more).tolist()
    cache = StaticCache(config=ours.config, max_cache_len=32)
    expected = stock(ids).logits
    torch.testing.assert_close(ours(ids, past_key_values=cache).logits, expected, rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_all_of_a_quantized_model_on_gpus_is_exact_arithmetic_on_its_weights(name: str) -> None:
    config = config_of(name)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    ours = load(gguf_path(name), 2, config=config, kt_gpu_experts=moe_layers)
    assert not any(row.operation == "experts_cpu" for row in ours.kt_report.rows)
    ids = random_tokens(40)
    expected = dequantized_model(gguf_path(name), config)(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_in_bfloat16_the_distance_to_exact_arithmetic_is_no_larger_than_on_the_cpu(name: str) -> None:
    config, path = config_of(name), gguf_path(name)
    with fake_gpus("1GiB", activations=torch.bfloat16):
        hybrid = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, config=config, kt_gpu_experts=0)
    on_the_cpu = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, config=config, device_map="cpu")
    ids = random_tokens(200)
    exact = dequantized_model(path, config)(ids).logits[0]
    found = {which: model(ids).logits[0] for which, model in (("hybrid", hybrid), ("cpu", on_the_cpu))}
    distance = {which: kl_divergence(exact, logits).median().item() for which, logits in found.items()}
    print(f"{name}: KL median {distance}")
    assert distance["hybrid"] <= distance["cpu"]
    same = (found["hybrid"].argmax(-1) == exact.argmax(-1)).float().mean().item()
    assert same >= (found["cpu"].argmax(-1) == exact.argmax(-1)).float().mean().item() - 0.05


@torch.no_grad()
def test_delays_of_streams_change_no_bit(gguf_file: Callable[[str], Path]) -> None:
    ids, found = random_tokens(8), []
    for seed in range(3):
        delays = {"longest_delay_s": 0.002 * (seed > 0), "seed": seed}
        model = load(gguf_file("v3-F32"), 2, kt_gpu_experts=1, delays=delays)
        out = model(ids, use_cache=True)
        after = model(ids[:, :1], past_key_values=out.past_key_values).logits
        found.append(torch.cat((out.logits, after), dim=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_tiny_r1_answers_right_in_a_pipeline_and_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    question = [{"role": "user", "content": "What is 3 + 4?"}]
    with fake_gpus("24GiB"):
        model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto", kt_gpu_experts=1)
        tokenizer = AutoTokenizer.from_pretrained(bundled_model())
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        answer = generator(question, do_sample=False)[0]["generated_text"][-1]["content"]
        assert "7" in answer.rpartition("</think>")[2]
        inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
        capsys.readouterr()
        model.generate(**inputs, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
        assert "7" in capsys.readouterr().out.rpartition("</think>")[2]


# --- Placement ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kt_gpu_experts": 1},
        {"kt_cpu_layers": 2},
        {"device_map": {"": "cpu", "model.layers.1": 0}},
        {"device_map": {"": 0}},
        {"max_memory": {0: "1GiB", "cpu": "8GiB"}},
        {"kt_rules": THEIRS / "v3-one-gpu.yaml"},
    ],
    ids=lambda options: "-".join(options) or "auto",
)
@torch.no_grad()
def test_what_a_plan_shows_is_what_is_loaded_and_it_answers(
    gguf_file: Callable[[str], Path], stock_model: Callable[[str], Any], options: dict[str, Any]
) -> None:
    path = gguf_file("v3-F32")
    with fake_gpus("1GiB"):
        shown = plan(None, gguf_path=path, **options)
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, **options)
    rows = [(row.module, row.operation, row.device, row.nbytes) for row in shown.rows]
    assert [(row.module, row.operation, row.device) for row in model.kt_report.rows] == [row[:3] for row in rows]
    loaded, planned = model.kt_report.nbytes, sum(row[3] for row in rows)
    assert abs(loaded - planned) <= 0.03 * planned
    ids = random_tokens(20)
    torch.testing.assert_close(model(ids).logits, stock_model("v3-F32")(ids).logits, rtol=0, atol=FLOAT_TOLERANCE)
    assert next(iter(model.hf_device_map.values())) == "cpu" if hasattr(model, "hf_device_map") else True


# File -> a random model, and the GPUs on which the file puts some of its layers.
OF_THEIRS = {
    "v2-lite-one-gpu": ("small-v2-F32", 1),
    "v2-lite-gpu-and-cpu": ("deep-v2-F32", 1),
    "v2-four-gpus": ("deep-v2-F32", 4),
    "v3-one-gpu": ("small-v3-F32", 1),
    "v3-two-gpus": ("deep-v3-F32", 2),
}


@pytest.mark.parametrize("name", OF_THEIRS)
@torch.no_grad()
def test_a_file_of_ktransformers_is_loaded_as_planned_and_decodes_as_transformers_does(
    stock_model: Callable[[str], Any], gguf_file: Callable[[str], Path], name: str
) -> None:
    small, gpus = OF_THEIRS[name]
    rules = THEIRS / f"{name}.yaml"
    with fake_gpus(*["1GiB"] * 4):
        shown = plan(None, gguf_path=gguf_file(small), kt_rules=rules)
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file(small), kt_rules=rules)
    places = [(row.module, row.operation, row.device) for row in model.kt_report.rows]
    assert places == [(row.module, row.operation, row.device) for row in shown.rows]
    assert {device for _, _, device in places} == {"cpu", *(f"cuda:{number}" for number in range(gpus))}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "output_logits": True}
    found, expected = (
        each.generate(random_tokens(12), return_dict_in_generate=True, **options)
        for each in (model, stock_model(small))
    )
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", ["v3-F32", "v2-F32"])
def test_a_device_holds_what_a_plan_says(gguf_file: Callable[[str], Path], name: str) -> None:
    path, context = gguf_file(name), 512
    with fake_gpus("1GiB", activations=torch.bfloat16) as devices:
        (use,) = (each for each in plan(None, gguf_path=path, context=context).devices if each.device != "cpu")
        whole = devices["cuda:0"].free_bytes()
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
        model.generate(random_tokens(context - 4), max_new_tokens=4, do_sample=False, eos_token_id=-1)
        used = whole - devices["cuda:0"].free_bytes()
    # Buffers count what CUDA itself takes, and what operations need while they run, of which fakes know nothing.
    lasting = use.weights + use.kv_cache
    assert lasting <= used <= 1.03 * lasting + use.buffers - _CUDA_BYTES


def test_layers_that_do_not_fit_lie_on_the_cpu_and_the_model_answers(
    gguf_file: Callable[[str], Path], stock_model: Callable[[str], Any]
) -> None:
    device_map = {"": "cpu", "model.layers.0": 0, "model.layers.2": 1}
    with fake_gpus("1GiB", "1GiB"), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("v3-F32"), device_map=device_map)
        ids = random_tokens(20)
        out = model(ids[:, :15], use_cache=True)
        rest = model(ids[:, 15:], past_key_values=out.past_key_values).logits
    found = torch.cat((out.logits, rest), dim=1)
    torch.testing.assert_close(found, stock_model("v3-F32")(ids).logits, rtol=0, atol=FLOAT_TOLERANCE)


# --- What goes wrong ---


@pytest.mark.parametrize("tokens", [4, 1])
@torch.no_grad()
def test_an_expert_that_fails_raises_itself_and_the_model_goes_on(
    gguf_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    begun: list[None] = []
    ended: list[None] = []
    monkeypatch.setattr(fake.FakeDevice, "takes_cores", False)  # threads of the CPU are kept awake then
    monkeypatch.setattr(_C, "begin_step", lambda: begun.append(None))
    monkeypatch.setattr(_C, "end_step", lambda: ended.append(None))
    model = load(gguf_file("v3-F32"), 2, kt_gpu_experts=0)
    ids = random_tokens(6 + tokens)
    expected, cache = model(ids).logits, DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    experts = model.model.layers[-1].mlp.experts

    def fail(*args: Any) -> None:
        raise ValueError("the last expert fails")

    with monkeypatch.context() as patch:
        patch.setattr(type(experts), "routed", property(lambda self: type("Failing", (), {"forward_routed": fail})()))
        with pytest.raises(ValueError, match="the last expert fails"):
            model(ids[:, 6:], past_key_values=cache)
    assert cache.get_seq_length() == 6
    assert len(begun) == len(ended) == (tokens == 1)
    torch.testing.assert_close(
        model(ids[:, 6:], past_key_values=cache).logits, expected[:, 6:], rtol=0, atol=FLOAT_TOLERANCE
    )
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_prompt_too_long_for_the_device_says_what_was_needed_and_nothing_is_lost(
    gguf_file: Callable[[str], Path],
) -> None:
    path = gguf_file("small-v3-mixed")
    with fake_gpus("2500KiB") as devices:
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, device_map={"": 0})
        ids, before = random_tokens(10), devices["cuda:0"].free_bytes()
        expected = model(ids).logits
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        with pytest.raises(OutOfMemoryError, match=r"cuda:0 is out of memory: .* needed, .* free. Shorten the prompt"):
            model(random_tokens(900), past_key_values=cache)
        assert cache.get_seq_length() == 10
        assert torch.equal(model(ids).logits, expected)
        del cache
        assert devices["cuda:0"].free_bytes() <= before


def test_weights_too_large_for_a_gpu_are_refused_before_memory_is_taken(gguf_file: Callable[[str], Path]) -> None:
    with (
        fake_gpus("300KiB") as devices,
        pytest.raises(OutOfMemoryError, match=r"on cuda:0 take .*, but 307 kB is available \(memory of cuda:0\)"),
    ):
        AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("small-v3-mixed"), device_map={"": 0})
    assert devices["cuda:0"].free_bytes() == 300 << 10


def test_the_memory_of_a_deleted_model_comes_back(gguf_file: Callable[[str], Path]) -> None:
    with fake_gpus("1GiB") as devices:
        whole = devices["cuda:0"].free_bytes()
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file("small-v3-mixed"), kt_gpu_experts=1)
        on_gpu = sum(row.nbytes for row in model.kt_report.rows if row.device == "cuda:0")
        assert whole - devices["cuda:0"].free_bytes() == on_gpu
        cache = DynamicCache()
        model.generate(random_tokens(5), past_key_values=cache, max_new_tokens=3)
        del model
        gc.collect()
        of_cache = sum(each.nbytes for layer in cache.layers for each in layer._buffers)
        assert whole - devices["cuda:0"].free_bytes() == of_cache
        del cache
        gc.collect()
        assert devices["cuda:0"].free_bytes() == whole


@torch.no_grad()
def test_two_threads_and_two_models_do_not_disturb_each_other(gguf_file: Callable[[str], Path]) -> None:
    with fake_gpus("1GiB", longest_delay_s=0.001):
        models = [
            AutoModelForCausalLM.from_pretrained(None, gguf_path=gguf_file(name), kt_gpu_experts=0)
            for name in ("small-v3-mixed", "small-v2-F32")
        ]
    prompts = [random_tokens(6, seed) for seed in range(4)]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    expected = [models[i % 2].generate(prompt, **options) for i, prompt in enumerate(prompts)]
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        found[number] = models[number % 2].generate(prompts[number], **options)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], each) for number, each in enumerate(expected))


def test_a_gradient_is_refused_as_on_the_cpu(gguf_file: Callable[[str], Path]) -> None:
    model = load(gguf_file("small-v3-mixed"), device_map={"": 0})
    embeddings = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    with pytest.raises(UnsupportedOperationError, match="a gradient was asked for"):
        model(inputs_embeds=embeddings)
