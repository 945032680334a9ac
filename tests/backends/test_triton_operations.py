"""The operations that models on a device call give the same by kernels, interpreted where there is no GPU, and by their
plain forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_matrices import packed_panels, stored_rows

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.families.base import Router

pytest.importorskip("triton")

HIDDEN, ROWS = 64, 40
# Of the largest result: three sums of at most 64 products in float32, in another order, are 2^-24 times as many off.
TOLERANCE = 1e-5


def matrix(device: FakeDevice, count: int, rows: int, cols: int) -> DeviceMatrix:
    panels = [packed_panels("Q8_0", stored_rows("Q8_0", rows, cols), cols) for _ in range(count)]
    return DeviceMatrix(device, "Q8_0", torch.stack(panels), rows, cols)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def products(device: FakeDevice, tokens: int) -> list[torch.Tensor]:
    one, each = matrix(device, 1, ROWS, HIDDEN), matrix(device, 2, ROWS, HIDDEN)
    return [one.multiply(values(tokens, HIDDEN)), each.multiply_each(values(tokens, 2, HIDDEN))]


def norm(device: FakeDevice, tokens: int) -> list[torch.Tensor]:
    return [operations.rms_norm(values(2, tokens, HIDDEN)[..., :48], values(48), 1e-6, device)]


def experts(device: FakeDevice, tokens: int) -> list[torch.Tensor]:
    router = Router(sigmoid=True, groups=2, top_groups=1, top_k=2, normalize=True, scale=2.5)
    x = values(tokens, HIDDEN)
    staging = Staging.of(torch.empty(Staging.words(tokens, HIDDEN, 2)), tokens, HIDDEN, 2)
    operations.stage(x, values(8, HIDDEN), values(8), router, staging, device)
    gate, up, down = (matrix(device, 8, *shape) for shape in ((32, HIDDEN), (32, HIDDEN), (HIDDEN, 32)))
    return [*staging, operations.mix_experts(x, staging.ids, staging.weights, gate, up, down)]


def steps(device: FakeDevice, rows: int) -> list[torch.Tensor]:
    """A token a row: norms, rotation and appending, then attention over what is there, MLPs between."""
    latents, ropes = values(rows, 20, 32), values(20, rows, 16).transpose(0, 1).contiguous()
    table, key, query = values(rows, 16), values(rows, 32 + 16), values(rows, 24)
    places = torch.tensor([9, 4, 10], dtype=torch.int32).repeat(rows, 1)
    lengths, ranges = places[:, 0], places[:, 1:]
    normed = operations.norm_rope_append(
        query, values(24), key, values(32), 1e-6, table, lengths, latents, ropes, device
    )
    heads = values(rows, 3, 32), values(rows, 3, 24)[..., :16]
    assert normed is not None
    return [normed, operations.attend_once(*heads, table, latents, ropes, ranges, 0.25, device)]


def feed_forward(device: FakeDevice, tokens: int) -> list[torch.Tensor]:
    gate, up, down = (matrix(device, 1, *shape) for shape in ((32, HIDDEN), (32, HIDDEN), (HIDDEN, 32)))
    residual, normed = values(tokens, HIDDEN), torch.empty(tokens, HIDDEN)
    out = operations.swiglu(residual, gate, up, down)
    operations.add_rms_norm(residual, out, values(HIDDEN), 1e-6, normed, device)
    return [out, residual, normed]


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("compute", [products, norm, experts, steps, feed_forward], ids=lambda each: each.__name__)
def test_by_kernels_an_operation_gives_what_its_plain_form_does(
    compute: Callable[[FakeDevice, int], list[torch.Tensor]], tokens: int
) -> None:
    by_kernels, plainly = (
        compute(FakeDevice(0, 1 << 30, has_kernels=has_kernels), tokens) for has_kernels in (True, False)
    )
    for found, expected in zip(by_kernels, plainly, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * largest)
