"""Which GGUF tensor fills which place of a model, and whether a checkpoint has them all.

What a layer has is the family's; token embedding, last norm and head have the same names in every GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from transformers_kt.errors import CheckpointError
from transformers_kt.families.base import Family, TensorRow, TensorSlot
from transformers_kt.families.registry import family_of
from transformers_kt.text import listed

if TYPE_CHECKING:
    from transformers_kt.gguf.reader import TensorInfo

_EMBEDDING = TensorRow("token_embd.weight", "model.embed_tokens", "weight", ("vocab", "hidden"))
_NORM = TensorRow("output_norm.weight", "model.norm", "weight", ("hidden",))
_OUTPUT = TensorRow("output.weight", "lm_head", "weight", ("vocab", "hidden"))
_TIED_OUTPUT = TensorRow("token_embd.weight", "lm_head", "weight", ("vocab", "hidden"))

_LAYER_NUMBER = re.compile(r"blk\.(\d{1,6})\.")
_INDEXER = ".indexer."
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.")


class TensorSource(Protocol):
    """What `check_tensors` needs of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


def tensor_slots(config: Any, present: Collection[str]) -> list[TensorSlot]:
    """Every slot of the model that ``config`` describes, in the order of the forward pass.

    ``present`` (the names in the checkpoint) only decides between spellings: those of the family, and an output matrix
    of its own or the embeddings doubling as one.
    """
    family = family_of(config)
    sizes = family.sizes(config)
    slots = [_slot(_EMBEDDING, sizes)]
    for layer, rows in enumerate(family.layer_rows(config, present)):
        slots += [_slot(row, sizes, layer) for row in rows]
    slots.append(_slot(_NORM, sizes))
    slots.append(_slot(_OUTPUT if _OUTPUT.gguf_name in present else _TIED_OUTPUT, sizes))
    return slots


def check_tensors(checkpoint: TensorSource, config: Any) -> list[TensorSlot]:
    """The slots that the checkpoint's tensors fill, after checking that names and shapes are those of ``config``.

    Raises `CheckpointError` that lists what is missing, surplus or of another shape, all at once. Reads no data.
    """
    family, tensors = family_of(config), checkpoint.tensors
    layers = family.dims(config).layers
    slots = tensor_slots(config, tensors.keys())
    problems = []
    for slot in slots:
        found = tensors.get(slot.gguf_name)
        if found is None:
            if not slot.optional:
                problems.append(f"{slot.gguf_name} is missing (it fills {slot.module}, shape {slot.shape})")
        elif found.shape != slot.shape:
            problems.append(
                f"{slot.gguf_name} in {found.path.name} has shape {found.shape}; the config says {slot.shape}"
            )
    wanted = {slot.gguf_name for slot in slots}
    for name, info in tensors.items():
        if name not in wanted and not _is_ignored(name, family, layers):
            problems.append(
                f"{name} in {info.path.name} is surplus: the model has no place for it{_surplus_hint(name)}"
            )
    if problems:
        raise CheckpointError(
            f"the GGUF tensors do not fit the config ({config.model_type}, {layers} layers):\n  "
            + listed(problems, separator="\n  ", before_more="\n  ")
            + f"\n{_advice(tensors.keys(), layers, any(_INDEXER in slot.gguf_name for slot in slots))}"
        )
    return [slot for slot in slots if slot.gguf_name in tensors]


def _slot(row: TensorRow, sizes: Mapping[str, int], layer: int | None = None) -> TensorSlot:
    gguf_name, module = row.gguf_name, row.module
    if layer is not None:
        gguf_name, module = f"blk.{layer}.{gguf_name}", f"model.layers.{layer}.{module}"
    return TensorSlot(gguf_name, module, row.role, tuple(sizes[size] for size in row.shape), row.optional)


def _is_ignored(name: str, family: Family, layers: int) -> bool:
    """Whether ``name`` belongs to what transformers' models leave out: multi-token prediction, in layers past the last,
    and what the family leaves unread."""
    match = _LAYER_NUMBER.match(name)
    if match is None:
        return False
    if int(match[1]) >= layers or name.startswith("nextn.", match.end()):
        return True
    return any(name.endswith("." + unread) for unread in family.unread)


def _surplus_hint(name: str) -> str:
    if _ONE_EXPERT.match(name):
        return " (one tensor per expert is an old layout; convert the model anew, which stacks them in ffn_*_exps)"
    return ""


def _advice(names: Collection[str], layers: int, has_indexer: bool) -> str:
    """What to do about tensors that do not fit, by what kind of file has such ``names``, and whether the model has an
    indexer."""
    numbers = {int(match[1]) for match in map(_LAYER_NUMBER.match, names) if match}
    if numbers and min(numbers) >= layers:
        return (
            "The file holds the layers for multi-token prediction alone, a draft for another program; take the file of "
            "the model itself."
        )
    if any(_INDEXER in name for name in names) and not has_indexer:
        return (
            "The file has the indexer of sparse attention, which the config does not know; leave the config out to "
            "take the GGUF's own."
        )
    if has_indexer and not any(_INDEXER in name for name in names):
        return (
            "The file was made without the indexer of sparse attention; leave the config out, and the model attends to "
            "every key, as llama.cpp computes such files."
        )
    if any(name.endswith((".scale", ".input_scale")) for name in names):
        return (
            "The file has scales beside its weights, as converters keep them of FP8 and NVFP4 checkpoints; they are "
            "not read. Take a file that llama.cpp quantized from BF16."
        )
    if any(_ONE_EXPERT.match(name) for name in names):
        return "Convert the model with today's converter of llama.cpp, which stacks the experts."
    return "Use the config of the very model that the GGUF was made from, or leave it out to take the GGUF's own."
