"""The random models of random_models.py as GGUF files of many types, and what tests do with them again and again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import random_models
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedTokenizerFast

from transformers_kt.families.deepseek.export import export_gguf

_GOLDEN = Path(__file__).parents[1] / "golden"

# The first pattern that a tensor's name has decides. Mixed: every type that the gguf package can write, different ones
# inside a layer and inside an expert.
_ALWAYS_F32 = (r"_norm|ffn_gate_inp|exp_probs_b", Type.F32)
_BF16 = (_ALWAYS_F32, (r"", Type.BF16))
_MIXED = (
    _ALWAYS_F32,
    (r"ffn_gate_exps|attn_v_b", Type.Q4_0),
    (r"ffn_up_exps|attn_k_b", Type.Q5_0),
    (r"shexp|attn_output", Type.BF16),
    (r"", Type.Q8_0),
)


@dataclass(frozen=True, slots=True)
class RandomFile:
    """A model of random_models.py and how it is written."""

    builder: str
    overrides: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    types: tuple[tuple[str, Type], ...] = ()  # empty: as exported

    def stock(self) -> Any:
        """The float32 model of transformers."""
        return getattr(random_models, self.builder)(**self.overrides)

    def write(self, model: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
        export_gguf(model, tokenizer, path, name=path.stem, **self.export)
        if self.types:
            _convert(path, self.types)


RANDOM_FILES = {
    "v3-F32": RandomFile("v3_like"),
    "v2-F32": RandomFile("v2_like", export={"split_kv_b": False}),
    "v2-F16": RandomFile("v2_like", export={"weight_type": Type.F16, "split_kv_b": False}),
    "v2-mixed": RandomFile("v2_like", types=_MIXED),
    "v2-lite-BF16": RandomFile("v2_lite_like", export={"split_kv_b": False}, types=_BF16),
    # Small enough for stock transformers to keep up.
    "small-v3-F32": RandomFile("v3_narrow", {"num_hidden_layers": 3}),
    "small-v3-mixed": RandomFile("v3_narrow", {"num_hidden_layers": 3}, types=_MIXED),
    # Layers up to those that KTransformers' files put on a last GPU.
    "deep-v3-F32": RandomFile("v3_narrow", {"num_hidden_layers": 32}),
    "deep-v2-F32": RandomFile("v2_lite_like", {"num_hidden_layers": 31, "first_k_dense_replace": 1}),
    "small-v2-F32": RandomFile("v2_lite_like", {"num_hidden_layers": 3, "first_k_dense_replace": 1}),
}
GOLDEN_FILES = {name: _GOLDEN / f"{name}.gguf" for name in ("v3-like-Q4_K_M", "v2-lite-like-Q4_K_M")}
"""Written by llama.cpp's quantizer."""


def _convert(path: Path, types: tuple[tuple[str, Type], ...]) -> None:
    """Converts the float tensors of a GGUF, in place, each to the type that ``types`` has for its name."""
    reader = gguf.GGUFReader(path)
    converted = path.with_suffix(".converted")
    writer = gguf.GGUFWriter(converted, "deepseek2")
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            of_items = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], of_items)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        to = next(to for pattern, to in types if re.search(pattern, tensor.name))
        writer.add_tensor(tensor.name, gguf.quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    converted.replace(path)


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    """int64 (1, count): ordinary tokens; 0 to 2 are special."""
    return torch.randint(3, 512, (1, count), generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of shape (1, tokens) as one batch: ids and attention mask, each (prompts, longest)."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), longest), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


@contextmanager
def recorded_lengths(model: Any) -> Iterator[list[int]]:
    """Collects the number of tokens of every forward pass inside the block."""
    lengths: list[int] = []

    def record(_module: torch.nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        lengths.append((kwargs["inputs_embeds"] if ids is None else ids).shape[1])

    hook = model.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield lengths
    finally:
        hook.remove()
