"""Routed experts in RAM on their way to a device: straight from the packed memory, or through pinned buffers.

Memory that is registered with the device is copied by the device alone, at the full rate of the link, while the CPU
computes with it. Registering takes 0.1 s for each GB. Where the system refuses it, the CPU copies an expert's panels to
one of a few pinned buffers, and the device copies them from there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch

import transformers_kt._C as _C
from transformers_kt.backends.gpu.device import Device, Event, Stream, Work
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.panels import LAYOUTS, PANEL_ROWS
from transformers_kt.backends.gpu.whole_blocks import make_codebook

_PINNED_BUFFERS = 4
"""Of which the host fills one while others are copied."""


class PinnedBuffers:
    """Pinned memory that matrices pass through, in turn."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[tuple[torch.Tensor, Event]] = []
        self._next = 0

    def copy(self, matrix: _C.PackedMatrix, index: int, to: torch.Tensor, stream: Stream) -> None:
        """Panels of matrix ``index`` to ``to`` uint8 (panels, panel bytes) on the device; the host may wait for a
        buffer."""
        buffer, is_free = self._buffer_of(to.nbytes)
        is_free.synchronize()
        panels = buffer[: to.nbytes].view(to.shape)
        matrix.read_panels(index, panels.numpy())
        stream.copy(to, panels)
        stream.discard(panels)
        stream.record(is_free)

    def _buffer_of(self, nbytes: int) -> tuple[torch.Tensor, Event]:
        if not self._buffers or len(self._buffers[0][0]) < nbytes:
            for _, is_free in self._buffers:
                is_free.synchronize()
            self._buffers = [
                (self._device.pinned((nbytes,), torch.uint8), self._device.event()) for _ in range(_PINNED_BUFFERS)
            ]
        self._next = (self._next + 1) % len(self._buffers)
        return self._buffers[self._next]


class Uploads:
    """What experts are copied to a device with: a stream beside that of the layers, and pinned memory."""

    def __init__(self, device: Device) -> None:
        self.stream, self.pinned = device.stream(), PinnedBuffers(device)
        self.are_done = device.event()

    def wait(self) -> None:
        """Until all that was launched is done."""
        self.stream.record(self.are_done)
        self.are_done.synchronize()


class HostExperts:
    """Gate, up and down of a layer's experts in RAM, as far as ``device`` copies them."""

    def __init__(self, experts: _C.Experts, device: Device) -> None:
        self.device = device
        self.matrices: Sequence[_C.PackedMatrix] = experts.matrices
        for matrix in self.matrices:
            make_codebook(matrix.type_name, device.torch_device)
        self._parts = [
            [(first, torch.from_numpy(panels)) for first, panels in matrix.node_panels] for matrix in self.matrices
        ]
        self.is_registered = False
        self._was_refused = False

    def __deepcopy__(self, memo: dict[int, Any]) -> HostExperts:
        return self  # weights do not change: a copy of a model shares them

    @property
    def count(self) -> int:
        return self.matrices[0].count

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return sum(matrix.nbytes // matrix.count for matrix in self.matrices)

    def on_device(self, memory: torch.Tensor) -> list[DeviceMatrix]:
        """Room for as many experts as fit in ``memory``, uint8 of the device: gate, up and down."""
        count, found, start = len(memory) // self.nbytes, [], 0
        for matrix in self.matrices:
            shape = (count, -(-matrix.rows // PANEL_ROWS), LAYOUTS[matrix.type_name].panel_bytes(matrix.cols))
            end = start + count * matrix.nbytes // matrix.count
            found.append(
                DeviceMatrix(self.device, matrix.type_name, memory[start:end].view(shape), matrix.rows, matrix.cols)
            )
            start = end
        return found

    def register(self, uploads: Uploads) -> bool:
        """Whether the device copies from this memory by itself, with ``uploads``. The first call tries."""
        if not self.is_registered and not self._was_refused:
            self.is_registered = self._register(uploads)
            self._was_refused = not self.is_registered
        return self.is_registered

    def _register(self, uploads: Uploads) -> bool:
        ends: list[Work] = []
        parts = [panels for of_matrix in self._parts for _, panels in of_matrix]
        for panels in parts:
            end = self.device.register(panels)
            if end is None:
                _end_all(ends, uploads, parts)
                return False
            ends.append(end)
        # Before the memory goes, which `parts` keep until then.
        weakref.finalize(self, _end_all, ends, uploads, parts)
        return True

    def copy(self, expert: int, to: Sequence[torch.Tensor], uploads: Uploads) -> None:
        """Its gate, up and down to ``to``, uint8 (panels, panel bytes) on the device each, in order."""
        for matrix, parts, panels in zip(self.matrices, self._parts, to, strict=True):
            if not self.is_registered:
                uploads.pinned.copy(matrix, expert, panels, uploads.stream)
                continue
            for first, part in parts:
                uploads.stream.copy(panels[first : first + part.shape[1]], part[expert])


def _end_all(ends: Sequence[Work], uploads: Uploads, parts: Sequence[torch.Tensor]) -> None:
    with contextlib.suppress(Exception):  # of what was copied nobody wants to know any more
        uploads.wait()
    for end in ends:
        end()
