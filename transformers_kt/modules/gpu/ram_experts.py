"""What a GPU computes of experts in RAM: those in its slots, and of long prompts those that are copied to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import transformers_kt._C as _C
from transformers_kt.backends.gpu.device import Device, Stream
from transformers_kt.backends.gpu.expert_ring import ExpertRing
from transformers_kt.backends.gpu.expert_slots import ExpertSlots
from transformers_kt.backends.gpu.host_experts import HostExperts, Uploads
from transformers_kt.backends.gpu.plain import Staging
from transformers_kt.backends.gpu.prefill_split import PrefillRates, fewest_tokens, split_experts
from transformers_kt.families.registry import dims_of
from transformers_kt.planning.costs import RING_SLOTS
from transformers_kt.planning.expert_profile import ExpertProfile
from transformers_kt.planning.gpu_experts import GpuExperts
from transformers_kt.text import layer_number

_TIMED_EXPERTS = 8
_FEW_TOKENS, _MANY_TOKENS = 1, 48  # of each expert, to tell what it takes from what its tokens take


class PrefillStream:
    """The way to one device for a model's experts in RAM: a stream, and a ring that is made for the first long prompt.

    Who computes which expert depends on counts of tokens and on rates that are measured once: a model that is loaded
    computes a prompt the same way each time.
    """

    def __init__(self, device: Device, ring_nbytes: int, fewest_tokens: int) -> None:
        """No prompt goes this way where there is no ring."""
        self.uploads = Uploads(device)
        self._device, self._ring_nbytes, self._fewest_tokens = device, ring_nbytes, fewest_tokens
        self._ring: ExpertRing | None = None
        self._rates: PrefillRates | None = None  # of an expert of `_rated_nbytes`
        self._rated_nbytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefillStream:
        """Buffers are those of one model."""
        return PrefillStream(self._device, self._ring_nbytes, self._fewest_tokens)

    def require_room(self, expert_nbytes: int) -> None:
        """The ring holds experts of this size: their rows are padded, which plans do not count."""
        if self._ring_nbytes:
            self._ring_nbytes = max(self._ring_nbytes, RING_SLOTS * expert_nbytes)

    def takes(self, tokens: int) -> bool:
        """Whether experts for so many tokens at once are divided between this and the CPU."""
        return self._ring_nbytes > 0 and tokens >= self._fewest_tokens

    def compute(
        self,
        routed: _C.Experts,
        host: HostExperts,
        staged: Staging,
        result: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
        stream: Stream,
    ) -> None:
        """The experts of ``staged``: the device adds its share for ``x``, the same on the device, to ``out`` there, on
        ``stream``; ``result`` float32 (tokens, hidden) of the host gets that of the CPU."""
        host.register(self.uploads)
        if self._ring is None:
            self._ring = ExpertRing(self._device, self._ring_nbytes)
            self.uploads.stream.follow_torch()  # which may have used that memory before
        if self._rates is None:
            self._rates = measured_rates(routed, host, self._ring, self.uploads)
            self._rated_nbytes = host.nbytes
        ids, weights = staged.ids.numpy(), staged.weights.numpy()
        counts = np.bincount(ids[ids >= 0], minlength=host.count)
        split = split_experts(counts.tolist(), self._rates.scaled(host.nbytes / self._rated_nbytes))
        on_cpu = np.where(np.isin(ids, split.link), -1, ids).astype(np.int64)
        job = routed.submit_routed(staged.x.numpy(), on_cpu, weights, result.numpy())
        self._ring.launch(host, split.link, x, ids, weights, out, stream, self.uploads)
        job.wait()


def measured_rates(routed: _C.Experts, host: HostExperts, ring: ExpertRing, uploads: Uploads) -> PrefillRates:
    """What an expert of ``routed`` takes on the CPU, and its copy to the ring."""

    def on_cpu(tokens: int) -> float:
        gate, experts = host.matrices[0], min(_TIMED_EXPERTS, host.count)
        x = np.ones((tokens, gate.cols), np.float32)
        ids = np.tile(np.arange(experts), (tokens, 1))
        weights, out = np.ones(ids.shape, np.float32), np.empty_like(x)
        return _shortest(lambda: routed.forward_routed(x, ids, weights, out)) / experts

    def copy() -> None:
        to = [matrix.panels[0] for matrix in host.on_device(ring.memory)]
        host.copy(0, to, uploads)
        uploads.wait()

    few, many = on_cpu(_FEW_TOKENS), on_cpu(_MANY_TOKENS)
    per_token = max(0.0, (many - few) / (_MANY_TOKENS - _FEW_TOKENS))
    return PrefillRates(max(0.0, few - _FEW_TOKENS * per_token), per_token, _shortest(copy))


def _shortest(call: Callable[[], object]) -> float:
    """Seconds; the first time finds nothing in caches, and may wait for memory."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass
class RamExperts:
    """Experts of a layer in RAM, as far as a GPU computes them. ``slots`` are None where there are none."""

    host: HostExperts
    slots: ExpertSlots | None
    stream: PrefillStream


def share_with_gpus(
    model: nn.Module,
    shared: GpuExperts,
    profile: ExpertProfile | None,
    stream_tokens: int | None,
    devices: dict[str, Device],
) -> None:
    """Give the loaded experts of ``model`` that ``shared`` names their slots, filled by ``profile``, and the way there.

    ``stream_tokens`` is from how many tokens on prompts go there, None for what suits the model. Raises
    OutOfMemoryError.
    """
    config: Any = model.config
    streams: dict[str, PrefillStream] = {}
    for layer in shared.layers:
        device = devices[layer.device]
        if layer.device not in streams:
            fewest = fewest_tokens(layer.experts, dims_of(config).top_k) if stream_tokens is None else stream_tokens
            streams[layer.device] = PrefillStream(device, shared.ring.get(layer.device, 0), fewest)
        stream = streams[layer.device]
        experts: Any = model.get_submodule(layer.module)
        host = HostExperts(experts.routed, device)
        stream.require_room(host.nbytes)
        slots = ExpertSlots(host, layer.slots) if layer.slots else None
        number = layer_number(layer.module)
        if slots is not None and profile is not None and number is not None:
            slots.begin(profile.counts[number], profile.tokens, stream.uploads)
        experts.on_gpu = RamExperts(host, slots, stream)
