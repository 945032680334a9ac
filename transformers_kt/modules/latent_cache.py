"""A cache layer that appends in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

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

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self._key_buffer = _with_room(self._key_buffer, self.keys, key_states, length)
        self._value_buffer = _with_room(self._value_buffer, self.values, value_states, length)
        end = length + key_states.shape[-2]
        self._key_buffer[:, :, length:end] = key_states
        self._value_buffer[:, :, length:end] = value_states
        self.keys = self._key_buffer[:, :, :end]
        self.values = self._value_buffer[:, :, :end]
        return self.keys, self.values

    def reset(self) -> None:
        self._key_buffer = self._value_buffer = None
        super().reset()


def _with_room(buffer: torch.Tensor | None, view: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """`buffer` where `view` still starts it and `new` fits behind; else a larger one that begins with `view`."""
    needed = length + new.shape[-2]
    if buffer is not None and length > 0:
        in_place = view.data_ptr() == buffer.data_ptr() and view.stride() == buffer.stride()
        if in_place and view.shape[0] == buffer.shape[0] and buffer.shape[-2] >= needed:
            return buffer
    # Half again as much: the memory spared outweighs the few copies saved by doubling.
    room = max(_SMALLEST, needed + needed // 2)
    larger = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
    if length > 0:
        larger[:, :, :length] = view
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
