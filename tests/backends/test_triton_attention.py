"""Absorbed MLA in Triton gives the softmax and sums of float64, however the keys are split."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; make test-triton installs it and runs these")

from transformers_kt.backends.gpu.plain import rotated
from transformers_kt.backends.triton.mla_decode import KEYS, mla_decode, scratch_floats, splits_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Float32 throughout: exp, products of up to 576 terms and sums over 200 keys of values near 1 round to a few 1e-6.
TOLERANCE = 2e-5


def reference(query: torch.Tensor, latents: torch.Tensor, ropes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    out, tokens = [], len(query) // len(latents)
    for row, (q, (first, end)) in enumerate(zip(query.double(), ranges.tolist(), strict=True)):
        latent, rope = (each[row // tokens, first:end].double() for each in (latents, ropes))
        out.append(torch.softmax(q @ torch.cat((latent, rope), dim=-1).T, dim=-1) @ latent)
    return torch.stack(out)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("heads", "latent_dim", "rope_dim"), [(4, 32, 8), (20, 512, 64)])
@pytest.mark.parametrize(
    "ranges",
    [
        [[0, 1], [0, 200]],
        [[13, 14], [7, 7 + KEYS]],
        [[0, 2 * KEYS], [3, 100]],
        [[0, 40], [0, 41], [0, 42], [5, 17], [5, 18], [5, 19]],  # three tokens of each sequence
        [[9, 9], [9, 10], [0, 0], [3, 4]],  # some see nothing
    ],
)
def test_context_equals_that_of_float64(
    ranges: list[list[int]], heads: int, latent_dim: int, rope_dim: int, splits: int
) -> None:
    generator = torch.Generator().manual_seed(heads)
    tokens = len(ranges) // 2
    query = torch.randn(2 * tokens, heads, latent_dim + rope_dim, generator=generator).to(DEVICE)
    buffer = torch.full((2, 260, latent_dim), torch.nan)  # keys that are not shown may hold anything
    rope_buffer = torch.full((2, 260, rope_dim), torch.nan)
    for row in range(2):
        own = ranges[row * tokens : (row + 1) * tokens]
        first, end = min(own)[0], max(end for _first, end in own)
        buffer[row, first:end] = torch.randn(end - first, latent_dim, generator=generator)
        rope_buffer[row, first:end] = torch.randn(end - first, rope_dim, generator=generator)
    latents, ropes = buffer.to(DEVICE)[:, :230], rope_buffer.to(DEVICE)[:, :230]
    shown = torch.tensor(ranges, dtype=torch.int32, device=DEVICE)
    angles = torch.randn(2 * tokens, rope_dim // 2, generator=generator)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    parts = query[..., :latent_dim], query[..., latent_dim:]
    turned = torch.cat((parts[0], rotated(parts[1], table)), dim=-1) * latent_dim**-0.5
    scratch = torch.full((scratch_floats(2 * tokens, heads, latent_dim, splits),), torch.nan, device=DEVICE)
    out = torch.full((2 * tokens, heads, latent_dim), torch.nan, device=DEVICE)
    mla_decode(*parts, table, latents, ropes, shown, latent_dim**-0.5, splits, scratch, out)
    torch.testing.assert_close(out.double(), reference(turned, latents, ropes, shown), atol=TOLERANCE, rtol=0)


def test_long_contexts_are_split_over_the_processors_and_short_ones_are_not() -> None:
    assert splits_for(rows=1, heads=128, keys=1, processors=132) == 1
    assert splits_for(rows=1, heads=128, keys=32768, processors=132) == 33
    assert splits_for(rows=8, heads=128, keys=32768, processors=132) == 4
    assert splits_for(rows=64, heads=128, keys=32768, processors=132) == 1
