"""Attention over expanded keys and values gives what absorbed attention does, in any chunks."""

from __future__ import annotations

import pytest
import torch
from gpu_matrices import packed_panels, random_values, stored_rows

from transformers_kt.backends.gpu import expanded_attention, operations
from transformers_kt.backends.gpu.expanded_attention import attend_expanded, is_less_work
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.backends.gpu.matrices import DeviceMatrix

BATCH, TOKENS, KEYS, HEADS, LATENT, NOPE, ROPE, VALUE = 2, 9, 14, 5, 64, 32, 8, 24
# Of the largest value: sums of up to 64 products in float32, one after another in two orders.
TOLERANCE = 1e-5


def matrices(device: FakeDevice, rows: int, cols: int) -> DeviceMatrix:
    stored = stored_rows("Q8_0", HEADS * rows, cols).reshape(HEADS, rows, -1)
    return DeviceMatrix(device, "Q8_0", torch.stack([packed_panels("Q8_0", each, cols) for each in stored]), rows, cols)


def visible(kind: str) -> torch.Tensor:
    """Causal, the first sequence without its first 3 keys, the second without any for its first query; as ranges of
    keys or as a mask."""
    ends = torch.arange(KEYS - TOKENS + 1, KEYS + 1, dtype=torch.int32).repeat(BATCH, 1)
    starts = torch.tensor([[3], [0]], dtype=torch.int32).repeat(1, TOKENS)
    starts[1, 0] = KEYS
    ranges = torch.stack((starts, ends), dim=-1)
    return ranges if kind == "ranges" else operations.seen_keys(ranges, KEYS)


@pytest.mark.parametrize(("expanded_bytes", "scores"), [(1 << 27, 1 << 26), (2 * BATCH * KEYS * 64 * 4, 300)])
@pytest.mark.parametrize("kind", ["ranges", "mask"])
def test_it_equals_absorbed_attention(
    kind: str, expanded_bytes: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expanded_attention, "_EXPANDED_BYTES", expanded_bytes)
    monkeypatch.setattr(expanded_attention, "_SCORES", scores)
    device = FakeDevice(0, 1 << 30)
    k_b, v_b = matrices(device, LATENT, NOPE), matrices(device, VALUE, LATENT)
    plain, rotary = (random_values(BATCH, TOKENS, HEADS, width, seed=width) for width in (NOPE, ROPE))
    latents, ropes = (random_values(BATCH, KEYS, width, seed=1 + width) for width in (LATENT, ROPE))
    got = attend_expanded(plain, rotary, latents, ropes, visible(kind), k_b, v_b, 0.01)
    absorbed = k_b.multiply_each(plain.flatten(0, 1)).view(BATCH, TOKENS, HEADS, LATENT)
    contexts = operations.attend(0.01 * torch.cat((absorbed, rotary), dim=-1), latents, ropes, visible(kind))
    expected = v_b.multiply_each(contexts.flatten(0, 1)).view(BATCH, TOKENS, HEADS, VALUE)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    assert (got[1, 0] == 0).all()


def test_prompts_of_deepseek_v3_are_expanded_from_171_tokens_on() -> None:
    assert [is_less_work(tokens, 512, 128, 128) for tokens in (1, 170, 171)] == [False, False, True]
