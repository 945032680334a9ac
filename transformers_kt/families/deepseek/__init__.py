"""DeepSeek V2, V3, R1 and models built like them."""

from __future__ import annotations

from typing import Any

from transformers_kt.families.base import Example, Family
from transformers_kt.families.deepseek.config import PLAIN, dims, mla, router
from transformers_kt.families.deepseek.metadata import config_values
from transformers_kt.families.deepseek.outline import GLM_LITE, OUTLINE, V2, V3, V32, YOUTU
from transformers_kt.families.deepseek.responses import RESPONSES
from transformers_kt.families.deepseek.tensors import (
    CORRECTION_BIAS,
    INDEXER_WEIGHTS,
    KEYS,
    MERGES,
    UNREAD,
    layer_rows,
    sizes,
)
from transformers_kt.families.deepseek.tokenizers import TOKENIZERS
from transformers_kt.families.tree import ModuleNode

_TOPK_METHODS = ("greedy", "group_limited_greedy")


def _attention_bias(node: ModuleNode, config: Any) -> str | None:
    return "attention_bias is set; DeepSeek's GGUF layout has no biases" if config.attention_bias else None


def _rope_in_halves(node: ModuleNode, config: Any) -> str | None:
    if getattr(config, "rope_interleave", True):
        return None
    return "rope_interleave is off; GGUF files of DeepSeek are interleaved"


def _other_routing(node: ModuleNode, config: Any) -> str | None:
    method = getattr(config, "topk_method", None)
    if not node.class_name.startswith(V2) or method in _TOPK_METHODS:
        return None
    return f"topk_method is {method!r}; supported: {', '.join(_TOPK_METHODS)}"


def _with_indexer(name: str, of_v2: str | None = None) -> tuple[str, ...]:
    """Those of V3.2 too, whose attention, and all that our attention needs beside it, stays transformers'."""
    return (*_of_all(name, of_v2), f"{V32}DeepseekV32{name}")


def _of_all(name: str, of_v2: str | None = None) -> tuple[str, ...]:
    others = (f"{V3}DeepseekV3{name}", f"{GLM_LITE}Glm4MoeLite{name}")
    dense = () if name in ("MoE", "Experts") else (f"{YOUTU}Youtu{name}",)
    return (f"{V2}DeepseekV2{of_v2 or name}", *others, *dense)


DEEPSEEK = Family(
    name="deepseek",
    about="DeepSeek V2, V3, R1 and models built like them",
    architectures=("deepseek2", "deepseek32"),
    model_types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "youtu"),
    # The folders of Kimi-K2 bring a class of their own, a copy of V3's, as the language model of K2.5 is one.
    aliases={"kimi_k2": "deepseek_v3"},
    language_parts={"kimi_k25": ("text_config", "deepseek_v3")},
    dims=dims,
    mla=mla,
    router=router,
    sizes=sizes,
    layer_rows=layer_rows,
    unread=UNREAD,
    merges=MERGES,
    zero_where_absent=(CORRECTION_BIAS,),
    keys_from=f"{KEYS}.weight",
    read_by_others=(INDEXER_WEIGHTS,),
    config_values=config_values,
    stock_classes={
        "attention": _of_all("Attention"),
        "moe": _with_indexer("MoE", of_v2="Moe"),
        "mlp": _with_indexer("MLP"),
        "experts": _with_indexer("Experts"),
        "norm": _with_indexer("RMSNorm"),
        "rotary": _of_all("RotaryEmbedding"),
        "decoder_layer": _of_all("DecoderLayer"),
        "base_model": _of_all("Model"),
    },
    limits={"attention": (_attention_bias, _rope_in_halves), "moe": (_other_routing,)},
    tokenizers=TOKENIZERS,
    examples={
        "DeepSeek-V2-Lite Q4_K_M": Example(10_700_000_000, 1_610_000_000),
        "DeepSeek-V2.5 Q4_K_M": Example(144_000_000_000, 12_600_000_000),
        "DeepSeek-R1 Q4_K_M": Example(406_000_000_000, 22_300_000_000),
    },
    responses=RESPONSES,
    plain=PLAIN,
    outline=OUTLINE,
)
