"""The two things the parity tests compare with, neither of them ours: llama.cpp's stored answers, and transformers'
float32 models on weights that the `gguf` package read, named and dequantized."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import random_models
import torch
from gguf.quants import dequantize
from golden.make_golden import RANDOM_MODELS, TINY_R1
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

HERE = Path(__file__).resolve().parent

TINY_R1_NAME = "tiny-r1-Q4_K_M"
NAMES = (TINY_R1_NAME, *(spec.name for spec in RANDOM_MODELS))


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """``logits``: llama.cpp's, float32 (stored, vocab), at the last ``stored`` of the (1, tokens) ``input_ids``.

    ``greedy``, ``margins``: llama.cpp's continuation and by how much each of its tokens led; both may be empty.
    """

    name: str
    input_ids: torch.Tensor
    logits: torch.Tensor
    greedy: list[int]
    margins: list[float]


def gguf_path(name: str) -> Path:
    return TINY_R1 if name == TINY_R1_NAME else HERE / f"{name}.gguf"


def golden_prompts(name: str) -> list[GoldenPrompt]:
    """Raises ValueError where the GGUF is not the one that the golden data were made from."""
    with np.load(HERE / f"{name}.npz") as data:
        found = hashlib.sha256(gguf_path(name).read_bytes()).hexdigest()
        if found != str(data["gguf_sha256"]):
            raise ValueError(
                f"{gguf_path(name)} has changed since {name}.npz was made; run tests/golden/make_golden.py"
            )
        return [
            GoldenPrompt(
                prompt,
                torch.from_numpy(data[f"{prompt}.tokens"]).long()[None],
                torch.from_numpy(data[f"{prompt}.logits"]),
                data[f"{prompt}.greedy"].tolist(),
                data[f"{prompt}.margins"].tolist(),
            )
            for prompt in dict.fromkeys(key.rpartition(".")[0] for key in data.files if key.endswith(".tokens"))
        ]


def config_of(name: str) -> PreTrainedConfig:
    """The config as the model's maker wrote it, not as it can be read back from the GGUF."""
    if name == TINY_R1_NAME:
        return AutoConfig.from_pretrained(TINY_R1.parent)
    spec = next(spec for spec in RANDOM_MODELS if spec.name == name)
    with torch.device("meta"):
        return getattr(random_models, spec.builder)(**spec.overrides).config


def dequantized_model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model in float32 on the dequantized weights of ``path``, in eval mode."""
    # GLM's indexer is called as DeepSeek-V3.2's, which the package does not know before 0.20.
    has_indexer = config.model_type == "deepseek_v32"
    architecture = gguf.MODEL_ARCH.GLM_DSA if has_indexer else gguf.MODEL_ARCH.DEEPSEEK2
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = {
        tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for tensor in gguf.GGUFReader(path).tensors
    }

    def take(module: str, suffix: str = ".weight") -> torch.Tensor:
        name = names.get_name(module)
        if name is None:
            raise KeyError(f"the gguf package has no name for {module}")
        return weights.pop(name + suffix)

    state = {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key in model.state_dict():
        module = key.removesuffix(".weight")
        if key.endswith("experts.gate_up_proj"):
            experts = key.removesuffix(".gate_up_proj")
            state[key] = torch.cat([take(f"{experts}.gate_proj"), take(f"{experts}.up_proj")], dim=1)
        elif key.endswith("kv_b_proj.weight") and names.get_name(module) + ".weight" not in weights:
            attention = key.removesuffix(".kv_b_proj.weight")
            k_b, v_b = take(f"{attention}.k_b_proj"), take(f"{attention}.v_b_proj")
            state[key] = torch.cat([k_b.transpose(1, 2), v_b], dim=1).flatten(0, 1)
        elif key.endswith("e_score_correction_bias"):
            state[key] = take(key.removesuffix("_bias"), ".bias")
        elif key.endswith(".bias"):
            state[key] = take(key.removesuffix(".bias"), ".bias")
        else:
            state[key] = take(module)
    if weights:
        raise ValueError(f"tensors of {path} without a place in the model: {sorted(weights)}")
    model.load_state_dict(state, strict=True)
    return model.eval()


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats for every row of two (rows, vocab) tensors of logits; computed in float64.

    Compare medians over rows, not means: where two experts are nearly tied, noise of the last bit may pick another one,
    and single rows stand out by a factor of a hundred on either side.
    """
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
