"""Fused decoder layers: norms, attention and feed-forward half in one call.

A layer stays transformers' module, with its four parts inside. If all four are ours and no foreign hook watches one of
them, its forward pass takes the fast path: one call in place of five, two additions and a copy into the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.utils import output_capturing

import transformers_kt._C as _C
from transformers_kt.backends import schemas as ops
from transformers_kt.families.registry import stock_classes
from transformers_kt.families.tree import dotted
from transformers_kt.modules.base import Handle, NotPickledAlone, as_float32
from transformers_kt.modules.experts import KtMlp, KtMoe
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT, require_cache_argument
from transformers_kt.modules.fused.latent_cache import growing_layer
from transformers_kt.modules.mla import KtMlaAttention
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.patches import METHODS, patched_method
from transformers_kt.modules.rotary import as_rope_table


@dataclass(frozen=True)
class LayerParts:
    """The modules that a packed layer was made from."""

    input_norm: KtRMSNorm
    attention: KtMlaAttention
    post_norm: KtRMSNorm
    feed_forward: KtMoe | KtMlp
    layer: Handle


class FastPath:
    """Whether the fused call of `layers` still does all that their parts would: no foreign hook, no part replaced.

    Checked for every token, hence flat lists: 0.1 ms for 27 layers while decoding.
    """

    def __init__(self, layers: Sequence[Any], watched: Sequence[nn.Module] = (), classes: Sequence[type] = ()) -> None:
        self._places = [
            (layer._modules, name, part)
            for layer in layers
            for name, part in (
                ("input_layernorm", layer.parts.input_norm),
                ("self_attn", layer.parts.attention),
                ("post_attention_layernorm", layer.parts.post_norm),
                ("mlp", layer.parts.feed_forward),
            )
        ]
        self._modules = [part for _modules, _name, part in self._places] + list(watched)
        self._hooks = [each._forward_hooks for each in self._modules]
        self._hooks += [each._forward_pre_hooks for each in self._modules]
        called = dict.fromkeys((*map(type, (*self._modules, *layers)), *map(stock_class, layers), *classes))
        self._methods = [(cls, name, getattr(cls, name)) for cls in called for name in METHODS]

    def is_open(self) -> bool:
        if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        if any(self._hooks) and has_foreign_hooks(self._hooks):
            return False
        if any("forward" in module.__dict__ and _is_wrapped(module) for module in self._modules):
            return False
        if any(getattr(cls, name) is not method for cls, name, method in self._methods):
            return False
        return all(modules[name] is part for modules, name, part in self._places)


def has_foreign_hooks(all_hooks: Sequence[Mapping[int, Any]]) -> bool:
    """Whether any hook is other than those of transformers' output recording, which stay behind when it is over."""
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or collector.get() is not None:
        return True
    found = (hook for hooks in all_hooks for hook in hooks.values())
    return any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in found)


def _is_wrapped(module: nn.Module) -> bool:
    """As accelerate does, which leaves the class's own method in the instance when its hooks are removed."""
    return getattr(module.__dict__["forward"], "__func__", None) is not type(module).forward


class _FusedDecoderLayer(NotPickledAlone):
    """The forward pass of a decoder layer, before that of its stock class."""

    parts: LayerParts
    _fast_path: FastPath

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = past_key_values if cache is None else cache
        if not self._fast_path.is_open():
            stock: torch.Tensor = super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )
            return stock
        parts, attention = self.parts, self.parts.attention
        x, handle = as_float32(hidden_states), parts.layer.number
        batch, tokens, _hidden = x.shape
        table = as_rope_table(position_embeddings, batch)
        norms = parts.input_norm.weight, parts.post_norm.weight
        growing = growing_layer(cache, attention.layer_idx, batch)
        out: torch.Tensor
        if growing is not None:
            earlier = growing.get_seq_length()
            latents, ropes = (states.squeeze(1) for states in growing.grow(tokens))
            visible = attention.visible_keys(attention_mask, latents, tokens, earlier)
            out = ops.layer_append_and_forward(x, *norms, table, latents, ropes, visible, handle)
            return out
        keys = ops.layer_project_keys(x, norms[0], table, handle, attention.latent_dim, attention.rope_dim)
        new_latents, new_ropes, visible = attention.cached_keys(keys[0], keys[1], attention_mask, cache)
        out = ops.layer_forward(x, *norms, table, new_latents, new_ropes, visible, handle)
        return out


_SUBCLASSES: dict[tuple[type, type[nn.Module]], Any] = {}


def subclass_in_front(ours: type, stock: type[nn.Module]) -> Any:
    """`stock` with the methods of `ours` before its own, under its own name."""
    if (ours, stock) not in _SUBCLASSES:
        require_cache_argument(stock)
        names = {key: getattr(stock, key) for key in ("__module__", "__qualname__", "__doc__")}
        _SUBCLASSES[ours, stock] = type(stock.__name__, (ours, stock), names)
    return _SUBCLASSES[ours, stock]


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that `subclass_in_front` was given."""
    found: type[nn.Module] = type(module).__bases__[1]
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether it is a fused decoder layer."""
    return isinstance(module, _FusedDecoderLayer)


def fuse_decoder_layers(model: nn.Module) -> None:
    """Fuse the decoder layers of the loaded ``model`` whose parts are all ours, unless their class was patched."""
    stock = stock_classes("decoder_layer")
    for module in model.modules():
        if dotted(type(module)) in stock and patched_method(type(module)) is None:
            _fuse(module)


def _fuse(layer: Any) -> None:
    norms = layer.input_layernorm, layer.post_attention_layernorm
    attention, feed_forward = layer.self_attn, layer.mlp
    # Not their subclasses, which compute on GPUs.
    ours = all(type(norm) is KtRMSNorm for norm in norms) and type(attention) is KtMlaAttention
    if not ours or type(feed_forward) not in (KtMoe, KtMlp):
        return
    packed = feed_forward.weights.packed
    is_moe = isinstance(feed_forward, KtMoe)
    handle = Handle(
        _C.DecoderLayer(
            attention=attention.weights.packed,
            moe=packed if is_moe else None,
            mlp=None if is_moe else packed,
            input_norm_eps=norms[0].eps,
            post_norm_eps=norms[1].eps,
        )
    )
    # A change of class keeps the module itself, which others may hold, its hooks and its place in the model.
    layer.__class__ = subclass_in_front(_FusedDecoderLayer, type(layer))
    layer.parts = LayerParts(norms[0], attention, norms[1], feed_forward, handle)
    layer._fast_path = FastPath([layer])
