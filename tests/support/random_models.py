"""Tiny DeepSeek models with random weights, in shapes that differ: V3, V3.2, V2, V2-Lite, Moonlight, GLM-4.7-Flash,
Kimi-K2, Youtu-LLM.

All are float32, seeded, and scaled so that a comparison of logits means something: activations keep unit size through
the layers, logits spread by about three, attention is neither flat nor one-hot, and every expert gets tokens. YaRN is
on everywhere, with a short original length, so that a prompt of a few hundred tokens passes it.

Keyword arguments of the functions override fields of the config.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    YoutuConfig,
    YoutuForCausalLM,
)

ORIGINAL_POSITIONS = 128

_SHARED: dict[str, Any] = {
    "vocab_size": 512,  # that of tiny-r1's tokenizer, whose files these models borrow
    "hidden_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 8 * ORIGINAL_POSITIONS,
}


def _yarn(mscale_all_dim: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
        "beta_fast": 32,
        "beta_slow": 1,
        # Both alike, as in every DeepSeek release: llama.cpp reads mscale_all_dim only and takes mscale from it.
        "mscale": mscale_all_dim,
        "mscale_all_dim": mscale_all_dim,
    }


# Standard deviation of a matrix, as a multiple of 1 / sqrt(inputs), which keeps the size of what comes in; 1 where a
# module is not named.
_GAINS = {
    "lm_head": 3.0,
    "gate": 2.0,  # the router: scores spread, so that top-k is no coin toss
    "q_proj": 2.0,
    "q_b_proj": 2.0,
    "o_proj": 0.5,
    "down_proj": 0.5,
}
_SPREAD = 0.1  # of norm weights round 1 and of the correction bias round 0


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            normal(parameter, 0.0, 1.0)
        elif parameter.dim() == 1:
            normal(parameter, 1.0, _SPREAD)
        else:
            # "...mlp.experts.down_proj" holds its stack itself, "...o_proj.weight" is a Linear's
            module = name.removesuffix(".weight").rsplit(".", 1)[-1]
            normal(parameter, 0.0, _GAINS.get(module, 1.0) / math.sqrt(parameter.shape[-1]))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            normal(buffer, 0.0, _SPREAD)
    model.eval()


_V3: dict[str, Any] = {
    **_SHARED,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": _yarn(1.0),
}


def v3_like(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """V3 and R1: low-rank queries, sigmoid scores, expert groups, a correction bias that decides some choices."""
    config = DeepseekV3Config(**{**_V3, "num_mtp_layers": 0, **overrides})
    model = DeepseekV3ForCausalLM(config)
    _randomize(model, seed)
    return model


def v3_narrow(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """V3 in widths that only types with blocks of 32 can store; more experts than `v3_like`, weights not normalized."""
    narrow = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "q_lora_rank": 64,
        "kv_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
    }
    return v3_like(seed, **{**narrow, **overrides})


def glm_lite_like(seed: int = 0, **overrides: Any) -> Glm4MoeLiteForCausalLM:
    """GLM-4.7-Flash: heads that do not divide by 8, keys wider without rotation than with, values wider than keys
    without rotation, one group, plain RoPE."""
    config = Glm4MoeLiteConfig(
        **{
            **_SHARED,
            "intermediate_size": 320,
            "moe_intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            **overrides,
        }
    )
    model = Glm4MoeLiteForCausalLM(config)
    _randomize(model, seed)
    return model


INDEX_TOPK = 48


def v32_like(seed: int = 0, **overrides: Any) -> DeepseekV32ForCausalLM:
    """V3.2: V3 with an indexer, which leaves out keys as soon as there are more than `INDEX_TOPK`."""
    config = DeepseekV32Config(
        **{
            **_V3,
            "index_topk": INDEX_TOPK,
            "index_n_heads": 4,
            "index_head_dim": 64,
            **overrides,
        }
    )
    model = DeepseekV32ForCausalLM(config)
    _randomize(model, seed)
    return model


def kimi_like(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """Kimi-K2: one group, one dense layer, half as many heads, YaRN whose ramp has no width."""
    kimi = {
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 24,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**_yarn(1.0), "rope_theta": 50000.0, "beta_fast": 1.0, "beta_slow": 1.0},
    }
    return v3_like(seed, **{**kimi, **overrides})


def youtu_like(seed: int = 0, **overrides: Any) -> YoutuForCausalLM:
    """Youtu-LLM: V3's attention, no experts, embeddings that double as the head."""
    config = YoutuConfig(
        **{
            **_SHARED,
            "intermediate_size": 320,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1600000.0},
            **overrides,
        }
    )
    model = YoutuForCausalLM(config)
    _randomize(model, seed)
    with torch.no_grad():  # as a head, for which they were far too large
        model.get_input_embeddings().weight.mul_(_GAINS["lm_head"] / math.sqrt(config.hidden_size))
    return model


_THIN: dict[str, Any] = {
    "intermediate_size": 32,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 25,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
}
"""27 layers because llama.cpp tells by their number that a file has no low-rank queries; most are dense and thin, so
that the file stays small."""


def moonlight_like(seed: int = 0, **overrides: Any) -> DeepseekV3ForCausalLM:
    """Moonlight: V3's router without groups, full-rank queries, plain RoPE."""
    moonlight = {
        **_THIN,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    return v3_like(seed, **{**moonlight, **overrides})


def v2_like(seed: int = 0, **overrides: Any) -> DeepseekV2ForCausalLM:
    """V2: low-rank queries, softmax scores, groups ranked by their best expert, weights scaled but not normalized.

    llama.cpp ranks groups by the sum of their two best experts whatever the model (that is V3's rule), so it computes
    something else for such a model and cannot be its reference.
    """
    config = DeepseekV2Config(
        **{
            **_SHARED,
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 256,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
            "rope_parameters": _yarn(1.0),
            **overrides,
        }
    )
    model = DeepseekV2ForCausalLM(config)
    _randomize(model, seed)
    return model


def v2_lite_like(seed: int = 0, **overrides: Any) -> DeepseekV2ForCausalLM:
    """V2-Lite: full-rank queries, plain softmax top-k, experts whose width does not divide by 256."""
    config = DeepseekV2Config(
        **{
            **_SHARED,
            **_THIN,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "rope_parameters": _yarn(0.707),
            **overrides,
        }
    )
    model = DeepseekV2ForCausalLM(config)
    _randomize(model, seed)
    return model
