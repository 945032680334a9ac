"""GGUF files for tests: any bytes at all by hand, and small DeepSeek models through the `gguf` package's own writer."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from transformers_kt.errors import KtError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def refusal(action: Callable[[], object]) -> str | None:
    """The message of the `KtError` that ``action`` raises, None if it raises nothing. Other errors pass through."""
    try:
        action()
    except KtError as error:
        return str(error)
    return None


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)


def array(kind: int, values: Sequence[Any]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


@dataclass
class Tensor:
    name: str | bytes
    dims: Sequence[int]  # as in the file: fastest first
    kind: int = 0
    offset: int = 0

    def pack(self) -> bytes:
        dims = struct.pack(f"<I{len(self.dims)}Q", len(self.dims), *self.dims)
        return string(self.name) + dims + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Handmade:
    """A GGUF file whose every part can be made wrong."""

    keys: list[tuple[str | bytes, int, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32

    def header(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        keys = b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in self.keys)
        table = b"".join(tensor.pack() for tensor in self.tensors)
        return self.magic + struct.pack("<IQQ", self.version, *counts) + keys + table

    def build(self) -> bytes:
        header = self.header()
        return header + b"\0" * (-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def small_file() -> Handmade:
    """Every kind of metadata value and three tensors, F32 (2, 3), Q8_0 (2, 32) and F16 (2, 2, 4), in a kilobyte."""
    data = bytearray(3 * 96)
    data[0:24] = np.arange(6, dtype=np.float32).tobytes()
    data[32:100] = bytes(range(68))
    data[128:160] = np.arange(16, dtype=np.float16).tobytes()
    return Handmade(
        keys=[
            ("general.architecture", STRING, string("deepseek2")),
            *((f"a.{_CODES[kind]}", kind, scalar(kind, 1)) for kind in _CODES),
            ("a.strings", ARRAY, array(STRING, ["", "é", "日本", "a b"])),
            ("a.numbers", ARRAY, array(I32, [1, -2, 3])),
            ("a.floats", ARRAY, array(F32, [0.5, 1.5])),
            ("a.bools", ARRAY, array(BOOL, [True, False])),
            ("a.empty", ARRAY, array(U64, [])),
        ],
        tensors=[
            Tensor("one", (3, 2), 0, 0),
            Tensor("two", (32, 2), 8, 32),
            Tensor("three", (4, 2, 2), 1, 128),
        ],
        data=bytes(data[:160]),
    )


# The metadata of a narrow DeepSeek-V3-like model, below "deepseek2.", as today's converter writes it.
TINY_V3: dict[str, Any] = {
    "block_count": 3,
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "expert_feed_forward_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.q_lora_rank": 48,
    "attention.kv_lora_rank": 32,
    "attention.key_length": 40,
    "attention.value_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "leading_dense_block_count": 1,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_gating_func": 2,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "vocab_size": 50,
}
TINY_V2: dict[str, Any] = {
    **{key: value for key, value in TINY_V3.items() if "group" not in key and "q_lora" not in key},
    "expert_gating_func": 1,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
    "expert_shared_count": 2,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}


def tiny_tensors(facts: Mapping[str, Any], *, split_kv_b: bool = True, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Name to row-major shape of every tensor of the model that ``facts`` describe, spelt out once more."""
    hidden, heads, layers = facts["embedding_length"], facts["attention.head_count"], facts["block_count"]
    key, value = facts["attention.key_length_mla"], facts["attention.value_length_mla"]
    rope, latent = facts["rope.dimension_count"], facts["attention.kv_lora_rank"]
    experts, width = facts["expert_count"], facts["expert_feed_forward_length"]
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (facts["vocab_size"], hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (facts["vocab_size"], hidden),
    }
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn_kv_a_mqa.weight": (latent + rope, hidden),
            "attn_kv_a_norm.weight": (latent,),
            "attn_output.weight": (hidden, heads * value),
        }
        if "attention.q_lora_rank" in facts:
            rank = facts["attention.q_lora_rank"]
            block |= {"attn_q_a.weight": (rank, hidden), "attn_q_a_norm.weight": (rank,)}
            block |= {"attn_q_b.weight": (heads * key, rank)}
        else:
            block |= {"attn_q.weight": (heads * key, hidden)}
        if split_kv_b:
            block |= {"attn_k_b.weight": (heads, latent, key - rope), "attn_v_b.weight": (heads, value, latent)}
        else:
            block |= {"attn_kv_b.weight": (heads * (key - rope + value), latent)}
        if layer < facts["leading_dense_block_count"]:
            dense = facts["feed_forward_length"]
            block |= {"ffn_gate.weight": (dense, hidden), "ffn_up.weight": (dense, hidden)}
            block |= {"ffn_down.weight": (hidden, dense)}
        else:
            shared = width * facts["expert_shared_count"]
            block |= {
                "ffn_gate_inp.weight": (experts, hidden),
                "ffn_gate_exps.weight": (experts, width, hidden),
                "ffn_up_exps.weight": (experts, width, hidden),
                "ffn_down_exps.weight": (experts, hidden, width),
                "ffn_gate_shexp.weight": (shared, hidden),
                "ffn_up_shexp.weight": (shared, hidden),
                "ffn_down_shexp.weight": (hidden, shared),
            }
            if bias and facts["expert_gating_func"] == 2:
                block |= {"exp_probs_b.bias": (experts,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def metadata(facts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """``facts`` with their prefix, as a reader hands them out."""
    return {"general.architecture": "deepseek2", **{f"deepseek2.{key}": value for key, value in facts.items()}, **more}


def write_model(
    path: Path,
    facts: Mapping[str, Any] = TINY_V3,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    architecture: str = "deepseek2",
    split_max_tensors: int = 0,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of constant F32 tensors, each with its own value, through the `gguf` package."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    values = {f"{architecture}.{key}": value for key, value in facts.items()} | dict(more or {})
    for key, value in values.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for number, (name, shape) in enumerate((tiny_tensors(facts) if shapes is None else shapes).items()):
        writer.add_tensor(name, np.full(shape, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
