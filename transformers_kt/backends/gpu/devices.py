"""The GPUs of this process: those of torch.cuda, or fakes where the user asked for them."""

from __future__ import annotations

import functools

import torch

from transformers_kt.backends.gpu.device import CudaDevice, Device
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.planning.hardware import fake_gpu_memory
from transformers_kt.rules.devices import gpu_name


@functools.cache
def devices() -> dict[str, Device]:
    """Name ("cuda:0") -> device, of all there are. Streams and memory of a device are one for all models."""
    fakes = fake_gpu_memory()
    if fakes is not None:
        return {gpu_name(number): FakeDevice(number, nbytes) for number, nbytes in enumerate(fakes)}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {gpu_name(number): CudaDevice(number) for number in range(count)}
