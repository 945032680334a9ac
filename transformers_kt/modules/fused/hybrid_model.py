"""Base models with layers on GPUs: activations stay on a device from layer to layer, and CPU and GPU work at once.

A layer on a GPU is a few launches on the device's stream: norm, attention, norm and router; x, chosen experts and their
weights go to pinned memory, which an event marks. While the host waits for it, computes the routed experts and writes
their sum to pinned memory, the device computes the shared experts; the sum is added when the next launch comes. Layers
without experts in RAM are launched without waiting. The host waits once more, for the last states.

Layers on the CPU, and those that somebody watches with hooks, are called as modules between.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformers_kt.backends import schemas as ops
from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.families.base import Router
from transformers_kt.families.registry import family_of, stock_classes
from transformers_kt.families.tree import dotted
from transformers_kt.modules.base import as_float32
from transformers_kt.modules.experts import KtExperts
from transformers_kt.modules.fused.base_model import RECORDED
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT, require_cache_argument
from transformers_kt.modules.fused.decoder_layer import has_foreign_hooks, subclass_in_front
from transformers_kt.modules.fused.latent_cache import GrowingLayers, growing_layers, start_layer
from transformers_kt.modules.gpu.experts import KtGpuExperts, KtGpuMlp, KtGpuMoe
from transformers_kt.modules.gpu.mla import KtGpuMlaAttention
from transformers_kt.modules.gpu.simple import KtGpuRMSNorm
from transformers_kt.modules.mla import ranges_mask
from transformers_kt.modules.patches import patched_method
from transformers_kt.modules.rotary import KtRotaryEmbedding


@dataclass(frozen=True)
class _SplitMoe:
    """A MoE block of transformers whose router and shared experts lie on the device of its layer."""

    gate: Any
    experts: KtExperts  # on the CPU, or on the device as `KtGpuExperts`
    shared: KtGpuMlp | None
    router: Router

    @property
    def modules(self) -> list[nn.Module]:
        return [each for each in (self.experts, self.shared) if each is not None]


class _DeviceLayer:
    """A decoder layer that computes on one device but for routed experts, and whether it still does as it was made."""

    def __init__(self, layer: Any, feed_forward: KtGpuMlp | KtGpuMoe | _SplitMoe) -> None:
        self.device: Device = layer.self_attn.device
        self.input_norm: KtGpuRMSNorm = layer.input_layernorm
        self.attention: KtGpuMlaAttention = layer.self_attn
        self.post_norm: KtGpuRMSNorm = layer.post_attention_layernorm
        self.feed_forward = feed_forward
        self._layer, self._mlp, self._forward = layer, layer.mlp, type(layer).forward
        watched = [layer, self.input_norm, self.attention, self.post_norm, layer.mlp]
        if isinstance(feed_forward, _SplitMoe):
            watched += feed_forward.modules
            self._gate_hooks = self._count_gate_hooks()
        self._watched = watched
        self._hooks = [hooks for each in watched for hooks in (each._forward_hooks, each._forward_pre_hooks)]

    def _count_gate_hooks(self) -> int:
        """The router of a `_SplitMoe` has two of our own, which take it to its device and back."""
        assert isinstance(self.feed_forward, _SplitMoe)
        gate = self.feed_forward.gate
        return len(gate._forward_hooks) + len(gate._forward_pre_hooks)

    def is_open(self) -> bool:
        if any(self._hooks) and has_foreign_hooks(self._hooks):
            return False
        if isinstance(self.feed_forward, _SplitMoe):
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


def _device_layer(layer: Any, config: Any) -> _DeviceLayer | None:
    """None where the layer, or a part of it that is not routed experts, lies elsewhere."""
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(attention, KtGpuMlaAttention):
        return None
    feed_forward = mlp if isinstance(mlp, KtGpuMlp | KtGpuMoe) else _split_moe(mlp, config, attention.device)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    parts = [*norms, *([] if isinstance(feed_forward, _SplitMoe) else [feed_forward])]
    if not all(isinstance(norm, KtGpuRMSNorm) for norm in norms) or feed_forward is None:
        return None
    return _DeviceLayer(layer, feed_forward) if all(part.device is attention.device for part in parts) else None


def _split_moe(moe: Any, config: Any, device: Device) -> _SplitMoe | None:
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
    return _SplitMoe(gate, experts, shared, router(config)) if all(each.device is device for each in own) else None


class _Buffers:
    """What the layers of a device pass on for ``rows`` tokens: on the device, and in pinned memory for the host."""

    def __init__(self, device: Device, rows: int, hidden: int, top_k: int) -> None:
        self.rows = rows
        self.residual, self.normed, self.routed = (device.empty((rows, hidden), torch.float32) for _ in range(3))
        self.host = device.pinned((rows, hidden), torch.float32)  # states on their way to the device or back
        self.result = device.pinned((rows, hidden), torch.float32)
        words = (Staging.words(rows, hidden, top_k),)
        self.pinned_block, self.block = device.pinned(words, torch.float32), device.empty(words, torch.float32)
        self.staged = Staging.of(self.pinned_block, rows, hidden, top_k)  # for experts on the CPU
        self.chosen = Staging.of(self.block, rows, hidden, top_k)  # for experts on the device


class _Lane:
    """A device in one model: its stream, its events, and what a forward pass has put there."""

    def __init__(self, device: Device, hidden: int, top_k: int) -> None:
        self.device = device
        self.stream, self.staged, self.done = device.stream(), device.event(), device.event()
        self._sizes = hidden, top_k
        self.buffers: _Buffers | None = None
        self.table: torch.Tensor
        self.visible: torch.Tensor

    def begin(self, rows: int, table: torch.Tensor, visible: torch.Tensor) -> None:
        """``table`` (batch, tokens, rope) and ``visible`` on the host, for all layers of the pass."""
        if self.buffers is None or self.buffers.rows != rows:
            self.buffers = None  # first, so that their memory is free
            self.buffers = _Buffers(self.device, rows, *self._sizes)
        self.table, self.visible = (each.to(self.device.torch_device) for each in (table, visible))
        self.stream.follow_torch()

    def take(self, x: torch.Tensor) -> None:
        """``x`` float32 (rows, hidden) of the host becomes the residual."""
        b = self.own  # of which nothing launched before touches `host` any more: some `give` has waited
        b.host.copy_(x)
        self.stream.copy(b.residual, b.host)
        self.stream.discard(b.host)

    def take_from(self, other: _Lane) -> None:
        """The residual of another device becomes that of this one: a copy and an event."""
        other.stream.record(other.staged)
        self.stream.wait(other.staged)
        self.stream.copy(self.own.residual, other.own.residual)

    def give(self) -> torch.Tensor:
        """The residual as a tensor of the host, when all that was launched is done."""
        b = self.own
        self.stream.copy(b.host, b.residual)
        self.stream.record(self.done)
        self.done.synchronize()
        return b.host.clone()

    def drain(self) -> None:
        """Wait for what was launched, after an error: what else goes wrong there is of no interest."""
        self.stream.record(self.done)
        with contextlib.suppress(Exception):
            self.done.synchronize()
        self.buffers = None

    @property
    def own(self) -> _Buffers:
        assert self.buffers is not None
        return self.buffers


def _run_layer(layer: _DeviceLayer, lane: _Lane, shape: torch.Size, keys: Sequence[torch.Tensor], earlier: int) -> None:
    """One layer on the states of ``lane``, which come from ids of ``shape`` (batch, tokens). ``keys`` are the cache's
    latents and rotary keys, (batch, 1, room, width), of which ``earlier`` tokens are there."""
    lane.stream.launch(partial(_attend, layer, lane, shape, keys, earlier))
    feed_forward, b = layer.feed_forward, lane.own
    if not isinstance(feed_forward, _SplitMoe):
        lane.stream.launch(lambda: b.residual.add_(feed_forward.on_device(b.normed)))
        return
    if isinstance(feed_forward.experts, KtGpuExperts):
        lane.stream.launch(partial(_choose, feed_forward, b, b.chosen, lane.device))
        lane.stream.launch(partial(_compute_experts, feed_forward.experts, b))
        _launch_shared(feed_forward, lane)
        return
    lane.stream.launch(partial(_choose, feed_forward, b, b.staged, lane.device))
    lane.stream.record(lane.staged)
    _launch_shared(feed_forward, lane)  # while the host waits and computes
    lane.staged.synchronize()
    arrays = (each.numpy() for each in (b.staged.x, b.staged.ids.long(), b.staged.weights, b.result))
    feed_forward.experts.routed.forward_routed(*arrays)
    lane.stream.discard(b.pinned_block)
    # The host writes `result` again only when the next layer has staged, which is after this copy.
    lane.stream.copy(b.routed, b.result)
    lane.stream.discard(b.result)
    lane.stream.launch(lambda: b.residual.add_(b.routed))


def _attend(layer: _DeviceLayer, lane: _Lane, shape: torch.Size, keys: Sequence[torch.Tensor], earlier: int) -> None:
    (batch, tokens), b = shape, lane.own
    x = layer.input_norm.on_device(b.residual).view(batch, tokens, -1)
    held = [states[:, 0, : earlier + tokens] for states in keys]
    for states, new in zip(held, layer.attention.new_keys(x, lane.table), strict=True):
        states[:, earlier:] = new
    b.residual.add_(layer.attention.attend(x, lane.table, held[0], held[1], lane.visible).view(b.rows, -1))
    b.normed.copy_(layer.post_norm.on_device(b.residual))


def _choose(moe: _SplitMoe, b: _Buffers, staging: Staging, device: Device) -> None:
    bias = getattr(moe.gate, "e_score_correction_bias", None)
    operations.stage(b.normed, moe.gate.weight, bias, moe.router, staging, device)


def _compute_experts(experts: KtGpuExperts, b: _Buffers) -> None:
    b.residual.add_(experts.on_device(b.normed, b.chosen.ids, b.chosen.weights))


def _launch_shared(moe: _SplitMoe, lane: _Lane) -> None:
    shared, b = moe.shared, lane.own
    if shared is not None:
        lane.stream.launch(lambda: b.residual.add_(shared.on_device(b.normed)))


class _Hybrid:
    """The layers of a base model as they were loaded, and the devices of those that lie on one."""

    def __init__(self, model: Any) -> None:
        self.layers = _layers_of(model)
        self.on_devices: Mapping[int, _DeviceLayer] = {
            number: found
            for number, layer in enumerate(self.layers)
            if (found := _device_layer(layer, model.config)) is not None
        }
        config = model.config
        router = family_of(config).router
        top_k = 1 if router is None else router(config).top_k
        devices = {layer.device.name: layer.device for layer in self.on_devices.values()}
        self.lanes = {name: _Lane(device, config.hidden_size, top_k) for name, device in devices.items()}
        self.lock = threading.Lock()
        """Held by a forward pass: buffers are those of the model, not of the caller."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a model makes its own."""

    def open_layers(self) -> dict[int, _DeviceLayer]:
        """Those that nobody watches, by number: the others are called as modules."""
        return {number: layer for number, layer in self.on_devices.items() if layer.is_open()}

    def forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        mask: torch.Tensor,
        layers: Mapping[int, _DeviceLayer],
        keys: GrowingLayers,
        cache: Cache,
    ) -> torch.Tensor:
        """``x`` float32 (batch, tokens, hidden) through all layers, as tensors of the host.

        ``table`` (batch, tokens, rope); ``mask`` int32 (batch, 1, tokens, 2) or bool (batch, 1, tokens, keys);
        ``layers`` are those that compute inside their device, and append to ``keys``.
        """
        shape, earlier = x.shape[:2], keys.length
        keys.grow(shape[1])
        try:
            return self._forward(x, table, mask, layers, keys, earlier, cache)
        except BaseException:
            for lane in self.lanes.values():
                lane.drain()
            keys.take_back(shape[1])
            raise

    def _forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        mask: torch.Tensor,
        layers: Mapping[int, _DeviceLayer],
        keys: GrowingLayers,
        earlier: int,
        cache: Cache,
    ) -> torch.Tensor:
        shape = x.shape[:2]
        for lane in self.lanes.values():
            lane.begin(shape.numel(), table, mask[:, 0])
        at: _Lane | None = None  # where the states are; None: in x
        buffers = iter(keys.buffers)
        for number, module in enumerate(self.layers):
            layer = layers.get(number)
            if layer is not None:
                lane = self.lanes[layer.device.name]
                if at is None:
                    lane.take(x.reshape(shape.numel(), -1))
                elif at is not lane:
                    lane.take_from(at)
                at = lane
                _run_layer(layer, lane, shape, next(buffers), earlier)
                continue
            if at is not None:
                x, at = at.give().view(x.shape), None
            x = module(x, attention_mask=mask, position_embeddings=table, use_cache=True, **{CACHE_ARGUMENT: cache})
        return x if at is None else at.give().view(x.shape)


def _keys_of(cache: Cache, layers: Sequence[_DeviceLayer], batch: int) -> GrowingLayers | None:
    """What of ``cache`` the devices write into; None where it is of a kind that they do not know."""
    for layer in layers:
        _start_cache(cache, layer, batch)
    kinds = [(layer.device.activations, layer.device.torch_device) for layer in layers]
    return growing_layers(cache, [layer.attention.layer_idx for layer in layers], batch, kinds)


def _start_cache(cache: Cache, layer: _DeviceLayer, batch: int) -> None:
    attention, device = layer.attention, layer.device
    if attention.layer_idx < len(cache.layers) and cache.layers[attention.layer_idx].is_initialized:
        return

    def empty(shape: Sequence[int], *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return device.empty(shape, dtype)

    latents, ropes = (
        torch.empty((batch, 1, 0, width), dtype=device.activations, device=device.torch_device)
        for width in (attention.latent_dim, attention.rope_dim)
    )
    start_layer(cache, attention.layer_idx, latents, ropes, empty)


class _HybridModel:
    """The forward pass of a base model, before that of its stock class."""

    _hybrid: _Hybrid | None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        model: Any = self
        given = input_ids if inputs_embeds is None else inputs_embeds
        one_of_both = given is not None and (input_ids is None or inputs_embeds is None)
        if one_of_both and _is_plain(model, given, attention_mask, kwargs):
            hybrid = self._hybrid = self._hybrid or _Hybrid(model)
            own = DynamicCache() if cache is None else cache
            with hybrid.lock:
                out = _states(model, hybrid, input_ids, inputs_embeds, attention_mask, position_ids, own)
            if out is not None:
                wanted = model.config.use_cache if use_cache is None else use_cache
                kept = own if cache is not None or wanted else None
                return MoeModelOutputWithPast(last_hidden_state=out, **{CACHE_ARGUMENT: kept})
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )


def _states(
    model: Any,
    hybrid: _Hybrid,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor | None:
    """The last states (batch, tokens, hidden) on the host; None where ``cache`` or the layers are of another kind."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    layers = hybrid.open_layers()
    keys = _keys_of(cache, list(layers.values()), len(given)) if layers else None
    if keys is None or (attention_mask is not None and attention_mask.shape[1] != keys.length + given.shape[1]):
        return None
    x = as_float32(model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).cpu()
    batch, tokens, _hidden = x.shape
    earlier = keys.length
    if position_ids is None:
        position_ids = torch.arange(earlier, earlier + tokens).unsqueeze(0)
    table = model.rotary_emb(x, position_ids.cpu()).expand(batch, -1, -1)
    mask = None if attention_mask is None else attention_mask.cpu().to(torch.bool)
    visible = ranges_mask(batch, tokens, earlier + tokens, q_offset=earlier, attention_mask=mask)
    out: torch.Tensor = model.norm(hybrid.forward(x, table, visible, layers, keys, cache))
    return out


def _is_plain(model: Any, given: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call is ids or embeddings in, the last states out, and nothing else."""
    if not isinstance(model.rotary_emb, KtRotaryEmbedding):
        return False
    if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if given.requires_grad and torch.is_grad_enabled():
        return False
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        return False
    config = model.config
    options = {"return_dict": config.return_dict, **kwargs}
    if not options.pop("return_dict") or any(value is not None and value is not False for value in options.values()):
        return False
    return ops.computes_at_once() and not any(getattr(config, output, False) for output in RECORDED)


def _layers_of(model: Any) -> list[Any]:
    return list(model.layers._modules.values())[: model.config.num_hidden_layers]


def fuse_hybrid_models(model: nn.Module) -> None:
    """Give the base models in the loaded ``model`` that have layers on GPUs the pass that keeps states there, unless
    their class was patched."""
    stock = stock_classes("base_model")
    module: Any
    for module in model.modules():
        if not any(dotted(cls) in stock for cls in type(module).__mro__):
            continue
        on_gpus = any(isinstance(layer.self_attn, KtGpuMlaAttention) for layer in _layers_of(module))
        if on_gpus and patched_method(type(module)) is None:
            require_cache_argument(type(model))  # which hands it on
            module.__class__ = subclass_in_front(_HybridModel, type(module))
            module._hybrid = None
