"""Devices that are not there: their tensors lie on the CPU, each stream is a thread, a capture is a list of operations.

Delays drawn from a seed, NaN in what nobody has written, and captures that refuse what CUDA refuses make visible on a
machine without GPUs what would go wrong on one.
"""

from __future__ import annotations

import contextlib
import math
import queue
import random
import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial

import torch
from typing_extensions import override

from transformers_kt.backends.gpu.capture import Capture, poisoned, refuse_while_capturing
from transformers_kt.backends.gpu.device import Device, Event, Launchable, Stream, Work
from transformers_kt.backends.gpu.whole_blocks import is_codebook
from transformers_kt.text import format_bytes


class _FakeEvent(Event):
    """Each recording is a flag of its own: a wait holds for the recording that came before it."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self.flag.set()
        self.stream: _FakeStream | None = None

    @override
    def synchronize(self) -> None:
        refuse_while_capturing("the host waits for an event")
        self.flag.wait()
        if self.stream is not None:
            self.stream.raise_failure()

    @override
    def query(self) -> bool:
        return self.flag.is_set()


class _FakeStream(Stream):
    def __init__(self, device: FakeDevice, seed: int) -> None:
        self._device = device
        self._random = random.Random(seed)
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name=f"fake {device.name}", daemon=True).start()

    def _run(self) -> None:
        torch.get_num_threads()  # asking sets it for this thread: else its first product is divided, with other bits
        while True:
            work = self._work.get()
            if self._device.longest_delay_s:
                time.sleep(self._random.random() * self._device.longest_delay_s)
            try:
                with torch.inference_mode():
                    work()
            except BaseException as error:  # as on a GPU, who waits next hears of it
                self._failure = error
            del work  # and the tensors that it holds, until the next comes

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @override
    def launch(self, work: Work) -> None:
        refuse_while_capturing("work is launched")
        self._work.put(work)

    @override
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        refuse_while_capturing("a copy is launched")
        self._work.put(lambda: _copy(to, source))

    @override
    def record(self, event: Event) -> None:
        refuse_while_capturing("an event is recorded")
        assert isinstance(event, _FakeEvent)
        event.flag, event.stream = threading.Event(), self
        self._work.put(event.flag.set)

    @override
    def wait(self, event: Event) -> None:
        refuse_while_capturing("an event is waited for")
        assert isinstance(event, _FakeEvent)
        flag = event.flag
        self._work.put(lambda: _wait(flag))

    @override
    def follow_torch(self) -> None:
        """Torch on the CPU is done when it returns."""

    @override
    def keep(self, tensor: torch.Tensor) -> None:
        """Work that waits holds its tensors."""

    @override
    def discard(self, tensor: torch.Tensor) -> None:
        self._work.put(lambda: poisoned(tensor))


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


def _wait(flag: threading.Event) -> None:
    flag.wait()


class _FakeGraph(Launchable):
    def __init__(self, captured: Capture) -> None:
        self._captured = captured

    @override
    def launch(self, stream: Stream) -> None:
        stream.launch(self._captured.replay)


class FakeDevice(Device):
    """A GPU that is not there: its tensors lie on the CPU, its streams are threads.

    It computes in float32, unless ``activations`` says otherwise, with the plain torch forms. ``longest_delay_s``
    bounds the pause before each piece of work, drawn from ``seed``. ``registered`` is memory of the host, in bytes, and
    nothing where it ``registers`` none.
    """

    takes_cores = True

    def __init__(
        self,
        number: int,
        nbytes: int,
        *,
        longest_delay_s: float = 0.0,
        seed: int = 0,
        activations: torch.dtype = torch.float32,
        has_kernels: bool = False,
        registers: bool = True,
    ) -> None:
        self.name = f"cuda:{number}"
        self.torch_device = torch.device("cpu")
        self.nbytes = nbytes
        self.longest_delay_s = longest_delay_s
        self.activations = activations
        self.has_kernels = has_kernels
        self.registers = registers
        self.registered = 0
        self._seeds = random.Random(seed)
        self._taken = 0
        self._held: set[int] = set()  # addresses of storages
        self._pinned: set[int] = set()
        self._lock = threading.RLock()  # memory can be given back by a garbage collection wherever it was taken

    @override
    def stream(self) -> Stream:
        return _FakeStream(self, self._seeds.getrandbits(32))

    @override
    def current(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    @override
    def event(self, *, is_blocking: bool = False) -> Event:
        return _FakeEvent()

    @override
    def capture(self, work: Work, beside: Launchable | None = None) -> Launchable:
        return _FakeGraph(Capture(work, self._is_known, has_kernels=self.has_kernels))

    def _is_known(self, address: int) -> bool:
        return address in self._held or address in self._pinned or is_codebook(address)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in the memory of this device, of which on a GPU the host reads nothing without waiting."""
        return tensor.untyped_storage().data_ptr() in self._held

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        refuse_while_capturing("pinned memory is asked for")
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self._take(tensor, self._pinned, 0)
        return poisoned(tensor)

    @override
    def register(self, memory: torch.Tensor) -> Work | None:
        if not self.registers:
            return None
        self.registered += memory.nbytes
        return partial(self._unregister, memory.nbytes)

    def _unregister(self, nbytes: int) -> None:
        self.registered -= nbytes

    @override
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        refuse_while_capturing(f"memory of {self.name} that may outlive it is asked for")
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if nbytes > self.free_bytes():
                raise self._out_of_memory(f"{format_bytes(nbytes)} are needed")
            tensor = torch.empty(tuple(shape), dtype=dtype)
            self._take(tensor, self._held, nbytes)
        return poisoned(tensor)

    def _take(self, tensor: torch.Tensor, addresses: set[int], nbytes: int) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            self._taken += nbytes
            addresses.add(storage.data_ptr())
        weakref.finalize(storage, self._give_back, addresses, storage.data_ptr(), nbytes)

    def _give_back(self, addresses: set[int], address: int, nbytes: int) -> None:
        with self._lock:
            self._taken -= nbytes
            addresses.discard(address)

    @override
    def free_bytes(self) -> int:
        return self.nbytes - self._taken
