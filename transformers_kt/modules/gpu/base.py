"""What the operations on a GPU have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.matrices import DeviceMatrix, upload
from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.gguf.reader import TensorInfo
from transformers_kt.modules.base import TensorData, float_values, pack_matrices


class OnDevice:
    """A module whose weights lie on ``device``. It is told which before it is loaded."""

    device: Device

    def place(self, device: Device) -> None:
        self.device = device

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` on the device."""
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UnsupportedOperationError(
                "a gradient was asked for, but GGUF-backed modules compute forward passes only: call under "
                "torch.no_grad() or detach the input"
            )
        return tensor.to(self.device.torch_device)

    def _uploaded(self, tensor: TensorInfo, data: TensorData) -> DeviceMatrix:
        """Packed as on the CPU, then on the device alone."""
        return upload(pack_matrices(tensor, data), self.device)

    def _floats(self, tensors: Mapping[str, TensorInfo], role: str, data: TensorData) -> Any:
        """float32 on the device; None where there is no such tensor."""
        if role not in tensors:
            return None
        values = torch.from_numpy(float_values(tensors[role], data(tensors[role])))
        out = self.device.empty(values.shape, torch.float32)
        return out.copy_(values)
