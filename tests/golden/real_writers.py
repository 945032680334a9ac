"""Files as llama.cpp's converter and quantizer write them, in the size of a repository: their headers, byte by byte,
and weights that are drawn again whenever a file is made. Beside each header lie the logits of transformers, in float32
on the dequantized weights, and those of llama.cpp. tools/real_writers.py makes the archive.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from synthetic import random_blocks

ARCHIVE = Path(__file__).with_name("real-writers.npz")
STORED = 32  # logits are kept for so many positions at the end of the prompt
_LEVELS = 2**16 - 1

# As in random_models.py: a matrix keeps the size of what comes in, but for these.
_GAINS = {"output": 3.0, "ffn_gate_inp": 2.0, "attn_q": 2.0, "attn_q_b": 2.0, "attn_output": 0.5, "token_embd": None}
_SPREAD = 0.1  # of norm weights round 1, of biases round 0


def prompt(vocab: int) -> torch.Tensor:
    """int64 (1, 72): past the 48 keys that the V3.2 among the models attends to at most."""
    return torch.randint(3, vocab, (1, 72), generator=torch.Generator().manual_seed(0))


def weights(name: str, kind: Type, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The same at each call: blocks of ``kind`` for a tensor of ``shape``, row-major, as GGUF calls it."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    base, what = name.split(".")[-2:]
    if len(shape) == 1:
        mean = 0.0 if what == "bias" else 1.0
        return rng.normal(mean, _SPREAD, shape).astype(np.float32)
    gain = 0.5 if base.startswith("ffn_down") else _GAINS.get(base, 1.0)
    deviation = 1.0 if gain is None else gain / math.sqrt(shape[-1])
    if kind == Type.F32:
        return rng.normal(0.0, deviation, shape).astype(np.float32)
    elements, _ = gguf.GGML_QUANT_SIZES[kind]
    return random_blocks(kind, math.prod(shape) // elements, deviation, rng)


@dataclass(frozen=True, slots=True)
class Case:
    """``builder`` names the function of random_models.py whose config the model has, with ``overrides``.

    ``header`` is the file up to its weights, ``tensors`` has name, type, row-major shape and offset of each;
    ``transformers`` and ``llama_cpp`` are logits, float32 (`STORED`, vocab).
    """

    name: str
    builder: str
    overrides: dict[str, Any]
    header: bytes
    tensors: list[Any]
    sha256: str
    transformers: torch.Tensor
    llama_cpp: torch.Tensor

    @classmethod
    def of(cls, name: str, builder: str, overrides: dict[str, Any], file: Path) -> Case:
        """As ``file`` is laid out, without logits."""
        reader = gguf.GGUFReader(file)
        start = reader.data_offset
        tensors = [
            [each.name, int(each.tensor_type), each.shape[::-1].tolist(), each.data_offset - start]
            for each in reader.tensors
        ]
        return cls(name, builder, overrides, file.read_bytes()[:start], tensors, "", torch.empty(0), torch.empty(0))

    def with_logits(self, file: Path, transformers: torch.Tensor, llama_cpp: torch.Tensor) -> Case:
        """``file`` is what `write` wrote, logits are those of all of its prompt."""
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        return replace(self, sha256=sha256, transformers=transformers[-STORED:], llama_cpp=llama_cpp[-STORED:])

    def write(self, path: Path) -> Path:
        """Raises ValueError where the file is not the one that the logits are of."""
        data = bytearray(self.header)
        for name, kind, shape, offset in self.tensors:
            data += bytes(len(self.header) + offset - len(data))  # alignment
            data += weights(name, Type(kind), tuple(shape)).tobytes()
        data += bytes(-len(data) % gguf.GGUF_DEFAULT_ALIGNMENT)
        path.write_bytes(data)
        if self.sha256 not in ("", hashlib.sha256(data).hexdigest()):
            raise ValueError(
                f"{self.name}: other weights were drawn than those that the logits are of, by another release of numpy "
                "or gguf; run tools/real_writers.py --golden"
            )
        return path


def names() -> list[str]:
    with np.load(ARCHIVE) as data:
        found: list[str] = json.loads(str(data["names"]))
        return found


def cases() -> dict[str, Case]:
    with np.load(ARCHIVE) as data:
        return {name: _read(data, name) for name in names()}


def _read(data: Any, name: str) -> Case:
    about = json.loads(str(data[f"{name}.about"]))
    logits = (_decoded(*(data[f"{name}.{of}.{part}"] for part in ("codes", "low", "step"))) for of in _LOGITS)
    return Case(name, header=data[f"{name}.header"].tobytes(), **about, **dict(zip(_LOGITS, logits, strict=True)))


_LOGITS = ("transformers", "llama_cpp")


def store(found: list[Case]) -> None:
    """Logits take 16 bits each, evenly spaced between the extremes of a row: half of a step, 2e-4, is lost at most."""
    arrays: dict[str, Any] = {"names": np.array(json.dumps([case.name for case in found]))}
    for case in found:
        about = {key: getattr(case, key) for key in ("builder", "overrides", "tensors", "sha256")}
        arrays[f"{case.name}.about"] = np.array(json.dumps(about))
        arrays[f"{case.name}.header"] = np.frombuffer(case.header, np.uint8)
        for of in _LOGITS:
            codes, low, step = _encoded(getattr(case, of).numpy())
            arrays |= {f"{case.name}.{of}.codes": codes, f"{case.name}.{of}.low": low, f"{case.name}.{of}.step": step}
    np.savez_compressed(ARCHIVE, **arrays)


def _encoded(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], ...]:
    low = logits.min(-1, keepdims=True)
    step = (logits.max(-1, keepdims=True) - low) / _LEVELS
    return ((logits - low) / step).round().astype(np.uint16), low, step


def _decoded(codes: npt.NDArray[np.uint16], low: npt.NDArray[Any], step: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(low + step * codes.astype(np.float32))
