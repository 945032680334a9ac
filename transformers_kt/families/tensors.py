"""Which GGUF tensor goes to which module of transformers' DeepSeek models, and whether a checkpoint has them all.

The table is the one place where the two vocabularies meet; everything else is derived from it and the config.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from transformers_kt.errors import CheckpointError
from transformers_kt.text import listed

if TYPE_CHECKING:
    from transformers import DeepseekV2Config, DeepseekV3Config

    from transformers_kt.gguf.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A place in the model that one GGUF tensor fills.

    ``role`` is what the tensor is to its module: "weight", "e_score_correction_bias", "gate" | "up" | "down" (of a
    stack of experts), "k_b" | "v_b" (the two halves of ``kv_b_proj.weight``, the first one transposed).
    ``shape`` is row-major, as torch has it, and follows from the config alone.
    """

    gguf_name: str
    module: str
    role: str
    shape: tuple[int, ...]
    optional: bool = False


class TensorSource(Protocol):
    """What `check_tensors` needs of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...


class _Row(NamedTuple):
    gguf_name: str  # below "blk.N." for a layer's tensors
    module: str  # below "model.layers.N." for a layer's tensors
    role: str
    shape: tuple[str, ...]  # names of sizes, see _sizes


_MODEL = (
    _Row("token_embd.weight", "model.embed_tokens", "weight", ("vocab", "hidden")),
    _Row("output_norm.weight", "model.norm", "weight", ("hidden",)),
)
_OUTPUT = _Row("output.weight", "lm_head", "weight", ("vocab", "hidden"))
_TIED_OUTPUT = _Row("token_embd.weight", "lm_head", "weight", ("vocab", "hidden"))

_EVERY_LAYER = (
    _Row("attn_norm.weight", "input_layernorm", "weight", ("hidden",)),
    _Row("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa", "weight", ("kv_lora_and_rope", "hidden")),
    _Row("attn_kv_a_norm.weight", "self_attn.kv_a_layernorm", "weight", ("kv_lora",)),
    _Row("attn_output.weight", "self_attn.o_proj", "weight", ("hidden", "heads_v")),
    _Row("ffn_norm.weight", "post_attention_layernorm", "weight", ("hidden",)),
)
_QUERY_PLAIN = (_Row("attn_q.weight", "self_attn.q_proj", "weight", ("heads_qk", "hidden")),)
_QUERY_LORA = (
    _Row("attn_q_a.weight", "self_attn.q_a_proj", "weight", ("q_lora", "hidden")),
    _Row("attn_q_a_norm.weight", "self_attn.q_a_layernorm", "weight", ("q_lora",)),
    _Row("attn_q_b.weight", "self_attn.q_b_proj", "weight", ("heads_qk", "q_lora")),
)
_KV_WHOLE = (_Row("attn_kv_b.weight", "self_attn.kv_b_proj", "weight", ("heads_nope_and_v", "kv_lora")),)
_KV_SPLIT = (
    _Row("attn_k_b.weight", "self_attn.kv_b_proj", "k_b", ("heads", "kv_lora", "nope")),
    _Row("attn_v_b.weight", "self_attn.kv_b_proj", "v_b", ("heads", "v", "kv_lora")),
)
_DENSE = (
    _Row("ffn_gate.weight", "mlp.gate_proj", "weight", ("dense", "hidden")),
    _Row("ffn_up.weight", "mlp.up_proj", "weight", ("dense", "hidden")),
    _Row("ffn_down.weight", "mlp.down_proj", "weight", ("hidden", "dense")),
)
_MOE = (
    _Row("ffn_gate_inp.weight", "mlp.gate", "weight", ("experts", "hidden")),
    _Row("ffn_gate_exps.weight", "mlp.experts", "gate", ("experts", "expert", "hidden")),
    _Row("ffn_up_exps.weight", "mlp.experts", "up", ("experts", "expert", "hidden")),
    _Row("ffn_down_exps.weight", "mlp.experts", "down", ("experts", "hidden", "expert")),
    _Row("ffn_gate_shexp.weight", "mlp.shared_experts.gate_proj", "weight", ("shared", "hidden")),
    _Row("ffn_up_shexp.weight", "mlp.shared_experts.up_proj", "weight", ("shared", "hidden")),
    _Row("ffn_down_shexp.weight", "mlp.shared_experts.down_proj", "weight", ("hidden", "shared")),
)
_CORRECTION_BIAS = _Row("exp_probs_b.bias", "mlp.gate", "e_score_correction_bias", ("experts",))

_LAYER_NUMBER = re.compile(r"blk\.(\d{1,6})\.")
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.")


def tensor_slots(config: DeepseekV2Config | DeepseekV3Config, present: Collection[str]) -> list[TensorSlot]:
    """Every slot of the model that ``config`` describes, in the order of the forward pass.

    ``present`` (the names in the checkpoint) only decides between spellings: ``attn_kv_b`` or its two halves, an
    output matrix of its own or the embeddings doubling as one. Files that carry both kv_b layouts exist (forks add the
    halves, requantized, to the original): the original is taken.
    """
    sizes = _sizes(config)
    has_correction_bias = config.model_type == "deepseek_v3"
    # Sigmoid-routed models without any bias are legitimate, and zero is what they mean; one layer without it is not.
    bias_is_optional = not any(name.endswith("." + _CORRECTION_BIAS.gguf_name) for name in present)

    slots = [_slot(_MODEL[0], sizes)]
    for layer in range(config.num_hidden_layers):
        rows = [*_EVERY_LAYER, *(_QUERY_PLAIN if config.q_lora_rank is None else _QUERY_LORA)]
        whole = f"blk.{layer}.{_KV_WHOLE[0].gguf_name}" in present
        halves = any(f"blk.{layer}.{row.gguf_name}" in present for row in _KV_SPLIT)
        rows += _KV_SPLIT if halves and not whole else _KV_WHOLE
        moe = layer >= (config.first_k_dense_replace or 0)
        rows += _MOE if moe else _DENSE
        slots += [_slot(row, sizes, layer) for row in rows]
        if moe and has_correction_bias:
            slots.append(_slot(_CORRECTION_BIAS, sizes, layer, optional=bias_is_optional))
    slots.append(_slot(_MODEL[1], sizes))
    slots.append(_slot(_OUTPUT if _OUTPUT.gguf_name in present else _TIED_OUTPUT, sizes))
    return slots


def check_tensors(checkpoint: TensorSource, config: DeepseekV2Config | DeepseekV3Config) -> list[TensorSlot]:
    """The slots that the checkpoint's tensors fill, after checking that names and shapes are those of ``config``.

    Raises `CheckpointError` that lists what is missing, surplus or of another shape, all at once. Reads no data.
    """
    tensors = checkpoint.tensors
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
        if name not in wanted and not _is_ignored(name, config.num_hidden_layers):
            problems.append(
                f"{name} in {info.path.name} is surplus: the model has no place for it{_surplus_hint(name)}"
            )
    if problems:
        raise CheckpointError(
            f"the GGUF tensors do not fit the config ({config.model_type}, {config.num_hidden_layers} layers):\n  "
            + listed(problems, separator="\n  ", before_more="\n  ")
            + "\nUse the config of the very model that the GGUF was made from, or leave it out to take the GGUF's own."
        )
    return [slot for slot in slots if slot.gguf_name in tensors]


def _slot(row: _Row, sizes: Mapping[str, int], layer: int | None = None, optional: bool = False) -> TensorSlot:
    gguf_name, module = row.gguf_name, row.module
    if layer is not None:
        gguf_name, module = f"blk.{layer}.{gguf_name}", f"model.layers.{layer}.{module}"
    return TensorSlot(gguf_name, module, row.role, tuple(sizes[size] for size in row.shape), optional)


def _sizes(config: DeepseekV2Config | DeepseekV3Config) -> dict[str, int]:
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    v = config.v_head_dim or 0
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "heads": heads,
        "nope": nope,
        "v": v,
        "kv_lora": config.kv_lora_rank,
        "kv_lora_and_rope": config.kv_lora_rank + rope,
        "heads_qk": heads * (nope + rope),
        "heads_v": heads * v,
        "heads_nope_and_v": heads * (nope + v),
        "q_lora": config.q_lora_rank or 0,
        "dense": config.intermediate_size,
        "experts": config.n_routed_experts,
        "expert": config.moe_intermediate_size,
        "shared": config.moe_intermediate_size * config.n_shared_experts,
    }


def _is_ignored(name: str, layers: int) -> bool:
    """Whether ``name`` belongs to what transformers' models leave out: multi-token prediction, in layers past the last,
    and whichever of the two kv_b layouts was not chosen."""
    match = _LAYER_NUMBER.match(name)
    if match is None:
        return False
    if int(match[1]) >= layers or name.startswith("nextn.", match.end()):
        return True
    return any(name.endswith("." + row.gguf_name) for row in (*_KV_WHOLE, *_KV_SPLIT))


def _surplus_hint(name: str) -> str:
    if _ONE_EXPERT.match(name):
        return " (one tensor per expert is an old layout; convert the model anew, which stacks them in ffn_*_exps)"
    return ""
