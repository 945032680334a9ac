"""Writes GGUF files with the dimensions of real DeepSeek models and random weights, for benchmarks.

    python tests/support/synthetic.py v2-lite q4_k_m v2-lite-q4_k_m.gguf
    python tests/support/synthetic.py v3 q4_k_m one-layer.gguf --layers 4 --experts 64
    python tests/support/synthetic.py v3 ud-q2_k_xl shapes-only.gguf --sparse

Types of tensors are those of real files:

q4_k_m, q8_0
    what llama.cpp's quantizer chooses, its fallbacks for rows that do not divide by 256 included. With
    ``whole_kv_b`` DeepSeek-R1 comes out at the 376.65 GiB that the published Q4_K_M file has.
ud-q2_k_xl
    what Unsloth's dynamic file of DeepSeek-R1 holds. Its listing by llama.cpp says how many tensors of each type there
    are (171 Q2_K, 3 Q3_K, 306 Q4_K, 184 Q6_K) and how large it is (211.03 GiB); the table below is the one that
    gives both. The newer layout with split kv_b has these halves in Q8_0, as Unsloth's later files do.
iq4_xs, iq2_xxs, mxfp4_moe
    what llama.cpp's quantizer chooses by these names, but for the layers that IQ2_XXS gives better types: routed
    experts of the type, attention and shared experts of Q5_K in an IQ2_XXS file and of Q8_0 in an MXFP4 one.
only-q4_k, only-iq3_s and so on
    nothing but this type, and Q8_0 where a row does not divide into its blocks: for measuring one type at a time. In
    "v2-lite-even" that is attn_k_b alone; it is V2-Lite with feed-forward widths that divide by 256.

Scales are set so that activations keep their size through the layers and the router spreads its tokens: speed does not
depend on the values, but a file of NaN or of one favourite expert would measure something else. The tokenizer is a
stub: token i is "<i>". llama.cpp tells V2-Lite by its 27 layers, so it does not load a V2-Lite shrunk by `--layers`;
`--experts` it takes.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tqdm
from gguf import GGMLQuantizationType as Type
from transformers import DeepseekV2Config, DeepseekV3Config

from transformers_kt.families.base import TensorSlot
from transformers_kt.families.deepseek.export import write_hyperparameters
from transformers_kt.families.tensors import tensor_slots

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}


def _with(config: Any, **changes: int) -> Any:
    config.update(changes)
    return config


MODELS: dict[str, Any] = {
    "v2-lite": lambda: DeepseekV2Config(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, q_lora_rank=None,
        first_k_dense_replace=1, topk_method="greedy", max_position_embeddings=163840,
        rope_parameters={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v2-lite-even": lambda: _with(MODELS["v2-lite"](), intermediate_size=11008, moe_intermediate_size=1536),
    "v2": lambda: DeepseekV2Config(
        vocab_size=102400, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=60,
        num_attention_heads=128, n_routed_experts=160, num_experts_per_tok=6, n_shared_experts=2, q_lora_rank=1536,
        first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0, max_position_embeddings=163840,
        rope_parameters={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "v3": lambda: DeepseekV3Config(
        max_position_embeddings=163840, num_mtp_layers=0,
        rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}  # fmt: skip

# Where a block has its scale, and its minimum with the multiple of the scale that makes the mean zero.
_PLAIN_SCALES: dict[Type, tuple[int, tuple[int, float] | None]] = {
    Type.Q4_0: (0, None),
    Type.Q5_0: (0, None),
    Type.Q8_0: (0, None),
    Type.Q4_1: (0, (2, -7.5)),
    Type.Q5_1: (0, (2, -15.5)),
    Type.IQ4_NL: (0, None),
    Type.IQ4_XS: (0, None),
    Type.IQ3_S: (0, None),
    Type.IQ3_XXS: (0, None),
    Type.IQ2_S: (0, None),
    Type.IQ2_XS: (0, None),
    Type.IQ2_XXS: (0, None),
    Type.IQ1_S: (0, None),
}

_SINGLE_TYPES = {
    f"only-{ggml_type.name.lower()}": ggml_type
    for ggml_type in (
        *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ1_M, Type.MXFP4, Type.F16, Type.BF16),
        *_PLAIN_SCALES,
    )
}
_MIXES = {  # routed experts, other matrices, embedding, head
    "iq4_xs": (Type.IQ4_XS, Type.IQ4_XS, Type.IQ4_XS, Type.Q6_K),
    "iq2_xxs": (Type.IQ2_XXS, Type.Q5_K, Type.Q4_K, Type.Q5_K),
    "mxfp4_moe": (Type.MXFP4, Type.Q8_0, Type.Q8_0, Type.Q8_0),
}
QUANTIZATIONS = ("q4_k_m", "q8_0", "ud-q2_k_xl", *_MIXES, *_SINGLE_TYPES)

# Base names of tensors in a UD-Q2_K_XL file; all others are Q4_K.
_UD_Q2_K_XL = {
    "ffn_gate_exps": Type.Q2_K,
    "ffn_up_exps": Type.Q2_K,
    "ffn_down_exps": Type.Q2_K,  # Q3_K in the first _UD_BETTER_LAYERS layers with experts
    "ffn_down": Type.Q6_K,
    "ffn_down_shexp": Type.Q6_K,
    "attn_kv_a_mqa": Type.Q6_K,
    "attn_kv_b": Type.Q6_K,
    "attn_k_b": Type.Q8_0,
    "attn_v_b": Type.Q8_0,
    "output": Type.Q6_K,
}
_UD_BETTER_LAYERS = 3

# What llama.cpp takes where a row does not divide into blocks of 256.
_FALLBACKS = {
    **dict.fromkeys((Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.IQ2_XXS), Type.IQ4_NL),
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}

# A constant 6-bit scale and minimum of 32 for all sub-blocks, in the packed form of Q4_K and Q5_K.
_SIX_BIT_SCALES = np.array([160] * 8 + [0] * 4, dtype=np.uint8)

# Standard deviation of a matrix as a multiple of 1 / sqrt(columns), which keeps the size of what comes in.
_GAINS = {"output": 3.0, "ffn_gate_inp": 2.0, "attn_output": 0.5, "ffn_down": 0.5, "token_embd": 0.0}


def random_blocks(ggml_type: Type, blocks: int, deviation: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """`blocks` blocks of weights round 0 with about the standard deviation asked for."""
    if ggml_type in (Type.F16, Type.BF16):
        # Drawn once and repeated, as below; of an odd number, so that no two rows are the same.
        values = np.resize(deviation * rng.standard_normal(min(blocks, (1 << 20) - 3)).astype(np.float32), blocks)
        return gguf.quantize(values, ggml_type).view(np.uint8).reshape(blocks, 2)
    _elements, nbytes = gguf.GGML_QUANT_SIZES[ggml_type]
    # Random bytes are drawn once and shifted: drawing 10 GB would take longer than writing them.
    pool = rng.integers(0, 256, min(blocks * nbytes, 1 << 24) + 4096, dtype=np.uint8)
    data = np.resize(pool[int(rng.integers(0, 4096)) :], blocks * nbytes).reshape(blocks, nbytes)

    def set_half(offset: int, value: float) -> None:
        data[:, offset : offset + 2] = np.array([value], dtype=np.float16).view(np.uint8)

    if ggml_type in (Type.Q4_K, Type.Q5_K):
        levels = 16 if ggml_type == Type.Q4_K else 32
        d = deviation / 32 / (levels / math.sqrt(12))
        set_half(0, d)
        set_half(2, d * (levels - 1) / 2)
        data[:, 4:16] = _SIX_BIT_SCALES
    elif ggml_type == Type.Q2_K:  # a scale and a minimum of 8 in each byte
        d = deviation / 8 / (4 / math.sqrt(12))
        data[:, :16] = 0x88
        set_half(80, d)
        set_half(82, d * 1.5)
    elif ggml_type == Type.Q3_K:  # stored scales have an offset of 32: zeros are -32
        data[:, 96:108] = 0
        set_half(108, deviation / 32 / (8 / math.sqrt(12)))
    elif ggml_type == Type.Q6_K:
        data[:, 192:208] = 32
        set_half(208, deviation / 32 / (64 / math.sqrt(12)))
    elif ggml_type == Type.IQ1_M:  # a nibble of the scale in each of the last four words
        words = data[:, 48:56].view("<u2")

        def set_nibbles(value: float) -> None:
            half = int(np.array([value], dtype=np.float16).view(np.uint16)[0])
            words[:] = words & 0x0FFF | np.array([(half >> 4 * place & 15) << 12 for place in range(4)], np.uint16)

        set_nibbles(1.0)
        set_nibbles(deviation / _deviation(data, ggml_type))
    elif ggml_type == Type.MXFP4:  # powers of two: of two neighbours, as many as give the variance
        data[:, 0] = 128
        power, times = divmod(math.log2(deviation / _deviation(data, ggml_type)), 1.0)
        data[:, 0] = 128 + int(power) + (rng.random(blocks) < (4.0**times - 1) / 3)
    else:
        scale, minimum = _PLAIN_SCALES[ggml_type]
        set_half(scale, 1.0)
        if minimum is not None:
            set_half(minimum[0], minimum[1])
        ratio = deviation / _deviation(data, ggml_type)
        set_half(scale, ratio)
        if minimum is not None:
            set_half(minimum[0], minimum[1] * ratio)
    return data


def _deviation(data: npt.NDArray[np.uint8], ggml_type: Type) -> float:
    return float(gguf.dequantize(data[:4096], ggml_type).std())


def type_of(slot: TensorSlot, quantization: str, config: Any) -> Type:
    """The type of this tensor in a real file of the quantization; see the top of this file for where that is from."""
    base = slot.gguf_name.split(".")[-2]
    if len(slot.shape) == 1 or base == "ffn_gate_inp":
        return Type.F32
    layer = int(slot.gguf_name.split(".")[1]) if slot.gguf_name.startswith("blk.") else 0
    if quantization == "q8_0":
        return Type.Q8_0
    if quantization in _SINGLE_TYPES:
        chosen = _SINGLE_TYPES[quantization]
        return chosen if slot.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else Type.Q8_0
    if quantization in _MIXES:
        experts, others, embedding, head = _MIXES[quantization]
        chosen = {"token_embd": embedding, "output": head}.get(base, experts if base.endswith("_exps") else others)
    elif quantization == "ud-q2_k_xl":
        chosen = _UD_Q2_K_XL.get(base, Type.Q4_K)
        if base == "ffn_down_exps" and layer < config.first_k_dense_replace + _UD_BETTER_LAYERS:
            chosen = Type.Q3_K
    else:
        layers = config.num_hidden_layers
        # llama.cpp's use_more_bits: the first and last eighth of the layers, and every third between. Where a model has
        # experts it goes by the layer in the name. (Its current version gives more bits to a whole attn_kv_b too; the
        # versions that the files with such a tensor come from did not.)
        more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        better = base == "output" or (base.startswith("ffn_down") and more_bits)
        chosen = Type.Q6_K if better else Type.Q4_K
    return chosen if slot.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else _FALLBACKS[chosen]


def write(
    model: str,
    quantization: str,
    path: Path,
    layers: int | None = None,
    experts: int | None = None,
    *,
    whole_kv_b: bool = False,
    sparse: bool = False,
) -> None:
    """Writes the file; `layers` and `experts` shrink the model without changing the shape of what is left.

    `whole_kv_b` is the layout of older files: one tensor attn_kv_b instead of attn_k_b and attn_v_b.

    `sparse` leaves the weights out: the file has its full length but is a hole after the header, enough for whatever
    reads only names, shapes and types. Its zeros are blocks too, of a model that answers nothing.
    """
    config = MODELS[model]()
    if layers is not None:
        config.num_hidden_layers = layers
    if experts is not None:
        config.n_routed_experts = experts
    halves = () if whole_kv_b else ("attn_k_b", "attn_v_b")
    names = {f"blk.{i}.{half}.weight" for i in range(config.num_hidden_layers) for half in halves}
    slots = tensor_slots(config, names | {"output.weight"})
    rng = np.random.default_rng(0)

    writer = gguf.GGUFWriter(path, "deepseek2", use_temp_file=False)
    _write_metadata(writer, config, model, split_kv_b=not whole_kv_b)
    types = {slot.gguf_name: type_of(slot, quantization, config) for slot in slots}
    slots = list({slot.gguf_name: slot for slot in slots}.values())
    sizes = {}
    for slot in slots:
        ggml_type = types[slot.gguf_name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[ggml_type]
        size = sizes[slot.gguf_name] = math.prod(slot.shape) // elements * nbytes
        is_float = ggml_type == Type.F32
        shape = slot.shape if is_float else (*slot.shape[:-1], slot.shape[-1] // elements * nbytes)
        dtype = np.dtype(np.float32 if is_float else np.uint8)
        writer.add_tensor_info(slot.gguf_name, shape, dtype, size, raw_dtype=None if is_float else ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if sparse:
        writer.close()
        header = path.stat().st_size
        os.truncate(path, sum(writer.ggml_pad(size, writer.data_alignment) for size in (header, *sizes.values())))
        return
    for slot in tqdm.tqdm(slots, desc=path.name, unit="tensor"):
        base = slot.gguf_name.split(".")[-2]
        if len(slot.shape) == 1:
            is_bias = base == "exp_probs_b"
            values = 0.1 * rng.standard_normal(slot.shape) if is_bias else np.ones(slot.shape)
            writer.write_tensor_data(values.astype(np.float32))
            continue
        gain = next((gain for name, gain in _GAINS.items() if base.startswith(name)), 1.0)
        deviation = gain / math.sqrt(slot.shape[-1]) if gain else 1.0
        if types[slot.gguf_name] == Type.F32:
            writer.write_tensor_data((deviation * rng.standard_normal(slot.shape)).astype(np.float32))
            continue
        blocks = math.prod(slot.shape) // gguf.GGML_QUANT_SIZES[types[slot.gguf_name]][0]
        writer.write_tensor_data(random_blocks(types[slot.gguf_name], blocks, deviation, rng))
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, config: Any, name: str, *, split_kv_b: bool) -> None:
    writer.add_name(f"{name} dimensions, random weights")
    write_hyperparameters(writer, config, split_kv_b)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3" if config.model_type == "deepseek_v3" else "deepseek-llm")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("quantization", choices=QUANTIZATIONS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--experts", type=int, help="default: as many as the model has")
    parser.add_argument("--whole-kv-b", action="store_true", help="attn_kv_b in one piece, as in older files")
    parser.add_argument("--sparse", action="store_true", help="header only, with a hole of full length for the weights")
    args = parser.parse_args()
    layout = {"whole_kv_b": args.whole_kv_b, "sparse": args.sparse}
    write(args.model, args.quantization, args.path, args.layers, args.experts, **layout)


if __name__ == "__main__":
    main()
