"""Decoder layers whose four parts are computed in one go.

A layer stays the module of transformers that it is, with its norms, attention and feed-forward half inside. Where all
four are ours and nobody looks at them singly, its forward pass skips them: one call in place of five, two additions and
a copy into the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from transformers_kt import _C, ops
from transformers_kt.modules.attention import KtMlaAttention
from transformers_kt.modules.base import Handle, as_float32
from transformers_kt.modules.experts import KtMlp, KtMoe
from transformers_kt.modules.latent_cache import growing_layer
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.rotary import as_rope_table


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
        if torch_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        parts = (self.input_norm, self.attention, self.post_norm, self.feed_forward)
        now = (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
        return all(
            part is module and not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
            for part, module in zip(parts, now, strict=True)
        )


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
        parts = self._parts
        if not parts.stand_in(self):  # type: ignore[arg-type]
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
        x, handle, attention = as_float32(hidden_states), parts.layer.number, parts.attention
        norms = parts.input_norm.weight, parts.post_norm.weight
        batch, tokens, _hidden = x.shape
        table = as_rope_table(position_embeddings, batch)
        out: torch.Tensor
        growing = growing_layer(past_key_values, attention.layer_idx, batch)
        if growing is not None:
            earlier = growing.get_seq_length()
            latents, ropes = (states.squeeze(1) for states in growing.grow(tokens))
            visible = attention.visible_keys(attention_mask, latents, tokens, earlier)
            out = ops.layer_forward_appending(x, *norms, table, latents, ropes, visible, handle)
            return out
        latents, ropes = ops.layer_project_keys(x, norms[0], table, handle, attention.latent_dim, attention.rope_dim)
        latents, ropes, visible = attention.cached_keys(latents, ropes, attention_mask, past_key_values)
        out = ops.layer_forward(x, *norms, table, latents, ropes, visible, handle)
        return out


class KtDeepseekV2DecoderLayer(_InOneGo, DeepseekV2DecoderLayer):  # type: ignore[misc]
    """`DeepseekV2DecoderLayer` in one go."""


class KtDeepseekV3DecoderLayer(_InOneGo, DeepseekV3DecoderLayer):  # type: ignore[misc]
    """`DeepseekV3DecoderLayer` in one go."""


_CLASSES = {DeepseekV2DecoderLayer: KtDeepseekV2DecoderLayer, DeepseekV3DecoderLayer: KtDeepseekV3DecoderLayer}


def join_decoder_layers(model: nn.Module) -> None:
    """Let the decoder layers of the loaded ``model`` whose parts are all ours compute them in one go."""
    for module in model.modules():
        if type(module) in _CLASSES:
            _join(module)


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
    layer.__class__ = _CLASSES[type(layer)]
    layer._parts = _Parts(norms[0], attention, norms[1], feed_forward, handle)
