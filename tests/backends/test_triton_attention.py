"""Absorbed MLA in Triton gives the softmax and sums of float64, however the keys are split."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; make test-triton installs it and runs these")

from transformers_kt.backends.triton.mla_decode import KEYS, mla_decode, scratch_floats, splits_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Float32 throughout: exp, products of up to 576 terms and sums over 200 keys of values near 1 round to a few 1e-6.
TOLERANCE = 2e-5


def reference(query: torch.Tensor, latents: torch.Tensor, ropes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    out = []
    for q, latent, rope, (first, end) in zip(
        query.double(), latents.double(), ropes.double(), ranges.tolist(), strict=True
    ):
        keys = torch.cat((latent, rope), dim=-1)[first:end]
        out.append(torch.softmax(q @ keys.T, dim=-1) @ latent[first:end])
    return torch.stack(out)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("heads", "latent_dim", "rope_dim"), [(4, 32, 8), (16, 64, 16), (20, 512, 64)])
@pytest.mark.parametrize("ranges", [[[0, 1], [0, 200]], [[13, 14], [7, 7 + KEYS]], [[0, 2 * KEYS], [3, 100]]])
def test_context_equals_that_of_float64(
    ranges: list[list[int]], heads: int, latent_dim: int, rope_dim: int, splits: int
) -> None:
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(2, heads, latent_dim + rope_dim, generator=generator).to(DEVICE) * latent_dim**-0.5
    buffer = torch.full((2, 260, latent_dim), torch.nan)  # keys that are not shown may hold anything
    rope_buffer = torch.full((2, 260, rope_dim), torch.nan)
    for row, (first, end) in enumerate(ranges):
        buffer[row, first:end] = torch.randn(end - first, latent_dim, generator=generator)
        rope_buffer[row, first:end] = torch.randn(end - first, rope_dim, generator=generator)
    latents, ropes = buffer.to(DEVICE)[:, :230], rope_buffer.to(DEVICE)[:, :230]
    shown = torch.tensor(ranges, dtype=torch.int32, device=DEVICE)
    scratch = torch.full((scratch_floats(2, heads, latent_dim, splits),), torch.nan, device=DEVICE)
    out = torch.full((2, heads, latent_dim), torch.nan, device=DEVICE)
    mla_decode(query, latents, ropes, shown, splits, scratch, out)
    torch.testing.assert_close(out.double(), reference(query, latents, ropes, shown), atol=TOLERANCE, rtol=0)


def test_long_contexts_are_split_over_the_processors_and_short_ones_are_not() -> None:
    assert splits_for(batch=1, heads=128, keys=1, processors=132) == 1
    assert splits_for(batch=1, heads=128, keys=32768, processors=132) == 33
    assert splits_for(batch=8, heads=128, keys=32768, processors=132) == 4
    assert splits_for(batch=64, heads=128, keys=32768, processors=132) == 1
