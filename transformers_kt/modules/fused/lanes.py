"""What a device works with in one model: a stream, events, and buffers at fixed addresses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.modules.rotary import KtRotaryEmbedding

MOST_KEPT_ROWS = 8
"""Buffers for as many tokens are kept: captured steps read and write at their addresses."""


class Buffers:
    """What the layers of a device pass on for ``rows`` tokens: on the device, and in pinned memory for the host."""

    def __init__(self, device: Device, rows: int, hidden: int, top_k: int, rope: int) -> None:
        self.rows = rows
        with torch.inference_mode(False):  # else only the mode that made them could write into them
            self.residual, self.normed, self.routed = (device.empty((rows, hidden), torch.float32) for _ in range(3))
            self.host = device.pinned((rows, hidden), torch.float32)  # states on their way to the device or back
            self.result = device.pinned((rows, hidden), torch.float32)
            words = (Staging.words(rows, hidden, top_k),)
            self.pinned_block, self.block = device.pinned(words, torch.float32), device.empty(words, torch.float32)
            self.places_on_host, self.places = (make((rows, 4), torch.int32) for make in (device.pinned, device.empty))
            self.table = device.empty((rows, rope), torch.float32)
            self.slots = device.empty((rows, top_k), torch.int32)  # of experts in RAM that lie in slots too
            self.slot_weights = device.empty((rows, top_k), torch.float32)
            self.slots_on_host = device.pinned((rows, top_k), torch.int32)
        self.staged = Staging.of(self.pinned_block, rows, hidden, top_k)  # for experts on the CPU
        self.chosen = Staging.of(self.block, rows, hidden, top_k)  # for experts on the device
        # Of a step, whose rows are sequences: the token's position, the keys there are, the first it sees and the end.
        self.positions, self.lengths, self.ranges = self.places[:, 0], self.places[:, 1], self.places[:, 2:]


class Lane:
    """A device in one model: its stream, its events, and what a forward pass has put there."""

    def __init__(self, device: Device, hidden: int, top_k: int, rotary: KtRotaryEmbedding) -> None:
        self.device = device
        self.stream, self.staged, self.done = device.stream(), device.event(), device.event()
        self._inv_freq = rotary.frequencies_on(device)
        self._scaling = rotary.scaling
        self._sizes = hidden, top_k, 2 * len(self._inv_freq)
        self._kept: dict[int, Buffers] = {}
        self._large: Buffers | None = None
        self.buffers: Buffers | None = None
        self.table: torch.Tensor
        self.visible: torch.Tensor

    def begin(self, rows: int) -> None:
        """Buffers for as many tokens. What torch was given before comes first."""
        if rows <= MOST_KEPT_ROWS:
            if rows not in self._kept:
                self._kept[rows] = Buffers(self.device, rows, *self._sizes)
            self._large, self.buffers = None, self._kept[rows]
        else:
            if self._large is None or self._large.rows != rows:
                self._large = self.buffers = None  # first, so that their memory is free
                self._large = Buffers(self.device, rows, *self._sizes)
            self.buffers = self._large
        self.stream.follow_torch()

    def take_tokens(self, positions: torch.Tensor, visible: torch.Tensor) -> None:
        """``positions`` and ``visible`` of tokens (batch, tokens), on the host, for all layers of the pass."""
        there = self.device.torch_device
        self.visible = visible.to(there)
        with self.device.current():
            self.table = operations.rope_table(positions.to(there), self._inv_freq, self._scaling)
        self.stream.follow_torch()

    def take_step(self, places: torch.Tensor) -> None:
        """``places`` int32 (rows, 4) as of `Buffers.places`: one new token a row."""
        b = self.own
        b.places_on_host.copy_(places)
        self.stream.copy(b.places, b.places_on_host)

    def make_table(self) -> None:
        """Device work of a step: the rotary table of its positions."""
        b = self.own
        b.table.copy_(operations.rope_table(b.positions, self._inv_freq, self._scaling))

    def follow(self, other: Lane) -> None:
        """The residual of another device becomes that of this one: a copy and an event."""
        other.stream.record(other.staged)
        self.stream.wait(other.staged)
        self.stream.copy(self.own.residual, other.own.residual)

    def wait(self) -> None:
        """Until all that was launched is done."""
        self.stream.record(self.done)
        self.done.synchronize()

    def drain(self) -> None:
        """The same after an error: what else goes wrong there is of no interest."""
        with contextlib.suppress(Exception):
            self.wait()
        self._large = self.buffers = None

    @property
    def own(self) -> Buffers:
        assert self.buffers is not None
        return self.buffers

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: the copy of a model makes its own."""
