"""Devices, streams, events and captured work behind one small interface, and that of torch.cuda.

A step of a model on GPU and CPU together is a sequence of calls on this interface. On a GPU they are what torch gives;
`fake` has one of threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
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
    def keep(self, tensor: torch.Tensor) -> None:
        """Memory of ``tensor`` goes to nobody else, once it is deleted, before the work launched until then is done."""

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
    takes_cores = False
    """Whether its work runs on the CPU's cores, as that of a fake does."""

    @abstractmethod
    def stream(self) -> Stream: ...

    @abstractmethod
    def event(self, *, is_blocking: bool = False) -> Event:
        """A host that waits for it spins, or sleeps if it ``is_blocking``: no core is busy, and it wakes later."""

    @abstractmethod
    def capture(self, work: Work, beside: Launchable | None = None) -> Launchable:
        """``work`` as one launch, over the addresses of now; it also runs once, here, on no stream of ours.

        It may read no value on the host, touch no ordinary memory, and allocate nothing that outlives it. ``beside`` is
        one that never runs at the same time: both may take the same memory for what lies between their operations.
        """

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies to and from while the host goes on."""

    @abstractmethod
    def register(self, memory: torch.Tensor) -> Work | None:
        """Let the device copy from ``memory`` of the host as from `pinned`. Returns what ends that, to be called before
        the memory goes; None where the system refuses."""

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
    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self.stream)

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
    def capture(self, work: Work, beside: Launchable | None = None) -> Launchable:
        # Another thread may take memory meanwhile: for graphs of its own model, or for another device.
        options: dict[str, Any] = {"capture_error_mode": "thread_local"}
        if beside is not None:
            assert isinstance(beside, _CudaGraph)
            options["pool"] = beside.graph.pool()
        graph = torch.cuda.CUDAGraph()
        stream = self._capture_stream
        with torch.inference_mode(), torch.cuda.stream(stream), self.reporting_memory():
            work()  # kernels are compiled and libraries initialized outside the capture, where they may allocate
            stream.synchronize()
            # Not torch.cuda.graph(), which empties torch's caches for each: a step is a hundred of them.
            graph.capture_begin(**options)
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of the capture that is incomplete
                    graph.capture_end()
                raise
            graph.capture_end()
        return _CudaGraph(graph)

    @functools.cached_property
    def _capture_stream(self) -> Any:
        """One for all: cuBLAS keeps a workspace for each stream that it has seen."""
        return torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    @override
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    @override
    def register(self, memory: torch.Tensor) -> Work | None:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        portable = 1  # for all GPUs
        with self.current():
            if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)) == 0:
                return partial(runtime.cudaHostUnregister, memory.data_ptr())
            # The error stays until somebody asks for it, which would be whoever launches the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self.torch_device)
        return None

    @override
    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[0])
