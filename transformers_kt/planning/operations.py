"""What can compute the modules of a model: names, tensors and types, bytes. Their modules are in `modules`.

Plans are made of this alone. Loading asks the same questions before it takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers_kt._C as _C
from transformers_kt.errors import UnsupportedModelError, UnsupportedTypeError
from transformers_kt.families.tree import TORCH_CLASSES, V2, V3, ModuleNode
from transformers_kt.gguf.reader import GgmlType, TensorInfo

KERNEL_TYPES: dict[int, str] = {number: name for name, number, _elements, _nbytes in _C.weight_types()}
"""ggml type number -> name, for every type that can be multiplied with."""

_TOPK_METHODS = ("greedy", "group_limited_greedy")
_STATIC_ROPE_TYPES = ("default", "linear", "yarn")

Tensors = Mapping[str, TensorInfo]
"""Role, a path relative to the module, -> tensor."""


def _nothing_more(tensors: Tensors, config: Any) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Operation:
    """``op`` is its name in rules, ``replaces`` the dotted names of the stock classes that it can stand for.

    ``roles`` are paths, relative to the module, of every tensor that it can consume; of the matrices among them those
    ``of_any_type`` need no kernel. ``limits`` say why a module of a config is none it can stand for, or None.
    ``more_bytes`` is what its weights take beyond what they take in the file.
    """

    op: str
    replaces: tuple[str, ...]
    roles: frozenset[str]
    of_any_type: frozenset[str] = frozenset()
    limits: tuple[Callable[[ModuleNode, Any], str | None], ...] = ()
    more_bytes: Callable[[Tensors, Any], int] = _nothing_more

    def require_supported(self, node: ModuleNode, config: Any, path: str) -> None:
        """Raise `UnsupportedModelError` where it cannot stand for the stock module ``node`` at ``path``."""
        for limit in self.limits:
            if (reason := limit(node, config)) is not None:
                raise UnsupportedModelError(f"{path}: {reason}")

    def require_use(self, roles: Iterable[str], path: str) -> None:
        """Raise `UnsupportedModelError` unless it consumes all of ``roles``."""
        if unused := set(roles) - self.roles:
            raise UnsupportedModelError(
                f"{self.op} at {path} has no use for {', '.join(sorted(unused))}; keep that module with a rule "
                "(op: torch)"
            )

    def check_types(self, tensors: Tensors) -> None:
        """Raise `UnsupportedTypeError` where a matrix that needs a kernel has a type without."""
        for role, tensor in tensors.items():
            if len(tensor.shape) > 1 and role not in self.of_any_type:
                _require_kernel(tensor)

    def memory_needed(self, tensors: Tensors, config: Any) -> int:
        """Bytes that loading ``tensors`` will take."""
        return sum(tensor.nbytes for tensor in tensors.values()) + self.more_bytes(tensors, config)


def is_wide(tensor: TensorInfo) -> bool:
    """Whether the tensor may hold what float16 does not."""
    return tensor.ggml_type in (GgmlType.F32, GgmlType.BF16)


def _require_kernel(tensor: TensorInfo) -> None:
    if int(tensor.ggml_type) in KERNEL_TYPES:
        return
    raise UnsupportedTypeError(
        f"{tensor.path}: tensor {tensor.name} has type {tensor.ggml_type.name}, for which there is no kernel; "
        f"types with kernels: {', '.join(KERNEL_TYPES.values())}. Use a file quantized to one of these"
    )


# --- Limits ----------------------------------------------------------------------------------------------------------


def _other_activation(node: ModuleNode, config: Any) -> str | None:
    """SiLU is the only one that the kernels compute."""
    if config.hidden_act == "silu":
        return None
    return f"hidden_act is {config.hidden_act!r}; only 'silu' is supported"


def _other_routing(node: ModuleNode, config: Any) -> str | None:
    method = getattr(config, "topk_method", None)
    if not node.class_name.startswith(V2) or method in _TOPK_METHODS:
        return None
    return f"topk_method is {method!r}; supported: {', '.join(_TOPK_METHODS)}"


def _attention_bias(node: ModuleNode, config: Any) -> str | None:
    return "attention_bias is set; DeepSeek's GGUF layout has no biases" if config.attention_bias else None


def _rope_in_halves(node: ModuleNode, config: Any) -> str | None:
    if getattr(config, "rope_interleave", True):
        return None
    return "rope_interleave is off; GGUF files of DeepSeek are interleaved"


def _bias(node: ModuleNode, config: Any) -> str | None:
    return "linear layers with a bias are not supported by linear_cpu" if "bias" in node.parameters else None


def _dynamic_rope(node: ModuleNode, config: Any) -> str | None:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _STATIC_ROPE_TYPES:
        return None
    return f"rope_type is {rope_type!r}; supported: {', '.join(_STATIC_ROPE_TYPES)}"


# --- The operations --------------------------------------------------------------------------------------------------


def _float_keys(tensors: Tensors, config: Any) -> int:
    """The key half of kv_b becomes float in place of its blocks: absorbing needs it across their direction."""
    tensor = tensors.get("kv_b_proj.weight")
    if tensor is None:
        return 0
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    values = config.num_attention_heads * nope * config.kv_lora_rank
    return int((4 if is_wide(tensor) else 2) * values - tensor.nbytes * nope // (nope + value))


def _of_both(v2: str, v3: str | None = None) -> tuple[str, ...]:
    return (f"{V2}DeepseekV2{v2}", f"{V3}DeepseekV3{v3 or v2}")


def _weights(*modules: str) -> frozenset[str]:
    return frozenset(f"{module}.weight" for module in modules)


_EXPERT_PARTS = ("gate", "up", "down")
_MLP = ("gate_proj", "up_proj", "down_proj")

OPERATIONS: Mapping[str, Operation] = {
    operation.op: operation
    for operation in (
        Operation(
            "attention_cpu",
            _of_both("Attention"),
            _weights("q_proj", "q_a_proj", "q_b_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
            | _weights("kv_b_proj", "o_proj")
            | {"kv_b_proj.k_b", "kv_b_proj.v_b"},
            limits=(_attention_bias, _rope_in_halves),
            more_bytes=_float_keys,
        ),
        Operation(
            "moe_cpu",
            _of_both("Moe", "MoE"),
            frozenset(f"experts.{part}" for part in _EXPERT_PARTS)
            | _weights("gate", *(f"shared_experts.{part}" for part in _MLP))
            | {"gate.e_score_correction_bias"},
            of_any_type=_weights("gate"),
            limits=(_other_activation, _other_routing),
        ),
        Operation("mlp_cpu", _of_both("MLP"), _weights(*_MLP), limits=(_other_activation,)),
        Operation("experts_cpu", _of_both("Experts"), frozenset(_EXPERT_PARTS), limits=(_other_activation,)),
        Operation("linear_cpu", (TORCH_CLASSES["Linear"],), frozenset({"weight", "k_b", "v_b"}), limits=(_bias,)),
        Operation(
            "embedding_cpu", (TORCH_CLASSES["Embedding"],), frozenset({"weight"}), of_any_type=frozenset({"weight"})
        ),
        Operation("norm_cpu", _of_both("RMSNorm"), frozenset({"weight"})),
        Operation("rotary_cpu", _of_both("RotaryEmbedding"), frozenset(), limits=(_dynamic_rope,)),
    )
}
"""Name -> operation, coarse before fine."""
