"""Captured decode steps on fake GPUs: the bits of the same work launched piece by piece, and nothing that waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.reference import NAMES, config_of, gguf_path
from random_files import left_padded, random_tokens
from test_hybrid import load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from transformers_kt.assets import bundled_model
from transformers_kt.backends import schemas
from transformers_kt.backends.gpu import fake
from transformers_kt.backends.gpu.capture import HostReads
from transformers_kt.planning.decision import NO_GRAPHS


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets longer with every capture."""
    made, capture = list[Any](), fake.FakeDevice.capture

    def counted(*args: Any) -> Any:
        made.append(capture(*args))
        return made[-1]

    monkeypatch.setattr(fake.FakeDevice, "capture", counted)
    return made


# File; GPUs; layers with their experts on a GPU; captures: of a layer with experts in RAM two, and one for the rest.
GRAPHS = [
    ("v3-F32", 1, 2, 1),
    ("v3-F32", 2, 0, 6),
    ("small-v2-F32", 1, 0, 5),
    ("v3-like-Q4_K_M", 1, 0, 3),
    ("v2-lite-like-Q4_K_M", 1, 0, 5),
    ("tiny-r1", 2, 0, 8),
]


@pytest.mark.parametrize(("name", "gpus", "experts", "count"), GRAPHS)
@torch.no_grad()
def test_graphs_change_no_bit_and_serve_the_next_call(
    gguf_file: Callable[[str], Path], captures: list[Any], name: str, gpus: int, experts: int, count: int
) -> None:
    path = bundled_model() if name == "tiny-r1" else gguf_path(name) if name in NAMES else gguf_file(name)
    options: dict[str, Any] = {"config": config_of(name)} if name in NAMES else {}
    eager, ours = (load(path, gpus, kt_gpu_experts=experts, kt_cuda_graph=on, **options) for on in (False, True))
    assert (NO_GRAPHS in eager.kt_report.notes, NO_GRAPHS in ours.kt_report.notes) == (True, False)
    vocabulary = min(64, ours.config.vocab_size)
    asked = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "output_logits": True}
    for prompts in ([4], [3, 6, 2, 1]):
        ids, mask = left_padded([random_tokens(length, seed=length) % vocabulary for length in prompts])
        expected = eager.generate(ids, attention_mask=mask, return_dict_in_generate=True, **asked)
        assert not captures
        for made in (count, 0):
            # Of the cache, which lies in the outputs too, nothing is kept.
            found = ours.generate(ids, attention_mask=mask, return_dict_in_generate=True, **asked).logits
            assert len(captures) == made
            captures.clear()
            assert all(map(torch.equal, found, expected.logits))


@torch.no_grad()
def test_what_happens_to_a_cache_or_a_model_between_steps_changes_no_bit_of_graphs(captures: list[Any]) -> None:
    ids, found = random_tokens(14) % 64, []
    for is_on in (False, True):
        model, cache, logits = load(bundled_model(), kt_gpu_experts=0, kt_cuda_graph=is_on), DynamicCache(), []
        model(ids[:, :5], past_key_values=cache)
        for step in range(5, 14):
            hooks = []
            if step == 7:
                hooks.append(model.model.layers[1].mlp.register_forward_hook(lambda *_: None))
            elif step == 9:
                cache.crop(-1)
            elif step == 10:
                cache = copy.deepcopy(cache)
            elif step == 11:
                held = cache.layers[0].keys
                copied = held.clone()
            elif step == 12:
                model.generate(ids[:, :3], max_new_tokens=3, do_sample=False, eos_token_id=-1)
            logits.append(model(ids[:, step : step + 1], past_key_values=cache).logits)
            for hook in hooks:
                hook.remove()
        assert torch.equal(held, copied)
        assert bool(captures) is is_on
        found.append(torch.cat(logits))
    assert torch.equal(*found)


@torch.no_grad()
def test_keys_that_somebody_holds_are_not_lent_to_the_next_cache(
    gguf_file: Callable[[str], Path], captures: list[Any]
) -> None:
    model, ids = load(gguf_file("small-v3-mixed"), kt_gpu_experts=0), random_tokens(6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    cache = DynamicCache()
    expected = model.generate(ids, past_key_values=cache, **options)
    made = len(captures)
    assert made
    model.generate(random_tokens(300), max_new_tokens=2, eos_token_id=-1)  # while it lives
    assert len(captures) == 2 * made
    held = cache.layers[0].keys
    copied, cache = held.clone(), None
    for _ in range(2):
        assert model.generate(ids, **options).tolist() == expected.tolist()
    assert torch.equal(held, copied)
    assert len(captures) == 2 * made  # in what the longer call gave back


class _NoDeviceMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations of this thread touch no memory of ``devices``: on a GPU each would wait, or run beside the stream."""

    def __init__(self, devices: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._devices = list(devices)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, torch.Tensor)]
        assert not any(device.holds(tensor) for device in self._devices for tensor in tensors), func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_decoded_token_waits_once_for_each_layer_with_experts_in_ram_and_once_at_the_end(
    gguf_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither side reads what lies at the other: streams no value on the host, the host no memory of the device."""
    waits = []
    wait, launch = fake._FakeEvent.synchronize, fake._FakeStream.launch

    def counted(event: Any) -> None:
        waits.append(event)
        wait(event)

    def watched(stream: Any, work: Any) -> None:
        def without_host_reads() -> None:
            with HostReads():
                work()

        launch(stream, without_host_reads)

    for experts, expected in ((2, 1), (1, 2), (0, 3)):
        model = load(gguf_file("v3-F32"), kt_gpu_experts=experts)
        cache = DynamicCache()
        model(random_tokens(5), past_key_values=cache)
        model(random_tokens(1), past_key_values=cache)  # captures
        with monkeypatch.context() as patch:
            patch.setattr(fake._FakeEvent, "synchronize", counted)
            patch.setattr(fake._FakeStream, "launch", watched)
            patch.setattr(schemas, "computes_at_once", lambda: True)  # whatever modes of torch are active
            waits.clear()
            with _NoDeviceMemory(lane.device for lane in model.model._hybrid.lanes.values()):
                model.model(random_tokens(1), past_key_values=cache)
        assert len(waits) == expected
