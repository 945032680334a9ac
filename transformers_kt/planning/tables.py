"""Tables of modules for a terminal: equal layers on one line, at most 100 columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from transformers_kt.text import LAYER, layer_number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WIDTH = 100

# Of three types, or two beside a rule: names of modules need the width more.
_TYPES, _RULE = "types", "rule"
_WIDEST_TYPES, _WIDEST_TYPES_BESIDE_A_RULE = 16, 10
_LAYER_NORM = re.compile(r"\.\w+_layernorm$")


class HasModule(Protocol):
    """A row of a report."""

    @property
    def module(self) -> str: ...


Row = TypeVar("Row", bound=HasModule)


def grouped(rows: Iterable[Row], alike: Callable[[Row], Hashable]) -> list[tuple[str, list[Row]]]:
    """Rows whose ``alike`` and path are the same in all but the layer, under one name: model.layers.{3-60}.mlp.

    The norms of a layer count as the same: a row for each would say nothing more.
    """
    groups: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        path = _LAYER_NORM.sub(".*_layernorm", row.module)
        groups.setdefault((LAYER.sub("*", path), alike(row)), []).append(row)
    return [(_common_name([row.module for row in group]), group) for group in groups.values()]


def new_table(*columns: str, numbers: Collection[str] = ()) -> Table:
    """An empty table; ``numbers`` stand to the right, in one piece, and other columns fold."""
    from rich import box
    from rich.table import Table

    widest_types = _WIDEST_TYPES_BESIDE_A_RULE if _RULE in columns else _WIDEST_TYPES
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_number = column in numbers
        justify: Literal["left", "right"] = "right" if is_number else "left"
        widest = widest_types if column == _TYPES else None
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_number, max_width=widest)
    return table


def rendered(*parts: RenderableType) -> str:
    """What rich prints of ``parts`` in `WIDTH` columns: no colours, no trailing blanks, tables between blank lines."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=WIDTH, color_system=None)
    for part in parts:
        around = "" if isinstance(part, str) else "\n"
        console.print(around, part, around, sep="", highlight=False, markup=False)
    plain = "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
    return re.sub("\n{3,}", "\n\n", plain)


def _common_name(modules: Sequence[str]) -> str:
    if len(modules) == 1:
        return modules[0]
    name = modules[0] if len(set(map(_last_part, modules))) == 1 else _LAYER_NORM.sub(".*_layernorm", modules[0])
    layers = sorted({layer for layer in map(layer_number, modules) if layer is not None})
    return name if len(layers) == 1 else LAYER.sub("{" + ranges(layers) + "}", name, count=1)


def _last_part(module: str) -> str:
    return module.rpartition(".")[2]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: 0,3-5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
