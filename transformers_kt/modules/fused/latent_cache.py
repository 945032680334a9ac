"""A cache layer that appends in place."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

import transformers_kt._C as _C
from transformers_kt.errors import OutOfMemoryError

_SMALLEST = 256
"""Tokens of room in a new buffer."""

Kind = tuple[torch.dtype, torch.device]
FLOATS: Kind = (torch.float32, torch.device("cpu"))
"""What kind of keys the extension reads."""

Empty = Callable[..., torch.Tensor]
"""`torch.empty` for buffers, or what counts the memory of a device too."""


class Loan:
    """Buffers that layers of a cache use until they drop this object; then they go back to who lent them.

    Forfeited ones do not: somebody holds a view of them, which nothing may write into.
    """

    def __init__(
        self, buffers: Sequence[Sequence[torch.Tensor]], lender: Any, take_back: Callable[[Any], None]
    ) -> None:
        """``buffers`` are keys and values of each layer; ``take_back`` is called with ``lender``."""
        self.buffers, self.lender = buffers, lender
        self._returning = weakref.finalize(self, take_back, lender)
        self._returning.atexit = False

    def forfeit(self) -> None:
        self._returning.detach()


_NOT_COPIED = ("_states", "_buffers", "_group", "_loan")


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
        self._empty: Empty = torch.empty
        self._loan: Loan | None = None  # of the buffers, where they are lent
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
        self._forfeit_loan()
        self._buffers[which] = None
        return self._states[which]

    def _replace(self, which: int, states: Any) -> None:
        self.leave_group()
        self._buffers[which] = None
        self._states[which] = states
        if self._buffers == [None, None]:
            self._loan = None

    def _forfeit_loan(self) -> None:
        if self._loan is not None:
            self._loan.forfeit()
            self._loan = None

    def settle(self, buffers: Sequence[torch.Tensor], loan: Loan) -> None:
        """Move keys and values to the beginning of ``buffers``, lent by ``loan``."""
        states = self.own_states()
        for buffer, own, each in zip(buffers, self._buffers, states, strict=True):
            if own is not buffer:
                buffer[:, :, : each.shape[-2]] = each
        self._buffers, self._states = [*buffers], _beginnings(buffers, [each.shape[-2] for each in states])
        self._returned, self._loan = 0, loan

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

    def takes(self, batch: int, kind: Kind) -> bool:
        """Whether it can grow by states of a `kind`, of `batch` sequences and one head."""
        keys, values = self.own_states()
        if not self.is_initialized or any(states is None or states.ndim != 4 for states in (keys, values)):
            return False
        as_long = keys.shape[-2] == values.shape[-2]
        of_kind = (keys.dtype, keys.device) == (values.dtype, values.device) == kind
        return as_long and of_kind and tuple(keys.shape[:2]) == tuple(values.shape[:2]) == (batch, 1)

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
            self._loan = None
        if self._buffers[0] is None and self._buffers[1] is None:
            self._returned = 0
        buffers = [_with_room(*pair, tokens, self._empty) for pair in zip(self._buffers, states, strict=True)]
        if buffers[0] is not self._buffers[0]:
            self._loan = None
        self._buffers = [*buffers]
        self._states = _beginnings(buffers, [each.shape[-2] for each in states])  # else smaller ones would stay alive
        return buffers

    def fit(self) -> None:
        """Gives back room that it does not need."""
        states = self.own_states()
        buffers = [_with_room(None, each, 1, self._empty) for each in states]
        self._buffers, self._states = [*buffers], _beginnings(buffers, [each.shape[-2] for each in states])
        self._loan = None

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
        self._forfeit_loan()
        self._returned = max(states.shape[-2] for states in grown)
        return grown

    def crop(self, tokens_to_remove: int) -> None:
        buffers, loan, self._loan = [*self._buffers], self._loan, None
        super().crop(tokens_to_remove)
        # Keys and values still are their beginning, and nobody else got to see them.
        self._buffers, self._loan = buffers, loan

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. A shallow copy has the same keys and values, and neither writes behind them."""
        states = [self.keys, self.values]
        own = {"_buffers": [None, None], "_returned": 0, "_empty": torch.empty, "_loan": None}
        return {**vars(self), "_states": states, **own}

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentCacheLayer:
        # By way of a pickle's state the original would part with its buffers, and the copy be copied again as it grows.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        left = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        copied.__dict__.update(copy.deepcopy(left, memo), _group=None, _buffers=[None, None], _loan=None)
        states = self.own_states()
        if self.get_seq_length() == 0:
            copied._states = copy.deepcopy(states, memo)
        else:
            buffers = [_with_room(None, each, 1, self._empty) for each in states]
            copied._buffers, copied._states = [*buffers], _beginnings(buffers, [each.shape[-2] for each in states])
            copied._returned = 0
        return copied


class GrowingLayers:
    """All layers of a cache, grown by the same tokens with one addition.

    To grow each, and make views of its buffers, took 0.4 ms a token for 27 layers: as long as nobody asks for the keys
    of a layer, or sets them, the number of tokens here is all that changes.
    """

    def __init__(self, layers: list[LatentCacheLayer]) -> None:
        # They hold this: in a circle they would live on until the garbage collector comes, and keep what is lent.
        self._layers = [weakref.ref(layer) for layer in layers]
        self.length = layers[0].get_seq_length()
        states = [layer.own_states()[0] for layer in layers]
        self.batch: int = states[0].shape[0]
        self.kinds = [(keys.dtype, keys.device) for keys in states]
        self._room = 0
        self._loan: Loan | None = None  # known to be that of all layers
        self._packed: _C.KeyBuffers | None = None

    @property
    def layers(self) -> list[LatentCacheLayer | None]:
        """None for one that its cache has dropped."""
        return [layer() for layer in self._layers]

    def _living(self) -> list[LatentCacheLayer]:
        return [layer for layer in self.layers if layer is not None]

    @property
    def loan(self) -> Loan | None:
        """What all layers live in, where that is lent."""
        if self._loan is not None:
            return self._loan
        loans = [layer._loan for layer in self._living()]
        return loans[0] if all(loan is loans[0] for loan in loans) else None

    def settle(self, loan: Loan) -> None:
        """Moves all layers into its buffers, which have room for as many tokens as are to come."""
        if self._loan is loan:
            return
        living = self._living()
        for layer, buffers in zip(living, loan.buffers, strict=True):
            layer.settle(buffers, loan)
        self._begin_with([[*buffers] for buffers in loan.buffers], living)
        self._loan = loan

    def grow(self, tokens: int) -> None:
        """Takes in `tokens` more, whose rows at the end of the `buffers` the caller has to fill."""
        self._is_new_room = self.length + tokens > self._room
        if self._is_new_room:
            living = self._living()
            try:
                buffers = [layer.make_room(tokens) for layer in living]
            except BaseException:
                self._fit()
                raise
            self._begin_with(buffers, living)
        self.length += tokens

    def _begin_with(self, buffers: list[list[torch.Tensor]], layers: list[LatentCacheLayer]) -> None:
        self.buffers, self._loan = buffers, None
        self._room = min(buffer.shape[-2] for pair in buffers for buffer in pair)
        self._packed = None
        for layer in layers:
            layer._group = self

    def take_back(self, tokens: int) -> None:
        """Undoes the last `grow`, whose rows were not filled, and gives back the room that it made."""
        self.length -= tokens
        if self._is_new_room:
            self._fit()

    def _fit(self) -> None:
        """Each layer on its own, with room as for what it holds."""
        self.dissolve()
        self._room = 0
        with contextlib.suppress(OutOfMemoryError):  # the larger buffers do as well
            for layer in self._living():
                layer.fit()

    @property
    def packed(self) -> _C.KeyBuffers:
        """The buffers for the extension."""
        if self._packed is None:
            columns = zip(*self.buffers, strict=True)
            self._packed = _C.KeyBuffers(*([buffer.numpy()[:, 0] for buffer in column] for column in columns))
        return self._packed

    def dissolve(self) -> None:
        living, self._loan = self._living(), None
        for layer in living:
            layer.own_states()
        for layer in living:
            layer._group = None


@contextlib.contextmanager
def grown(caches: Sequence[GrowingLayers], tokens: int) -> Iterator[tuple[list[_C.KeyBuffers], list[int]]]:
    """Buffers of several caches, each with its number of keys after `tokens` more, which the block has to fill.

    Where it raises, or there is no memory, all are as they were.
    """
    done: list[GrowingLayers] = []
    try:
        for cache in caches:
            cache.grow(tokens)
            done.append(cache)
        yield [cache.packed for cache in caches], [cache.length for cache in caches]
    except BaseException:
        for cache in done:
            cache.take_back(tokens)
        raise


def _beginnings(buffers: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[torch.Tensor]:
    return [buffer[:, :, :length] for buffer, length in zip(buffers, lengths, strict=True)]


def _goes_on(states: Any, added: torch.Tensor) -> bool:
    """Whether ``added`` can be written behind ``states`` as it is; else the stock layer promotes or raises."""
    if states is None or states.ndim != 4 or added.ndim != 4:
        return False
    of_rows = states.shape[:2] == added.shape[:2] and states.shape[-1] == added.shape[-1]
    return bool(of_rows and states.dtype == added.dtype and states.device == added.device)


def _with_room(buffer: torch.Tensor | None, states: torch.Tensor, tokens: int, empty: Empty) -> torch.Tensor:
    """`buffer`, which begins with `states`, where `tokens` more fit; else a larger one that does."""
    length = states.shape[-2]
    if buffer is not None and buffer.shape[-2] >= length + tokens:
        return buffer
    # Half again as much: the memory spared outweighs the few copies saved by doubling.
    room = max(_SMALLEST, length + tokens + (length + tokens) // 2)
    larger = empty((*states.shape[:-2], room, states.shape[-1]), dtype=states.dtype, device=states.device)
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


def held_states(cache: Any, layer_idx: int) -> torch.Tensor | None:
    """The keys that a layer of ``cache`` holds, to look at their dtype and device; None where it holds none yet."""
    layers = getattr(cache, "layers", ())
    if layer_idx >= len(layers) or not getattr(layers[layer_idx], "is_initialized", False):
        return None
    layer = layers[layer_idx]
    keys = layer.own_states()[0] if isinstance(layer, LatentCacheLayer) else getattr(layer, "keys", None)
    return keys if isinstance(keys, torch.Tensor) else None


def start_layer(cache: Cache, layer_idx: int, keys: torch.Tensor, values: torch.Tensor, empty: Empty) -> None:
    """Makes a layer of a plain ``DynamicCache`` that holds nothing yet hold ``keys`` and ``values``, of no tokens, and
    take room for more from ``empty``; leaves others alone."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    grow_in_place(cache, layer_idx)
    if cache.layer_class_to_replicate is LatentCacheLayer:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(LatentCacheLayer())
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if type(layer) is LatentCacheLayer and not layer.is_initialized:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer._empty = keys, values, empty


def expect_length(cache: Any, tokens: int) -> None:
    """Say how long ``cache`` may grow, for who makes room in it."""
    if type(cache) is DynamicCache:
        cache.kt_expected_length = tokens


def expected_length(cache: Cache) -> int:
    return int(getattr(cache, "kt_expected_length", 0))


def copied_states(cache: Any) -> list[list[torch.Tensor]] | None:
    """Keys and values of each layer without room for more; None where a layer is no `LatentCacheLayer`."""
    is_plain = type(cache) is DynamicCache and not cache.offloading
    if not is_plain or any(type(layer) is not LatentCacheLayer for layer in cache.layers):
        return None
    return [[states.clone() for states in layer.own_states()] for layer in cache.layers]


def cache_of(all_states: list[list[torch.Tensor]], tokens: int) -> DynamicCache:
    """A cache with a copy of the first ``tokens`` of what `copied_states` gave."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = LatentCacheLayer
    for keys, values in all_states:
        layer = LatentCacheLayer()
        layer.update(keys[:, :, :tokens], values[:, :, :tokens])
        cache.layers.append(layer)
    return cache


def growing_layer(cache: Any, layer_idx: int, batch: int, kind: Kind = FLOATS) -> LatentCacheLayer | None:
    """The layer of ``cache`` that keys of `batch` sequences can be written into; None: use its `update`."""
    # A subclass may do more in its update than its layers do in theirs.
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    return layer if type(layer) is LatentCacheLayer and layer.takes(batch, kind) else None


def growing_layers(
    cache: Any, layer_indices: Sequence[int], batch: int, kinds: Sequence[Kind] | None = None
) -> GrowingLayers | None:
    """The same for several layers, which hold as many tokens; ``kinds`` has that of each, `FLOATS` if left out."""
    kinds = [FLOATS] * len(layer_indices) if kinds is None else kinds
    if type(cache) is DynamicCache and not cache.offloading and max(layer_indices) < len(cache.layers):
        layers = [cache.layers[index] for index in layer_indices]
        group = getattr(layers[0], "_group", None)
        if group is not None and group.layers == layers:
            return group if group.batch == batch and group.kinds == kinds else None
    found = [growing_layer(cache, index, batch, kind) for index, kind in zip(layer_indices, kinds, strict=True)]
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found) or len({layer.get_seq_length() for layer in layers}) > 1:
        return None
    for layer in layers:
        layer.leave_group()
    return GrowingLayers(layers)
