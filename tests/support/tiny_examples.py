"""Small models with random weights, as GGUF files and as stock models to compare with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from transformers_kt.families.deepseek.export import export_gguf

EOS, BOS, PAD = 257, 258, 259  # after the 256 bytes and one merge
VOCAB = 320  # more rows than tokens, as real models have
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 96,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


@dataclass(frozen=True)
class Example:
    """One model in every form a user may have it in."""

    stock: Any  # the model of transformers, with the weights of the file
    folder: Path  # config.json, generation_config.json, tokenizer and the GGUF
    config_folder: Path  # the same without the GGUF
    gguf: Path

    @property
    def prompt(self) -> torch.Tensor:
        return torch.tensor([[BOS, 72, 101, 108, 108, 111, 44]])


def make_tokenizer() -> PreTrainedTokenizerFast:
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Hi"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("H", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    backend.add_special_tokens(["<eos>", "<bos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_stock(kind: str) -> Any:
    torch.manual_seed(7)
    if kind == "v3":
        config: Any = DeepseekV3Config(
            **SIZES, n_routed_experts=8, n_group=2, topk_group=1, q_lora_rank=48, routed_scaling_factor=2.5
        )
        model: Any = DeepseekV3ForCausalLM(config)
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.data.normal_(std=0.1)
    else:
        config = DeepseekV2Config(**SIZES, n_routed_experts=8, q_lora_rank=None, topk_method="greedy", n_group=1)
        model = DeepseekV2ForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # the initial 0.02 leaves logits too even to tell tokens apart
    return model.eval()


def make_example(kind: str, root: Path, **export: Any) -> Example:
    stock, tokenizer = make_stock(kind), make_tokenizer()
    config_folder = root / "config"
    stock.config.save_pretrained(config_folder)
    token_ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    GenerationConfig(**token_ids, do_sample=True, temperature=0.6).save_pretrained(config_folder)
    tokenizer.save_pretrained(config_folder)
    folder = root / f"tiny-{kind}"
    shutil.copytree(config_folder, folder)
    path = folder / f"tiny-{kind}.gguf"
    export_gguf(stock, tokenizer, path, name=f"tiny-{kind}", pre_tokenizer="gpt-2", **export)
    alone = root / "alone" / path.name
    alone.parent.mkdir()
    shutil.copy(path, alone)
    return Example(stock, folder, config_folder, alone)
