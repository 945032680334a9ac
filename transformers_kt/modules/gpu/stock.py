"""Modules that stay transformers' own, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from transformers_kt.backends.gpu.device import Device
from transformers_kt.gguf.reader import GgmlType, TensorInfo


def move_stock(module: nn.Module, tensors: Mapping[str, TensorInfo], device: Device) -> int:
    """Put the tensors that ``module`` itself owns on ``device``, in bfloat16 unless the file has F32; the bytes there.

    Inputs follow it, outputs come back to the host: as every module on a GPU, it takes and gives tensors of the host.
    """
    is_float32 = all(info.ggml_type == GgmlType.F32 for info in tensors.values())
    dtype = torch.float32 if is_float32 else torch.bfloat16
    nbytes = 0
    of_module: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for owned in of_module:
        for name, tensor in owned.items():
            if tensor is None:
                continue
            moved = device.empty(tensor.shape, dtype if tensor.is_floating_point() else tensor.dtype)
            moved.copy_(tensor)
            is_parameter = owned is module._parameters
            owned[name] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
            nbytes += moved.nbytes

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        def taken(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(device.torch_device, dtype if value.is_floating_point() else value.dtype)

        return tuple(map(taken, args)), {key: taken(value) for key, value in kwargs.items()}

    def give(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(give(module, args, part) for part in output)
        if not isinstance(output, torch.Tensor):
            return output
        return output.cpu().float() if output.is_floating_point() else output.cpu()

    module.register_forward_pre_hook(take, with_kwargs=True)
    module.register_forward_hook(give)
    return nbytes
