"""Decoder layers that compute on one device, but for routed experts: their parts, and whether they still are those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transformers_kt.backends.gpu.device import Device
from transformers_kt.families.base import Router
from transformers_kt.families.registry import family_of, stock_classes
from transformers_kt.families.tree import dotted
from transformers_kt.modules.experts import KtExperts
from transformers_kt.modules.fused.decoder_layer import has_foreign_hooks
from transformers_kt.modules.gpu.experts import KtGpuExperts, KtGpuMlp, KtGpuMoe
from transformers_kt.modules.gpu.mla import KtGpuMlaAttention
from transformers_kt.modules.gpu.simple import KtGpuRMSNorm


@dataclass(frozen=True)
class SplitMoe:
    """A MoE block of transformers whose router and shared experts lie on the device of its layer."""

    gate: Any
    experts: KtExperts  # on the CPU, or on the device as `KtGpuExperts`
    shared: KtGpuMlp | None
    router: Router

    @property
    def modules(self) -> list[nn.Module]:
        return [each for each in (self.experts, self.shared) if each is not None]


class DeviceLayer:
    """A decoder layer that computes on one device but for routed experts, and whether it still does as it was made."""

    def __init__(self, layer: Any, feed_forward: KtGpuMlp | KtGpuMoe | SplitMoe) -> None:
        self.device: Device = layer.self_attn.device
        self.input_norm: KtGpuRMSNorm = layer.input_layernorm
        self.attention: KtGpuMlaAttention = layer.self_attn
        self.post_norm: KtGpuRMSNorm = layer.post_attention_layernorm
        self.feed_forward = feed_forward
        self._layer, self._mlp, self._forward = layer, layer.mlp, type(layer).forward
        watched = [layer, self.input_norm, self.attention, self.post_norm, layer.mlp]
        if isinstance(feed_forward, SplitMoe):
            watched += feed_forward.modules
            self._gate_hooks = self._count_gate_hooks()
        self._watched = watched
        self._hooks = [hooks for each in watched for hooks in (each._forward_hooks, each._forward_pre_hooks)]

    @property
    def has_experts_in_ram(self) -> bool:
        """Whether the host computes routed experts for it."""
        return isinstance(self.feed_forward, SplitMoe) and not self.has_experts

    @property
    def has_experts(self) -> bool:
        """Whether routed experts lie on the device, or some of them do too."""
        if isinstance(self.feed_forward, SplitMoe):
            experts = self.feed_forward.experts
            has_slots = experts.on_gpu is not None and experts.on_gpu.slots is not None
            return has_slots or isinstance(experts, KtGpuExperts)
        return isinstance(self.feed_forward, KtGpuMoe)

    def _count_gate_hooks(self) -> int:
        """The router of a `SplitMoe` has two of our own, which take it to its device and back."""
        assert isinstance(self.feed_forward, SplitMoe)
        gate = self.feed_forward.gate
        return len(gate._forward_hooks) + len(gate._forward_pre_hooks)

    def is_open(self) -> bool:
        if any(self._hooks) and has_foreign_hooks(self._hooks):
            return False
        if isinstance(self.feed_forward, SplitMoe):
            now, then = self._mlp._modules, self.feed_forward
            if now["gate"] is not then.gate or now["experts"] is not then.experts:
                return False
            if now.get("shared_experts") is not then.shared or self._count_gate_hooks() != self._gate_hooks:
                return False
        parts = self._layer._modules
        same = (
            parts["input_layernorm"] is self.input_norm
            and parts["self_attn"] is self.attention
            and parts["post_attention_layernorm"] is self.post_norm
            and parts["mlp"] is self._mlp
        )
        wrapped = any("forward" in each.__dict__ for each in self._watched)
        return same and not wrapped and type(self._layer).forward is self._forward


def device_layer(layer: Any, config: Any) -> DeviceLayer | None:
    """None where the layer, or a part of it that is not routed experts, lies elsewhere."""
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention, KtGpuMlaAttention):
        return None
    feed_forward = mlp if isinstance(mlp, KtGpuMlp | KtGpuMoe) else _split_moe(mlp, config, attention.device)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    parts = [*norms, *([] if isinstance(feed_forward, SplitMoe) else [feed_forward])]
    if not all(isinstance(norm, KtGpuRMSNorm) for norm in norms) or feed_forward is None:
        return None
    return DeviceLayer(layer, feed_forward) if all(part.device is attention.device for part in parts) else None


def _split_moe(moe: Any, config: Any, device: Device) -> SplitMoe | None:
    router = family_of(config).router
    if router is None or dotted(type(moe)) not in stock_classes("moe"):
        return None
    gate, experts, shared = moe.gate, moe.experts, getattr(moe, "shared_experts", None)
    own = [each for each in (experts, shared) if isinstance(each, KtGpuExperts | KtGpuMlp)]
    weight = getattr(gate, "weight", None)
    if weight is None or weight.dtype != torch.float32 or weight.device != device.torch_device:
        return None
    if not isinstance(experts, KtExperts) or not (shared is None or isinstance(shared, KtGpuMlp)):
        return None
    return SplitMoe(gate, experts, shared, router(config)) if all(each.device is device for each in own) else None
