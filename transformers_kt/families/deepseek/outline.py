"""The trees of transformers' DeepSeek models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers_kt.families.deepseek.config import sparse_layers
from transformers_kt.families.outline import EMBEDDING, GENERATION, LAYER, LINEAR, MODEL, MODULE, SILU, Outline
from transformers_kt.families.tree import TORCH_CLASSES, ModelTree, ModuleNode

V2 = "transformers.models.deepseek_v2.modeling_deepseek_v2."
V3 = "transformers.models.deepseek_v3.modeling_deepseek_v3."
V32 = "transformers.models.deepseek_v32.modeling_deepseek_v32."
GLM_LITE = "transformers.models.glm4_moe_lite.modeling_glm4_moe_lite."
YOUTU = "transformers.models.youtu.modeling_youtu."
"""What the dotted names of transformers' classes begin with."""

SEEN = {
    "deepseek_v2": (
        "f354e01b3224c05505609c514b9c2eb92b7ed3965ff279f93d5594cbafb10134",  # 5.22
        "ba403d9aa84ec0fddb301887c22a77fd8f11a6c4e19fef3e3e67d8ac94b4b4e3",  # 5.23
        "d15ff3e1700771a9bd8565b281c7416e8e698e9209b1007b8ce6c3dcd16856b1",  # 5.24
    ),
    "deepseek_v3": (
        "dc0df54620d7f92b140e1c5f01227ae1f292a2ba4899cf38003161747c20801f",
        "e82f83084b8ff66589d7026741f4fd2ff0ef0682ccd87fe4a931283f200a950a",
        "2ee61edcee9be267a9832822d2fd7b50a87aa6da5d0ed2b0bcb6c7a700fedb2d",
    ),
    "glm4_moe_lite": (
        "efad17b5bda557ddeeb293897b2f741f43f5533a47601c3cfce85727b382acc3",
        "0bf69912852085471fc5a1d867a22c1a4272fc98ffe7a9e855bc72457d106e6a",
        "626156a9ad8da0a56e2cd8c517346bc8eb5e2d8cd13da2dd9fd9bd839e38fde7",
    ),
}
_ROPE_BUFFERS = ("inv_freq", "original_inv_freq")


class _Architecture(NamedTuple):
    prefix: str  # of the names of its classes
    moe: str
    router_buffers: tuple[str, ...]


_ARCHITECTURES = {
    "deepseek_v2": _Architecture(V2 + "DeepseekV2", "Moe", ()),
    "deepseek_v3": _Architecture(V3 + "DeepseekV3", "MoE", ("e_score_correction_bias",)),
    "glm4_moe_lite": _Architecture(GLM_LITE + "Glm4MoeLite", "MoE", ("e_score_correction_bias",)),
}


def _make(config: Any) -> ModelTree | None:
    if config.hidden_act != "silu" or config.attention_bias or getattr(config, "mlp_bias", False):
        return None
    has_low_rank_queries = config.q_lora_rank is not None
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        return None
    return _tree(architecture, sparse_layers(config), has_low_rank_queries)


@functools.cache
def _class_names() -> frozenset[str]:
    trees = [_tree(architecture, (False, True), has_low_rank_queries=True) for architecture in _ARCHITECTURES.values()]
    return frozenset(name for tree in trees for _, node in tree.modules() for name in node.classes)


def _tree(architecture: _Architecture, sparse: Sequence[bool], has_low_rank_queries: bool) -> ModelTree:
    def of_class(name: str, *bases: str, **facts: Any) -> ModuleNode:
        return ModuleNode((architecture.prefix + name, *bases, *MODULE), **facts)

    norm = of_class("RMSNorm", parameters=("weight",))
    query = {"q_a_proj": LINEAR, "q_a_layernorm": norm, "q_b_proj": LINEAR}
    attention = {
        **(query if has_low_rank_queries else {"q_proj": LINEAR}),
        "kv_a_proj_with_mqa": LINEAR,
        "kv_a_layernorm": norm,
        "kv_b_proj": LINEAR,
        "o_proj": LINEAR,
    }
    linears = {"gate_proj": LINEAR, "up_proj": LINEAR, "down_proj": LINEAR}
    mlp = of_class("MLP", children={**linears, "act_fn": SILU})
    experts = of_class("Experts", children={"act_fn": SILU}, parameters=("gate_up_proj", "down_proj"))
    router = of_class("TopkRouter", parameters=("weight",), buffers=architecture.router_buffers)
    moe = of_class(architecture.moe, children={"experts": experts, "gate": router, "shared_experts": mlp})
    self_attention = of_class("Attention", children=attention)

    def layer(feed_forward: ModuleNode) -> ModuleNode:
        children = {"self_attn": self_attention, "mlp": feed_forward}
        norms = {"input_layernorm": norm, "post_attention_layernorm": norm}
        return of_class("DecoderLayer", LAYER, children={**children, **norms})

    with_mlp, with_experts = layer(mlp), layer(moe)
    stack = {str(number): with_experts if has_experts else with_mlp for number, has_experts in enumerate(sparse)}
    parts = {
        "embed_tokens": EMBEDDING,
        "layers": ModuleNode((TORCH_CLASSES["ModuleList"], *MODULE), stack),
        "norm": norm,
        "rotary_emb": of_class("RotaryEmbedding", buffers=_ROPE_BUFFERS, unsaved=_ROPE_BUFFERS),
    }
    own = architecture.prefix + "PreTrainedModel"
    base = ModuleNode((architecture.prefix + "Model", own, *MODEL, "builtins.object"), parts)
    whole = (architecture.prefix + "ForCausalLM", own, *MODEL, *GENERATION, "builtins.object")
    return ModelTree(ModuleNode(whole, {"model": base, "lm_head": LINEAR}))


OUTLINE = Outline(_make, SEEN, _class_names)
