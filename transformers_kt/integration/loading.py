"""Apply a plan to a model skeleton, fill it from a checkpoint, and report what was done.

A skeleton is a model of transformers on the meta device. Modules that stay stock are filled with float32 weights,
dequantized by the `gguf` package; the others take the stored blocks as they are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import transformers_kt._C as _C
from transformers_kt.families.registry import family_of
from transformers_kt.gguf import damage
from transformers_kt.modules.gpu.base import OnDevice
from transformers_kt.modules.gpu.stock import move_stock
from transformers_kt.planning.assignments import Assignment
from transformers_kt.planning.tables import grouped, new_table, rendered
from transformers_kt.rules import TORCH
from transformers_kt.rules.devices import CPU
from transformers_kt.text import format_bytes, listed

if TYPE_CHECKING:
    from transformers_kt.backends.gpu.device import Device
    from transformers_kt.families.base import Family
    from transformers_kt.gguf.reader import TensorInfo
    from transformers_kt.modules.base import KtModule, TensorData

    Modules = Mapping[str, type[KtModule]]

_DEQUANTIZED_AT_ONCE = 1 << 22  # elements: 16 MB of float32, so that the copy in flight is small beside any model
# Between two steps of the progress bar: half a second of a hard disk, and long beside the end of a parallel loop.
_READ_AT_ONCE = 64 << 20


class TensorSource(Protocol):
    """What loading needs of a `Checkpoint`."""

    def data(self, name: str, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]: ...
    def places(self, name: str) -> Sequence[tuple[int, int]]: ...
    def reading(self, name: str) -> AbstractContextManager[None]: ...


class ProgressBar(Protocol):
    """What loading needs of tqdm."""

    def update(self, n: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One module of the loaded model: what computes it, where, from which ggml types, in how many bytes of memory."""

    module: str
    operation: str
    device: str
    types: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class KtReport:
    """What became of each module of a loaded model. ``str()`` gives a table in which equal layers share a line.

    ``notes`` say what rules asked for and did not get, ``kernels`` which of ours run here.
    """

    title: str
    rules: str
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()
    kernels: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weights hold."""
        return sum(row.nbytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        rows = [{**asdict(row), "types": list(row.types)} for row in self.rows]
        return {
            "title": self.title,
            "rules": self.rules,
            "nbytes": self.nbytes,
            "rows": rows,
            "notes": [*self.notes],
            "kernels": self.kernels,
        }

    def __str__(self) -> str:
        table = new_table("module", "operation", "device", "types", "memory", numbers=["memory"])
        table.columns[0].footer, table.columns[-1].footer = "all weights", format_bytes(self.nbytes)
        for module, rows in grouped(self.rows, lambda row: (row.operation, row.device, row.types)):
            first, nbytes = rows[0], sum(row.nbytes for row in rows)
            table.add_row(module, first.operation, first.device, ", ".join(first.types), format_bytes(nbytes))
        lines = [f"Note: {note}" for note in self.notes]
        lines += [f"Kernels: {self.kernels}"] if self.kernels else []
        return rendered(f"{self.title}, rules: {self.rules}", table, *lines)


def apply_plan(
    model: nn.Module, assignments: Iterable[Assignment], modules: Modules, devices: Mapping[str, Device]
) -> None:
    """Put the operations that ``assignments`` name into the skeleton ``model``, without weights."""
    config: Any = model.config
    for assignment in assignments:
        path, device = assignment.entry.module, assignment.entry.device
        if assignment.operation.backend != TORCH:
            stock = model.get_submodule(path)
            module = modules[assignment.entry.op].from_module(stock, config, path)
            if isinstance(module, OnDevice):
                module.place(devices[device])
            model.set_submodule(path, module)


def fill(
    model: nn.Module,
    assignments: Sequence[Assignment],
    source: TensorSource,
    progress: ProgressBar,
    devices: Mapping[str, Device],
) -> tuple[ReportRow, ...]:
    """Load every weight of ``model`` (plan applied, no memory taken yet). ``progress`` moves by bytes read.

    After any failure, Ctrl-C included, the modules are removed from the model: a traceback that is kept would hold
    gigabytes through its frames.
    """
    rows = []
    config: Any = model.config
    family = family_of(config)
    try:
        for assignment in assignments:
            entry = assignment.entry
            reader = _Reader(source, progress)
            if assignment.operation.backend == TORCH:
                stock = model.get_submodule(entry.module)
                nbytes = _load_stock(stock, family, assignment.tensors, reader)
                if entry.device != CPU:
                    nbytes = move_stock(stock, assignment.tensors, devices[entry.device])
            else:
                nbytes = _operation_at(model, entry.module).load(assignment.tensors, reader)
            reader.finish()
            types = tuple(sorted({info.ggml_type.name for info in assignment.tensors.values()}))
            rows.append(ReportRow(entry.module, entry.op, entry.device, types, nbytes))
        _require_complete(model)
    except BaseException:
        _take_apart(model)
        raise
    return tuple(rows)


class _Reader:
    """Hands out stored tensors or pieces of them, looks them over for damage, and tells the progress bar what was used.

    What was handed out counts as used when the next is asked for. One thread at a time calls it.
    """

    def __init__(self, source: TensorSource, progress: ProgressBar) -> None:
        self._source, self._progress = source, progress
        self._unreported = 0
        self._tensors: dict[str, _C.StoredTensor] = {}

    def __call__(self, info: TensorInfo, start: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        self.finish()
        end = info.nbytes if end is None else end
        stored = self._source.data(info.name, start, end)
        self._tensor(info).look_at(start, stored)
        self._require_sound(info, end)
        self._unreported = end - start
        return stored

    def read_into(self, info: TensorInfo, out: npt.NDArray[np.uint8]) -> None:
        tensor = self._tensor(info)
        block_bytes = gguf.GGML_QUANT_SIZES[info.ggml_type][1]
        for start in range(0, info.nbytes, step := _READ_AT_ONCE // block_bytes * block_bytes):
            piece = out[start : start + step]
            with self._source.reading(info.name):
                tensor.read(start, piece)
            self._progress.update(len(piece))
        self._require_sound(info, info.nbytes)

    def pack(self, info: TensorInfo, matrix: _C.PackedMatrix) -> None:
        tensor = self._tensor(info)
        each = info.nbytes // matrix.count
        at_once = max(1, _READ_AT_ONCE // each)
        for first in range(0, matrix.count, at_once):
            count = min(at_once, matrix.count - first)
            with self._source.reading(info.name):
                matrix.pack_stored(tensor, first, count)
            self._progress.update(count * each)
        self._require_sound(info, info.nbytes)

    def finish(self) -> None:
        """Report what was handed out last as used."""
        self._progress.update(self._unreported)
        self._unreported = 0

    def _tensor(self, info: TensorInfo) -> _C.StoredTensor:
        if info.name not in self._tensors:
            places = self._source.places(info.name)
            self._tensors[info.name] = _C.StoredTensor(int(info.ggml_type), places, info.nbytes // len(places))
        return self._tensors[info.name]

    def _require_sound(self, info: TensorInfo, end: int) -> None:
        """The tensor was read up to byte ``end``."""
        found = self._tensors[info.name]
        damage.require_finite(info, found)
        if end == info.nbytes:
            damage.require_values(info, found, partial(self._source.data, info.name))


def _operation_at(model: nn.Module, path: str) -> KtModule:
    return cast("KtModule", model.get_submodule(path))


def _load_stock(module: nn.Module, family: Family, tensors: Mapping[str, TensorInfo], data: TensorData) -> int:
    """Fill the parameters and buffers that ``module`` itself owns; the bytes they hold."""
    left = dict(tensors)
    for name, merge in family.merges.items():
        if merge.roles[0] in left:
            parts = [_dequantized(left.pop(role), data).numpy() for role in merge.roles]
            _set_tensor(module, name, torch.from_numpy(merge.join(*parts)))
    for role, info in left.items():
        _set_tensor(module, role, _dequantized(info, data))
    for name in family.zero_where_absent:
        buffer = module._buffers.get(name)
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in own)


def _dequantized(info: TensorInfo, data: TensorData) -> torch.Tensor:
    """The tensor as float32 in ordinary memory, shape ``info.shape``."""
    cols = info.shape[-1]
    values = torch.empty(info.shape, dtype=torch.float32, device="cpu")
    rows = values.view(-1, cols)
    row_bytes = info.nbytes // len(rows)
    step = max(1, _DEQUANTIZED_AT_ONCE // cols)
    for start in range(0, len(rows), step):
        end = min(start + step, len(rows))
        # A copy: torch warns about arrays that cannot be written, such as views of a read-only mapping.
        stored = np.array(data(info, start * row_bytes, end * row_bytes)).reshape(end - start, row_bytes)
        rows[start:end] = torch.from_numpy(gguf.dequantize(stored, info.ggml_type).reshape(-1, cols))
    return values


def _set_tensor(module: nn.Module, name: str, values: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[name] = values


def _require_complete(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise RuntimeError(f"the plan left {len(left)} tensors without values: {listed(left)}")


def _take_apart(model: nn.Module) -> None:
    for module in list(model.modules()):
        module.__dict__.clear()
    gc.collect()
