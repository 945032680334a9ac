"""Modules whose weights are GGUF blocks, one for each of the operations that placement rules may name."""

from __future__ import annotations

from transformers_kt.modules.base import KtModule
from transformers_kt.modules.embedding import KtEmbedding
from transformers_kt.modules.experts import KtExperts, KtMlp, KtMoe
from transformers_kt.modules.gpu.experts import KtGpuExperts, KtGpuMlp, KtGpuMoe
from transformers_kt.modules.gpu.mla import KtGpuMlaAttention
from transformers_kt.modules.gpu.simple import KtGpuEmbedding, KtGpuLinear, KtGpuRMSNorm, KtGpuRotaryEmbedding
from transformers_kt.modules.linear import KtLinear
from transformers_kt.modules.mla import KtMlaAttention
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.rotary import KtRotaryEmbedding

MODULES: dict[str, type[KtModule]] = {
    module.operation.op: module
    for module in (
        *(KtMlaAttention, KtMoe, KtMlp, KtExperts, KtLinear, KtEmbedding, KtRMSNorm, KtRotaryEmbedding),
        *(KtGpuMlaAttention, KtGpuMoe, KtGpuMlp, KtGpuExperts),
        *(KtGpuLinear, KtGpuEmbedding, KtGpuRMSNorm, KtGpuRotaryEmbedding),
    )
}
"""Name of the operation -> module."""

__all__ = [
    "MODULES",
    "KtEmbedding",
    "KtExperts",
    "KtLinear",
    "KtMlaAttention",
    "KtMlp",
    "KtModule",
    "KtMoe",
    "KtRMSNorm",
    "KtRotaryEmbedding",
]
