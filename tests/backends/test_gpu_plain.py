"""The plain torch forms of a layer's operations give the numbers of transformers' modules and of the CPU library."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from gpu_matrices import NUMBERS, packed_panels, stored_rows
from gpu_matrices import random_values as random
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)

import transformers_kt._C as _C
from transformers_kt.backends.gpu import panels, plain
from transformers_kt.families.base import Router

# Float32 on both sides in another order: sums of up to 64 terms near 1 round to a few 1e-6.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

V3_LIKE = Router(sigmoid=True, groups=4, top_groups=2, top_k=3, normalize=True, scale=2.5)
V2_LIKE = Router(sigmoid=False, groups=3, top_groups=2, top_k=4, normalize=False, scale=16.0)
ROUTERS = {
    "sigmoid in groups": (V3_LIKE, 16),
    "softmax in groups of 5": (V2_LIKE, 15),
    "softmax, greedy": (replace(V2_LIKE, groups=1, top_groups=1), 10),
    "sigmoid, one group, not normalized": (replace(V3_LIKE, groups=1, top_groups=1, normalize=False), 12),
}


def as_panels(matrix: torch.Tensor) -> torch.Tensor:
    """float32 (rows, cols) -> F32 panels."""
    return packed_panels("F32", matrix.detach().numpy().view(np.uint8), matrix.shape[1])


def choose(router: Router, logits: torch.Tensor, bias: torch.Tensor | None, resident: Any = None) -> plain.Staging:
    rows, x = len(logits), random(len(logits), 6)
    block = torch.full((plain.Staging.words(rows, 6, router.top_k),), torch.nan)
    staging = plain.Staging.of(block, rows, 6, router.top_k)
    plain.router_stage(logits, bias, router, x, staging, resident)
    assert torch.equal(staging.x, x)
    return staging


def dense(staging: plain.Staging, experts: int) -> torch.Tensor:
    """Weights by expert, so that the order in which they were chosen is no matter."""
    return torch.zeros(len(staging.ids), experts).scatter(1, staging.ids.long(), staging.weights)


def test_attention_over_a_latent_cache_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=64,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 16,
        },
        attn_implementation="eager",
    )
    stock = DeepseekV3Attention(config, 0).eval()
    for norm in (stock.q_a_layernorm, stock.kv_a_layernorm):
        norm.weight.data += 0.3 * torch.randn_like(norm.weight)
    batch, tokens, heads, earlier = 2, 9, 3, 6
    x = random(batch, tokens, 64)
    positions = torch.arange(tokens).expand(batch, tokens)
    cos, sin = DeepseekV3RotaryEmbedding(config)(x, positions)
    mask = torch.full((tokens, tokens), float("-inf")).triu(1).expand(batch, 1, tokens, tokens)
    expected = stock(x, (cos, sin), mask)[0]

    latents, ropes = torch.full((batch, 12, 32), torch.nan), torch.full((batch, 12, 8), torch.nan)
    absorbed = stock.kv_b_proj.weight.view(heads, 16 + 20, 32)
    k_b = torch.stack([as_panels(each[:16].T.contiguous()) for each in absorbed])
    v_b = torch.stack([as_panels(each[16:].contiguous()) for each in absorbed])
    got = []
    for first, end in ((0, earlier), (earlier, tokens)):  # what is cached already, and three tokens at once
        rows, now = x[:, first:end].flatten(0, 1), end - first
        table = torch.cat((cos[:, first:end, :4], sin[:, first:end, :4]), dim=-1).flatten(0, 1)
        compressed = plain.linear(
            as_panels(torch.cat((stock.q_a_proj.weight, stock.kv_a_proj_with_mqa.weight))),
            "F32",
            rows,
            torch.empty(len(rows), 24 + 40),
        )
        normed = torch.empty(len(rows), 24)
        plain.norm_rope_append(
            compressed[:, :24],
            stock.q_a_layernorm.weight,
            normed,
            compressed[:, 24:],
            stock.kv_a_layernorm.weight,
            stock.kv_a_layernorm.variance_epsilon,
            table,
            torch.full((batch,), first, dtype=torch.int32),
            latents,
            ropes,
        )
        queries = plain.linear(as_panels(stock.q_b_proj.weight), "F32", normed, torch.empty(len(rows), 72))
        queries = queries.view(len(rows), heads, 24)
        absorbed_query = plain.linear_per_head(k_b, "F32", queries[..., :16], torch.empty(len(rows), heads, 32))
        ends = torch.arange(first + 1, end + 1, dtype=torch.int32).repeat(batch)
        context = plain.mla_decode(
            absorbed_query,
            queries[..., 16:],
            table,
            latents,
            ropes,
            torch.stack((torch.zeros_like(ends), ends), dim=-1),
            stock.scaling,
            1,
            torch.empty(0),
            torch.empty(len(rows), heads, 32),
        )
        values = plain.linear_per_head(v_b, "F32", context, torch.empty(len(rows), heads, 20))
        out = plain.linear(as_panels(stock.o_proj.weight), "F32", values.flatten(1), torch.empty(len(rows), 64))
        got.append(out.view(batch, now, 64))
    torch.testing.assert_close(torch.cat(got, dim=1), expected, **TOLERANCE)
    assert latents[:, tokens:].isnan().all()


@pytest.mark.parametrize("method", ["sigmoid", "greedy", "group_limited_greedy"])
def test_experts_are_chosen_as_transformers_chooses_them(method: str) -> None:
    sizes = {"hidden_size": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    bias, stock = None, None
    if method == "sigmoid":
        stock = DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=32, norm_topk_prob=True, **sizes))
        bias = stock.e_score_correction_bias
        bias.copy_(0.2 * random(32, seed=3))
    else:
        stock = DeepseekV2TopkRouter(DeepseekV2Config(n_routed_experts=32, topk_method=method, **sizes))
    stock.weight.data.copy_(random(32, 32, seed=1) * 0.3)
    logits, weights, ids = stock(random(50, 32, seed=2))
    groups = (1, 1) if method == "greedy" else (4, 2)
    router = Router(method == "sigmoid", *groups, top_k=4, normalize=method == "sigmoid", scale=2.5)
    expected = torch.zeros(50, 32).scatter(1, ids, weights)
    torch.testing.assert_close(dense(choose(router, logits.detach(), bias), 32), expected.detach())


def by_the_cpu(router: Router, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Weights by expert of the CPU's MoE block: its router copies logits, expert e adds its weight to output e."""
    rows, experts = logits.shape

    def packed(matrices: torch.Tensor) -> Any:
        matrix = _C.PackedMatrix(NUMBERS["F32"], *matrices.shape)
        for number, each in enumerate(matrices):
            matrix.pack(number, each.contiguous().numpy().view(np.uint8).reshape(-1))
        return matrix

    one = torch.zeros(experts, 1, experts + 1)
    one[..., experts] = 1.0
    to_own = torch.eye(experts + 1)[:experts, :, None]
    copying = packed(torch.eye(experts, experts + 1)[None])
    routed = _C.Experts(packed(one), packed(one), packed(to_own))
    moe = _C.MoeBlock(copying, None if bias is None else bias.numpy(), routed, None, **asdict(router))
    x = torch.cat((logits, torch.ones(rows, 1)), dim=1)
    out, seen = np.zeros((rows, experts + 1), np.float32), np.zeros((rows, experts), np.float32)
    moe.forward(x.numpy(), out, seen)
    assert np.array_equal(seen, logits.numpy())
    return torch.from_numpy(out[:, :experts]) / torch.nn.functional.silu(torch.tensor(1.0))


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("levels", [3, None])
def test_experts_are_chosen_as_the_cpu_chooses_them_also_among_equal_scores(name: str, levels: int | None) -> None:
    router, experts = ROUTERS[name]
    logits = random(40, experts)
    bias = 0.5 * random(experts, seed=1) if router.sigmoid and levels is None else None
    if levels is not None:
        logits = (levels * logits.sigmoid()).floor()  # few different values: ties between experts and between groups
    got = choose(router, logits, bias)
    assert (got.ids.diff(dim=-1) > 0).all()
    torch.testing.assert_close(dense(got, experts), by_the_cpu(router, logits, bias))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_row_of_nan_gets_experts_that_exist_and_weights_of_nan(name: str) -> None:
    router, experts = ROUTERS[name]
    got = choose(router, torch.full((1, experts), torch.nan), None)
    assert got.ids.tolist() == [list(range(router.top_k))]
    assert got.weights.isnan().all()


def test_resident_experts_are_left_out_of_what_the_cpu_gets() -> None:
    logits = random(5, 16)
    slots = torch.full((16,), -1, dtype=torch.int32)
    slots[[3, 7, 8]] = torch.tensor([2, 0, 1], dtype=torch.int32)
    resident = plain.Resident(slots, torch.full((5, 3), 99, dtype=torch.int32), torch.full((5, 3), torch.nan))
    everything, rest = choose(V3_LIKE, logits, None), choose(V3_LIKE, logits, None, resident)
    has_slot = torch.isin(everything.ids, torch.tensor([3, 7, 8]))
    assert has_slot.any()
    assert torch.equal(rest.ids, torch.where(has_slot, -1, everything.ids))
    assert torch.equal(resident.ids, slots[everything.ids.long()])
    assert torch.equal(resident.weights, everything.weights)


def test_resident_experts_add_what_the_cpu_library_adds_for_them() -> None:
    hidden, intermediate, count = 32, 48, 4
    own = [random(count, *shape, seed=n) * shape[1] ** -0.5 for n, shape in enumerate([(48, 32), (48, 32), (32, 48)])]
    matrices = []
    for weights in own:
        matrix = _C.PackedMatrix(NUMBERS["F32"], *weights.shape)
        for number, each in enumerate(weights):
            matrix.pack(number, each.numpy().view(np.uint8).reshape(-1))
        matrices.append(matrix)
    x, weights = random(3, hidden), random(3, 2, seed=5)
    expected = np.empty((3, hidden), np.float32)
    ids = torch.tensor([[0, 3], [1, 2], [0, 1]])
    _C.Experts(*matrices).forward_routed(x.numpy(), ids.numpy(), weights.numpy(), expected)

    # Expert e lies in slot 3 - e; slots that nobody asks for may hold anything.
    slots = [torch.stack([as_panels(each) for each in group.flip(0)]) for group in own]
    resident = plain.Resident(torch.empty(0), (3 - ids).to(torch.int32), weights)
    scratch, out = torch.empty(3, 2, intermediate), torch.empty(3, hidden)
    plain.grouped_experts(*slots, ("F32", "F32"), x, resident, scratch, out)
    torch.testing.assert_close(out, torch.from_numpy(expected), **TOLERANCE)

    resident = resident._replace(ids=torch.tensor([[-1, 0], [-1, -1], [3, 2]], dtype=torch.int32))
    slots[0][0], weights[0, 0] = 255, torch.nan  # read for no row but the first one
    alone = plain.grouped_experts(*slots, ("F32", "F32"), x, resident, scratch, torch.empty(3, hidden))
    assert alone[0].isnan().all()
    assert torch.equal(alone[1], torch.zeros(hidden))
    torch.testing.assert_close(alone[2], out[2])


@pytest.mark.parametrize("name", ["Q4_K", "F16"])
def test_products_do_not_depend_on_how_much_is_dequantized_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_panels(name, stored_rows(name, 70, 512), 512)
    weights, x = panels.dequantize(packed, name, 70, 512).double(), random(3, 512)
    expected, largest = x.double() @ weights.T, x.double().abs() @ weights.abs().T
    for values in (1 << 24, 2 * 16 * 512):  # all at once, and two panels of five
        monkeypatch.setattr(plain, "_CHUNK_VALUES", values)
        error = (plain.linear(packed, name, x, torch.full((3, 70), torch.nan)) - expected).abs()
        assert (error <= 16 * 2.0**-24 * largest).all()  # float32 sums of 512 terms in another order


def test_results_are_added_to_the_residual_before_the_norm_of_transformers() -> None:
    norm = DeepseekV3RMSNorm(64, eps=1e-6)
    norm.weight.data = random(64, seed=9)
    residual, added = random(3, 64), [random(3, 64, seed=1), random(3, 64, seed=2)]
    summed = residual + added[0] + added[1]
    out = torch.empty(3, 64)
    plain.add_rms_norm(residual, added, norm.weight.detach(), 1e-6, out)
    assert torch.equal(residual, summed)
    torch.testing.assert_close(out, norm(summed).detach())
