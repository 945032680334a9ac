"""Experts between RAM and GPU: who lies in slots, who computes what of a long prompt, and that no copy comes too early.

The properties are of pure functions; what runs is compared with float32 in torch's order on fakes with random delays.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import transformers_kt._C as _C
from transformers_kt.backends.gpu.expert_ring import ExpertRing
from transformers_kt.backends.gpu.expert_slots import ExpertSlots
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.backends.gpu.host_experts import HostExperts, Uploads
from transformers_kt.backends.gpu.plain import Resident
from transformers_kt.backends.gpu.prefill_split import PrefillRates, fewest_tokens, ring_steps, split_experts
from transformers_kt.backends.gpu.slot_policy import UPLOADS_PER_TOKEN, SlotPolicy
from transformers_kt.planning.costs import RING_SLOTS

EXPERTS, HIDDEN, INNER, TOP_K = 7, 64, 96, 3

# --- Who lies in slots ---


@given(
    slots=st.integers(1, 9),
    steps=st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=6, max_size=6), st.integers(1, 50)), max_size=30),
)
def test_slots_hold_different_experts_and_few_change_at_a_time(slots: int, steps: list[tuple[list[int], int]]) -> None:
    policy = SlotPolicy(6, slots)
    for choices, tokens in steps:
        before = list(policy.in_slots)
        policy.observe(choices, tokens)
        exchanges = policy.exchanges(UPLOADS_PER_TOKEN)
        assert len(exchanges) <= UPLOADS_PER_TOKEN
        for slot, expert, leaving in exchanges:
            assert before[slot] == leaving
            assert expert not in before
            before[slot] = expert
        assert before == policy.in_slots
        there = [expert for expert in policy.in_slots if expert is not None]
        assert len(set(there)) == len(there)


@settings(max_examples=20, deadline=None)
@given(hot=st.sets(st.integers(0, 63), min_size=6, max_size=12), seed=st.integers(0, 99))
def test_experts_that_are_always_chosen_come_soon_and_then_nothing_moves(hot: set[int], seed: int) -> None:
    """After another text, whose experts have to leave."""
    random = np.random.default_rng(seed)
    policy = SlotPolicy(64, 12)
    for those in (sorted(set(range(64)) - hot)[:12], sorted(hot)):
        for token in range(1200):
            policy.observe(np.bincount(random.permutation(those)[:6], minlength=64).tolist(), 1)
            moved = policy.exchanges(UPLOADS_PER_TOKEN)
            assert token < 600 or not moved
    assert hot <= set(policy.in_slots)


def test_evenly_chosen_experts_move_seldom() -> None:
    """V3's 8 of 256: plain LRU with as few slots would move two of them for nearly every token."""
    random = np.random.default_rng(0)
    policy, moved = SlotPolicy(256, 8), 0
    for _ in range(1000):
        policy.observe(np.bincount(random.permutation(256)[:8], minlength=256).tolist(), 1)
        moved += len(policy.exchanges(UPLOADS_PER_TOKEN))
    assert 8 <= moved <= 40


# --- Who computes what of a long prompt ---

rates = st.builds(PrefillRates, *[st.floats(0, 10, allow_subnormal=False)] * 2, st.floats(0.01, 10))


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 50), max_size=8), rates=rates)
def test_each_chosen_expert_is_computed_once_and_no_split_is_done_sooner(
    counts: list[int], rates: PrefillRates
) -> None:
    split = split_experts(counts, rates)
    active = [expert for expert, count in enumerate(counts) if count]
    assert sorted((*split.link, *split.cpu)) == active

    def end(link: Any) -> float:
        on_cpu = sum(rates.cpu_seconds(counts[expert]) for expert in active if expert not in link)
        return max(len(link) * rates.link_s, on_cpu)

    subsets = itertools.chain.from_iterable(itertools.combinations(active, n) for n in range(len(active) + 1))
    assert end(split.link) <= min(map(end, subsets)) * (1 + 1e-9)
    assert all(counts[a] >= counts[b] for a in split.link for b in split.cpu)


@given(experts=st.lists(st.integers(0, 99), unique=True, max_size=30), slots=st.integers(1, 5), each=st.integers(1, 9))
def test_each_expert_goes_through_the_ring_once_and_slots_take_turns(experts: list[int], slots: int, each: int) -> None:
    steps = list(ring_steps(experts, slots, each, first_slot=slots - 1))
    assert [expert for step in steps for expert in step.experts] == experts
    assert all(len(step.experts) <= each for step in steps)
    for number, step in enumerate(steps):
        assert all(step.slot != other.slot for other in steps[max(0, number - slots + 1) : number])


def test_prompts_are_long_once_reading_weights_no_longer_holds_up_the_cpu() -> None:
    assert fewest_tokens(experts=256, top_k=8) == 512  # V3
    assert fewest_tokens(experts=64, top_k=6) == 171  # V2-Lite


# --- On a device ---


class Layer:
    """Experts in RAM, and the same as floats."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        self.floats = [torch.from_numpy(random.standard_normal((EXPERTS, *s)).astype(np.float32) / 8) for s in shapes]
        matrices = []
        for values in self.floats:
            matrix = _C.PackedMatrix(0, *values.shape)
            matrix.pack_floats(values.numpy())
            matrices.append(matrix)
        self.experts = _C.Experts(*matrices)

    def mixed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """float64 (tokens, hidden); ids of -1 add nothing."""
        gate, up, down = (each.double() for each in self.floats)
        out = torch.zeros(x.shape, dtype=torch.float64)
        for token, place in (ids >= 0).nonzero().tolist():
            expert, row = int(ids[token, place]), x[token].double()
            between = functional.silu(gate[expert] @ row) * (up[expert] @ row)
            out[token] += weights[token, place].double() * (down[expert] @ between)
        return out


def chosen(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    ids = np.sort(np.stack([random.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]), axis=1).astype(np.int32)
    x = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(random.random(ids.shape).astype(np.float32))


@pytest.fixture(params=[True, False], ids=["registered", "pinned"])
def fake(request: pytest.FixtureRequest) -> Callable[[int], FakeDevice]:
    """A device by the seed of its delays; 0 is without."""
    return lambda seed: FakeDevice(
        0, 1 << 30, longest_delay_s=0.001 * (seed > 0), seed=seed, registers=bool(request.param)
    )


@pytest.mark.parametrize("experts_per_slot", [1, 2])
def test_what_goes_through_the_ring_is_computed_right_whatever_the_delays(
    fake: Callable[[int], FakeDevice], experts_per_slot: int
) -> None:
    layers = [Layer(0), Layer(1)]
    x, ids, weights = chosen(9, seed=3)
    link = [4, 0, 6, 2, 1]
    expected = sum(
        layer.mixed(x, torch.where(torch.isin(ids, torch.tensor(link)), ids, -1), weights) for layer in layers
    )
    found = []
    for seed in range(3):
        device = fake(seed)
        hosts = [HostExperts(layer.experts, device) for layer in layers]
        ring = ExpertRing(device, RING_SLOTS * experts_per_slot * hosts[0].nbytes)
        stream, uploads = device.stream(), Uploads(device)
        out = device.empty(x.shape, torch.float32).zero_()
        done = device.event()
        for host in hosts:
            assert host.register(uploads) == device.registers
            ring.launch(host, link, x, ids.numpy(), weights.numpy(), out, stream, uploads)
            stream.record(done)
            done.synchronize()
        found.append(out.clone())
        assert device.registered == (2 * EXPERTS * hosts[0].nbytes if device.registers else 0)
        del host, hosts, ring
        gc.collect()
        assert device.registered == 0
    # Sums of 64 and 96 products in float32 against float64.
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(each, found[0]) for each in found)


def compute_step(
    slots: ExpertSlots, ids: torch.Tensor, weights: torch.Tensor, resident: Resident, x: torch.Tensor, out: torch.Tensor
) -> None:
    """What the router does, and what is computed on the device."""
    resident.ids.copy_(resident.slots[ids.long()])
    resident.weights.copy_(weights)
    out.copy_(slots.on_device(x, resident))


def test_experts_in_slots_change_between_tokens_and_are_computed_right_whatever_the_delays(
    fake: Callable[[int], FakeDevice],
) -> None:
    """First experts 0 and 1 are hot, then 5 and 6."""
    layer, found = Layer(0), []
    for seed in range(3):
        device = fake(seed)
        slots = ExpertSlots(HostExperts(layer.experts, device), 2)
        stream, uploads, done = device.stream(), Uploads(device), device.event()
        slots.begin([9, 8, 1, 1, 1, 1, 1], 22, uploads)
        assert slots.experts == [0, 1]
        results, held = [], []
        for token in range(60):
            x, ids, weights = chosen(1, seed=token)
            if token >= 20:
                ids = torch.tensor([[token % 5, 5, 6]], dtype=torch.int32)
            lies = slots.experts
            resident = slots.resident(torch.empty_like(ids), torch.empty_like(weights))
            out = device.empty(x.shape, torch.float32)

            stream.launch(partial(compute_step, slots, ids, weights, resident, x, out))
            stream.record(done)
            done.synchronize()
            staged = torch.where(resident.ids >= 0, -1, ids)
            assert set(ids.flatten().tolist()) - set(lies) == {int(each) for each in staged.flatten() if each >= 0}
            torch.testing.assert_close(
                out.double(), layer.mixed(x, torch.where(staged < 0, ids, -1), weights), rtol=0, atol=1e-5
            )
            slots.note(staged.numpy(), resident.ids.numpy())
            slots.turn(1, stream, uploads)
            results.append(out.clone())
            held.append(slots.experts)
        assert held[-1] == [5, 6]
        assert [5, 6] not in held[:22]
        found.append((torch.cat(results), held))
    assert all(held == found[0][1] and torch.equal(results, found[0][0]) for results, held in found)
