"""Experts in RAM that a GPU computes too, in slots and from long prompts: the answers of transformers' own models.

Who computes which expert of a prompt depends on rates that are measured; here they are given, so that both sides have
something to do.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpus import fake_gpus
from random_files import random_tokens
from test_parity import FLOAT_TOLERANCE
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from transformers_kt.assets import bundled_model
from transformers_kt.backends.gpu.expert_ring import ExpertRing
from transformers_kt.backends.gpu.prefill_split import PrefillRates
from transformers_kt.modules.experts import KtExperts
from transformers_kt.modules.gpu import ram_experts
from transformers_kt.planning.expert_profile import ExpertProfile

PROMPT, STEPS = 64, 4
# File, GPUs, experts of each layer in slots, fewest tokens of a prompt whose experts are streamed; sequences and tokens
# of the prompt.
SETTINGS = [
    ("v3-F32", 1, 0, 16, 1, PROMPT),
    ("v3-F32", 2, 3, 16, 4, PROMPT),
    ("v3-F32", 2, 3, 16, 4, 1),
    ("v3-F32", 1, 3, 0, 1, 700),
    ("v3-F32", 1, "all", 16, 4, 7),
    ("small-v2-F32", 2, 0, 16, 4, 7),
    ("small-v2-F32", 1, 3, 16, 1, 700),
    ("small-v2-F32", 1, 3, 16, 4, 1),
    ("small-v2-F32", 2, "all", 0, 1, PROMPT),
]


@pytest.fixture(autouse=True)
def given_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy takes as long as the CPU takes for 8 tokens."""
    monkeypatch.setattr(ram_experts, "measured_rates", lambda *args: PrefillRates(1.0, 1.0, 9.0))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each layer of each prompt sent to the GPU."""
    counts: list[int] = []
    launch = ExpertRing.launch

    def counted(self: Any, host: Any, experts: Any, *args: Any) -> None:
        counts.append(len(experts))
        launch(self, host, experts, *args)

    monkeypatch.setattr(ExpertRing, "launch", counted)
    return counts


def experts_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def load(path: Path, gpus: int = 1, **options: Any) -> Any:
    fakes = {key: options.pop(key) for key in ("longest_delay_s", "seed", "registers") if key in options}
    with fake_gpus(*["1GiB"] * gpus, **fakes):
        return AutoModelForCausalLM.from_pretrained(None, gguf_path=path, kt_gpu_experts=0, **options)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A prompt, and STEPS tokens after it one by one."""
    cache = DynamicCache()
    parts = [ids[:, :-STEPS], *ids[:, -STEPS:].split(1, dim=1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda each: "-".join(map(str, each)))
def test_logits_of_a_prompt_and_of_tokens_after_it_equal_those_of_transformers(
    setting: tuple[str, int, Any, int, int, int],
    stock_model: Callable[[str], Any],
    gguf_file: Callable[[str], Path],
    streamed: list[int],
) -> None:
    name, gpus, slots, stream_tokens, batch, prompt = setting
    stock = stock_model(name)
    in_layer = stock.config.n_routed_experts
    slots = in_layer if slots == "all" else slots
    ours = load(gguf_file(name), gpus, kt_expert_slots=slots, kt_prefill_stream_tokens=stream_tokens)
    ids = random_tokens(batch * (prompt + STEPS)).view(batch, -1)
    found = logits_of(ours, ids)
    with torch.no_grad():
        torch.testing.assert_close(found, stock(ids).logits, rtol=0, atol=FLOAT_TOLERANCE)
    layers = experts_of(ours)
    assert len(streamed) == (len(layers) if 0 < stream_tokens <= batch * prompt else 0)
    assert all(0 < count < in_layer for count in streamed) or prompt > PROMPT  # of which the link takes all
    if slots:
        assert all(len(layer.on_gpu.slots.experts) == slots for layer in layers)  # filled by the prompt
        assert f"{slots} of {in_layer} experts" in str(ours.kt_report)
    again = logits_of(ours, ids)  # with what lies in slots by now
    torch.testing.assert_close(again, found, rtol=0, atol=FLOAT_TOLERANCE)


def test_graphs_delays_and_memory_that_cannot_be_registered_change_no_bit(gguf_file: Callable[[str], Path]) -> None:
    ids, found = random_tokens(PROMPT + STEPS), []
    for options in (
        {},
        {"kt_cuda_graph": False},
        {"longest_delay_s": 0.001, "seed": 1},
        {"longest_delay_s": 0.001, "seed": 2, "registers": False},
    ):
        model = load(gguf_file("v3-F32"), 2, kt_expert_slots=2, kt_prefill_stream_tokens=16, **options)
        found.append(torch.cat([logits_of(model, ids), logits_of(model, ids)]))
    assert all(torch.equal(each, found[0]) for each in found[1:])


def test_a_profile_says_what_lies_in_slots_from_the_beginning(
    gguf_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the CPU is given of them is -1."""
    config = load(gguf_file("small-v2-F32")).config
    experts, top_k, layers = config.n_routed_experts, config.num_experts_per_tok, range(1, config.num_hidden_layers)
    counts = {layer: [top_k] * experts for layer in layers}
    for layer, choices in counts.items():
        for hot in (0, layer, layer + 1):
            choices[hot] *= 5
    tokens = experts + 3 * 4
    path = tmp_path / "experts.json"
    ExpertProfile("any", tokens, top_k, {layer: tuple(each) for layer, each in counts.items()}).write(path)
    model = load(gguf_file("small-v2-F32"), kt_expert_profile=path, kt_expert_slots=3)
    for layer, module in enumerate(experts_of(model), start=1):
        assert module.on_gpu.slots.experts == [0, layer, layer + 1]
    everything = load(gguf_file("small-v2-F32"), kt_expert_profile=path)
    assert [len(module.on_gpu.slots.experts) for module in experts_of(everything)] == [experts] * len(counts)
    routed: list[Any] = []
    weights: Any = KtExperts.routed
    monkeypatch.setattr(KtExperts, "routed", property(lambda self: _Watched(weights.fget(self), routed)))
    with torch.no_grad():
        everything(random_tokens(5))
    assert len(routed) == len(counts)
    assert all((ids == -1).all() for ids in routed)


class _Watched:
    """Experts that remember which were asked for."""

    def __init__(self, routed: Any, seen: list[Any]) -> None:
        self._routed, self._seen = routed, seen

    def forward_routed(self, x: Any, ids: Any, weights: Any, out: Any) -> None:
        self._seen.append(ids)
        self._routed.forward_routed(x, ids, weights, out)


def test_the_plan_counts_the_memory_that_slots_and_ring_take_and_all_of_it_comes_back(
    gguf_file: Callable[[str], Path],
) -> None:
    path, options = gguf_file("small-v3-mixed"), {"kt_gpu_experts": 0, "kt_expert_slots": 2}
    with fake_gpus("1GiB") as devices:
        device = devices["cuda:0"]
        whole = device.free_bytes()
        model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path, **options, kt_prefill_stream_tokens=16)
        layers = experts_of(model)
        weights = sum(row.nbytes for row in model.kt_report.rows if row.device == "cuda:0")
        slots = sum(layer.on_gpu.slots.nbytes for layer in layers)
        tables = sum(4 * layer.num_experts for layer in layers)
        assert whole - device.free_bytes() == weights + slots + tables
        assert slots == sum(2 * layer.on_gpu.host.nbytes for layer in layers)
        with torch.no_grad():
            model(random_tokens(PROMPT))
        assert device.registered == sum(row.nbytes for row in model.kt_report.rows if row.operation == "experts_cpu")
        del model, layers
        gc.collect()
        for _ in range(200):  # until the fakes' threads have let go of the last copies of tables
            if device.free_bytes() == whole:
                break
            time.sleep(0.01)
        assert (device.free_bytes(), device.registered) == (whole, 0)


@torch.no_grad()
def test_an_expert_that_fails_beside_a_stream_raises_itself_and_the_model_goes_on(
    gguf_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(gguf_file("small-v2-F32"), kt_expert_slots=2, kt_prefill_stream_tokens=16)
    ids = random_tokens(PROMPT)
    expected = model(ids).logits

    def fail(*args: Any) -> None:
        raise ValueError("the last expert fails")

    failing = type("Failing", (), {"submit_routed": fail})()
    with monkeypatch.context() as patch:
        patch.setattr(type(experts_of(model)[-1]), "routed", property(lambda self: failing))
        with pytest.raises(ValueError, match="the last expert fails"):
            model(ids)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=FLOAT_TOLERANCE)


def test_tiny_r1_answers_right_from_slots_and_stream(streamed: list[int]) -> None:
    question = [{"role": "user", "content": "What is 3 + 4?"}]
    with fake_gpus("24GiB"):
        model = AutoModelForCausalLM.from_pretrained(
            bundled_model(), kt_gpu_experts=0, kt_expert_slots=3, kt_prefill_stream_tokens=8
        )
        tokenizer = AutoTokenizer.from_pretrained(bundled_model())
        answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(question, do_sample=False)
    assert "7" in answer[0]["generated_text"][-1]["content"].rpartition("</think>")[2]
    assert streamed
    assert max(streamed) > 0
