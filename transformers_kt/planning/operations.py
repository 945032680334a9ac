"""What can compute the modules of a model: names, tensors and types, bytes. Their modules are in `modules`.

Plans are made of this alone. Loading asks the same questions before it takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

import transformers_kt._C as _C
from transformers_kt.errors import UnsupportedModelError, UnsupportedTypeError
from transformers_kt.families.base import Limit
from transformers_kt.families.registry import families, mla_of, stock_classes
from transformers_kt.families.tree import TORCH_CLASSES, ModuleNode
from transformers_kt.gguf.quantizations import published_with
from transformers_kt.gguf.reader import GgmlType, TensorInfo

KERNEL_TYPES: dict[int, str] = {number: name for name, number, _elements, _nbytes in _C.weight_types()}
"""ggml type number -> name, for every type that can be multiplied with."""

_STATIC_ROPE_TYPES = ("default", "linear", "yarn")

Tensors = Mapping[str, TensorInfo]
"""Role, a path relative to the module, -> tensor."""


def _nothing_more(tensors: Tensors, config: Any) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Operation:
    """``op`` is its name in rules, ``kind`` that name without its device. ``torch_classes`` are the dotted names of the
    classes of torch.nn that it can stand for, beside those that families have for its kind.

    ``roles`` are paths, relative to the module, of every tensor that it can consume; of the matrices among them those
    ``of_any_type`` need no kernel. ``limits`` say why a module of a config is none it can stand for, or None; families
    have more of their own.
    ``more_bytes`` is what its weights take beyond what they take in the file.
    """

    op: str
    roles: frozenset[str]
    torch_classes: tuple[str, ...] = ()
    of_any_type: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()
    more_bytes: Callable[[Tensors, Any], int] = _nothing_more

    @property
    def kind(self) -> str:
        return self.op.removesuffix("_cpu")

    @property
    def replaces(self) -> tuple[str, ...]:
        """The dotted names of the stock classes that it can stand for."""
        return (*self.torch_classes, *stock_classes(self.kind))

    def require_supported(self, node: ModuleNode, config: Any, path: str) -> None:
        """Raise `UnsupportedModelError` where it cannot stand for the stock module ``node`` at ``path``."""
        of_families = (
            limit
            for family in families()
            if node.class_name in family.stock_classes.get(self.kind, ())
            for limit in family.limits.get(self.kind, ())
        )
        for limit in (*self.limits, *of_families):
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
        """Raise `UnsupportedTypeError` where a matrix that needs a kernel has a type without, or another tensor one
        that cannot be dequantized."""
        for role, tensor in tensors.items():
            if len(tensor.shape) > 1 and role not in self.of_any_type:
                _require_kernel(tensor)
            elif int(tensor.ggml_type) not in KERNEL_TYPES:
                require_dequantizable(tensor, role)

    def memory_needed(self, tensors: Tensors, config: Any) -> int:
        """Bytes that loading ``tensors`` will take."""
        return sum(tensor.nbytes for tensor in tensors.values()) + self.more_bytes(tensors, config)


def is_wide(tensor: TensorInfo) -> bool:
    """Whether the tensor may hold what float16 does not."""
    return tensor.ggml_type in (GgmlType.F32, GgmlType.BF16)


def require_dequantizable(tensor: TensorInfo, what: str) -> None:
    """Raise `UnsupportedTypeError` where the `gguf` package lists the type of ``tensor`` but does not dequantize it."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.ggml_type]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), tensor.ggml_type)
    except NotImplementedError:
        raise UnsupportedTypeError(
            f"{tensor.path}: tensor {tensor.name} ({what}) has type {tensor.ggml_type.name}, which the gguf package "
            "cannot dequantize; give the module to an operation that takes the type, or take another quantization"
        ) from None


def _require_kernel(tensor: TensorInfo) -> None:
    if int(tensor.ggml_type) in KERNEL_TYPES:
        return
    raise UnsupportedTypeError(
        f"{tensor.path}: tensor {tensor.name} has type {tensor.ggml_type.name}, for which there is no kernel; "
        f"types with kernels: {', '.join(KERNEL_TYPES.values())}. Files that hold no others are called "
        f"{', '.join(published_with(KERNEL_TYPES.values()))}; whether another loads, plan() tells from its header"
    )


# --- Limits ----------------------------------------------------------------------------------------------------------


def _other_activation(node: ModuleNode, config: Any) -> str | None:
    """SiLU is the only one that the kernels compute."""
    if config.hidden_act == "silu":
        return None
    return f"hidden_act is {config.hidden_act!r}; only 'silu' is supported"


def _bias(node: ModuleNode, config: Any) -> str | None:
    return "linear layers with a bias are not supported by linear_cpu" if "bias" in node.parameters else None


def _dynamic_rope(node: ModuleNode, config: Any) -> str | None:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _STATIC_ROPE_TYPES:
        return None
    return f"rope_type is {rope_type!r}; supported: {', '.join(_STATIC_ROPE_TYPES)}"


# --- The operations --------------------------------------------------------------------------------------------------


def _float_keys(tensors: Tensors, config: Any) -> int:
    """The key half of kv_b becomes float in place of its blocks: absorbing needs it across their direction. Where it
    stands alone, that is only for types without a kernel."""
    mla = mla_of(config)
    values = mla.heads * mla.nope * mla.latent
    if (keys := tensors.get("kv_b_proj.k_b")) is not None:
        return 0 if int(keys.ggml_type) in KERNEL_TYPES else 2 * values - keys.nbytes
    if (tensor := tensors.get("kv_b_proj.weight")) is None:
        return 0
    return (4 if is_wide(tensor) else 2) * values - tensor.nbytes * mla.nope // (mla.nope + mla.value)


def _weights(*modules: str) -> frozenset[str]:
    return frozenset(f"{module}.weight" for module in modules)


_EXPERT_PARTS = ("gate", "up", "down")
_MLP = ("gate_proj", "up_proj", "down_proj")

OPERATIONS: Mapping[str, Operation] = {
    operation.op: operation
    for operation in (
        Operation(
            "attention_cpu",
            _weights("q_proj", "q_a_proj", "q_b_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
            | _weights("kv_b_proj", "o_proj")
            | {"kv_b_proj.k_b", "kv_b_proj.v_b"},
            # llama.cpp makes it Q5_1 or IQ4_NL where its rows, 128 or 192 wide, fit no K-quant: in every Q5_K_M.
            of_any_type=frozenset({"kv_b_proj.k_b"}),
            more_bytes=_float_keys,
        ),
        Operation(
            "moe_cpu",
            frozenset(f"experts.{part}" for part in _EXPERT_PARTS)
            | _weights("gate", *(f"shared_experts.{part}" for part in _MLP))
            | {"gate.e_score_correction_bias"},
            of_any_type=_weights("gate"),
            limits=(_other_activation,),
        ),
        Operation("mlp_cpu", _weights(*_MLP), limits=(_other_activation,)),
        Operation("experts_cpu", frozenset(_EXPERT_PARTS), limits=(_other_activation,)),
        Operation(
            "linear_cpu",
            frozenset({"weight", "k_b", "v_b"}),
            (TORCH_CLASSES["Linear"],),
            of_any_type=frozenset({"k_b", "v_b"}),
            limits=(_bias,),
        ),
        Operation(
            "embedding_cpu", frozenset({"weight"}), (TORCH_CLASSES["Embedding"],), of_any_type=frozenset({"weight"})
        ),
        Operation("norm_cpu", frozenset({"weight"})),
        Operation("rotary_cpu", frozenset(), limits=(_dynamic_rope,)),
    )
}
"""Name -> operation, coarse before fine."""
