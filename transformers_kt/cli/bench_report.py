"""What `bench` found: speeds of settings, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers_kt.cli.pictures import new_figure
from transformers_kt.planning.tables import new_table, rendered
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

OURS = "transformers_kt"
_MOST_BESIDE = 4  # settings whose names fit under half of a picture
_LEGEND_COLUMNS = 3  # what fits beside each other


class Setting(NamedTuple):
    """What is measured: a ``prompt`` of so many tokens, or decoding at a ``depth`` of so many; the other is None."""

    threads: int
    batch: int
    prompt: int | None = None
    depth: int | None = None

    @property
    def title(self) -> str:
        return f"decode at {self.depth:,}" if self.prompt is None else f"prompt of {self.prompt:,}"


@dataclass(frozen=True, slots=True)
class Figure:
    """``rounds`` are tokens per second, of all sequences of the batch together: of each round the median.

    ``limit`` is what memory or multiplying allow, ``bound`` which of them; of other engines nothing is known.
    """

    engine: str
    threads: int
    batch: int
    prompt: int | None
    depth: int | None
    rounds: tuple[float, ...]
    limit: float | None
    bound: str | None

    @property
    def setting(self) -> Setting:
        return Setting(self.threads, self.batch, self.prompt, self.depth)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median: how far to trust the median."""
        return (max(self.rounds) - min(self.rounds)) / self.median


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one number of threads: bytes read and products of bytes a second, the best of all rounds."""

    read: float
    products: float


@dataclass(frozen=True, slots=True)
class BenchReport:
    """``bytes_per_token`` are those of weights; ``limits`` by threads; ``about`` says where the figures are from."""

    title: str
    about: Mapping[str, str]
    bytes_per_token: int
    limits: Mapping[int, Limits]
    figures: Sequence[Figure]

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        figures = [{**asdict(each), "median": each.median, "spread": each.spread} for each in self.figures]
        return {**asdict(self), "figures": figures}

    def __str__(self) -> str:
        return rendered(self._heading(), self._table(), *self._remarks())

    def markdown(self) -> str:
        columns, rows = self._cells()
        columns = [column.replace("\n", " ") for column in columns]
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        return "\n\n".join((self._heading(), table, *self._remarks(), about))

    def plot(self, path: str) -> None:
        """Write a picture: prompts left, decoding right, a bar a setting, marks for rounds and limits."""
        sides = [(name, [each for each in self.figures if (each.prompt is None) == (name == "decoding")])
                 for name in ("prompts", "decoding")]  # fmt: skip
        sides = [(name, figures) for name, figures in sides if figures]
        most = max(len({each.setting for each in figures}) for _, figures in sides)
        figure, axes = new_figure(len(sides), stacked=most > _MOST_BESIDE)
        engines = list(dict.fromkeys(each.engine for each in self.figures))
        for axis, (name, figures) in zip(axes, sides, strict=True):
            settings = list(dict.fromkeys(each.setting for each in figures))
            width = 0.8 / len(engines)
            for each in figures:
                place = settings.index(each.setting) + (engines.index(each.engine) - (len(engines) - 1) / 2) * width
                axis.bar(place, each.median, width * 0.9, color=f"C{engines.index(each.engine)}")
                axis.plot([place] * len(each.rounds), each.rounds, "k.", markersize=4)
                if each.limit is not None:
                    axis.plot([place - width / 2, place + width / 2], [each.limit] * 2, color="black", linewidth=1.5)
            axis.set_xticks(range(len(settings)), [_short(setting, settings) for setting in settings], fontsize=9)
            axis.set(title=name, ylabel="tokens/s (higher is better)")
            axis.set_xlabel("tokens of the prompt" if name == "prompts" else "tokens of context")
        _legend(figure, engines)
        figure.suptitle(f"{self.title}, {self.about['CPU']}")
        figure.savefig(path, dpi=100)

    def _heading(self) -> str:
        return f"{self.title}: a token reads {format_bytes(self.bytes_per_token)} of weights"

    def _remarks(self) -> Iterator[str]:
        if self._peers:
            yield f"Ratio: ours over the best of {', '.join(self._peers)}."
        for threads, limits in self.limits.items():
            yield (
                f"Limits of {threads} thread{'s' * (threads > 1)}: {format_bytes(int(limits.read))}/s read, "
                f"{limits.products / 1e9:,.0f} GOPS of int8 products with weights in the cache."
            )

    def _table(self) -> Table:
        columns, rows = self._cells()
        table = new_table(*columns, numbers=columns[3:-1])
        table.show_footer = False
        for row in rows:
            table.add_row(*row)
        return table

    @property
    def _peers(self) -> list[str]:
        return list(dict.fromkeys(each.engine for each in self.figures if each.engine != OURS))

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = ["what", "threads", "batch", "tokens/s", "rounds\napart", "of the\nlimit", "bound by"]
        medians = {(each.engine, each.setting): each.median for each in self.figures}
        if self._peers:
            columns[6:6] = [*(peer.replace(" ", "\n") for peer in self._peers), "ratio"]
        rows = []
        for each in self.figures:
            if each.engine != OURS:
                continue
            share = "" if each.limit is None else f"{each.median / each.limit:.0%}"
            apart = f"{each.spread:.0%}" if len(each.rounds) > 1 else ""
            row = [each.setting.title, str(each.threads), str(each.batch), _shown(each.median), apart, share]
            if self._peers:
                others = [medians.get((peer, each.setting)) for peer in self._peers]
                row += ["" if other is None else _shown(other) for other in others]
                best = max((other for other in others if other is not None), default=None)
                row.append("" if best is None else f"{each.median / best:.2f}")
            rows.append([*row, each.bound or ""])
        return columns, rows


def _short(setting: Setting, all_settings: Sequence[Setting]) -> str:
    """What tells the setting from the others."""
    shown = [f"{setting.depth if setting.prompt is None else setting.prompt:,}"]
    for of, word in (("batch", "batch"), ("threads", "threads")):
        if len({getattr(each, of) for each in all_settings}) > 1:
            shown.append(f"{word} {getattr(setting, of)}")
    return "\n".join(shown)


def _legend(figure: Any, engines: Sequence[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=f"C{number}", label=engine) for number, engine in enumerate(engines)]
    handles.append(Line2D([], [], color="black", linestyle="", marker=".", label="a round"))
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="limit of this machine"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), _LEGEND_COLUMNS), frameon=False)


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
