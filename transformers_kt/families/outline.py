"""The trees of transformers' DeepSeek models from their configs alone: `tree_of` without torch, in a millisecond.

Loading never looks here; it plans on the model that transformers makes. Tests hold both equal. What no test has seen,
a transformers whose DeepSeek files are others or a config with modules of other kinds, has no outline: then planning,
too, has transformers make the model.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from transformers_kt.families.tree import TORCH_CLASSES, V2, V3, ModelTree, ModuleNode

SEEN = {
    "deepseek_v2": (
        "ba403d9aa84ec0fddb301887c22a77fd8f11a6c4e19fef3e3e67d8ac94b4b4e3",  # 5.23
        "d15ff3e1700771a9bd8565b281c7416e8e698e9209b1007b8ce6c3dcd16856b1",  # 5.24
    ),
    "deepseek_v3": (
        "e82f83084b8ff66589d7026741f4fd2ff0ef0682ccd87fe4a931283f200a950a",
        "2ee61edcee9be267a9832822d2fd7b50a87aa6da5d0ed2b0bcb6c7a700fedb2d",
    ),
}
"""The `digest` of every transformers that the tests of outlines have passed with."""

_MODULE = (TORCH_CLASSES["Module"], "builtins.object")
_MODEL = (
    "transformers.modeling_utils.PreTrainedModel",
    TORCH_CLASSES["Module"],
    "transformers.modeling_utils.EmbeddingAccessMixin",
    "transformers.modeling_utils.ModuleUtilsMixin",
    "transformers.utils.hub.PushToHubMixin",
    "transformers.integrations.peft.PeftAdapterMixin",
    "transformers.distributed.mixin.DistributedMixin",
)
_GENERATION = (
    "transformers.generation.utils.GenerationMixin",
    "transformers.generation.continuous_batching.continuous_api.ContinuousMixin",
)
_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"

_LINEAR = ModuleNode((TORCH_CLASSES["Linear"], *_MODULE), parameters=("weight",))
_EMBEDDING = ModuleNode((TORCH_CLASSES["Embedding"], *_MODULE), parameters=("weight",))
_SILU = ModuleNode(("transformers.activations.SiLUActivation", *_MODULE))
_ROPE_BUFFERS = ("inv_freq", "original_inv_freq")


class _Architecture(NamedTuple):
    prefix: str  # of the names of its classes
    moe: str
    router_buffers: tuple[str, ...]


_ARCHITECTURES = {
    "deepseek_v2": _Architecture(V2 + "DeepseekV2", "Moe", ()),
    "deepseek_v3": _Architecture(V3 + "DeepseekV3", "MoE", ("e_score_correction_bias",)),
}


def outline(config: Any) -> ModelTree | None:
    """What ``tree_of(AutoModelForCausalLM.from_config(config))`` gives; None where that is not known for certain.

    ``config`` is a `PlainConfig` or transformers' own.
    """
    if config.hidden_act != "silu" or config.attention_bias or getattr(config, "mlp_bias", False):
        return None
    if digest(config.model_type) not in SEEN[config.model_type]:
        return None
    has_low_rank_queries = config.q_lora_rank is not None
    architecture = _ARCHITECTURES[config.model_type]
    return _outline(architecture, config.num_hidden_layers, config.first_k_dense_replace, has_low_rank_queries)


def is_known_class(name: str) -> bool:
    """Whether rules can match the class of that dotted name on outlines: one of theirs, or of torch.nn."""
    return name in _class_names() or name.startswith("torch.nn.")


def digest(model_type: str) -> str | None:
    """Of the files in which the installed transformers defines config and model; None where they are not as files."""
    package = importlib.util.find_spec("transformers")  # finds, does not import
    if package is None or package.origin is None:
        return None
    folder = Path(package.origin).parent / "models" / model_type
    try:
        files = [(folder / f"{kind}_{model_type}.py").read_bytes() for kind in ("configuration", "modeling")]
    except OSError:
        return None
    return hashlib.sha256(b"".join(files)).hexdigest()


@functools.cache
def _class_names() -> frozenset[str]:
    trees = [_outline(architecture, 2, 1, has_low_rank_queries=True) for architecture in _ARCHITECTURES.values()]
    return frozenset(name for tree in trees for _, node in tree.modules() for name in node.classes)


def _outline(architecture: _Architecture, layers: int, dense_layers: int, has_low_rank_queries: bool) -> ModelTree:
    def of_class(name: str, *bases: str, **facts: Any) -> ModuleNode:
        return ModuleNode((architecture.prefix + name, *bases, *_MODULE), **facts)

    norm = of_class("RMSNorm", parameters=("weight",))
    query = {"q_a_proj": _LINEAR, "q_a_layernorm": norm, "q_b_proj": _LINEAR}
    attention = {
        **(query if has_low_rank_queries else {"q_proj": _LINEAR}),
        "kv_a_proj_with_mqa": _LINEAR,
        "kv_a_layernorm": norm,
        "kv_b_proj": _LINEAR,
        "o_proj": _LINEAR,
    }
    linears = {"gate_proj": _LINEAR, "up_proj": _LINEAR, "down_proj": _LINEAR}
    mlp = of_class("MLP", children={**linears, "act_fn": _SILU})
    experts = of_class("Experts", children={"act_fn": _SILU}, parameters=("gate_up_proj", "down_proj"))
    router = of_class("TopkRouter", parameters=("weight",), buffers=architecture.router_buffers)
    moe = of_class(architecture.moe, children={"experts": experts, "gate": router, "shared_experts": mlp})
    self_attention = of_class("Attention", children=attention)

    def layer(feed_forward: ModuleNode) -> ModuleNode:
        children = {"self_attn": self_attention, "mlp": feed_forward}
        norms = {"input_layernorm": norm, "post_attention_layernorm": norm}
        return of_class("DecoderLayer", _LAYER, children={**children, **norms})

    dense, sparse = layer(mlp), layer(moe)
    stack = {str(number): dense if number < dense_layers else sparse for number in range(layers)}
    parts = {
        "embed_tokens": _EMBEDDING,
        "layers": ModuleNode((TORCH_CLASSES["ModuleList"], *_MODULE), stack),
        "norm": norm,
        "rotary_emb": of_class("RotaryEmbedding", buffers=_ROPE_BUFFERS, unsaved=_ROPE_BUFFERS),
    }
    own = architecture.prefix + "PreTrainedModel"
    base = ModuleNode((architecture.prefix + "Model", own, *_MODEL, "builtins.object"), parts)
    whole = (architecture.prefix + "ForCausalLM", own, *_MODEL, *_GENERATION, "builtins.object")
    return ModelTree(ModuleNode(whole, {"model": base, "lm_head": _LINEAR}))
