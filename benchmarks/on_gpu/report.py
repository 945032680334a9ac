"""Figures of a section as JSON, written after each of them, and as Markdown.

A file has `section`, `ended`, `seconds`, `machine` and `tables`: title -> rows, a row being column -> value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class Report:
    """The figures of ``section`` in the folder ``out``."""

    def __init__(self, out: Path, section: str) -> None:
        self.out = out
        self._path = _path(out, section)
        self._content: dict[str, Any] = {"section": section, "ended": "is running", "machine": {}, "tables": {}}
        self._write()

    def describe(self, machine: Row) -> None:
        self._content["machine"] = dict(machine)
        self._write()

    def add(self, table: str, row: Row) -> None:
        """A row of the table with this title. Columns name their unit."""
        self._content["tables"].setdefault(table, []).append(dict(row))
        self._write()

    def _write(self) -> None:
        _replace(self._path, self._content)

    @staticmethod
    def finish(out: Path, section: str, ended: str, seconds: float) -> None:
        """Note how the process of ``section`` ended, whatever it has written."""
        content = read(out, section) or {"section": section, "machine": {}, "tables": {}}
        _replace(_path(out, section), {**content, "ended": ended, "seconds": round(seconds, 1)})


def _path(out: Path, section: str) -> Path:
    return out / f"{section}.json"


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: whoever writes may be ended at any time."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def read(out: Path, section: str) -> dict[str, Any] | None:
    """What is there of ``section``; None for nothing."""
    path = _path(out, section)
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def tables(out: Path, sections: Sequence[str]) -> str:
    """Markdown: a table a title, in the order of ``sections``, and what of them did not end well."""
    found = [content for name in sections if (content := read(out, name)) is not None]
    facts = [[f"{key} {value}" for key, value in each["machine"].items() if key != "time"] for each in found]
    parts = [f"{machine}\n" for machine in dict.fromkeys(map(", ".join, facts)) if machine]
    for content in found:
        parts += [f"## {title}\n\n{markdown_table(rows)}" for title, rows in content["tables"].items()]
        if content["ended"] != "ok":
            parts.append(f"**Section {content['section']} {content['ended']}.**\n")
    return "\n".join(parts)


def markdown_table(rows: Sequence[Row]) -> str:
    """Columns in the order in which rows first have them; a row without one leaves it empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
