"""The fast path of base models: small batches from ids to the last norm without torch.

Decoding a token reads the weights of every layer, which leaves nothing else in the caches: whatever Python or torch
touches next comes from memory. Between two layers the shortest way through Python then takes 175 us, a single operator
of torch 30 to 100. So for a small batch all layers are one call, and the steps around them work on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

import transformers_kt._C as _C
from transformers_kt.backends import cpu
from transformers_kt.backends import schemas as ops
from transformers_kt.families.registry import stock_classes
from transformers_kt.families.tree import dotted
from transformers_kt.modules.base import NotPickledAlone
from transformers_kt.modules.embedding import KtEmbedding
from transformers_kt.modules.fused.cache_argument import CACHE_ARGUMENT, require_cache_argument
from transformers_kt.modules.fused.decoder_layer import FastPath, is_fused, stock_class, subclass_in_front
from transformers_kt.modules.fused.latent_cache import GrowingLayers, growing_layers, grown
from transformers_kt.modules.gathering import computed
from transformers_kt.modules.linear import KtLinear
from transformers_kt.modules.mla import ranges_mask, visible_keys
from transformers_kt.modules.norm import KtRMSNorm
from transformers_kt.modules.patches import patched_method
from transformers_kt.modules.rotary import KtRotaryEmbedding

# Tokens of a sequence that go through all layers in one call; a longer one can be stopped between layers.
_SMALL_BATCH_TOKENS = 32

# Outputs, chosen in a call or in the config, that only the stock pass gives.
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")


class _Step(NamedTuple):
    """A call of a base model: a few tokens of sequences of one length."""

    ids: npt.NDArray[np.int64]  # (batch, tokens)
    positions: npt.NDArray[np.int64]  # (batch, tokens)
    keys: GrowingLayers  # which it appends to
    ranges: npt.NDArray[np.int32] | None  # of visible keys (batch, tokens, 2)
    mask: npt.NDArray[np.uint8] | None  # where they are no ranges


class _PackedModel:
    """All of a base model as it was loaded."""

    def __init__(self, model: Any) -> None:
        self.layers = _layers_of(model)
        self.around = (model.embed_tokens, model.rotary_emb, model.norm)
        watched = (*self.layers, *self.around)
        self.fast_path = FastPath(self.layers, watched, classes=[stock_class(model)])
        self.cache_indices = [layer.parts.attention.layer_idx for layer in self.layers]
        norms = [norm for layer in self.layers for norm in (layer.parts.input_norm, layer.parts.post_norm)]
        self._norms = [norm._parameters for norm in (*norms, model.norm)]
        self._norm_addresses: list[int] = []

    def is_all_of(self, model: Any) -> bool:
        """Whether `model` still consists of it, and no foreign hook watches its modules."""
        modules = model._modules
        now = (*_layers_of(model), modules["embed_tokens"], modules["rotary_emb"], modules["norm"])
        packed = (*self.layers, *self.around)
        return len(now) == len(packed) and all(map(is_, now, packed)) and self.fast_path.is_open()

    def forward(self, steps: Sequence[_Step]) -> Sequence[torch.Tensor]:
        """Of each step float32 (batch, tokens, hidden). All have as many tokens, and where they are several, ranges."""
        embedding, rotary, norm = self.around
        self._see_norm_weights()
        ids, positions, ranges = (_joined([step[part] for step in steps]) for part in (0, 1, 3))
        x = np.empty((*ids.shape, embedding.embedding_dim), np.float32)
        embedding.table.gather(ids.reshape(-1), x.reshape(-1, x.shape[-1]))
        table = rotary.table(positions)
        out = torch.empty(x.shape, dtype=torch.float32)
        states = out.numpy()
        with grown([step.keys for step in steps], ids.shape[1]) as (buffers, lengths):
            self._stack.append_and_forward(x, table, buffers, lengths, ranges, steps[0].mask, states)
        rows = states.reshape(-1, x.shape[-1])
        _C.rms_norm(rows, self._last_norm, norm.eps, rows)
        return torch.split(out, [len(step.ids) for step in steps])

    def _see_norm_weights(self) -> None:
        """As they are now: they can be changed, as in any model."""
        weights = [parameters["weight"] for parameters in self._norms]
        addresses = [weight.data_ptr() for weight in weights]
        if addresses != self._norm_addresses:
            *in_layers, self._last_norm = (weight.detach().numpy() for weight in weights)
            self._stack = _C.DecoderStack([layer.parts.layer.packed for layer in self.layers], in_layers)
            self._norm_addresses = addresses

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a model packs itself."""


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _FastPathModel(NotPickledAlone):
    """The forward pass of a base model, before that of its stock class."""

    _packed_model: _PackedModel | None

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
        packed, keys = self._packed(), None
        if packed and inputs_embeds is None and _is_plain(self, input_ids, kwargs) and packed.is_all_of(self):
            assert input_ids is not None
            keys = growing_layers(cache, packed.cache_indices, len(input_ids))
        if packed is None or input_ids is None or keys is None or not _is_of_keys(attention_mask, input_ids, keys):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )
        shape = input_ids.shape
        ids = np.ascontiguousarray(input_ids.numpy(), np.int64)
        if position_ids is None:
            positions = np.arange(keys.length, keys.length + shape[1], dtype=np.int64)
        else:
            positions = position_ids.numpy().astype(np.int64)
        positions = np.ascontiguousarray(np.broadcast_to(positions, shape))
        step = _Step(ids, positions, keys, *_visible(attention_mask, shape, keys.length))
        joins_others = shape[1] == 1 and step.ranges is not None
        out = computed(packed.forward, step, begins_pass=True) if joins_others else packed.forward([step])[0]
        return MoeModelOutputWithPast(last_hidden_state=out, **{CACHE_ARGUMENT: cache})

    def _packed(self) -> _PackedModel | None:
        if self._packed_model is None and _is_ours(self):
            self._packed_model = _PackedModel(self)
        return self._packed_model


def _is_ours(model: Any) -> bool:
    """Whether all of its modules are such as were loaded here."""
    around = type(model.embed_tokens) is KtEmbedding and type(model.rotary_emb) is KtRotaryEmbedding
    layers = _layers_of(model)
    return around and type(model.norm) is KtRMSNorm and bool(layers) and all(map(is_fused, layers))


def _layers_of(model: Any) -> list[Any]:
    return list(model.layers._modules.values())[: model.config.num_hidden_layers]


def _is_plain(model: Any, input_ids: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call is a small batch of ids in, the last states out, and nothing else."""
    if type(input_ids) is not torch.Tensor or not input_ids.is_cpu or input_ids.ndim != 2:
        return False
    if not 0 < input_ids.shape[1] <= _SMALL_BATCH_TOKENS:
        return False
    config = model.config
    options = {"return_dict": config.return_dict, **kwargs}
    options.pop("tokenizer", None)  # which generate() takes for stop strings, and hands on
    if not options.pop("return_dict") or any(value is not None and value is not False for value in options.values()):
        return False
    return ops.computes_at_once() and not any(getattr(config, output, False) for output in RECORDED)


def _is_of_keys(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, keys: GrowingLayers) -> bool:
    """Whether a mask, if there is one, says which keys are no padding, and nothing more."""
    batch, tokens = input_ids.shape
    return attention_mask is None or attention_mask.shape == (batch, keys.length + tokens)


def _visible(
    attention_mask: torch.Tensor | None, shape: torch.Size, earlier: int
) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.uint8] | None]:
    """What the queries see, by a mask (batch, keys) of what is no padding: ranges or a mask."""
    batch, tokens = shape
    if attention_mask is None or bool(attention_mask.all()):
        ranges = np.zeros((batch, tokens, 2), np.int32)
        ranges[:, :, 1] = np.arange(earlier + 1, earlier + tokens + 1)
        return ranges, None
    keys = earlier + tokens
    mask = ranges_mask(batch, tokens, keys, q_offset=earlier, attention_mask=attention_mask.to(torch.bool))
    return cpu.seen(visible_keys(mask, batch, tokens, keys, "model"))


def fuse_base_models(model: nn.Module) -> None:
    """Give the fast path to the base models in the loaded ``model`` whose modules are all ours, unless their class was
    patched."""
    stock = stock_classes("base_model")
    module: Any
    for module in model.modules():
        is_stock = any(dotted(cls) in stock for cls in type(module).__mro__)
        if is_stock and _is_ours(module) and patched_method(type(module)) is None:
            require_cache_argument(type(model))  # which hands it on
            module.__class__ = subclass_in_front(_FastPathModel, type(module))
            module._packed_model = None
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is KtLinear:
        head.gathers = True


def has_fast_path(model: nn.Module) -> bool:
    """Whether passes of several threads through the loaded ``model`` can be computed as one: all of its base model and
    its head are ours, and nothing watches them."""
    module: Any
    for module in model.modules():
        if isinstance(module, _FastPathModel):
            packed = module._packed()
            head = getattr(model.get_output_embeddings(), "gathers", False)  # type: ignore[operator]
            return packed is not None and packed.is_all_of(module) and head
    return False
