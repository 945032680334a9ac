"""Devices, streams, events and captured work behind one small interface: real with torch.cuda, fake with threads.

A step of a model on GPU and CPU together is a sequence of calls on this interface. On a GPU they are what torch gives.
The fake keeps its tensors on the CPU and runs each stream in a thread of its own, with delays drawn from a seed: an
event that nobody waits for, or a buffer written too early, changes results on a machine without any GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import queue
import random
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from transformers_kt.errors import OutOfMemoryError
from transformers_kt.text import format_bytes

Work = Callable[[], object]
"""Device work: torch operations and kernels over tensors that exist already."""


class Event(ABC):
    """A point in a stream that others wait for."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block this thread until the stream has passed it. Raises what the stream's work raised before."""

    @abstractmethod
    def query(self) -> bool:
        """Whether the stream has passed it."""


class Stream(ABC):
    """Work of a device in order; streams of one device run beside each other."""

    @abstractmethod
    def launch(self, work: Work) -> None:
        """Run ``work`` after all that was launched before, under `torch.inference_mode`; returns at once."""

    @abstractmethod
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between device and pinned memory, or within either, in order; returns at once."""

    @abstractmethod
    def record(self, event: Event) -> None:
        """``event`` is passed when all that was launched before is done."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is launched from here on starts after ``event``, as it was last recorded."""

    @abstractmethod
    def follow_torch(self) -> None:
        """What is launched from here on starts after all that torch was given on its own current stream."""

    @abstractmethod
    def discard(self, tensor: torch.Tensor) -> None:
        """Nobody reads what ``tensor`` holds once the work launched so far is done. Fakes overwrite it."""


class Launchable(ABC):
    """Work that was captured once and runs again without its Python."""

    @abstractmethod
    def launch(self, stream: Stream) -> None: ...


class Device(ABC):
    """One GPU. ``name`` is "cuda:0", ``torch_device`` where its tensors are made.

    ``activations`` is the dtype of what is multiplied with weights and of the KV cache; sums, norms, routers and the
    residual are float32. ``has_kernels`` says whether those in Triton run here; else the plain torch forms do.
    """

    name: str
    torch_device: torch.device
    activations: torch.dtype
    has_kernels: bool

    @abstractmethod
    def stream(self) -> Stream: ...

    @abstractmethod
    def event(self, *, is_blocking: bool = False) -> Event:
        """A host that waits for it spins, or sleeps if it ``is_blocking``: no core is busy, and it wakes later."""

    @abstractmethod
    def capture(self, work: Work) -> Launchable:
        """``work`` as one launch. It may read no value on the host, and allocate nothing that outlives it."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies to and from while the host goes on."""

    @abstractmethod
    def free_bytes(self) -> int: ...

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device. Raises OutOfMemoryError, with what is needed and what is free."""

    @abstractmethod
    def current(self) -> contextlib.AbstractContextManager[object]:
        """Kernels called inside run here, on torch's own current stream."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Device:
        return self  # there is one of each

    def _out_of_memory(self, what: str) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"{self.name} is out of memory: {what}, {format_bytes(self.free_bytes())} are free. Shorten the prompt, "
            "pass generate(prefill_chunk_size=...), keep more experts in RAM (kt_gpu_experts=, kt_cpu_layers=), or "
            'load with device_map="cpu"'
        )


# --- torch.cuda ------------------------------------------------------------------------------------------------------


class _CudaEvent(Event):
    def __init__(self, *, blocking: bool) -> None:
        self.event = torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]

    @override
    def synchronize(self) -> None:
        self.event.synchronize()

    @override
    def query(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class _CudaStream(Stream):
    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device.torch_device)  # type: ignore[no-untyped-call]

    @override
    def launch(self, work: Work) -> None:
        with torch.inference_mode(), torch.cuda.stream(self.stream), self._device.reporting_memory():
            work()

    @override
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        # Between GPUs torch orders the copy after this stream, and this stream after the copy.
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)

    @override
    def record(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        event.event.record(self.stream)

    @override
    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        self.stream.wait_event(event.event)

    @override
    def follow_torch(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self._device.torch_device))

    @override
    def discard(self, tensor: torch.Tensor) -> None:
        """On a GPU that would cost time."""


class _CudaGraph(Launchable):
    def __init__(self, graph: Any) -> None:
        self.graph = graph

    @override
    def launch(self, stream: Stream) -> None:
        stream.launch(self.graph.replay)


class CudaDevice(Device):
    """A GPU of torch.cuda."""

    activations = torch.bfloat16

    def __init__(self, number: int) -> None:
        self.name = f"cuda:{number}"
        self.torch_device = torch.device(self.name)
        self.has_kernels = importlib.util.find_spec("triton") is not None

    @contextlib.contextmanager
    def reporting_memory(self) -> Iterator[None]:
        """Turns torch's error for want of memory into ours."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(str(error).splitlines()[0]) from error

    @override
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.reporting_memory():
            return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    @override
    def stream(self) -> Stream:
        return _CudaStream(self)

    @override
    def current(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    @override
    def event(self, *, is_blocking: bool = False) -> Event:
        # A host that sleeps until the event wakes 50 microseconds late, 58 times a token of a 61-layer model.
        return _CudaEvent(blocking=is_blocking)

    @override
    def capture(self, work: Work) -> Launchable:
        stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            work()  # kernels are compiled and libraries initialized outside the capture, where they may allocate
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        return _CudaGraph(graph)

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    @override
    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])


# --- Fake ------------------------------------------------------------------------------------------------------------


class _FakeEvent(Event):
    """Each recording is a flag of its own: a wait holds for the recording that came before it."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self.flag.set()
        self.stream: _FakeStream | None = None

    @override
    def synchronize(self) -> None:
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

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @override
    def launch(self, work: Work) -> None:
        self._work.put(work)

    @override
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self._work.put(lambda: _copy(to, source))

    @override
    def record(self, event: Event) -> None:
        assert isinstance(event, _FakeEvent)
        event.flag, event.stream = threading.Event(), self
        self._work.put(event.flag.set)

    @override
    def wait(self, event: Event) -> None:
        assert isinstance(event, _FakeEvent)
        flag = event.flag
        self._work.put(lambda: _wait(flag))

    @override
    def follow_torch(self) -> None:
        """Torch on the CPU is done when it returns."""

    @override
    def discard(self, tensor: torch.Tensor) -> None:
        self._work.put(lambda: poisoned(tensor))


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


def _wait(flag: threading.Event) -> None:
    flag.wait()


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a capture on a GPU refuses: values that the host would have to wait for."""

    _REFUSED = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).rpartition(".")[0] in self._REFUSED:
            raise RuntimeError(f"{func} reads a value on the host, which no captured work may")
        return func(*args, **(kwargs or {}))


class _FakeGraph(Launchable):
    def __init__(self, work: Work) -> None:
        self._captured = work

    @override
    def launch(self, stream: Stream) -> None:
        stream.launch(self._captured)


class FakeDevice(Device):
    """A GPU that is not there: its tensors lie on the CPU, its streams are threads.

    It computes in float32, unless ``activations`` says otherwise, with the plain torch forms. ``longest_delay_s``
    bounds the pause before each piece of work, drawn from ``seed``.
    """

    def __init__(
        self,
        number: int,
        nbytes: int,
        *,
        longest_delay_s: float = 0.0,
        seed: int = 0,
        activations: torch.dtype = torch.float32,
        has_kernels: bool = False,
    ) -> None:
        self.name = f"cuda:{number}"
        self.torch_device = torch.device("cpu")
        self.nbytes = nbytes
        self.longest_delay_s = longest_delay_s
        self.activations = activations
        self.has_kernels = has_kernels
        self._seeds = random.Random(seed)
        self._taken = 0
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
    def capture(self, work: Work) -> Launchable:
        with torch.no_grad(), _HostReads():  # type: ignore[no-untyped-call]
            work()
        return _FakeGraph(work)

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return poisoned(torch.empty(tuple(shape), dtype=dtype))

    @override
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if nbytes > self.free_bytes():
                raise self._out_of_memory(f"{format_bytes(nbytes)} are needed")
            tensor = torch.empty(tuple(shape), dtype=dtype)
            self._taken += nbytes
            weakref.finalize(tensor.untyped_storage(), self._give_back, nbytes)
        return poisoned(tensor)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._taken -= nbytes

    @override
    def free_bytes(self) -> int:
        return self.nbytes - self._taken


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` filled with what no result can be made of: NaN, or the smallest integer."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)
