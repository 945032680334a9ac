"""Base models with layers on GPUs: activations stay on a device from layer to layer, and CPU and GPU work at once.

A pass is device work in `stretches`, between which the host computes routed experts. Prompts are launched work by work;
one new token for each of up to eight sequences is a `decode_step`, captured once.

Layers on the CPU, and those that somebody watches with hooks, are called as modules between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Work
from transformers_kt.families.registry import family_of, stock_classes
from transformers_kt.families.tree import dotted
from transformers_kt.modules.base import as_float32
from transformers_kt.modules.fused.base_model import RECORDED
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT, require_cache_argument
from transformers_kt.modules.fused.decode_step import DecodeStep
from transformers_kt.modules.fused.decoder_layer import has_foreign_hooks, subclass_in_front
from transformers_kt.modules.fused.device_layers import DeviceLayer, device_layer
from transformers_kt.modules.fused.kept_keys import KeptKeys, KeyStore
from transformers_kt.modules.fused.lanes import MOST_KEPT_ROWS, Lane
from transformers_kt.modules.fused.latent_cache import GrowingLayers, expected_length, growing_layers, start_layer
from transformers_kt.modules.fused.stretches import Pass, attend_tokens
from transformers_kt.modules.gpu.mla import KtGpuMlaAttention
from transformers_kt.modules.gpu.simple import KtGpuRMSNorm
from transformers_kt.modules.mla import ranges_mask
from transformers_kt.modules.patches import patched_method
from transformers_kt.modules.rotary import KtRotaryEmbedding


class _Hybrid:
    """The layers of a base model as they were loaded, and the devices of those that lie on one."""

    def __init__(self, model: Any, uses_graphs: bool) -> None:
        self.layers = _layers_of(model)
        self.on_devices: Mapping[int, DeviceLayer] = {
            number: found
            for number, layer in enumerate(self.layers)
            if (found := device_layer(layer, model.config)) is not None
        }
        config, own = model.config, list(self.on_devices.values())
        router = family_of(config).router
        self._top_k = 1 if router is None else router(config).top_k
        devices = {layer.device.name: layer.device for layer in own}
        self.lanes = {
            name: Lane(device, config.hidden_size, self._top_k, model.rotary_emb) for name, device in devices.items()
        }
        # Threads that wait for work hold cores, which nobody needs while a GPU computes.
        self._keeps_awake = any(layer.has_experts_in_ram and not layer.device.takes_cores for layer in own)
        chooses_on_host = any(layer.has_experts for layer in own)  # where choices are more than a few
        self._most_captured = operations.FEW_CHOICES // self._top_k if chooses_on_host else MOST_KEPT_ROWS
        self._store = KeyStore([(each.device, each.attention.latent_dim, each.attention.rope_dim) for each in own])
        self._steps: WeakKeyDictionary[KeptKeys, DecodeStep] = WeakKeyDictionary()
        self._uses_graphs = uses_graphs
        self.lock = threading.Lock()
        """Held by a forward pass: buffers are those of the model, not of the caller."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a model makes its own."""

    def open_layers(self) -> dict[int, DeviceLayer]:
        """Those that nobody watches, by number: the others are called as modules."""
        return {number: layer for number, layer in self.on_devices.items() if layer.is_open()}

    def forward(self, asked: _Asked, layers: Mapping[int, DeviceLayer], keys: GrowingLayers) -> torch.Tensor:
        """The last states, float32 (batch, tokens, hidden) on the host. ``layers`` are those that compute inside their
        device, and append to ``keys``."""
        tokens, earlier = asked.x.shape[1], keys.length
        kept = self._kept_keys(asked, layers, keys)
        keys.grow(tokens)
        try:
            for lane in self.lanes.values():
                lane.begin(asked.x.shape[:2].numel())
            if kept is not None and asked.is_step:
                out, is_normed = self._step(asked, kept, earlier)
            else:
                out, is_normed = self._tokens(asked, layers, keys, earlier)
        except BaseException:
            for lane in self.lanes.values():
                lane.drain()
            keys.take_back(tokens)
            raise
        normed: torch.Tensor = out if is_normed else asked.model.norm(out)
        return normed

    def _kept_keys(self, asked: _Asked, layers: Mapping[int, DeviceLayer], keys: GrowingLayers) -> KeptKeys | None:
        """Buffers of this model that ``keys`` live in from now on; None where they make room for themselves."""
        batch, tokens, _hidden = asked.x.shape
        if batch > MOST_KEPT_ROWS or len(layers) < len(self.on_devices):
            return None
        loan, needed = keys.loan, keys.length + tokens
        if loan is None or loan.lender.capacity < needed:
            if loan is not None:
                loan.forfeit()  # what has become too small is not kept
            loan = self._store.lend(batch, needed, expected_length(asked.cache))
        keys.settle(loan)
        kept: KeptKeys = loan.lender
        return kept

    def _step(self, asked: _Asked, kept: KeptKeys, earlier: int) -> tuple[torch.Tensor, bool]:
        """The last states of one token a sequence, and whether they went through the last norm."""
        step = self._steps.get(kept)
        if step is None or not step.is_of(asked.norm):
            step = DecodeStep(self.layers, self.on_devices, self.lanes, kept.buffers, asked.norm)
            self._steps[kept] = step
        step.take(asked.positions, asked.mask[:, 0], earlier)
        if self._uses_graphs and not step.is_captured and kept.batch <= self._most_captured:
            self._uses_graphs = step.capture()
        with _threads_awake() if self._keeps_awake else nullcontext():
            return step.run(asked.x, asked.call), step.gives_normed

    def _tokens(
        self, asked: _Asked, layers: Mapping[int, DeviceLayer], keys: GrowingLayers, earlier: int
    ) -> tuple[torch.Tensor, bool]:
        """The same for any number of tokens, launch by launch."""
        for lane in self.lanes.values():
            lane.take_tokens(asked.positions, asked.mask[:, 0])
        shape, buffers = asked.x.shape[:2], dict(zip(map(id, layers.values()), keys.buffers, strict=True))

        def attend(layer: DeviceLayer, lane: Lane) -> Work:
            return partial(attend_tokens, layer, lane, shape, buffers[id(layer)], earlier)

        all_layers = Pass(self.layers, layers, self.lanes, attend, asked.norm)
        return all_layers.run(asked.x, asked.call), all_layers.gives_normed


@contextmanager
def _threads_awake() -> Iterator[None]:
    """The CPU's threads wait longer for work, while a GPU computes what comes before their experts."""
    _C.begin_step()
    try:
        yield
    finally:
        _C.end_step()


@dataclass
class _Asked:
    """A call of a base model, as tensors of the host."""

    model: Any
    x: torch.Tensor
    """float32 (batch, tokens, hidden)"""
    positions: torch.Tensor
    """int32 (batch, tokens)"""
    mask: torch.Tensor
    """int32 (batch, 1, tokens, 2), or bool (batch, 1, tokens, keys)"""
    cache: Cache
    norm: KtGpuRMSNorm | None
    """The last one, where no one watches it."""

    @property
    def is_step(self) -> bool:
        """Whether it is one token a sequence that sees a range of keys."""
        return self.x.shape[1] == 1 and self.mask.dtype == torch.int32

    @cached_property
    def table(self) -> Any:
        return self.model.rotary_emb(self.x, self.positions)

    def call(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A layer that lies on the CPU, or is watched."""
        cache = {CACHE_ARGUMENT: self.cache}
        out: torch.Tensor = module(x, attention_mask=self.mask, position_embeddings=self.table, use_cache=True, **cache)
        return out


def _keys_of(cache: Cache, layers: Sequence[DeviceLayer], batch: int) -> GrowingLayers | None:
    """What of ``cache`` the devices write into; None where it is of a kind that they do not know."""
    for layer in layers:
        _start_cache(cache, layer, batch)
    kinds = [(layer.device.activations, layer.device.torch_device) for layer in layers]
    return growing_layers(cache, [layer.attention.layer_idx for layer in layers], batch, kinds)


def _start_cache(cache: Cache, layer: DeviceLayer, batch: int) -> None:
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
    _uses_graphs: bool

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
            hybrid = self._hybrid = self._hybrid or _Hybrid(model, self._uses_graphs)
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
    positions = position_ids.to("cpu", torch.int32).expand(batch, tokens)
    mask = None if attention_mask is None else attention_mask.cpu().to(torch.bool)
    visible = ranges_mask(batch, tokens, earlier + tokens, q_offset=earlier, attention_mask=mask)
    norm = model.norm if isinstance(model.norm, KtGpuRMSNorm) and not _is_watched(model.norm) else None
    return hybrid.forward(_Asked(model, x, positions, visible, cache, norm), layers, keys)


def _is_watched(module: nn.Module) -> bool:
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    return "forward" in module.__dict__ or (any(hooks) and has_foreign_hooks(hooks))


def _is_plain(model: Any, given: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call is ids or embeddings in, the last states out, and nothing else."""
    if not isinstance(model.rotary_emb, KtRotaryEmbedding) or _is_watched(model.rotary_emb):
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


def fuse_hybrid_models(model: nn.Module, *, uses_graphs: bool) -> None:
    """Give the base models in the loaded ``model`` that have layers on GPUs the pass that keeps states there, unless
    their class was patched. ``uses_graphs`` says whether decode steps are captured."""
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
            module._uses_graphs = uses_graphs
