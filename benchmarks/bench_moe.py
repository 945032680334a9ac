"""One MoE layer of DeepSeek-V3 in one call: 1 token against the memory, 512 tokens against the multipliers.

    make bench BENCH="-k layer"

Real widths (7168, experts of 2048, a shared expert), 64 experts of 256, of which a token takes 8; random weights. For
one token, each call has another token, so its experts come from memory. "routed" is the routed experts alone, each
token's 8 drawn at random; "layer" is all: router, routed and shared experts.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from random_experts import V3, random_experts
from shares import Measure

import transformers_kt._C as _C

HIDDEN, INTERMEDIATE, TOP_K = V3
EXPERTS = 64
GROUPS, TOP_GROUPS = 8, 4
MANY_TOKENS = 512
DIFFERENT_TOKENS = 64  # for one at a time
TYPES = (("Q4_K", "Q6_K"), ("Q4_K", "Q4_K"), ("Q8_0", "Q8_0"))  # of gate and up, and of down


class Layer(NamedTuple):
    routed: _C.Experts
    block: _C.MoeBlock
    expert_bytes: int
    router_bytes: int


def float_matrix(values: np.ndarray[Any, np.dtype[np.float32]]) -> _C.PackedMatrix:
    packed = _C.PackedMatrix(int(GGMLQuantizationType.F32), 1, *values.shape)
    packed.pack_floats(values[None])
    return packed


@pytest.fixture(scope="module", params=TYPES, ids="-".join)
def layer(request: pytest.FixtureRequest) -> Layer:
    experts, shared = (random_experts(V3, count, *request.param) for count in (EXPERTS, 1))
    scores = np.random.default_rng(2).standard_normal((EXPERTS, HIDDEN), dtype=np.float32) * HIDDEN**-0.5
    router = float_matrix(scores)
    block = _C.MoeBlock(
        router, np.zeros(EXPERTS, np.float32), experts.routed, shared.routed,
        sigmoid=True, groups=GROUPS, top_groups=TOP_GROUPS, top_k=TOP_K, normalize=True, scale=2.5,
    )  # fmt: skip
    return Layer(experts.routed, block, experts.expert_bytes, router.nbytes)


@pytest.mark.parametrize("tokens", [1, MANY_TOKENS])
@pytest.mark.parametrize("part", ["layer", "routed"])
def test_moe(layer: Layer, part: str, tokens: int, measure: Measure) -> None:
    rng = np.random.default_rng(1)
    many = rng.standard_normal((MANY_TOKENS, HIDDEN), dtype=np.float32)
    out, logits = np.empty_like(many), np.empty((MANY_TOKENS, EXPERTS), np.float32)
    indices = np.argsort(rng.random((MANY_TOKENS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int64)
    weights = np.full((MANY_TOKENS, TOP_K), 1 / TOP_K, np.float32)
    turn = itertools.cycle([slice(i, i + 1) for i in range(DIFFERENT_TOKENS)] if tokens == 1 else [slice(None)])

    def whole_layer() -> None:
        layer.block.forward(many[next(turn)], out[:tokens], logits[:tokens])

    def routed_experts() -> None:
        those = next(turn)
        layer.routed.forward_routed(many[those], indices[those], weights[those], out[:tokens])

    shared = 1 if part == "layer" else 0
    used = TOP_K if tokens == 1 else EXPERTS
    measure(
        whole_layer if part == "layer" else routed_experts,
        nbytes=(used + shared) * layer.expert_bytes + shared * layer.router_bytes,
        operations=tokens * (TOP_K + shared) * 2 * 3 * HIDDEN * INTERMEDIATE,
    )
