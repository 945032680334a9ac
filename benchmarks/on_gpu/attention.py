"""Attention over latents of DeepSeek-V3: one token over long caches, by splits, and prompts, absorbed and expanded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import attention, functional

from transformers_kt.backends.gpu import operations, plain

from .setting import Setting

HEADS, LATENT, ROPE, NOPE, VALUE = 128, 512, 64, 128, 128
_TINY = (2, 32, 16, 16, 16)
_BACKENDS = {
    "cuDNN": attention.SDPBackend.CUDNN_ATTENTION,
    "flash": attention.SDPBackend.FLASH_ATTENTION,
    "memory-efficient": attention.SDPBackend.EFFICIENT_ATTENTION,
    "math": attention.SDPBackend.MATH,
}


def measure(setting: Setting) -> None:
    for keys in setting.size((1024, 8192, 32768), (40,)):
        for splits in _splits(setting, keys):
            _measure_decode(setting, keys, splits)
    for tokens in setting.size((512, 2048, 4096), (24,)):
        _measure_prompt(setting, tokens)


def _splits(setting: Setting, keys: int) -> Iterator[int]:
    if setting.is_fake:
        yield from (1, 2)
        return
    processors = torch.cuda.get_device_properties(setting.device.torch_device).multi_processor_count
    most = 2 * processors * 16 // HEADS  # two programs a processor
    yield from sorted({min(keys // 64, splits) for splits in (most // 4, most // 2, most, 2 * most, 4 * most)})


def _measure_decode(setting: Setting, keys: int, splits: int) -> None:
    heads, latent, rope, _, _ = setting.size((HEADS, LATENT, ROPE, NOPE, VALUE), _TINY)
    form: Any = plain
    if setting.device.has_kernels:
        from transformers_kt.backends.triton import mla_decode as form
    nbytes = keys * (latent + rope) * setting.device.activations.itemsize
    caches = [(setting.values(1, keys, latent), setting.values(1, keys, rope)) for _ in range(setting.copies(nbytes))]
    query, query_rope = (setting.values(1, heads, width, dtype=torch.float32) for width in (latent, rope))
    ranges = setting.device.empty((1, 2), torch.int32).copy_(torch.tensor([[0, keys]]))
    scratch = setting.device.empty((splits * heads * (latent + 2),), torch.float32)
    out = setting.device.empty((1, heads, latent), torch.float32)

    def decode(latents: torch.Tensor, ropes: torch.Tensor) -> None:
        form.mla_decode(query, query_rope, None, latents, ropes, ranges, 0.1, splits, scratch, out)

    seconds = setting.seconds([partial(decode, *cache) for cache in caches])
    row = {"keys": keys, "splits": splits, "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9}
    setting.report.add("Attention of one token", row)


def _measure_prompt(setting: Setting, tokens: int) -> None:
    """Queries of a prompt over its own keys."""
    heads, latent, rope, nope, value = setting.size((HEADS, LATENT, ROPE, NOPE, VALUE), _TINY)
    query = setting.values(1, tokens, heads, latent + rope)
    latents, ropes = setting.values(1, tokens, latent), setting.values(1, tokens, rope)
    ends = torch.arange(1, tokens + 1, dtype=torch.int32, device=latents.device)
    visible = torch.stack((torch.zeros_like(ends), ends), dim=-1).unsqueeze(0)
    absorbed = partial(operations.attend, query, latents, ropes, visible)
    seconds = setting.seconds([absorbed], is_captured=False)
    setting.report.add("Attention of a prompt", {"tokens": tokens, "how": "absorbed, torch", "ms": seconds * 1e3})
    q, k, v = (setting.values(1, heads, tokens, width) for width in (nope + rope, nope + rope, value))
    for name, backend in _BACKENDS.items():
        try:
            with attention.sdpa_kernel(backend):
                expanded = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True)
                seconds = setting.seconds([expanded], is_captured=False)
        except RuntimeError as error:
            row = {"tokens": tokens, "how": f"expanded, {name}", "refused": str(error).splitlines()[0][:80]}
        else:
            row = {"tokens": tokens, "how": f"expanded, {name}", "ms": seconds * 1e3}
        setting.report.add("Attention of a prompt", row)
