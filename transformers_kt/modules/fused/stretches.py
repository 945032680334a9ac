"""A forward pass as stretches of device work, cut where the host has to do something.

Device work of a layer: norm, attention, norm, feed-forward. Where routed experts lie in RAM, x, the chosen experts and
their weights go to pinned memory and an event marks it: there a stretch ends. While the host waits for it, computes the
experts and writes their sum to pinned memory, the device does what lies `beside`: shared experts, and experts that it
holds. The next stretch begins by adding the sum. Layers without experts in RAM join their neighbours'.

So a layer with experts in RAM is two launches once its stretches are captured, and the host waits once for it; without
graphs each work is a launch of its own. Either way it is the same work in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from transformers_kt.backends.gpu import operations
from transformers_kt.backends.gpu.device import Device, Launchable, Work
from transformers_kt.backends.gpu.expert_slots import ExpertSlots
from transformers_kt.backends.gpu.plain import Resident, Staging
from transformers_kt.modules.experts import KtExperts
from transformers_kt.modules.fused.device_layers import DeviceLayer, SplitMoe
from transformers_kt.modules.fused.lanes import Buffers, Lane
from transformers_kt.modules.gpu.experts import KtGpuExperts
from transformers_kt.modules.gpu.ram_experts import RamExperts
from transformers_kt.modules.gpu.simple import KtGpuRMSNorm

Attend = Callable[[DeviceLayer, Lane], Work]
"""The attention half of a layer as device work: from ``residual`` to ``residual`` and ``normed``."""
CallModule = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Calls a layer that no stretch holds."""


@dataclass
class Stretch:
    """Device work without the host. ``experts`` are those in RAM that come after it."""

    lane: Lane
    before: Lane | None  # whose residual it goes on from, where that is another device's
    works: list[Work] = field(default_factory=list)
    beside: list[Work] = field(default_factory=list)
    experts: KtExperts | None = None
    takes_states: bool = False  # from the host
    gives_states: bool = False
    graphs: tuple[Launchable, Launchable | None] | None = None  # of `works` and of `beside`

    def launch(self) -> None:
        self._launch(self.works, self.graphs and self.graphs[0])

    def launch_beside(self) -> None:
        self._launch(self.beside, self.graphs and self.graphs[1])

    def _launch(self, works: Sequence[Work], graph: Launchable | None) -> None:
        if graph is not None:
            graph.launch(self.lane.stream)
            return
        for work in works:
            self.lane.stream.launch(work)

    def capture(self, sharing: Launchable | None) -> Launchable:
        """Both of its parts. ``sharing`` is a graph of the same device and pass; or what is to be one."""
        first = self.lane.device.capture(partial(_run_all, self.works), sharing)
        rest = self.lane.device.capture(partial(_run_all, self.beside), sharing or first) if self.beside else None
        self.graphs = (first, rest)
        return sharing or first


def _run_all(works: Iterable[Work]) -> None:
    for work in works:
        work()


class Pass:
    """All layers of a base model for as many rows as the lanes have begun with."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        layers: Mapping[int, DeviceLayer],
        lanes: Mapping[str, Lane],
        attend: Attend,
        norm: KtGpuRMSNorm | None,
        begin: Callable[[Lane], Work] | None = None,
    ) -> None:
        """``layers`` are those of ``modules`` that compute inside their device, by number. The last states go through
        ``norm`` where it lies on the last layer's device; ``begin`` is the first work of every lane."""
        self.parts: list[Stretch | nn.Module] = []
        self._lanes = lanes
        self._begin = begin
        self._begun: set[str] = set()
        for number, module in enumerate(modules):
            layer = layers.get(number)
            if layer is None:
                self._end()
                self.parts.append(module)
            else:
                self._add(layer, self._stretch_on(lanes[layer.device.name]), attend)
        self.gives_normed = self._end(norm)

    def _stretch_on(self, lane: Lane) -> Stretch:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Stretch) and last.lane is lane and last.experts is None:
            return last
        stretch = Stretch(lane, last.lane if isinstance(last, Stretch) and last.lane is not lane else None)
        if self._begin is not None and lane.device.name not in self._begun:
            self._begun.add(lane.device.name)
            stretch.works.append(self._begin(lane))
        if not isinstance(last, Stretch):
            stretch.takes_states = True
            stretch.works.append(partial(_take_states, lane.own))
        self.parts.append(stretch)
        return stretch

    def _add(self, layer: DeviceLayer, stretch: Stretch, attend: Attend) -> None:
        lane, b, feed_forward = stretch.lane, stretch.lane.own, layer.feed_forward
        stretch.works.append(attend(layer, lane))
        if not isinstance(feed_forward, SplitMoe):
            stretch.works.append(partial(_add_feed_forward, feed_forward, b))
            return
        shared = [] if feed_forward.shared is None else [partial(_add_feed_forward, feed_forward.shared, b)]
        if isinstance(feed_forward.experts, KtGpuExperts):
            stretch.works.append(partial(_choose, feed_forward, b, b.chosen, lane.device))
            stretch.works += [partial(_add_experts, feed_forward.experts, b), *shared]
            return
        on_gpu: RamExperts | None = feed_forward.experts.on_gpu
        if on_gpu is None or on_gpu.slots is None:
            stretch.works.append(partial(_choose, feed_forward, b, b.staged, lane.device))
        else:
            resident = on_gpu.slots.resident(b.slots, b.slot_weights)
            stretch.works += [
                partial(_choose, feed_forward, b, b.staged, lane.device, resident),
                partial(_tell_slots, b),
            ]
            stretch.beside.append(partial(_add_resident, on_gpu.slots, b, resident))
        stretch.beside += shared
        stretch.experts = feed_forward.experts
        self.parts.append(Stretch(lane, None, works=[partial(_add_result, b)]))

    def _end(self, norm: KtGpuRMSNorm | None = None) -> bool:
        """The states go to the host; whether through ``norm``."""
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, Stretch):
            return False
        is_there = norm is not None and norm.device is last.lane.device
        last.works.append(partial(_give_states, last.lane.own, norm if is_there else None))
        last.gives_states = True
        return is_there

    def capture(self) -> None:
        """Every stretch as one or two graphs. Its first works have to have what they read."""
        stretches = [part for part in self.parts if isinstance(part, Stretch)]
        shared: dict[str, Launchable] = {}
        for lane in {stretch.lane.device.name: stretch.lane for stretch in stretches}.values():
            lane.wait()
        try:
            for stretch in stretches:
                name = stretch.lane.device.name
                shared[name] = stretch.capture(shared.get(name))
        except BaseException:
            for stretch in stretches:
                stretch.graphs = None
            raise

    def run(self, x: torch.Tensor, call: CallModule) -> torch.Tensor:
        """``x`` float32 (batch, tokens, hidden) of the host -> the last states, of the host too."""
        for part in self.parts:
            if not isinstance(part, Stretch):
                x = call(part, x)
                continue
            lane, b = part.lane, part.lane.own
            if part.takes_states:
                b.host.copy_(x.reshape(b.host.shape))  # nothing launched before touches it: who gave states waited
            if part.before is not None:
                lane.follow(part.before)
            part.launch()
            if part.experts is not None:
                _compute_experts(part, part.experts, is_prompt=x.shape[1] > 1)
            elif part.gives_states:
                lane.wait()
                x = b.host.reshape(x.shape).clone()
        self._exchange_experts(x.shape[1])
        return x

    def _exchange_experts(self, tokens: int) -> None:
        """``tokens`` of each sequence are done, and so are all streams: other experts may go to slots."""
        for part in self.parts:
            if not isinstance(part, Stretch) or part.experts is None:
                continue
            on_gpu: RamExperts | None = part.experts.on_gpu
            if on_gpu is not None and on_gpu.slots is not None:
                on_gpu.slots.turn(tokens, part.lane.stream, on_gpu.stream.uploads)


def _compute_experts(stretch: Stretch, experts: KtExperts, *, is_prompt: bool) -> None:
    lane, b = stretch.lane, stretch.lane.own
    on_gpu: RamExperts | None = experts.on_gpu
    lane.stream.discard(b.result)  # of the layer before: it was added
    lane.stream.record(lane.staged)
    stretch.launch_beside()  # while the host waits and computes
    lane.staged.synchronize()
    if on_gpu is not None and on_gpu.slots is not None:
        on_gpu.slots.note(b.staged.ids.numpy(), b.slots_on_host.numpy())
        lane.stream.discard(b.slots_on_host)
    if on_gpu is not None and is_prompt and on_gpu.stream.takes(b.rows):
        on_gpu.stream.compute(experts.routed, on_gpu.host, b.staged, b.result, b.normed, b.residual, lane.stream)
    else:
        arrays = (each.numpy() for each in (b.staged.x, b.staged.ids.long(), b.staged.weights, b.result))
        experts.routed.forward_routed(*arrays)
    lane.stream.discard(b.pinned_block)


# --- Device work ---


def _take_states(b: Buffers) -> None:
    b.residual.copy_(b.host, non_blocking=True)


def _give_states(b: Buffers, norm: KtGpuRMSNorm | None) -> None:
    b.host.copy_(b.residual if norm is None else norm.on_device(b.residual), non_blocking=True)


def _add_result(b: Buffers) -> None:
    # The host writes `result` again only when the next layer has staged, which is after this copy.
    b.routed.copy_(b.result, non_blocking=True)
    b.residual.add_(b.routed)


def _choose(moe: SplitMoe, b: Buffers, staging: Staging, device: Device, resident: Resident | None = None) -> None:
    bias = getattr(moe.gate, "e_score_correction_bias", None)
    operations.stage(b.normed, moe.gate.weight, bias, moe.router, staging, device, resident)


def _tell_slots(b: Buffers) -> None:
    b.slots_on_host.copy_(b.slots, non_blocking=True)


def _add_resident(slots: ExpertSlots, b: Buffers, resident: Resident) -> None:
    b.residual.add_(slots.on_device(b.normed, resident))


def _add_experts(experts: KtGpuExperts, b: Buffers) -> None:
    b.residual.add_(experts.on_device(b.normed, b.chosen.ids, b.chosen.weights))


def _add_feed_forward(feed_forward: Any, b: Buffers) -> None:
    b.residual.add_(feed_forward.on_device(b.normed))


def attend_tokens(
    layer: DeviceLayer, lane: Lane, shape: torch.Size, keys: Sequence[torch.Tensor], earlier: int
) -> None:
    """The attention half for ids of ``shape`` (batch, tokens). ``keys`` are the cache's latents and rotary keys,
    (batch, 1, room, width), of which ``earlier`` tokens are there."""
    (batch, tokens), b = shape, lane.own
    x = layer.input_norm.on_device(b.residual).view(batch, tokens, -1)
    held = [states[:, 0, : earlier + tokens] for states in keys]
    for states, new in zip(held, layer.attention.new_keys(x, lane.table), strict=True):
        states[:, earlier:] = new
    out = layer.attention.attend(x, lane.table, held[0], held[1], lane.visible)
    _add_attention(layer, b, out)


def attend_step(layer: DeviceLayer, lane: Lane, keys: Sequence[torch.Tensor]) -> None:
    """The same for one new token a row: how many keys there are, and which are seen, is read on the device."""
    b = lane.own
    x = layer.input_norm.on_device(b.residual)
    latents, ropes = (states[:, 0] for states in keys)
    _add_attention(layer, b, layer.attention.step(x, b.table, b.lengths, b.ranges, latents, ropes))


def _add_attention(layer: DeviceLayer, b: Buffers, out: torch.Tensor) -> None:
    layer.post_norm.add_on_device(b.residual, out.view(b.rows, -1), b.normed)
