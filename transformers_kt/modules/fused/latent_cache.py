"""A cache layer that appends in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import transformers_kt._C as _C

_SMALLEST = 256
"""Tokens of room in a new buffer."""


class LatentCacheLayer(DynamicLayer):  # type: ignore[misc]
    """``DynamicLayer`` with room to grow: (batch, heads, tokens, width) views of longer buffers.

    The stock layer concatenates: at 4,096 tokens and 27 layers it copies 255 MB for every token, with torch's threads,
    which spin on for milliseconds and hold up ours.

    To everybody else it is as functional as the stock layer. Who reads ``keys`` or ``values`` gets a tensor that no
    later step writes into or reads from: the layer parts with its buffer and makes another when it grows, one copy
    for each look. Copies of a layer share nothing that either writes into.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._states: list[Any] = [None, None]  # keys and values
        self._buffers: list[torch.Tensor | None] = [None, None]  # which they begin, where these are ours alone
        self._returned = 0  # tokens that `update` gave away; their rows in the buffers are not written again
        self._group: GrowingLayers | None = None
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> Any:
        return self._give_away(0)

    @keys.setter
    def keys(self, states: Any) -> None:
        self._replace(0, states)

    @property
    def values(self) -> Any:
        return self._give_away(1)

    @values.setter
    def values(self, states: Any) -> None:
        self._replace(1, states)

    def _give_away(self, which: int) -> Any:
        self.leave_group()
        self._buffers[which] = None
        return self._states[which]

    def _replace(self, which: int, states: Any) -> None:
        self.leave_group()
        self._buffers[which] = None
        self._states[which] = states

    def own_states(self) -> list[Any]:
        """Keys and values, for what only reads them and keeps no view."""
        if self._group is not None and self._states[0].shape[-2] != self._group.length:
            self._states = [buffer[:, :, : self._group.length] for buffer in self._buffers]  # type: ignore[index]
        return self._states

    def leave_group(self) -> None:
        """From now on it is its own keys and values that count; the same goes for the others of the group."""
        if self._group is not None:
            self._group.dissolve()

    def get_seq_length(self) -> int:
        if self._group is not None:
            return self._group.length
        keys = self._states[0]
        return int(keys.shape[-2]) if self.is_initialized and keys is not None and keys.numel() else 0

    def takes_floats(self, batch: int) -> bool:
        """Whether it can grow by float32 states of `batch` sequences and one head."""
        keys, values = self.own_states()
        if not self.is_initialized or any(states is None or states.ndim != 4 for states in (keys, values)):
            return False
        as_long = keys.shape[-2] == values.shape[-2]
        of_floats = keys.dtype == values.dtype == torch.float32
        return as_long and of_floats and tuple(keys.shape[:2]) == tuple(values.shape[:2]) == (batch, 1)

    def grow(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with `tokens` more rows at their end, which the caller has to fill; not to be kept."""
        self.leave_group()
        ends = [states.shape[-2] + tokens for states in self._states]
        self._states = _beginnings(self.make_room(tokens), ends)
        return self._states[0], self._states[1]

    def make_room(self, tokens: int) -> list[torch.Tensor]:
        """Buffers with room for `tokens` more, of which keys and values are the beginning."""
        states = self.own_states()
        if min(each.shape[-2] for each in states) < self._returned:
            self._buffers = [None, None]  # it was cropped, and somebody may hold what was cut off
        if self._buffers[0] is None and self._buffers[1] is None:
            self._returned = 0
        buffers = [_with_room(*pair, tokens) for pair in zip(self._buffers, states, strict=True)]
        self._buffers = [*buffers]
        self._states = _beginnings(buffers, [each.shape[-2] for each in states])  # else smaller ones would stay alive
        return buffers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            if key_states.ndim == value_states.ndim == 4:
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        added = (key_states, value_states)
        if not all(map(_goes_on, self.own_states(), added)):
            stock: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return stock
        grown = self.grow(key_states.shape[-2])
        for states, new in zip(grown, added, strict=True):
            states[:, :, states.shape[-2] - new.shape[-2] :] = new
        self._returned = max(states.shape[-2] for states in grown)
        return grown

    def crop(self, tokens_to_remove: int) -> None:
        buffers = [*self._buffers]
        super().crop(tokens_to_remove)
        self._buffers = buffers  # of which keys and values still are the beginning; nobody else got to see them

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. A shallow copy has the same keys and values, and neither writes behind them."""
        states = [self.keys, self.values]
        return {**vars(self), "_states": states, "_buffers": [None, None], "_returned": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCacheLayer:
        # By way of a pickle's state the original would part with its buffers, and the copy be copied again as it grows.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        left = {name: value for name, value in vars(self).items() if name not in ("_states", "_buffers", "_group")}
        copied.__dict__.update(copy.deepcopy(left, memo), _group=None, _buffers=[None, None])
        states = self.own_states()
        if self.get_seq_length() == 0:
            copied._states = copy.deepcopy(states, memo)
        else:
            buffers = [_with_room(None, each, 1) for each in states]
            copied._buffers, copied._states = [*buffers], _beginnings(buffers, [each.shape[-2] for each in states])
            copied._returned = 0
        return copied


class GrowingLayers:
    """All layers of a cache, grown by the same tokens with one addition.

    To grow each, and make views of its buffers, took 0.4 ms a token for 27 layers: as long as nobody asks for the keys
    of a layer, or sets them, the number of tokens here is all that changes.
    """

    def __init__(self, layers: list[LatentCacheLayer]) -> None:
        self.layers = layers
        self.length = layers[0].get_seq_length()
        self.batch: int = layers[0].own_states()[0].shape[0]
        self._room = 0

    def grow(self, tokens: int) -> _C.KeyBuffers:
        """Takes in `tokens` more, whose rows at the end the caller has to fill, in buffers with room for more."""
        if self.length + tokens > self._room:
            buffers = [layer.make_room(tokens) for layer in self.layers]
            self._room = min(buffer.shape[-2] for pair in buffers for buffer in pair)
            columns = zip(*buffers, strict=True)
            self._packed = _C.KeyBuffers(*([buffer.numpy()[:, 0] for buffer in column] for column in columns))
            for layer in self.layers:
                layer._group = self
        self.length += tokens
        return self._packed

    def dissolve(self) -> None:
        for layer in self.layers:
            layer.own_states()
        for layer in self.layers:
            layer._group = None


def _beginnings(buffers: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
    return [buffer[:, :, :length] for buffer, length in zip(buffers, lengths, strict=True)]


def _goes_on(states: Any, added: torch.Tensor) -> bool:
    """Whether ``added`` can be written behind ``states`` as it is; else the stock layer promotes or raises."""
    if states is None or states.ndim != 4 or added.ndim != 4:
        return False
    of_rows = states.shape[:2] == added.shape[:2] and states.shape[-1] == added.shape[-1]
    return bool(of_rows and states.dtype == added.dtype and states.device == added.device)


def _with_room(buffer: torch.Tensor | None, states: torch.Tensor, tokens: int) -> torch.Tensor:
    """`buffer`, which begins with `states`, where `tokens` more fit; else a larger one that does."""
    length = states.shape[-2]
    if buffer is not None and buffer.shape[-2] >= length + tokens:
        return buffer
    # Half again as much: the memory spared outweighs the few copies saved by doubling.
    room = max(_SMALLEST, length + tokens + (length + tokens) // 2)
    larger = states.new_empty((*states.shape[:-2], room, states.shape[-1]))
    larger[:, :, :length] = states
    return larger


def grow_in_place(cache: Cache, layer_idx: int) -> None:
    """Makes the layer of a plain ``DynamicCache`` a ``LatentCacheLayer``, with all it holds; leaves others alone."""
    if getattr(cache, "offloading", False):
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = LatentCacheLayer
    if layer_idx < len(cache.layers) and type(cache.layers[layer_idx]) is DynamicLayer:
        layer = LatentCacheLayer()
        for name, value in vars(cache.layers[layer_idx]).items():
            setattr(layer, name, value)
        cache.layers[layer_idx] = layer


def growing_layer(cache: Any, layer_idx: int, batch: int) -> LatentCacheLayer | None:
    """The layer of ``cache`` that float32 keys of `batch` sequences can be written into; None: use its `update`."""
    # A subclass may do more in its update than its layers do in theirs.
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if type(layer) is LatentCacheLayer and layer.takes_floats(batch) else None


def growing_layers(cache: Any, layer_indices: Sequence[int], batch: int) -> GrowingLayers | None:
    """The same for several layers, which hold as many tokens."""
    if type(cache) is DynamicCache and not cache.offloading and max(layer_indices) < len(cache.layers):
        layers = [cache.layers[index] for index in layer_indices]
        group = getattr(layers[0], "_group", None)
        if group is not None and group.layers == layers:
            return group if group.batch == batch else None
    found = [growing_layer(cache, index, batch) for index in layer_indices]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found) or len({layer.get_seq_length() for layer in layers}) > 1:
        return None
    for layer in layers:
        layer.leave_group()
    return GrowingLayers(layers)
