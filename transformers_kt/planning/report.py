"""What a plan comes to: modules, memory per device, bytes read per token; as a table, as JSON, as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers_kt.errors import InputError, UnsupportedOperationError
from transformers_kt.planning.tables import grouped, new_table, rendered
from transformers_kt.rules import AUTO
from transformers_kt.text import format_bytes

PARTS = {
    "attention": "#4c72b0",
    "dense and shared experts": "#55a868",
    "routed experts": "#dd8452",
    "expert slots": "#ccb974",
    "embedding and head": "#8172b3",
    "KV cache": "#c44e52",
    "work buffers": "#937860",
}
"""What lies in memory -> its colour in the picture. Norms count as attention, routers as shared experts."""
_FREE_COLOUR = "#e8e8e8"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One module of the plan: what would compute it, where, from which ggml types, in how many bytes of memory.

    ``read_per_token`` are the bytes that one generated token reads, ``rule`` is the number of the rule that decided,
    ``parts`` splits ``nbytes`` over PARTS.
    """

    module: str
    operation: str
    device: str
    types: tuple[str, ...]
    nbytes: int
    read_per_token: int
    rule: int | None
    parts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a device would hold, in bytes, and ``bandwidth``, at which it reads, in bytes per second."""

    device: str
    capacity: int
    weights: int
    kv_cache: int
    expert_slots: int
    buffers: int
    read_per_token: int
    bandwidth: float

    @property
    def needed(self) -> int:
        return self.weights + self.kv_cache + self.expert_slots + self.buffers

    @property
    def free(self) -> int:
        """Negative where it does not fit."""
        return self.capacity - self.needed


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What loading and generating would take. ``str()`` gives tables of at most 100 columns.

    ``context`` is in tokens. ``notes`` say what was assumed, and what rules asked for and did not get;
    ``problems`` why the model cannot be loaded so.
    """

    title: str
    rules: str
    context: int
    rows: tuple[PlanRow, ...]
    devices: tuple[DeviceUse, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every device has the memory for what would lie on it."""
        return all(use.free >= 0 for use in self.devices)

    def tokens_per_second(self, cached_tokens: int = 0) -> float:
        """The most that decoding one sequence can reach: the time to read everything once, device after device.

        ``cached_tokens`` of context are read too, up to ``context``.
        """
        share = min(cached_tokens, self.context) / self.context
        seconds = sum((use.read_per_token + share * use.kv_cache) / use.bandwidth for use in self.devices)
        return 1 / seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON. Sizes are in bytes, bandwidths in bytes per second."""
        rows = [{**asdict(row), "types": list(row.types), "parts": dict(row.parts)} for row in self.rows]
        return {
            "title": self.title,
            "rules": self.rules,
            "context": self.context,
            "fits": self.fits,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "devices": [{**asdict(use), "needed": use.needed, "free": use.free} for use in self.devices],
            "tokens_per_second": {
                "empty_context": self.tokens_per_second(),
                "full_context": self.tokens_per_second(self.context),
            },
            "rows": rows,
        }

    def __str__(self) -> str:
        heading = f"{self.title}, {self.context:,} tokens of context, rules: {self.rules}"
        empty, full = self.tokens_per_second(), self.tokens_per_second(self.context)
        ceiling = (
            f"At most {_shown(empty)} tokens/s from an empty context, {_shown(full)} from a full one: the time to read "
            "the bytes above and the KV cache once per token."
        )
        remarks = [ceiling, *self.problems, *(f"Note: {note}" for note in self.notes)]
        return rendered(heading, self._module_table(), self._device_table(), *remarks)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture (the ending says which kind: .png, .svg, .pdf) with a bar per device, and what lies on it.

        Raises what `require_plot` raises.
        """
        require_plot(path)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.8 + 0.6 * len(self.devices)), layout="constrained")
        axes = figure.add_subplot()
        names = [
            f"{use.device}\n{format_bytes(use.needed)} of {format_bytes(use.capacity)}"
            + (f":\n{format_bytes(-use.free)} too little" if use.free < 0 else "")
            for use in self.devices
        ]
        # Each bar has a scale of its own: beside 400 GB in RAM nothing on a card of 24 could be seen.
        wholes = [max(use.capacity, use.needed, 1) for use in self.devices]
        ends = [0.0] * len(names)
        for part, colour in [*PARTS.items(), ("free", _FREE_COLOUR)]:
            widths = [self._parts_on(use)[part] / whole for use, whole in zip(self.devices, wholes, strict=True)]
            axes.barh(names, widths, left=ends, color=colour, label=part, height=0.6)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for position, (use, whole) in enumerate(zip(self.devices, wholes, strict=True)):
            edge = use.capacity / whole
            axes.plot([edge, edge], [position - 0.38, position + 0.38], color="black", linewidth=2)
        axes.set_xlim(0, 1.01)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_title(f"{self.title}, {self.context:,} tokens of context")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, title="black line: what the device has")
        figure.savefig(path, dpi=150)

    def _parts_on(self, use: DeviceUse) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        for row in self.rows:
            if row.device == use.device:
                for part, nbytes in row.parts.items():
                    parts[part] += nbytes
        others = {"KV cache": use.kv_cache, "expert slots": use.expert_slots, "work buffers": use.buffers}
        return {**parts, **others, "free": max(0, use.free)}

    def _module_table(self) -> Any:
        numbers = ["memory", "per token"] if self.rules == AUTO else ["memory", "per token", "rule"]
        table = new_table("module", "operation", "device", "types", *numbers, numbers=numbers)
        table.columns[0].footer = "all weights"
        table.columns[4].footer = format_bytes(sum(row.nbytes for row in self.rows))
        table.columns[5].footer = format_bytes(sum(row.read_per_token for row in self.rows))
        for module, rows in grouped(self.rows, lambda row: (row.operation, row.device, row.rule)):
            first = rows[0]
            types = sorted({name for row in rows for name in row.types})
            sizes = (sum(row.nbytes for row in rows), sum(row.read_per_token for row in rows))
            rule = "-" if first.rule is None else str(first.rule)
            cells = (module, first.operation, first.device, ", ".join(types), *map(format_bytes, sizes), rule)
            table.add_row(*cells[: len(table.columns)])
        return table

    def _device_table(self) -> Any:
        has_slots = any(use.expert_slots for use in self.devices)
        slots = ["slots"] if has_slots else []
        numbers = ("weights", "KV cache", *slots, "buffers", "needed", "there is", "left", "per token", "at")
        table = new_table("device", *numbers, numbers=numbers)
        table.show_footer = False
        for use in self.devices:
            own_slots = [use.expert_slots] if has_slots else []
            sizes = (use.weights, use.kv_cache, *own_slots, use.buffers, use.needed, use.capacity)
            left = format_bytes(use.free) if use.free >= 0 else f"-{format_bytes(-use.free)}"
            speed = f"{format_bytes(int(use.bandwidth))}/s"
            table.add_row(use.device, *map(format_bytes, sizes), left, format_bytes(use.read_per_token), speed)
        return table


def _shown(number: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def shortages(devices: tuple[DeviceUse, ...]) -> tuple[str, ...]:
    """One sentence for each device that would be overfull."""
    return tuple(
        f"Does not fit: {use.device} needs {format_bytes(use.needed)}, there is {format_bytes(use.capacity)}: "
        f"{format_bytes(-use.free)} too little."
        for use in devices
        if use.free < 0
    )


def require_plot(path: str | os.PathLike[str]) -> None:
    """Raises where `PlanReport.plot` could not write to ``path``.

    UnsupportedOperationError if matplotlib is not installed, InputError if it writes no such file or there is no such
    folder.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedOperationError(
            "the picture of a plan needs matplotlib, which is not installed: "
            "pip install 'transformers-kt-experts[plot]'"
        ) from None
    file, known = Path(path), sorted(Figure().canvas.get_supported_filetypes())
    if file.suffix[1:].lower() not in known:
        raise InputError(f"the picture of a plan cannot be {file}; names that end in .{', .'.join(known)} are accepted")
    if not file.parent.is_dir():
        raise InputError(f"the picture of a plan cannot be {file}: there is no folder {file.parent}")
