"""Experts of a layer that lie in the memory of its device too: a table, slots, and uploads between tokens.

The router looks up where an expert lies, sends the device's own to it and -1 for them to the CPU. The table and the
slots keep their addresses. Between two tokens an expert may leave: its entry becomes -1 at once, and its slot is
overwritten while the next token is computed; the newcomer is entered when that token is done. So which expert is where
depends on the tokens alone, never on how long a copy takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Stream
from transformers_kt.backends.gpu.host_experts import HostExperts, Uploads
from transformers_kt.backends.gpu.plain import Resident
from transformers_kt.backends.gpu.slot_policy import UPLOADS_PER_TOKEN, Exchange, SlotPolicy


class ExpertSlots:
    """Slots for some of a layer's experts."""

    def __init__(self, host: HostExperts, slots: int) -> None:
        device = host.device
        self._host = host
        self._policy = SlotPolicy(host.count, slots)
        with torch.inference_mode(False):  # else only the mode that made them could write into them
            self._memory = device.empty((slots * host.nbytes,), torch.uint8)
            self._table = device.empty((host.count,), torch.int32).fill_(-1)
            self._table_on_host = device.pinned((host.count,), torch.int32).fill_(-1)
        self._matrices = host.on_device(self._memory)
        self._is_uploaded = device.event()
        self._coming: list[Exchange] = []
        self._choices = np.zeros(host.count, np.int64)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: who computes with a copy of the model has other tokens."""

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @property
    def experts(self) -> list[int]:
        """Those that lie in slots now, ascending."""
        return [int(expert) for expert in np.flatnonzero(self._table_on_host.numpy() >= 0)]

    def resident(self, ids: torch.Tensor, weights: torch.Tensor) -> Resident:
        """For the router: ``ids`` int32 and ``weights`` float32 (rows, top_k), on the device, are what it writes."""
        return Resident(self._table, ids, weights)

    def on_device(self, x: torch.Tensor, resident: Resident) -> torch.Tensor:
        """``x`` (tokens, hidden) through those experts that have slots -> float32 (tokens, hidden)."""
        return operations.mix_experts(x, resident.ids, resident.weights, *self._matrices)

    def note(self, staged: npt.NDArray[np.int32], slots: npt.NDArray[np.int32]) -> None:
        """Experts were chosen: ``staged`` for the CPU, -1 where ``slots`` says which slot computes."""
        table = self._table_on_host.numpy()
        there = np.flatnonzero(table >= 0)
        expert_of = np.full(len(self._matrices[0].panels), -1)
        expert_of[table[there]] = there
        chosen = np.where(staged >= 0, staged, expert_of[slots])
        self._choices += np.bincount(chosen.reshape(-1), minlength=len(table))

    def begin(self, choices: Sequence[int], tokens: int, uploads: Uploads) -> None:
        """Fill the slots as after a text of so many ``tokens`` in which experts were chosen so often."""
        self._policy.observe(choices, tokens)
        self._launch(self._policy.exchanges(self._host.count), uploads)
        self._enter(uploads.stream)
        uploads.stream.copy(self._table, self._table_on_host)
        uploads.wait()

    def turn(self, tokens: int, stream: Stream, uploads: Uploads) -> None:
        """``tokens`` of each sequence were computed on ``stream``, which is done: exchange experts before the next."""
        entered = self._enter(stream)
        self._policy.observe(self._choices, tokens)
        self._choices[:] = 0
        exchanges = self._policy.exchanges(UPLOADS_PER_TOKEN * tokens)
        self._launch(exchanges, uploads)
        if entered or exchanges:
            stream.keep(self._table)
            stream.copy(self._table, self._table_on_host)

    def _launch(self, exchanges: Sequence[Exchange], uploads: Uploads) -> None:
        """What leaves is no longer looked up; what comes is copied to where it was."""
        if not exchanges:
            return
        uploads.stream.follow_torch()  # whose own stream cleared the table, and had the memory of the slots before
        table = self._table_on_host.numpy()
        for slot, expert, leaving in exchanges:
            if leaving is not None:
                table[leaving] = -1
            to = [matrix.panels[slot] for matrix in self._matrices]
            for panels in to:
                uploads.stream.discard(panels)
            self._host.copy(expert, to, uploads)
        uploads.stream.keep(self._memory)
        uploads.stream.record(self._is_uploaded)
        self._coming = list(exchanges)

    def _enter(self, stream: Stream) -> bool:
        """What was copied since the last token is looked up from now on; whether there is anything."""
        if not self._coming:
            return False
        stream.wait(self._is_uploaded)
        table = self._table_on_host.numpy()
        for slot, expert, _ in self._coming:
            table[expert] = slot
        self._coming = []
        return True
