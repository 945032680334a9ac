"""Triton kernels of a layer give the numbers of the plain torch forms: interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; make test-triton installs it and runs these")

from gpu_matrices import packed_panels, random_values, stored_rows

from transformers_kt.backends.gpu import panels, plain
from transformers_kt.backends.gpu.panels import LAYOUTS
from transformers_kt.backends.triton.gemm import gemm
from transformers_kt.backends.triton.gemv import gemv_per_head
from transformers_kt.backends.triton.grouped_experts import grouped_experts
from transformers_kt.backends.triton.norm import add_rms_norm, rms_norm
from transformers_kt.backends.triton.norm_rope_append import norm_rope_append
from transformers_kt.backends.triton.router_stage import router_stage
from transformers_kt.backends.triton.swiglu import swiglu
from transformers_kt.backends.triton.unpack import KINDS
from transformers_kt.families.base import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Both sides are float32; exp, roots and sums of up to 100 terms in another order round to a few 1e-6 of values near 1.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# Of the sum of absolute products: sums of float32 in another order (test_triton_kernels.py).
SUM_TOLERANCE = 16 * 2.0**-24


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_values(*shape, seed=seed).to(DEVICE)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else -99, dtype=dtype, device=DEVICE)


def matrices(name: str, count: int, rows: int, cols: int) -> torch.Tensor:
    """uint8 (count, panels, panel bytes)."""
    stored = stored_rows(name, count * rows, cols).reshape(count, rows, -1)
    return torch.stack([packed_panels(name, each, cols) for each in stored]).to(DEVICE)


@pytest.mark.parametrize("added", [0, 1, 2])
@pytest.mark.parametrize("cols", [64, 100])
def test_norms_after_additions(cols: int, added: int) -> None:
    weight, results = random(cols, seed=1), [random(3, cols, seed=2 + n) for n in range(added)]
    ours, theirs = random(3, cols + 7)[:, :cols], random(3, cols + 7)[:, :cols].clone()
    got, expected = unwritten(3, cols), unwritten(3, cols)
    if added:
        add_rms_norm(ours, results, weight, 1e-6, got)
        plain.add_rms_norm(theirs, results, weight, 1e-6, expected)
    else:
        rms_norm(ours, weight, 1e-6, got)
        plain.rms_norm(theirs, weight, 1e-6, expected)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("has_query", [True, False])
@pytest.mark.parametrize(("batch", "tokens"), [(3, 1), (2, 3)])
def test_keys_are_normed_turned_and_appended(batch: int, tokens: int, has_query: bool) -> None:
    rows, q_lora, latent, rope = batch * tokens, 24, 32, 6
    compressed = random(rows, q_lora + latent + rope)
    norms, table = (random(q_lora, seed=1), random(latent, seed=2)), random(rows, rope, seed=3)
    lengths = torch.tensor([4, 0, 2][:batch], dtype=torch.int32, device=DEVICE)
    results = []
    for operation in (norm_rope_append, plain.norm_rope_append):
        out, caches = unwritten(rows, q_lora), (unwritten(batch, 9, latent), unwritten(batch, 9, rope))
        query = (compressed[:, :q_lora], norms[0], out) if has_query else (None, None, None)
        operation(*query, compressed[:, q_lora:], norms[1], 1e-6, table, lengths, *caches)
        results.append((out, *caches))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, **TOLERANCE)
    assert results[0][1][:, :, 0].isfinite().sum() == rows  # and nothing else was written


@pytest.mark.parametrize("has_slots", [True, False])
@pytest.mark.parametrize("levels", [3, None])
@pytest.mark.parametrize(
    ("router", "experts"),
    [
        (Router(sigmoid=True, groups=4, top_groups=2, top_k=3, normalize=True, scale=2.5), 16),
        (Router(sigmoid=False, groups=3, top_groups=2, top_k=4, normalize=False, scale=16.0), 15),
        (Router(sigmoid=True, groups=1, top_groups=1, top_k=2, normalize=False, scale=1.0), 12),
        (Router(sigmoid=False, groups=1, top_groups=1, top_k=6, normalize=True, scale=1.0), 10),
    ],
)
def test_experts_are_chosen_and_staged(router: Router, experts: int, levels: int | None, has_slots: bool) -> None:
    rows, hidden = 6, 1030
    logits, x = random(rows, experts), random(rows, hidden, seed=1)
    bias = 0.5 * random(experts, seed=2) if router.sigmoid and levels is None else None
    if levels is not None:
        logits = (levels * logits.sigmoid()).floor()  # few different values: ties between experts and between groups
    logits[4] = torch.nan
    logits[5, 1] = torch.nan
    slots = torch.full((experts,), -1, dtype=torch.int32, device=DEVICE)
    slots[::3] = torch.arange(len(slots[::3]), dtype=torch.int32, device=DEVICE)
    results = []
    for operation in (router_stage, plain.router_stage):
        block = unwritten(plain.Staging.words(rows, hidden, router.top_k)).cpu()
        staging = plain.Staging.of(block.pin_memory() if DEVICE == "cuda" else block, rows, hidden, router.top_k)
        chosen = unwritten(rows, router.top_k, dtype=torch.int32), unwritten(rows, router.top_k)
        operation(logits, bias, router, x, staging, plain.Resident(slots, *chosen) if has_slots else None)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        results.append((*staging, *chosen))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_gate_and_up_become_one() -> None:
    gate_up, got, expected = 4 * random(3, 2 * 1100), unwritten(3, 1100), unwritten(3, 1100)
    torch.testing.assert_close(swiglu(gate_up, got), plain.swiglu(gate_up, expected), **TOLERANCE)


@pytest.mark.parametrize(
    ("types", "cols", "intermediate"),
    [(("Q4_K", "Q8_0"), 256, 32), (("Q8_0", "Q6_K"), 32, 256), (("F16", "BF16"), 40, 24)],
)
def test_experts_in_slots_are_added_and_others_left_out(types: tuple[str, str], cols: int, intermediate: int) -> None:
    weights = random(3, 2, seed=1)
    ids = torch.tensor([[2, -1], [-1, -1], [0, 2]], dtype=torch.int32, device=DEVICE)
    resident = plain.Resident(unwritten(1, dtype=torch.int32), ids, weights)
    gate, up = (matrices(types[0], 3, intermediate, cols) for _ in range(2))
    down, x = matrices(types[1], 3, cols, intermediate), random(3, cols, seed=2)
    results = []
    for operation in (grouped_experts, plain.grouped_experts):
        scratch = unwritten(3, 2, intermediate)
        results.append(operation(gate, up, down, types, x, resident, scratch, unwritten(3, cols)))
    assert torch.equal(results[0][1], torch.zeros(cols, device=DEVICE))
    largest = results[1].abs().amax(dim=-1, keepdim=True)
    assert ((results[0] - results[1]).abs() <= 1e-5 * largest).all()


@pytest.mark.parametrize(("tokens", "blocks", "rows"), [(9, 1, 33), (16, 5, 16)])
@pytest.mark.parametrize("name", KINDS)
def test_products_of_many_rows_lie_within_their_bound(name: str, tokens: int, blocks: int, rows: int) -> None:
    cols = blocks * LAYOUTS[name].block_elements
    packed = packed_panels(name, stored_rows(name, rows, cols), cols).to(DEVICE)
    weights, x = panels.dequantize(packed, name, rows, cols).double(), random(tokens, cols)
    if DEVICE == "cuda":  # tensor cores multiply what the interpreter cannot round to
        x, weights = x.bfloat16(), weights.bfloat16().double()
    error = (gemm(packed, name, x, unwritten(tokens, rows)).double() - x.double() @ weights.T).abs()
    assert (error <= SUM_TOLERANCE * (x.double().abs() @ weights.abs().T)).all()


@pytest.mark.parametrize("name", ["Q8_0", "F16"])
def test_each_head_has_its_own_matrix(name: str) -> None:
    of_heads, x = matrices(name, 3, 20, 32), random(5, 3, 40)[..., :32]
    got, expected = unwritten(5, 3, 24)[..., :20], unwritten(5, 3, 24)[..., :20]
    gemv_per_head(of_heads, name, x, got)
    plain.linear_per_head(of_heads, name, x, expected)
    torch.testing.assert_close(got, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
