"""What a fake device captures: operations of torch over fixed tensors, and what CUDA would refuse to capture.

A CUDA graph is a list of kernels with their addresses. Here it is the list of torch's operations, and of Triton's
interpreted kernels, with their tensors: replaying runs them again, and no Python decides anew which. Refused is
whatever needs the host: values that it reads, tensors of ordinary memory (on a GPU each is a copy that waits), memory
of another device, and memory or streams asked of the device itself.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

_here = threading.local()
_one_at_a_time = threading.Lock()


@contextmanager
def _marked(mark: str) -> Iterator[None]:
    setattr(_here, mark, True)
    try:
        yield
    finally:
        setattr(_here, mark, False)


def _is(mark: str) -> bool:
    """Of this thread."""
    return getattr(_here, mark, False)


def refuse_while_capturing(what: str) -> None:
    """Raises RuntimeError if this thread is capturing."""
    if _is("capturing"):
        raise RuntimeError(f"{what}, which no captured work may")


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a capture on a GPU refuses: values that the host would have to wait for."""

    _REFUSED = (
        "item",
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "_unique2",
        "unique_dim",
    )

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each.dtype in (torch.bool, torch.uint8) for each in _tensors(args[1])
        )
        if name in self._REFUSED or by_mask:
            raise RuntimeError(f"{func} reads a value on the host, which no captured work may")
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Refuses reads that on the tensors of a fake are none: they lie in the host's memory already."""

    _REFUSED = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._REFUSED and not _is("in_kernel"):
            raise RuntimeError(f"Tensor.{func.__name__} reads values on the host, which no captured work may")
        return func(*args, **(kwargs or {}))


class _Call(NamedTuple):
    """An operation, and the tensors that its results go to; none where it writes into its arguments."""

    operation: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]

    def repeat(self) -> None:
        out = self.operation(*self.args, **self.kwargs)
        if self.results:
            for kept, new in zip(self.results, _tensors(out), strict=True):
                kept.copy_(new)


class Capture(HostReads):  # type: ignore[no-untyped-call]
    """The operations of ``work``, which runs once meanwhile. ``is_known`` tells memory that captured work may touch by
    the address of its storage."""

    def __init__(
        self, work: Callable[[], object], is_known: Callable[[int], bool], *, has_kernels: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._is_known = is_known
        self._made: dict[int, torch.Tensor] = {}  # what it allocated: a graph has memory of its own for that
        self._calls: list[_Call] = []
        with torch.inference_mode():
            with _one_at_a_time, _marked("capturing"), self._kernels(has_kernels), _Reads(), self:
                work()
            for tensor in self._made.values():
                poisoned(tensor)  # CUDA computes nothing while it captures: who keeps such a tensor has no value yet

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is("in_kernel"):
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        self._require_known(func, given)
        addresses = {_address(tensor) for tensor in given}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        results = _tensors(out)
        if any(result is tensor for result in results for tensor in given):
            self._calls.append(_Call(func, args, kwargs, []))
        elif not all(_address(result) in addresses for result in results):  # else views, which stay
            self._calls.append(_Call(func, args, kwargs, results))
            self._made.update((_address(result), result) for result in results)
        return out

    def _require_known(self, what: Any, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            address = _address(tensor)
            if address and address not in self._made and not self._is_known(address):
                raise RuntimeError(
                    f"{what} touches a tensor {tuple(tensor.shape)} of {tensor.dtype} that is no memory of the device "
                    "and not pinned, which no captured work may"
                )

    @contextmanager
    def _kernels(self, are_used: bool) -> Iterator[None]:
        """Captures launches of Triton's kernels, which interpreted are no operations of torch."""
        if not are_used:
            yield
            return
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        launch, thread = interpreter.GridExecutor.__call__, threading.get_ident()

        def captured(kernel: Any, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread:
                self._require_known(kernel.fn.__name__, _tensors((args, kwargs)))
                self._calls.append(_Call(partial(launch, kernel), args, kwargs, []))
                with _marked("in_kernel"):
                    launch(kernel, *args, **kwargs)
            else:
                launch(kernel, *args, **kwargs)

        interpreter.GridExecutor.__call__ = captured
        try:
            yield
        finally:
            interpreter.GridExecutor.__call__ = launch

    def replay(self) -> None:
        for call in self._calls:
            call.repeat()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` filled with what no result can be made of: NaN, the smallest integer, True, bytes that are NaN."""
    if tensor.dtype == torch.uint8:
        return tensor.fill_(255)
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)
