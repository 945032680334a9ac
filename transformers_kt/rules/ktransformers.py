"""The names in KTransformers' YAML files, and what each means here. Names are data: none is ever imported.

Facts of KTransformers 0.1 to 0.4 (`optimize.py`, `operators/`, `optimize_rules/`). A replacement becomes an operation
kind; the module computes on ``generate_device``; what has no meaning here becomes the nearest thing, with a note.
Names of 0.1 that changed later are known too: they still stand in files that are about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers_kt.errors import RuleError
from transformers_kt.families.deepseek.outline import GLM_LITE, V2, V3
from transformers_kt.rules.checks import require_keys
from transformers_kt.rules.devices import CPU, DEVICES_ACCEPTED, parse_device
from transformers_kt.text import brief, nearest

DEFAULT_DEVICE = "cuda:0"
"""Where KTransformers computes what no rule speaks of, or what a rule says no device for."""

DEFAULT = "default"
ROUTER = "router"
MODEL = "model"
_OPERATORS = "ktransformers.operators."
_MODELS = "ktransformers.models."

# Replacement class -> kind. "router" and "model" stay transformers' own: they are there to be placed.
_REPLACEMENTS: Mapping[str, str] = {
    _OPERATORS + name: kind
    for kind, names in {
        "experts": (
            "experts.KTransformersExperts",
            "experts.KTransformersExpertsV2",
            "experts.KTransformersMLPExpert",
        ),
        "moe": (
            "experts.KDeepseekV2MoE",
            "experts.KDeepseekV3MoE",
            "experts.KDeepseekV3MoEV2",
            "experts.DeepseekV2MoEInjected",
        ),
        "mlp": ("mlp.kDeepseekV3MLP",),
        "linear": ("linear.KTransformersLinear", "linear.KTransformerLinear"),
        "attention": (
            "attention.KDeepseekV2Attention",
            "attention.KDeepseekV3Attention",
            "attention.DeepseekV2AttentionInjected",
            "attention.flashinfer_attn",
            "balance_serve_attention.flashinfer_attn",
        ),
        "rotary": (
            "RoPE.RotaryEmbedding",
            "RoPE.RotaryEmbeddingV2",
            "RoPE.RotaryEmbeddingV3",
            "RoPE.RotaryEmbeddingV4",
            "RoPE.YarnRotaryEmbedding",
            "RoPE.YarnRotaryEmbeddingV3",
            "RoPE.YarnRotaryEmbeddingV4",
        ),
        "norm": ("layernorm.RMSNorm", "layernorm.DeepseekV3RMSNormTorch"),
        ROUTER: ("gate.KMoEGate", "gate.KMoEGateDeepSeekV3", "gate.KMoEGateIPEXLLM"),
        MODEL: (
            "models.KDeepseekV2Model",
            "layer_wise_prefill.KDeepseekV2Model",
            "layer_wise_prefill.DeepseekV2ModelKTransformers",
            "layer_wise_prefill.DeepseekV2ModelPerLayerPrefill",
        ),
    }.items()
    for name in names
}
# What a replacement of the class does where its rule says no device: the experts were made for the CPU.
_DEFAULT_DEVICES = {"experts": CPU}

_V2_CLASSES = {
    "DeepseekV2RMSNorm": "DeepseekV2RMSNorm",
    "DeepseekV2RotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV2LinearScalingRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV2DynamicNTKScalingRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV2YarnRotaryEmbedding": "DeepseekV2RotaryEmbedding",
    "DeepseekV2MLP": "DeepseekV2MLP",
    "MoEGate": "DeepseekV2TopkRouter",
    "DeepseekV2MoE": "DeepseekV2Moe",
    "DeepseekV2Attention": "DeepseekV2Attention",
    "DeepseekV2FlashAttention2": "DeepseekV2Attention",
    "DeepseekV2DecoderLayer": "DeepseekV2DecoderLayer",
    "DeepseekV2PreTrainedModel": "DeepseekV2PreTrainedModel",
    "DeepseekV2Model": "DeepseekV2Model",
    "DeepseekV2ForCausalLM": "DeepseekV2ForCausalLM",
}
_V3_CLASSES = {
    "DeepseekV3RMSNorm": "DeepseekV3RMSNorm",
    "DeepseekV3RotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "DeepseekV3LinearScalingRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "DeepseekV3DynamicNTKScalingRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "DeepseekV3YarnRotaryEmbedding": "DeepseekV3RotaryEmbedding",
    "DeepseekV3MLP": "DeepseekV3MLP",
    "MoEGate": "DeepseekV3TopkRouter",
    "DeepseekV3MoE": "DeepseekV3MoE",
    "DeepseekV3Attention": "DeepseekV3Attention",
    "DeepseekV3FlashAttention2": "DeepseekV3Attention",
    "DeepseekV3DecoderLayer": "DeepseekV3DecoderLayer",
    "DeepseekV3PreTrainedModel": "DeepseekV3PreTrainedModel",
    "DeepseekV3Model": "DeepseekV3Model",
    "DeepseekV3ForCausalLM": "DeepseekV3ForCausalLM",
}
# Class of their copies of the models -> transformers' own. Their V3 file had another name at first.
_STOCK_CLASSES: Mapping[str, str] = {
    # The first files for V3 looked for this class in the file of V2.
    _MODELS + "modeling_deepseek.DeepseekV3YarnRotaryEmbedding": V3 + "DeepseekV3RotaryEmbedding",
} | {
    f"{_MODELS}{file}.{theirs}": stock + ours
    for file, stock, classes in (
        ("modeling_deepseek", V2, _V2_CLASSES),
        ("modeling_deepseek_v3", V3, _V3_CLASSES),
        ("modeling_deepseekv3", V3, _V3_CLASSES),
    )
    for theirs, ours in classes.items()
}
# Families that none of our operations stands for -> the classes that they are for.
CLASSES_OF = {
    ROUTER: (V2 + "DeepseekV2TopkRouter", V3 + "DeepseekV3TopkRouter", GLM_LITE + "Glm4MoeLiteTopkRouter"),
    MODEL: (V2 + "DeepseekV2Model", V3 + "DeepseekV3Model", GLM_LITE + "Glm4MoeLiteModel"),
}

_OPS = {
    "experts": ("KExpertsCPU", "KExpertsTorch", "KExpertsMarlin", "MLPCPUExperts", "MLPExpertsTorch"),
    "linear": (
        "KLinearMarlin",
        "VLinearMarlin",
        "KLinearTorch",
        "KLinearCPUInfer",
        "KLinearFP8",
        "KLinearQ8",
        "QuantizedLinearMarlin",
        "QuantizedLinearTorch",
    ),
}
_DEQUANTIZING_OPS = ("KLinearTorch", "QuantizedLinearTorch")
_CPU_OPS = ("KExpertsCPU", "MLPCPUExperts", "KLinearCPUInfer")
_NO_OP = (None, "None")
# Names of 0.1 for kwargs -> those since.
_FORMER_KWARGS = {"generate_mlp_type": "generate_op", "prefill_mlp_type": "prefill_op"}
_BACKENDS = ("llamafile", "AMXInt8", "AMXInt4", "AMXBF16")


class Replacement(NamedTuple):
    """What a rule of theirs asks for: ``kind`` is "default" where the module stays and is only placed. One that
    ``dequantizes`` wants a linear layer on a GPU in bfloat16."""

    kind: str
    device: str
    notes: tuple[str, ...]
    dequantizes: bool


def stock_class(name: str, where: str) -> str:
    """The class that ``name``, from the match of a rule, stands for: itself unless it is one of KTransformers'."""
    if not name.startswith("ktransformers."):
        return name
    if name not in _STOCK_CLASSES:
        raise RuleError(
            f"{where} has the unknown class {brief(name)}{nearest(name, list(_STOCK_CLASSES))}; known are the DeepSeek "
            f"classes of {_MODELS}modeling_deepseek and modeling_deepseek_v3, and transformers' and torch's own"
        )
    return _STOCK_CLASSES[name]


def read_replacement(replace: Mapping[str, Any], where: str) -> Replacement:
    """What ``replace``, of the keys class and kwargs, means. Raises `RuleError` if anything in it is not known."""
    name = replace.get("class", DEFAULT)
    kind = DEFAULT if name == DEFAULT else _kind(name, where)
    kwargs = {} if replace.get("kwargs") is None else replace["kwargs"]
    require_keys(kwargs, (*_KWARGS, *_FORMER_KWARGS), f"{where}, replace.kwargs", "kwargs")
    kwargs = {_FORMER_KWARGS.get(key, key): value for key, value in kwargs.items()}
    _check_keys(replace, kwargs, where)
    for key, value in kwargs.items():
        _KWARGS[key](value, f"{where}, replace.kwargs.{key}")
    for key in ("generate_op", "prefill_op"):
        _check_op(kwargs.get(key), kind, f"{where}, replace.kwargs.{key}")
    generate, prefill = (
        parse_device(kwargs[key]) if key in kwargs else None for key in ("generate_device", "prefill_device")
    )
    never_generates = "generate_op" in kwargs and kwargs["generate_op"] in _NO_OP
    device = (prefill if never_generates and prefill else generate) or _DEFAULT_DEVICES.get(kind, DEFAULT_DEVICE)
    op = kwargs.get("prefill_op" if never_generates else "generate_op")
    return Replacement(kind, device, tuple(_notes(kwargs, kind, device, prefill)), op in _DEQUANTIZING_OPS)


def _check_keys(replace: Mapping[str, Any], kwargs: Mapping[str, Any], where: str) -> None:
    """A device beside the class said, in 0.1, where weights are at first; what counts is where they are used."""
    accepted = ["class", "kwargs", *(["device"] if "generate_device" in kwargs else [])]
    if not replace.keys() <= set(accepted):
        raise RuleError(
            f"{where}, replace has {', '.join(replace)}: op and device are our form, class and kwargs that of "
            "KTransformers. Write the rule in one of them; in theirs, devices stand in kwargs"
        )
    if "device" in replace:
        _is_device(replace["device"], f"{where}, replace.device")


def _kind(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in _REPLACEMENTS:
        raise RuleError(
            f"{where}, replace has the unknown class {brief(name)}{nearest(name, [DEFAULT, *_REPLACEMENTS])}; known "
            f"are {DEFAULT} and, of {_OPERATORS[:-1]}, {', '.join(key[len(_OPERATORS) :] for key in _REPLACEMENTS)}"
        )
    return _REPLACEMENTS[name]


def _notes(kwargs: Mapping[str, Any], kind: str, device: str, prefill: str | None) -> list[str]:
    """What of ``kwargs`` has no meaning here, and what it becomes."""
    notes = []
    op = kwargs.get("generate_op")
    if op in _DEQUANTIZING_OPS and device != CPU:
        notes.append(
            f"generate_op {op} -> bfloat16 where a linear layer stands by itself, else as its whole is computed"
        )
    elif kind in _OPS and op not in (*_NO_OP, *(_CPU_OPS if device == CPU else ())):
        notes.append(f"generate_op {op} -> our {kind} operation of the device, on the weights as the file has them")
    if "generate_op" in kwargs and op in _NO_OP:
        notes.append("generate_op None -> generates where it prefills")
    if prefill not in (None, device):
        notes.append("prefill_device -> prefills where it generates")
    if "backend" in kwargs:
        notes.append(f"backend {kwargs['backend']} -> the fastest kernels of this CPU for the types of the file")
    if "n_deferred_experts" in kwargs:
        notes.append("n_deferred_experts -> no expert is deferred to a later layer")
    for key in ("absorb_for_prefill", "chunck_size"):
        if key in kwargs:
            notes.append(f"{key} -> attention works on latents in prefill too, in chunks of its own")
    if kwargs.get("per_layer_prefill_intput_threshold"):
        notes.append("per_layer_prefill_intput_threshold -> a long prompt is prefilled without moving layers about")
    return notes


def _check_op(op: Any, kind: str, where: str) -> None:
    """Ops of experts are none of linears. Modules of other classes ignored the key, and so do we."""
    known = _OPS.get(kind, tuple(op for ops in _OPS.values() for op in ops))
    if op not in (*known, *_NO_OP):
        raise RuleError(
            f"{where} is the unknown op {brief(op)}{nearest(op, known)}; known are {', '.join(known)}, None"
        )


def _is_device(value: Any, where: str) -> None:
    if parse_device(value) is None:
        raise RuleError(f"{where} is {brief(value)}{nearest(value, ['cpu', 'cuda'])}; {DEVICES_ACCEPTED} is expected")


def _is_device_or_none(value: Any, where: str) -> None:
    if value not in _NO_OP:
        _is_device(value, where)


def _is_op(value: Any, where: str) -> None:
    if value is not None and not isinstance(value, str):
        raise RuleError(f"{where} is {brief(value)}; the name of an op is expected")


def _is_flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        raise RuleError(f"{where} is {brief(value)}; true or false is expected")


def _is_count(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RuleError(f"{where} is {brief(value)}; an integer from 0 up is expected")


def _is_counts(value: Any, where: str) -> None:
    for count in value if isinstance(value, list) else [value]:
        _is_count(count, where)


def _is_backend(value: Any, where: str) -> None:
    if value not in _BACKENDS:
        raise RuleError(f"{where} is {brief(value)}{nearest(value, _BACKENDS)}; known are {', '.join(_BACKENDS)}")


def _is_transfer_map(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise RuleError(f"{where} is {brief(value)}; a mapping of layers to devices is expected")
    for layer, device in value.items():
        _is_count(layer, f"{where}: the layer")
        _is_device(device, f"{where}: the device of layer {layer}")


_KWARGS: Mapping[str, Callable[[Any, str], None]] = {
    "generate_device": _is_device,
    "prefill_device": _is_device,
    "out_device": _is_device_or_none,
    "generate_op": _is_op,
    "prefill_op": _is_op,
    "absorb_for_prefill": _is_flag,
    "chunck_size": _is_count,
    "per_layer_prefill_intput_threshold": _is_count,
    "transfer_map": _is_transfer_map,
    "backend": _is_backend,
    "n_deferred_experts": _is_counts,
}
