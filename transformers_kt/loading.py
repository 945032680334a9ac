"""Apply a plan to a model skeleton, fill it from a checkpoint, and report what was done.

A skeleton is a model of transformers on the meta device. Modules that stay stock are filled with float32 weights,
dequantized by the `gguf` package; the others take the stored blocks as they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transformers_kt.errors import UnsupportedModelError, UnsupportedTypeError
from transformers_kt.placement import format_bytes
from transformers_kt.tables import grouped, new_table, rendered

if TYPE_CHECKING:
    from transformers_kt.gguf.names import TensorSlot
    from transformers_kt.gguf.reader import TensorInfo
    from transformers_kt.modules.base import KtModule
    from transformers_kt.rules import Operations, Plan, PlanEntry

    Data = Callable[[TensorInfo], npt.NDArray[np.uint8]]

# What transformers keeps in one parameter and GGUF in several tensors, and the other way round: role to parameter.
_STOCK_PARAMETERS = {
    "gate": "gate_up_proj",
    "up": "gate_up_proj",
    "down": "down_proj",
    "k_b": "weight",
    "v_b": "weight",
}
# Buffers that files leave out where they would be zero.
_ZERO_WHERE_ABSENT = ("e_score_correction_bias",)
_DEQUANTIZED_AT_ONCE = 1 << 22  # elements: 16 MB of float32, so that the copy in flight is small beside any model


class TensorSource(Protocol):
    """What loading needs of a checkpoint."""

    def data(self, name: str) -> npt.NDArray[np.uint8]: ...
    def drop_pages(self, name: str) -> None: ...


class ProgressBar(Protocol):
    """What loading needs of tqdm."""

    def update(self, n: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class Assignment:
    """One entry of the plan with its tensors. The keys are paths relative to the module: "kv_b_proj.k_b".

    ``rule`` names file, number and line of the rule that decided, for messages; None where "auto" did.
    """

    entry: PlanEntry
    tensors: Mapping[str, TensorInfo]
    rule: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from the checkpoint."""
        return sum(info.nbytes for info in self.tensors.values())


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

    ``notes`` say what rules asked for and became something else or nothing.
    """

    title: str
    rules: str
    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weights hold."""
        return sum(row.nbytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        rows = [{**asdict(row), "types": list(row.types)} for row in self.rows]
        return {"title": self.title, "rules": self.rules, "nbytes": self.nbytes, "rows": rows, "notes": [*self.notes]}

    def __str__(self) -> str:
        table = new_table("module", "operation", "device", "types", "memory", numbers=["memory"])
        table.columns[0].footer, table.columns[-1].footer = "all weights", format_bytes(self.nbytes)
        for module, rows in grouped(self.rows, lambda row: (row.operation, row.device, row.types)):
            first, nbytes = rows[0], sum(row.nbytes for row in rows)
            table.add_row(module, first.operation, first.device, ", ".join(first.types), format_bytes(nbytes))
        return rendered(f"{self.title}, rules: {self.rules}", table, *(f"Note: {note}" for note in self.notes))


def assign_tensors(
    plan: Plan, model: nn.Module, slots: Sequence[TensorSlot], tensors: Mapping[str, TensorInfo]
) -> list[Assignment]:
    """The tensors of every entry of ``plan``, made for the untouched skeleton ``model``.

    Slots of the head go nowhere where the model has none (AutoModel). Raises `UnsupportedModelError` if
    the model has weights that no slot fills (a classification head).
    """
    names = {name for name, _ in model.named_modules()}
    base = "" if "model" in names else "model."
    of_entry: dict[str, dict[str, TensorInfo]] = {entry.module: {} for entry in plan.entries}
    filled = set()
    for slot in slots:
        module = slot.module.removeprefix(base)
        if module not in names and not slot.module.startswith("model."):
            continue
        owner = _owner(module, of_entry)
        key = f"{module}.{slot.role}"
        of_entry[owner][key[len(owner) + 1 :]] = tensors[slot.gguf_name]
        filled.add(f"{module}.{_STOCK_PARAMETERS.get(slot.role, slot.role)}")
    for name in model.state_dict():
        if name not in filled and not name.endswith(_ZERO_WHERE_ABSENT):
            raise UnsupportedModelError(
                f"{type(model).__name__} has the weight {name}, which no GGUF of this architecture holds; load "
                "AutoModelForCausalLM, or AutoModel for the hidden states"
            )
    return [Assignment(entry, of_entry[entry.module], plan.label(entry)) for entry in plan.entries]


def memory_needed(model: nn.Module, assignments: Iterable[Assignment], operations: Operations) -> int:
    """Bytes that the weights will take: what each operation says, float32 in stock modules. Plan applied."""
    return sum(
        _operation_at(model, assignment.entry.module).memory_needed(assignment.tensors)
        if assignment.entry.op in operations
        else sum(4 * int(np.prod(info.shape)) for info in assignment.tensors.values())
        for assignment in assignments
    )


def apply_plan(model: nn.Module, assignments: Iterable[Assignment], operations: Operations) -> None:
    """Put the operations that ``assignments`` name into the skeleton ``model``, without weights.

    Raises `UnsupportedModelError` if an operation cannot stand for its module, or has no use for one of its tensors.
    """
    for assignment in assignments:
        if assignment.entry.op in operations:
            with _naming_its_rule(assignment):
                _replace(model, assignment, operations[assignment.entry.op])


def check_types(model: nn.Module, assignments: Iterable[Assignment], operations: Operations) -> None:
    """Raise `UnsupportedTypeError` if a module cannot take the types it would get. ``model`` has the plan applied."""
    for assignment in assignments:
        with _naming_its_rule(assignment):
            if assignment.entry.op in operations:
                _operation_at(model, assignment.entry.module).check(assignment.tensors)
            else:
                _check_dequantizable(assignment)


def fill(
    model: nn.Module,
    assignments: Sequence[Assignment],
    operations: Operations,
    source: TensorSource,
    progress: ProgressBar,
) -> tuple[ReportRow, ...]:
    """Load every weight of ``model`` (plan applied, no memory taken yet). ``progress`` moves by bytes read.

    If anything goes wrong, Ctrl-C included, the model is taken apart, so that no frame of a traceback that somebody
    keeps can hold gigabytes.
    """
    rows = []
    try:
        for assignment in assignments:
            entry = assignment.entry
            reader = _Reader(source, progress)
            if entry.op in operations:
                nbytes = _operation_at(model, entry.module).load(assignment.tensors, reader)
            else:
                nbytes = _load_stock(model.get_submodule(entry.module), assignment.tensors, reader)
            reader.release()
            types = tuple(sorted({info.ggml_type.name for info in assignment.tensors.values()}))
            rows.append(ReportRow(entry.module, entry.op, entry.device, types, nbytes))
        _require_complete(model)
    except BaseException:
        _take_apart(model)
        raise
    return tuple(rows)


class _Reader:
    """Hands out stored tensors; asked for the next one, it gives up the pages of those before.

    That is safe while a view is still in use, for its pages are then read anew: a module that asks for three tensors
    and packs them together pays nothing, as the pages of a view come only with the first look at it.
    """

    def __init__(self, source: TensorSource, progress: ProgressBar) -> None:
        self._source, self._progress = source, progress
        self._handed_out: list[TensorInfo] = []
        self._unreported = 0

    def __call__(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        self.release()
        self._handed_out.append(info)
        self._unreported = info.nbytes
        return self._source.data(info.name)

    def release(self) -> None:
        for info in self._handed_out:
            self._source.drop_pages(info.name)
        self._progress.update(self._unreported)
        self._unreported = 0


@contextmanager
def _naming_its_rule(assignment: Assignment) -> Iterator[None]:
    """Let refusals begin with the rule that gave the module to what refuses it."""
    try:
        yield
    except (UnsupportedModelError, UnsupportedTypeError) as error:
        if assignment.rule is None:
            raise
        raise type(error)(f"{assignment.rule}: {error}") from None


def _replace(model: nn.Module, assignment: Assignment, operation_class: type[KtModule]) -> None:
    path = assignment.entry.module
    operation = operation_class.from_module(model.get_submodule(path), model.config, path)
    if unused := assignment.tensors.keys() - operation.roles():
        raise UnsupportedModelError(
            f"{assignment.entry.op} at {path} has no use for {', '.join(sorted(unused))}; keep that module with a "
            "rule (op: torch)"
        )
    model.set_submodule(path, operation)


def _owner(module: str, of_entry: Mapping[str, object]) -> str:
    """The path of the entry at ``module`` or above it."""
    owner = module
    while owner not in of_entry:
        if not owner:
            raise UnsupportedModelError(f"transformers' model has no module {module}, which the GGUF has a tensor for")
        owner = owner.rpartition(".")[0]
    return owner


def _operation_at(model: nn.Module, path: str) -> KtModule:
    return cast("KtModule", model.get_submodule(path))


def _load_stock(module: nn.Module, tensors: Mapping[str, TensorInfo], data: Data) -> int:
    """Fill the parameters and buffers that ``module`` itself owns; the bytes they hold."""
    for role, info in tensors.items():
        if role == "gate":
            values = _merged(_experts_gate_up, tensors["gate"], tensors["up"], data)
        elif role == "k_b":
            values = _merged(_kv_b, tensors["k_b"], tensors["v_b"], data)
        elif role in ("up", "v_b"):
            continue  # came with its other half
        else:
            values = _dequantized(info, data)
        _set_tensor(module, _STOCK_PARAMETERS.get(role, role), values)
    for name in _ZERO_WHERE_ABSENT:
        buffer = module._buffers.get(name)
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(tensor.nbytes for tensor in own)


def _merged(
    merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], first: TensorInfo, second: TensorInfo, data: Data
) -> torch.Tensor:
    return merge(_dequantized(first, data), _dequantized(second, data))


def _experts_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """(experts, 2 * intermediate, hidden) of two (experts, intermediate, hidden)."""
    return torch.cat((gate, up), dim=1)


def _kv_b(k_b: torch.Tensor, v_b: torch.Tensor) -> torch.Tensor:
    """(heads * (nope + v), latent) of (heads, latent, nope) and (heads, v, latent)."""
    return torch.cat((k_b.transpose(1, 2), v_b), dim=1).flatten(0, 1)


def _dequantized(info: TensorInfo, data: Data) -> torch.Tensor:
    """The tensor as float32 in ordinary memory, shape ``info.shape``."""
    cols = info.shape[-1]
    values = torch.empty(info.shape, dtype=torch.float32, device="cpu")
    rows = values.view(-1, cols)
    stored = data(info).reshape(len(rows), -1)
    step = max(1, _DEQUANTIZED_AT_ONCE // cols)
    for start in range(0, len(rows), step):
        # A copy, for torch warns of arrays that cannot be written, as the views of a read-only mapping are.
        block = gguf.dequantize(np.array(stored[start : start + step]), info.ggml_type)
        rows[start : start + step] = torch.from_numpy(block.reshape(-1, cols))
    return values


def _set_tensor(module: nn.Module, name: str, values: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[name] = values


def _check_dequantizable(assignment: Assignment) -> None:
    for role, info in assignment.tensors.items():
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.ggml_type]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), info.ggml_type)
        except NotImplementedError:
            raise UnsupportedTypeError(
                f"{info.path}: tensor {info.name} ({role} of {assignment.entry.module}) has type "
                f"{info.ggml_type.name}, which the gguf package cannot dequantize; give the module to an operation "
                "that takes the type, or take another quantization"
            ) from None


def _require_complete(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise RuntimeError(f"the plan left {len(left)} tensors without values: {', '.join(left[:5])}")


def _take_apart(model: nn.Module) -> None:
    for module in list(model.modules()):
        module.__dict__.clear()
    gc.collect()
