"""One new token for each of a few sequences, over fixed addresses: captured once, then launched without its Python.

The host writes states, positions, lengths and ranges to pinned memory and drives the launches; what is done with them
is decided on the device. A step belongs to the buffers that its keys lie in, and to as many sequences as they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from transformers_kt.errors import KtError
from transformers_kt.modules.fused.device_layers import DeviceLayer
from transformers_kt.modules.fused.lanes import Lane
from transformers_kt.modules.fused.stretches import CallModule, Pass, attend_step
from transformers_kt.modules.gpu.simple import KtGpuRMSNorm

logger = logging.getLogger(__name__)


class DecodeStep:
    """The lanes have begun with as many rows as ``buffers`` have sequences."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        layers: Mapping[int, DeviceLayer],
        lanes: Mapping[str, Lane],
        buffers: Sequence[Sequence[torch.Tensor]],
        norm: KtGpuRMSNorm | None,
    ) -> None:
        """``buffers`` are the keys of ``layers``, (batch, 1, capacity, width) each."""
        keys = dict(zip(map(id, layers.values()), buffers, strict=True))
        self._lanes = lanes
        self._norm = norm
        self._pass = Pass(
            modules,
            layers,
            lanes,
            attend=lambda layer, lane: partial(attend_step, layer, lane, keys[id(layer)]),
            norm=norm,
            begin=lambda lane: lane.make_table,
        )
        norms = [each for layer in layers.values() for each in (layer.input_norm, layer.post_norm)]
        self._norms = [each._parameters for each in (*norms, *([] if norm is None else [norm]))]
        self._addresses = self._norm_addresses()
        self.gives_normed = self._pass.gives_normed
        self.is_captured = False

    def _norm_addresses(self) -> list[int]:
        return [parameters["weight"].data_ptr() for parameters in self._norms]  # type: ignore[union-attr]

    def is_of(self, norm: KtGpuRMSNorm | None) -> bool:
        """Whether it still reads what the model consists of: weights of norms can be replaced, as in any model."""
        return self._norm is norm and self._addresses == self._norm_addresses()

    def take(self, positions: torch.Tensor, ranges: torch.Tensor, earlier: int) -> None:
        """``positions`` (batch, 1) and ``ranges`` int32 (batch, 1, 2) on the host; there are ``earlier`` keys."""
        lengths = torch.full_like(positions, earlier)
        places = torch.cat((positions, lengths, ranges[:, 0]), dim=1)
        for lane in self._lanes.values():
            lane.take_step(places)

    def capture(self) -> bool:
        """Whether it could be captured; if not, says so, and runs launch by launch."""
        try:
            self._pass.capture()
        except (RuntimeError, KtError) as error:
            logger.warning("kt_cuda_graph: a decode step cannot be captured and runs launch by launch: %s", str(error))
            return False
        self.is_captured = True
        return True

    def run(self, x: torch.Tensor, call: CallModule) -> torch.Tensor:
        """``x`` float32 (batch, 1, hidden) on the host -> the last states there, after `take`."""
        return self._pass.run(x, call)
