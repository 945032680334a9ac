"""Decoder layers whose four parts are computed in one go, and all layers of a model in one call.

A layer stays the module of transformers that it is, with its norms, attention and feed-forward half inside. Where all
four are ours and nobody looks at them singly, its forward pass skips them: one call in place of five, two additions
and a copy into the cache. When a token is decoded, the first layer goes on through the others in the same way, and
they hand on what it found: between two layers, whose weights have emptied the caches, the shortest way through Python
takes 175 us, 4.7 ms a token for 27 layers, where an idle machine says 1.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2Model
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3Model

from transformers_kt import _C, ops
from transformers_kt.modules.attention import KtMlaAttention
from transformers_kt.modules.base import Handle, as_float32
from transformers_kt.modules.experts import KtMlp, KtMoe
from transformers_kt.modules.latent_cache import growing_layers
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.rotary import as_rope_table

_LAYERS = (DeepseekV2DecoderLayer, DeepseekV3DecoderLayer)
_BASE_MODELS = (DeepseekV2Model, DeepseekV3Model)

# Tokens of a forward pass that goes through all layers in one call; a longer one can be stopped between layers.
_FEW_TOKENS = 32


class _Pass(threading.local):
    """The forward pass of a base model that a thread is in: its layers will be called one after the other."""

    layers: tuple[Any, ...] = ()
    output: torch.Tensor | None = None
    """That of the last layer, once the first one has computed them all."""


_pass = _Pass()


@dataclass(frozen=True)
class _Parts:
    """What the packed layer was made from."""

    input_norm: KtRMSNorm
    attention: KtMlaAttention
    post_norm: KtRMSNorm
    feed_forward: KtMoe | KtMlp
    layer: Handle

    def stand_in(self, layer: nn.Module) -> bool:
        """Whether calling the parts of `layer` one by one would do nothing else."""
        now = layer._modules  # attributes of a module are looked up in Python, which takes longer than the rest here
        return (
            now["input_layernorm"] is self.input_norm
            and now["self_attn"] is self.attention
            and now["post_attention_layernorm"] is self.post_norm
            and now["mlp"] is self.feed_forward
            and _is_unwatched(self.input_norm)
            and _is_unwatched(self.attention)
            and _is_unwatched(self.post_norm)
            and _is_unwatched(self.feed_forward)
        )


def _is_unwatched(module: nn.Module) -> bool:
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


class _InOneGo:
    """The forward pass of a decoder layer, before that of its stock class."""

    _parts: _Parts

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if hidden_states is _pass.output:
            return hidden_states
        parts = self._parts
        if torch_module._has_any_global_hook() or not parts.stand_in(self):  # type: ignore[no-untyped-call, arg-type]
            stock: torch.Tensor = super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return stock
        x, attention = as_float32(hidden_states), parts.attention
        batch, tokens, _hidden = x.shape
        table = as_rope_table(position_embeddings, batch)
        out: torch.Tensor
        run = self._with_all_that_follow() if tokens <= _FEW_TOKENS else [parts]
        caches = growing_layers(past_key_values, [each.attention.layer_idx for each in run], batch)
        if caches is not None:
            earlier = caches[0].get_seq_length()
            grown = [cache.grow(tokens) for cache in caches]
            latents, ropes = ([states.squeeze(1) for states in column] for column in zip(*grown, strict=True))
            visible = attention.visible_keys(attention_mask, latents[0], tokens, earlier)
            norms = [norm.weight for each in run for norm in (each.input_norm, each.post_norm)]
            handles = [each.layer.number for each in run]
            out = ops.append_and_forward(x, norms, table, latents, ropes, visible, handles)
            _pass.output = out if len(run) > 1 else None
            return out
        handle, norms = parts.layer.number, [parts.input_norm.weight, parts.post_norm.weight]
        keys = ops.layer_project_keys(x, norms[0], table, handle, attention.latent_dim, attention.rope_dim)
        new_latents, new_ropes, visible = attention.cached_keys(keys[0], keys[1], attention_mask, past_key_values)
        out = ops.layer_forward(x, *norms, table, new_latents, new_ropes, visible, handle)
        return out

    def _with_all_that_follow(self) -> list[_Parts]:
        """The parts of all layers of the pass if this is the first of them and nobody looks between them."""
        layers = _pass.layers
        if layers[:1] == (self,) and all(map(_goes_along, layers)):
            return [layer._parts for layer in layers]
        return [self._parts]


def _goes_along(layer: nn.Module) -> bool:
    return isinstance(layer, _InOneGo) and _is_unwatched(layer) and layer._parts.stand_in(layer)


class _KnowsItsPass:
    """The forward pass of a base model, which lets its first layer go on through the others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _pass.layers = tuple(self.layers[: self.config.num_hidden_layers])  # type: ignore[attr-defined]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            # Layers that are called by hand, or by another model, compute themselves alone.
            _pass.layers, _pass.output = (), None


_JOINED_CLASSES: dict[type[nn.Module], Any] = {}


def _joined_class(stock: type[nn.Module]) -> Any:
    """`stock`, a class of decoder layers or of base models, computed as described above, under its own name."""
    if stock not in _JOINED_CLASSES:
        ours = _InOneGo if issubclass(stock, _LAYERS) else _KnowsItsPass
        names = {key: getattr(stock, key) for key in ("__module__", "__qualname__", "__doc__")}
        _JOINED_CLASSES[stock] = type(stock.__name__, (ours, stock), names)
    return _JOINED_CLASSES[stock]


def join_decoder_layers(model: nn.Module) -> None:
    """Let the decoder layers of the loaded ``model`` whose parts are all ours compute them in one go."""
    for module in model.modules():
        if type(module) in _LAYERS:
            _join(module)
        elif isinstance(module, _BASE_MODELS):
            module.__class__ = _joined_class(type(module))


def _join(layer: Any) -> None:
    norms = layer.input_layernorm, layer.post_attention_layernorm
    attention, feed_forward = layer.self_attn, layer.mlp
    ours = all(isinstance(norm, KtRMSNorm) for norm in norms) and isinstance(attention, KtMlaAttention)
    if not ours or not isinstance(feed_forward, KtMoe | KtMlp):
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
    # A change of class keeps the module that others may hold, its hooks and its place in the model.
    layer.__class__ = _joined_class(type(layer))
    layer._parts = _Parts(norms[0], attention, norms[1], feed_forward, handle)
