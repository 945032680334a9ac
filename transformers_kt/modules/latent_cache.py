"""A cache layer that appends in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_SMALLEST = 256
"""Tokens of room in a new buffer."""


class LatentCacheLayer(DynamicLayer):  # type: ignore[misc]
    """``DynamicLayer`` with room to grow: (batch, heads, tokens, width) views of longer buffers.

    The stock layer concatenates: at 4,096 tokens of V2-Lite it copies 255 MB for every token, with torch's threads,
    which spin on for milliseconds and hold up ours. Cropping keeps the buffer, so a view taken before a crop sees what
    is appended after it; ``copy.deepcopy`` of a cache is independent as ever.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _key_buffer: torch.Tensor | None = None
    _value_buffer: torch.Tensor | None = None

    def grow(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``keys`` and ``values`` with room for `tokens` more, whose rows at the end the caller has to fill."""
        length = self.get_seq_length()
        end = length + tokens
        self._key_buffer = _with_room(self._key_buffer, self.keys, end)
        self._value_buffer = _with_room(self._value_buffer, self.values, end)
        self.keys = self._key_buffer[:, :, :end]
        self.values = self._value_buffer[:, :, :end]
        return self.keys, self.values

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
        self._key_buffer = self._value_buffer = None
        super().reset()


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
        layer.__dict__.update(cache.layers[layer_idx].__dict__)
        cache.layers[layer_idx] = layer


def growing_layers(cache: Any, layer_indices: Sequence[int], batch: int) -> list[LatentCacheLayer] | None:
    """The layers of ``cache`` that float32 keys of `batch` sequences can be written into; None: use its `update`."""
    # A subclass may do more in its update than its layers do in theirs.
    if type(cache) is not DynamicCache or cache.offloading or max(layer_indices) >= len(cache.layers):
        return None
    layers = [cache.layers[index] for index in layer_indices]
    for layer in layers:
        if type(layer) is not LatentCacheLayer or not layer.is_initialized or layer.keys.shape[0] != batch:
            return None
        if not layer.keys.dtype == layer.values.dtype == torch.float32:
            return None
    if len({layer.get_seq_length() for layer in layers}) > 1:
        return None
    return layers
