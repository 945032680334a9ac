"""Experts of a long prompt through a ring of slots in the memory of a device: copied, computed, overwritten.

The stream that copies waits until a slot is free, the one that computes until it is filled. The host launches all of
it and then computes its own share of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Device, Stream
from transformers_kt.backends.gpu.host_experts import HostExperts, Uploads
from transformers_kt.backends.gpu.matrices import DeviceMatrix
from transformers_kt.backends.gpu.prefill_split import ring_steps
from transformers_kt.planning.costs import RING_SLOTS


class ExpertRing:
    """Slots on ``device``, ``nbytes`` in all: each is as large as an expert of any layer at least."""

    def __init__(self, device: Device, nbytes: int) -> None:
        slot_bytes = nbytes // RING_SLOTS
        with torch.inference_mode(False):
            self._slots = [device.empty((slot_bytes,), torch.uint8) for _ in range(RING_SLOTS)]
        self._are_free = [device.event() for _ in self._slots]
        self._are_filled = [device.event() for _ in self._slots]
        self._choices = _Choices(device)
        self._next = 0

    @property
    def memory(self) -> torch.Tensor:
        """A slot that is free while nothing runs."""
        return self._slots[0]

    def launch(
        self,
        host: HostExperts,
        experts: Sequence[int],
        x: torch.Tensor,
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        out: torch.Tensor,
        stream: Stream,
        uploads: Uploads,
    ) -> None:
        """``out`` float32 (tokens, hidden) += ``weights`` times ``experts`` of ``x`` (tokens, hidden), both on the
        device; ``ids`` and ``weights`` (tokens, top_k) on the host. Returns when all is launched on ``stream``, which
        has to be done with what was launched for the layer before."""
        flat = ids.reshape(-1).astype(np.int16)  # whose sort is by digits
        order = np.argsort(flat, kind="stable")
        first, end = (np.searchsorted(flat[order], experts, side) for side in ("left", "right"))
        rows, shares = self._choices.take(order // ids.shape[1], weights.reshape(-1)[order], stream)
        own = {expert: slice(int(a), int(b)) for expert, a, b in zip(experts, first, end, strict=True)}
        per_slot = len(self._slots[0]) // host.nbytes
        for step in ring_steps(experts, len(self._slots), per_slot, self._next):
            memory = self._slots[step.slot]
            matrices = host.on_device(memory)
            uploads.stream.wait(self._are_free[step.slot])
            for place, expert in enumerate(step.experts):
                host.copy(expert, [matrix.panels[place] for matrix in matrices], uploads)
            uploads.stream.record(self._are_filled[step.slot])
            stream.wait(self._are_filled[step.slot])
            for place, expert in enumerate(step.experts):
                stream.launch(partial(_add_expert, x, rows[own[expert]], shares[own[expert]], matrices, place, out))
            stream.discard(memory)
            stream.record(self._are_free[step.slot])
            self._next = (step.slot + 1) % len(self._slots)


class _Choices:
    """Which tokens an expert computes and what each counts, in pinned memory and on the device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._room = 0

    def take(
        self, rows: npt.NDArray[np.int64], shares: npt.NDArray[np.float32], stream: Stream
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rows`` int64 and ``shares`` float32 (choices,) on the device."""
        count = len(rows)
        if count > self._room:
            with torch.inference_mode(False):
                self._pinned, self._there = (
                    (make((count,), torch.int64), make((count,), torch.float32))
                    for make in (self._device.pinned, self._device.empty)
                )
            self._room = count
            stream.follow_torch()  # which may have used that memory before
        found = []
        for values, pinned, there in zip((rows, shares), self._pinned, self._there, strict=True):
            pinned[:count].numpy()[:] = values
            stream.copy(there[:count], pinned[:count])
            stream.discard(pinned[:count])
            found.append(there[:count])
        return found[0], found[1]


def _add_expert(
    x: torch.Tensor,
    rows: torch.Tensor,
    shares: torch.Tensor,
    matrices: Sequence[DeviceMatrix],
    place: int,
    out: torch.Tensor,
) -> None:
    out.index_add_(0, rows, shares.unsqueeze(-1) * operations.expert(x[rows], place, *matrices))
