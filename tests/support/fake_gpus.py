"""Fake GPUs for a test, with what the environment variable cannot say: delays, seeds, dtypes, kernels."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from transformers_kt.backends.gpu import devices as registry
from transformers_kt.backends.gpu.device import Device
from transformers_kt.backends.gpu.fake import FakeDevice
from transformers_kt.planning.hardware import FAKE_GPUS


@contextmanager
def fake_gpus(*sizes: str, **options: Any) -> Iterator[dict[str, Device]]:
    """``options`` are those of `FakeDevice`. Models loaded inside keep their devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAKE_GPUS, ",".join(sizes))
        patch.setattr(registry, "FakeDevice", functools.partial(FakeDevice, **options))
        registry.devices.cache_clear()
        try:
            yield registry.devices()
        finally:
            registry.devices.cache_clear()
