"""Modules whose weights are GGUF blocks, and the operations that placement rules may name."""

from __future__ import annotations

from transformers_kt.modules.attention import KtMlaAttention
from transformers_kt.modules.base import KtModule
from transformers_kt.modules.embedding import KtEmbedding
from transformers_kt.modules.experts import KtExperts, KtMlp, KtMoe
from transformers_kt.modules.linear import KtLinear
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.rotary import KtRotaryEmbedding

OPERATIONS: dict[str, type[KtModule]] = {
    module.op: module
    for module in (KtMlaAttention, KtMoe, KtMlp, KtExperts, KtLinear, KtEmbedding, KtRMSNorm, KtRotaryEmbedding)
}
"""Operation name -> module, coarse before fine."""

__all__ = [
    "OPERATIONS",
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
