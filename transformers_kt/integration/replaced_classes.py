"""The stock classes that a loaded model has no module of any more. Patching them would do nothing, so it is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from transformers_kt.errors import UnsupportedOperationError
from transformers_kt.modules.patches import METHODS, patched_method
from transformers_kt.planning.assignments import Assignment
from transformers_kt.rules import TORCH, PlanEntry


class ReplacedClasses:
    """Those of the modules of a skeleton that a plan, not applied yet, replaces, and of all in them.

    Raises `UnsupportedOperationError` if one of them is patched already.
    """

    def __init__(self, model: nn.Module, assignments: Iterable[Assignment]) -> None:
        self._replaced_in: dict[type[nn.Module], dict[str, PlanEntry]] = {}
        for assignment in assignments:
            if assignment.operation.backend != TORCH:
                entry = assignment.entry
                for module in model.get_submodule(entry.module).modules():
                    self._replaced_in.setdefault(type(module), {}).setdefault(_pattern(entry.module), entry)
        for cls in self._replaced_in:
            self._require_stock(cls)
        self._methods = [(cls, name, getattr(cls, name)) for cls in self._replaced_in for name in METHODS]

    def require_unpatched(self) -> None:
        """Raise `UnsupportedOperationError` if one of them was patched since. Asked for every token: 1 us."""
        for cls, name, method in self._methods:
            if getattr(cls, name) is not method:
                self._require_stock(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplacedClasses:
        return self  # nothing of it belongs to one model

    def _require_stock(self, cls: type[nn.Module]) -> None:
        if (patch := patched_method(cls)) is None:
            return
        places = self._replaced_in[cls]
        entry = next(iter(places.values()))
        raise UnsupportedOperationError(
            f"{cls.__name__} was given another {patch}. {entry.module} is computed by {entry.op}, which would not call "
            "it. Undo that, or keep what is made of this class in torch: kt_rules=[{"
            f'"match": {{"name": r"^({"|".join(places)})$"}}, "replace": {{"op": "torch"}}}}]'
        )


def _pattern(module: str) -> str:
    """A pattern for the module and its like in other layers."""
    return r"\.".join(r"\d+" if part.isdigit() else part for part in module.split("."))
