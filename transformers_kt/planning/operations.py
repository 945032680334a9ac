"""What can compute the modules of a model: names, tensors and types, bytes. Their modules are in `modules`.

Plans are made of this alone. Loading asks the same questions before it takes memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import gguf
import numpy as np

import transformers_kt._C as _C
from transformers_kt.errors import UnsupportedModelError, UnsupportedTypeError
from transformers_kt.families.base import Limit
from transformers_kt.families.registry import families, mla_of, stock_classes
from transformers_kt.families.tree import TORCH_CLASSES, ModuleNode
from transformers_kt.gguf.quantizations import published_with
from transformers_kt.gguf.reader import GgmlType, TensorInfo
from transformers_kt.rules import TORCH
from transformers_kt.rules.devices import BACKENDS, CPU

KERNEL_TYPES: dict[int, str] = {number: name for name, number, _elements, _nbytes in _C.weight_types()}
"""ggml type number -> name, for every type that can be multiplied with, on the CPU and on GPUs."""

ATTENTION, ROTARY = "attention", "rotary"
"""The kinds that have to agree: our rotary embedding feeds our attention only."""

CPU_BACKEND, GPU = BACKENDS
_STATIC_ROPE_TYPES = ("default", "linear", "yarn")
_FLOAT32_BYTES, _FLOAT16_BYTES = 4, 2

Tensors = Mapping[str, TensorInfo]
"""Role, a path relative to the module, -> tensor."""


_BytesOf: TypeAlias = "Callable[[str, TensorInfo, Any], int]"


def _as_stored(role: str, tensor: TensorInfo, config: Any) -> int:
    return tensor.nbytes


@dataclass(frozen=True, slots=True)
class Operation:
    """``kind`` is what it computes, as rules and families say it, ``backend`` who computes it: "cpu", "gpu" or "torch".

    ``torch_classes`` are the dotted names of the classes of torch.nn that it can stand for, beside those that families
    have for its kind.

    ``roles`` are paths, relative to the module, of every tensor that it can consume; of the matrices among them those
    ``of_any_type`` need no kernel. ``limits`` say why a module of a config is none it can stand for, or None; families
    have more of their own. ``bytes_of`` is what a tensor takes in its memory, by role.
    """

    kind: str
    backend: str
    roles: frozenset[str]
    torch_classes: tuple[str, ...] = ()
    of_any_type: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()
    bytes_of: _BytesOf = _as_stored

    @property
    def op(self) -> str:
        """Its name in plans: "experts_cpu"."""
        return f"{self.kind}_{self.backend}"

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

    def check_types(self, tensors: Tensors, path: str) -> None:
        """Raise `UnsupportedTypeError` where a matrix that needs a kernel has a type without, or another tensor one
        that cannot be dequantized."""
        for role, tensor in tensors.items():
            if len(tensor.shape) > 1 and role not in self.of_any_type:
                _require_kernel(tensor)
            elif int(tensor.ggml_type) not in KERNEL_TYPES:
                require_dequantizable(tensor, role)

    def tensor_bytes(self, role: str, tensor: TensorInfo, config: Any, device: str) -> int:
        """Bytes that ``tensor`` takes in the memory of ``device``."""
        return self.bytes_of(role, tensor, config)

    def memory_needed(self, tensors: Tensors, config: Any, device: str = CPU) -> int:
        """Bytes that loading ``tensors`` takes in the memory of ``device``."""
        return sum(self.tensor_bytes(role, tensor, config, device) for role, tensor in tensors.items())


class _StockModule(Operation):
    """transformers' own module, with dequantized weights, on any device."""

    __slots__ = ()

    @property
    def op(self) -> str:
        return TORCH

    def require_use(self, roles: Iterable[str], path: str) -> None:
        """Every tensor of the module is one of its parameters or buffers."""

    def check_types(self, tensors: Tensors, path: str) -> None:
        """Raise `UnsupportedTypeError` where the gguf package cannot dequantize a type."""
        for role, tensor in tensors.items():
            require_dequantizable(tensor, f"{role} of {path}")

    def tensor_bytes(self, role: str, tensor: TensorInfo, config: Any, device: str) -> int:
        """float32 on the CPU, 16 bits on a GPU but for norms and routers, which are F32 in every file."""
        is_float32 = device == CPU or tensor.ggml_type == GgmlType.F32
        return (_FLOAT32_BYTES if is_float32 else _FLOAT16_BYTES) * math.prod(tensor.shape)


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
    return "linear layers with a bias are not supported" if "bias" in node.parameters else None


def _dynamic_rope(node: ModuleNode, config: Any) -> str | None:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in _STATIC_ROPE_TYPES:
        return None
    return f"rope_type is {rope_type!r}; supported: {', '.join(_STATIC_ROPE_TYPES)}"


# --- The operations --------------------------------------------------------------------------------------------------


def keys_as_floats(role: str, tensor: TensorInfo, config: Any) -> int:
    """The key half of kv_b becomes float in place of its blocks: absorbing needs it across their direction. Where it
    stands alone, that is only for types without a kernel."""
    if role not in ("kv_b_proj.weight", "kv_b_proj.k_b"):
        return tensor.nbytes
    mla = mla_of(config)
    keys = mla.heads * mla.nope * mla.latent
    if role == "kv_b_proj.k_b":
        return tensor.nbytes if int(tensor.ggml_type) in KERNEL_TYPES else _FLOAT16_BYTES * keys
    float_bytes = _FLOAT32_BYTES if is_wide(tensor) else _FLOAT16_BYTES
    return tensor.nbytes - tensor.nbytes * mla.nope // (mla.nope + mla.value) + float_bytes * keys


def _halves_in_float32(role: str, tensor: TensorInfo, config: Any) -> int:
    """The halves of kv_b, of which the first is transposed, become one matrix."""
    return _FLOAT32_BYTES * math.prod(tensor.shape) if role in _KV_B_HALVES else tensor.nbytes


def _halves_in_float16(role: str, tensor: TensorInfo, config: Any) -> int:
    return _FLOAT16_BYTES * math.prod(tensor.shape) if role in _KV_B_HALVES else tensor.nbytes


def _weights(*modules: str) -> frozenset[str]:
    return frozenset(f"{module}.weight" for module in modules)


_EXPERT_PARTS = ("gate", "up", "down")
_MLP = ("gate_proj", "up_proj", "down_proj")
_KV_B_HALVES = ("k_b", "v_b")


def _on_both(
    kind: str,
    roles: frozenset[str],
    torch_classes: tuple[str, ...] = (),
    of_any_type: frozenset[str] = frozenset(),
    limits: tuple[Limit, ...] = (),
    on_cpu: _BytesOf = _as_stored,
    on_gpu: _BytesOf = _as_stored,
    of_any_type_on_cpu: frozenset[str] = frozenset(),
) -> Iterator[Operation]:
    """The operations of a kind: they differ in their backend, and in what their tensors take there."""
    yield Operation(kind, CPU_BACKEND, roles, torch_classes, of_any_type | of_any_type_on_cpu, limits, on_cpu)
    yield Operation(kind, GPU, roles, torch_classes, of_any_type, limits, on_gpu)


OPERATIONS: Mapping[str, Operation] = {
    operation.op: operation
    for operation in (
        *_on_both(
            ATTENTION,
            _weights("q_proj", "q_a_proj", "q_b_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
            | _weights("kv_b_proj", "o_proj")
            | {f"kv_b_proj.{half}" for half in _KV_B_HALVES},
            # llama.cpp makes it Q5_1 or IQ4_NL where its rows, 128 or 192 wide, fit no K-quant: in every Q5_K_M.
            of_any_type=frozenset({"kv_b_proj.k_b"}),
            on_cpu=keys_as_floats,
            on_gpu=keys_as_floats,
        ),
        *_on_both(
            "moe",
            frozenset(f"experts.{part}" for part in _EXPERT_PARTS)
            | _weights("gate", *(f"shared_experts.{part}" for part in _MLP))
            | {"gate.e_score_correction_bias"},
            of_any_type=_weights("gate"),
            limits=(_other_activation,),
        ),
        *_on_both("mlp", _weights(*_MLP), limits=(_other_activation,)),
        *_on_both("experts", frozenset(_EXPERT_PARTS), limits=(_other_activation,)),
        *_on_both(
            "linear",
            frozenset({"weight", *_KV_B_HALVES}),
            (TORCH_CLASSES["Linear"],),
            of_any_type=frozenset(_KV_B_HALVES),
            limits=(_bias,),
            on_cpu=_halves_in_float32,
            on_gpu=_halves_in_float16,
        ),
        *_on_both(
            "embedding",
            frozenset({"weight"}),
            (TORCH_CLASSES["Embedding"],),
            of_any_type_on_cpu=frozenset({"weight"}),
        ),
        *_on_both("norm", frozenset({"weight"})),
        *_on_both(ROTARY, frozenset(), limits=(_dynamic_rope,)),
        _StockModule(TORCH, TORCH, frozenset()),
    )
}
"""Name -> operation, coarse before fine."""


def replaced_classes() -> dict[str, tuple[str, ...]]:
    """Kind of operation -> the stock classes that it can stand for, coarse before fine: all that rules know of them."""
    return {operation.kind: operation.replaces for operation in OPERATIONS.values() if operation.backend != TORCH}
