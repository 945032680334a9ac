"""Write a transformers DeepSeek model as GGUF, as llama.cpp's converter would.

For models that exist only as transformers objects: the bundled one before it is quantized, and the small random ones of
the tests. Rotary weights go over as they are: DeepSeek rotates neighbouring pairs, and so does llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from transformers_kt.errors import UnsupportedModelError
from transformers_kt.families.base import TensorSlot
from transformers_kt.families.deepseek.config import sparse_layers
from transformers_kt.families.tensors import tensor_slots

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import (
        DeepseekV2Config,
        DeepseekV3Config,
        DeepseekV32Config,
        Glm4MoeLiteConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        YoutuConfig,
    )

    DeepseekConfig: TypeAlias = (
        DeepseekV2Config | DeepseekV3Config | DeepseekV32Config | Glm4MoeLiteConfig | YoutuConfig
    )

_ARCHITECTURES = {"deepseek_v32": "deepseek32"}  # of the others "deepseek2"
_FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
}
_GATING = {
    "deepseek_v2": gguf.ExpertGatingFuncType.SOFTMAX,
    "deepseek_v3": gguf.ExpertGatingFuncType.SIGMOID,
    "deepseek_v32": gguf.ExpertGatingFuncType.SIGMOID,
    "glm4_moe_lite": gguf.ExpertGatingFuncType.SIGMOID,
    "youtu": None,  # has no experts
}
# What llama.cpp keeps in F32 in every file: it computes with these outside its quantized kernels.
_ALWAYS_F32 = ("_norm.weight", "_norm.bias", ".ffn_gate_inp.weight", ".exp_probs_b.bias")
# llama.cpp multiplies mscale_all_dim by this on writing and divides on reading.
_YARN_LOG_FACTOR = 0.1


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: str | Path,
    *,
    name: str,
    weight_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre_tokenizer: str = "deepseek-v3",
    split_kv_b: bool = True,
) -> None:
    """Write ``model`` (of a model type in `_GATING`, on the CPU) and ``tokenizer`` to ``path``.

    ``weight_type`` is F32 or F16 and holds for matrices; norms and routers are F32 always. ``split_kv_b`` chooses
    between the current layout (``attn_k_b`` transposed, ``attn_v_b``, one key-value head) and the older one
    (``attn_kv_b``, as many key-value heads as query heads). ``pre_tokenizer`` is llama.cpp's name for the splitting
    rules of ``tokenizer``, which this function cannot know.

    Raises `UnsupportedModelError` for another architecture or weight type.
    """
    config: Any = model.config
    if config.model_type not in _GATING:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot be written; accepted: {', '.join(_GATING)}"
        )
    if weight_type not in _FILE_TYPES:
        raise UnsupportedModelError(
            f"cannot write weights as {weight_type.name}; write F32 or F16 and quantize the file"
        )
    writer = gguf.GGUFWriter(path, _ARCHITECTURES.get(config.model_type, "deepseek2"))
    try:
        writer.add_name(name)
        writer.add_file_type(_FILE_TYPES[weight_type])
        write_hyperparameters(writer, config, split_kv_b)
        _write_tokenizer(writer, tokenizer, config.vocab_size, pre_tokenizer)
        for tensor_name, values in _tensors(model, config, split_kv_b):
            is_matrix = not tensor_name.endswith(_ALWAYS_F32)
            dtype = np.float16 if is_matrix and weight_type == gguf.GGMLQuantizationType.F16 else np.float32
            writer.add_tensor(tensor_name, np.ascontiguousarray(values, dtype=dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def write_hyperparameters(writer: gguf.GGUFWriter, config: DeepseekConfig, split_kv_b: bool) -> None:
    """Write the metadata that describe ``config``, in the layout that ``split_kv_b`` names; none of the tokenizer.

    Raises `UnsupportedModelError` for a rope type other than "default", "linear" and "yarn".
    """
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    value_dim = config.v_head_dim or 0
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_head_count(heads)
    writer.add_rope_dimension_count(rope)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    if split_kv_b:
        # Seen from the latent, attention has one key-value head whose key is latent and rotary part together.
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + rope)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value_dim)
    else:
        writer.add_head_count_kv(heads)
        writer.add_key_length(nope + rope)
        writer.add_value_length(value_dim)

    writer.add_leading_dense_block_count(sparse_layers(config).count(False))
    _write_experts(writer, config)
    if config.model_type == "deepseek_v32":
        writer.add_indexer_head_count(config.index_n_heads)
        writer.add_indexer_key_length(config.index_head_dim)
        writer.add_indexer_top_k(config.index_topk)
    _write_rope(writer, config)


def _write_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    gating = _GATING[config.model_type]
    if gating is None:  # then llama.cpp still wants these
        writer.add_expert_shared_count(0)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok or 0)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_gating_func(gating)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    if config.n_group is not None and config.topk_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _write_rope(writer: gguf.GGUFWriter, config: DeepseekConfig) -> None:
    rope: Any = config.rope_parameters or {}
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"rope_type {kind!r} cannot be written; accepted: default, linear, yarn")
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    if rope.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    # Stated where it is nothing too: readers cannot tell a file without the key from one older than the key.
    writer.add_rope_scaling_yarn_log_mul(_YARN_LOG_FACTOR * (rope.get("mscale_all_dim") or 0.0))


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, vocab_size: int, pre_tokenizer: str
) -> None:
    backend: Tokenizer = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    texts = {index: text for text, index in backend.get_vocab(with_added_tokens=True).items()}
    tokens, kinds = [], []
    for index in range(vocab_size):
        if index not in texts:  # an embedding row without token
            tokens.append(f"[PAD{index}]")
            kinds.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(texts[index])
        if index not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            kinds.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(_merges(backend))
    for add_id, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add_id(token_id)
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _merges(backend: Tokenizer) -> list[str]:
    """Merge rules as "left right", in order of rank. The library shows them only in its JSON form."""
    merges = json.loads(backend.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _tensors(
    model: PreTrainedModel, config: DeepseekConfig, split_kv_b: bool
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    layers = range(config.num_hidden_layers)
    # tensor_slots chooses between spellings by what it is told the file holds.
    present = {f"blk.{layer}.{half}.weight" for layer in layers for half in ("attn_k_b", "attn_v_b")}
    if not split_kv_b:
        present = set()
    if not config.tie_word_embeddings:
        present.add("output.weight")
    written: set[str] = set()
    for slot in tensor_slots(config, present):
        if slot.gguf_name not in written:  # tied embeddings fill two slots
            written.add(slot.gguf_name)
            yield slot.gguf_name, _slot_values(model, config, slot).detach().float().numpy()


def _slot_values(model: PreTrainedModel, config: DeepseekConfig, slot: TensorSlot) -> torch.Tensor:
    """The tensor that belongs into ``slot``, shape ``slot.shape``."""
    module: Any = model.get_submodule(slot.module)
    values: torch.Tensor
    if slot.role in ("gate", "up"):
        values = module.gate_up_proj.chunk(2, dim=1)[0 if slot.role == "gate" else 1]
    elif slot.role == "down":
        values = module.down_proj
    elif slot.role in ("k_b", "v_b"):
        value_dim = config.v_head_dim or 0
        per_head = module.weight.unflatten(0, (config.num_attention_heads, config.qk_nope_head_dim + value_dim))
        k_b, v_b = per_head.split([config.qk_nope_head_dim, value_dim], dim=1)
        values = k_b.transpose(1, 2) if slot.role == "k_b" else v_b
    else:
        values = getattr(module, slot.role)
    return values
