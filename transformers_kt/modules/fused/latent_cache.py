"""A cache layer that appends in place."""

from __future__ import annotations

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
    which spin on for milliseconds and hold up ours. Cropping keeps the buffer, so a view taken before a crop sees what
    is appended after it; ``copy.deepcopy`` of a cache is independent as ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._states: list[Any] = [None, None]  # keys and values
        self._buffers: list[torch.Tensor | None] = [None, None]  # what they may be the beginning of
        self._group: GrowingLayers | None = None
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> Any:
        return self._state(0)

    @keys.setter
    def keys(self, states: Any) -> None:
        self._set_state(0, states)

    @property
    def values(self) -> Any:
        return self._state(1)

    @values.setter
    def values(self, states: Any) -> None:
        self._set_state(1, states)

    def _state(self, which: int) -> Any:
        if self._group is not None and self._states[which].shape[-2] != self._group.length:
            self._states[which] = self._buffers[which][:, :, : self._group.length]  # type: ignore[index]
        return self._states[which]

    def _set_state(self, which: int, states: Any) -> None:
        self.leave_group()
        self._states[which] = states

    def leave_group(self) -> None:
        """From now on it is its own keys and values that count; the same goes for the others of the group."""
        if self._group is not None:
            self._group.dissolve()

    def get_seq_length(self) -> int:
        return int(super().get_seq_length()) if self._group is None else self._group.length

    def takes_floats(self, batch: int) -> bool:
        """Whether it can grow by float32 states of `batch` sequences and one head."""
        if not self.is_initialized or any(states is None or states.ndim != 4 for states in self._states):
            return False
        return all(states.shape[:2] == (batch, 1) and states.dtype == torch.float32 for states in self._states)

    def grow(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys`` and ``values`` with `tokens` more rows at their end, which the caller has to fill."""
        end = self.get_seq_length() + tokens
        self.make_room(end)
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)  # type: ignore[index]
        return self.keys, self.values

    def make_room(self, needed: int) -> list[torch.Tensor]:
        """Buffers for at least `needed` tokens, of which ``keys`` and ``values`` are the beginning."""
        pairs = zip(self._buffers, (self.keys, self.values), strict=True)
        buffers = [_with_room(buffer, states, needed) for buffer, states in pairs]
        self._buffers = [*buffers]
        return buffers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        tokens = key_states.shape[-2]
        keys, values = self.grow(tokens)
        keys[:, :, -tokens:] = key_states
        values[:, :, -tokens:] = value_states
        return keys, values

    def reset(self) -> None:
        self.leave_group()
        self._buffers = [None, None]
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        self.leave_group()  # so that a copy, which is made of this, has its own
        return dict(vars(self))


class GrowingLayers:
    """All layers of a cache, grown by the same tokens with one addition.

    To grow each, and make views of its buffers, took 0.4 ms a token for 27 layers: as long as nobody asks for the keys
    of a layer, or sets them, the number of tokens here is all that changes.
    """

    def __init__(self, layers: list[LatentCacheLayer]) -> None:
        self.layers = layers
        self.length = layers[0].get_seq_length()
        self.batch: int = layers[0].keys.shape[0]
        self._room = 0

    def grow(self, tokens: int) -> _C.KeyBuffers:
        """Takes in `tokens` more, whose rows at the end the caller has to fill, in buffers with room for more."""
        if self.length + tokens > self._room:
            buffers = [layer.make_room(self.length + tokens) for layer in self.layers]
            self._room = min(buffer.shape[-2] for pair in buffers for buffer in pair)
            columns = zip(*buffers, strict=True)
            self._packed = _C.KeyBuffers(*([buffer.numpy()[:, 0] for buffer in column] for column in columns))
            for layer in self.layers:
                layer._group = self
        self.length += tokens
        return self._packed

    def dissolve(self) -> None:
        for layer in self.layers:
            layer._states = [layer.keys, layer.values]
        for layer in self.layers:
            layer._group = None


def _with_room(buffer: torch.Tensor | None, view: torch.Tensor, needed: int) -> torch.Tensor:
    """`buffer` where `view` still starts it and `needed` tokens fit; else a larger one that begins with `view`."""
    if buffer is not None and view.shape[-2] > 0:
        in_place = view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
        if in_place and view.shape[0] == buffer.shape[0] and buffer.shape[-2] >= needed:
            return buffer
    # Half again as much: the memory spared outweighs the few copies saved by doubling.
    room = max(_SMALLEST, needed + needed // 2)
    larger = view.new_empty((*view.shape[:-2], room, view.shape[-1]))
    larger[:, :, : view.shape[-2]] = view
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
