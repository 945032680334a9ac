"""``transformers-kt bench``: how fast a model reads prompts and answers here, and what bounds it."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

import transformers_kt._C as _C
from transformers_kt.cli import peer
from transformers_kt.cli.inspect import inspect_model
from transformers_kt.cli.machine import cpu_name, decode_rates, product_rate
from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.cli.pictures import new_figure
from transformers_kt.errors import InputError, UnsupportedOperationError
from transformers_kt.planning.bandwidth import ReadableMemory
from transformers_kt.planning.hardware import usable_cpus
from transformers_kt.planning.plan import plan
from transformers_kt.planning.report import PlanReport, require_plot
from transformers_kt.planning.tables import new_table, rendered
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

LLAMA_CPP = "llama.cpp"
OURS = "transformers_kt"
_WARM_UP_TOKENS = 8
_MOST_BESIDE = 4  # settings whose names fit under half of a picture
_PACKAGES = ("torch", "transformers", "transformers-kt-experts")


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

    ``limit`` is what memory or multiplying allow, ``bound`` which of them; of llama.cpp nothing is known.
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

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = ["what", "threads", "batch", "tokens/s", "rounds apart", "of the limit", "bound by"]
        peers = {each.setting: each for each in self.figures if each.engine != OURS}
        if peers:
            columns[6:6] = [LLAMA_CPP, "ratio"]
        rows = []
        for each in self.figures:
            if each.engine != OURS:
                continue
            share = "" if each.limit is None else f"{each.median / each.limit:.0%}"
            apart = f"{each.spread:.0%}" if len(each.rounds) > 1 else ""
            row = [each.setting.title, str(each.threads), str(each.batch), _shown(each.median), apart, share]
            if peers:
                other = peers.get(each.setting)
                row += ["", ""] if other is None else [_shown(other.median), f"{each.median / other.median:.2f}"]
            rows.append([*row, each.bound or ""])
        return columns, rows


def bench(
    model: str,
    *,
    prompts: Sequence[int] = (128, 512),
    depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    new_tokens: int = 32,
    rounds: int = 3,
    against: str | None = None,
) -> BenchReport:
    """Loads the model and measures it inside generate(), every setting in every round.

    ``against`` llama.cpp the rounds alternate, each in a process of its own: two copies of a model rarely fit. Raises
    `InputError` or `UnsupportedOperationError` for what cannot be measured, and what loading raises.
    """
    title, counts = _title(model), list(threads or [_C.thread_count()])
    positions = plan(model, gpus=[], context=1 << 40).context
    longest = max([*prompts, *depths]) + new_tokens + 1
    if longest > positions:
        raise InputError(f"{longest} tokens of prompt or depth and answer; this model has {positions} positions")
    settings = [Setting(count, batch, prompt, None) for count in counts for batch in batches for prompt in prompts]
    settings += [Setting(count, batch, None, depth) for count in counts for batch in batches for depth in depths]
    if against is not None:
        _require_llama_cpp(against)
        return _alternating(model, title, settings, new_tokens, rounds)
    before = _C.thread_count()
    try:
        return _ours(model, title, settings, new_tokens, rounds)
    finally:
        _C.set_thread_count(before)


def _ours(model: str, title: str, settings: Sequence[Setting], new_tokens: int, rounds: int) -> BenchReport:
    from transformers import AutoModelForCausalLM

    from transformers_kt.cli.timing import random_tokens, timed_generate
    from transformers_kt.families.registry import dims_of

    loaded = AutoModelForCausalLM.from_pretrained(model, kt_rules="auto")
    vocab, dims = loaded.config.vocab_size, dims_of(loaded.config)
    timed_generate(loaded, [random_tokens(_WARM_UP_TOKENS, vocab)], 1)
    found: dict[Setting, list[float]] = {setting: [] for setting in settings}
    counts = list(dict.fromkeys(setting.threads for setting in settings))
    reads: dict[int, list[float]] = {count: [] for count in counts}
    products: dict[int, list[float]] = {count: [] for count in counts}
    memory, cpus = ReadableMemory(), usable_cpus()
    for number in range(rounds):
        for count in counts:
            _C.set_thread_count(count)
            # Kernels prefetch, plain reading does not: either may be faster.
            reads[count] += [memory.bandwidth(cpus[:count], rounds=1), *decode_rates()]
            products[count].append(product_rate())
            for setting in (setting for setting in settings if setting.threads == count):
                tokens = max(1, setting.depth or 0) if setting.prompt is None else setting.prompt
                batch = [random_tokens(tokens, vocab, 1 + number + row) for row in range(setting.batch)]
                timed = timed_generate(loaded, batch, new_tokens if setting.prompt is None else 0)
                seconds = statistics.median(timed.gaps) if setting.prompt is None else timed.first / tokens
                found[setting].append(setting.batch / seconds)
    limits = {count: Limits(max(reads[count]), max(products[count])) for count in counts}
    work = _Work.of(model, dims.top_k / max(1, dims.experts))
    figures = [
        Figure(OURS, *setting, tuple(found[setting]), *work.limit(setting, limits[setting.threads]))
        for setting in settings
    ]
    return BenchReport(title, _about(), work.bytes_per_token, limits, figures)


@dataclass(frozen=True, slots=True)
class _Work:
    """What computing takes at least. ``routed`` bytes of all experts, of which a token reads ``share``; ``others`` are
    read for every batch; ``weights`` multiply each token, those of the ``head`` the last of a prompt; ``cache`` bytes
    are read for each token of context. Products of attention with its keys are not counted."""

    routed: int
    others: int
    share: float
    weights: int
    head: int
    cache: int

    @classmethod
    def of(cls, model: str, share: float) -> _Work:
        report: PlanReport = plan(model, gpus=[], context=1)
        routed = sum(row.parts.get("routed experts", 0) for row in report.rows)
        read = sum(use.read_per_token for use in report.devices)
        found = inspect_model(model, 1)
        sizes = {group.name: group.weights for group in found.groups}
        embedding = sizes["token_embd.weight"]
        head = sizes.get("output.weight", 0)
        weights = found.active_parameters - embedding - head
        cache = sum(use.kv_cache for use in report.devices)
        return cls(routed, read - round(routed * share), share, weights, head or embedding, cache)

    @property
    def bytes_per_token(self) -> int:
        return self.others + round(self.routed * self.share)

    def limit(self, setting: Setting, limits: Limits) -> tuple[float, str]:
        """Tokens per second of all sequences together, and which limit that is.

        A batch reads each expert once that any of its tokens takes, chosen evenly.
        """
        at_once = setting.batch if setting.prompt is None else setting.batch * setting.prompt
        routed = self.routed * (1 - (1 - self.share) ** at_once)
        cached = setting.batch * self.cache * (setting.depth or 0)
        reading = (self.others + routed + cached) / limits.read
        multiplying = 2 * (self.weights * at_once + self.head * setting.batch) / limits.products
        seconds = max(reading, multiplying)
        return at_once / seconds, "memory" if reading > multiplying else "multiplying"


def _alternating(model: str, title: str, settings: Sequence[Setting], new_tokens: int, rounds: int) -> BenchReport:
    """Rounds of ours and of llama.cpp in turns, each in a process of its own."""
    single = [setting for setting in settings if setting.batch == 1]
    file = _file_of(model)
    reports, theirs = [], {setting: [] for setting in single}  # type: tuple[list[Any], dict[Setting, list[float]]]
    for _ in range(rounds):
        ours = _json_of([sys.executable, "-m", "transformers_kt.cli", "bench", model, "--rounds", "1", "--json",
                         *_as_options(settings, new_tokens)])  # fmt: skip
        reports.append(ours)
        wanted = {
            "path": file,
            "threads": sorted({setting.threads for setting in single}),
            "prompts": sorted({setting.prompt for setting in single if setting.prompt is not None}),
            "depths": sorted({setting.depth for setting in single if setting.depth is not None}),
            "new_tokens": new_tokens,
        }
        for each in _json_of([sys.executable, str(peer.__file__), json.dumps(wanted)]):
            setting = Setting(each["threads"], 1, each.get("prompt"), each.get("depth"))
            seconds = statistics.median(each["seconds"])
            theirs[setting].append((setting.prompt or 1) / seconds)
    return _merged(title, reports, theirs)


def _merged(title: str, reports: Sequence[Any], theirs: Mapping[Setting, list[float]]) -> BenchReport:
    """One report of those of the rounds: the rounds of each figure together, the highest of each limit."""
    figures = []
    for each in zip(*(report["figures"] for report in reports), strict=True):
        first = each[0]
        setting = Setting(*(first[key] for key in Setting._fields))
        limit = max(one["limit"] for one in each)
        figures.append(Figure(OURS, *setting, tuple(one["rounds"][0] for one in each), limit, first["bound"]))
    figures += [Figure(LLAMA_CPP, *setting, tuple(found), None, None) for setting, found in theirs.items()]
    limits = {
        int(count): Limits(*(max(report["limits"][count][key] for report in reports) for key in ("read", "products")))
        for count in reports[0]["limits"]
    }
    about = {**reports[0]["about"], LLAMA_CPP: f"llama-cpp-python {version('llama-cpp-python')}"}
    return BenchReport(title, about, reports[0]["bytes_per_token"], limits, figures)


def _as_options(settings: Iterable[Setting], new_tokens: int) -> Iterator[str]:
    for option, of in (("--threads", "threads"), ("--batch", "batch"), ("--prompt", "prompt"), ("--depth", "depth")):
        numbers = dict.fromkeys(getattr(setting, of) for setting in settings)
        yield from (option, ",".join(str(number) for number in numbers if number is not None))
    yield from ("--new-tokens", str(new_tokens))


def _json_of(command: Sequence[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UnsupportedOperationError(
            f"{Path(command[-2 if command[1].endswith('.py') else 1]).name} ended with {done.returncode}; its own "
            "message stands above"
        )
    return json.loads(done.stdout)


def _require_llama_cpp(against: str) -> None:
    if against != LLAMA_CPP:
        raise InputError(f"against={against!r}; {LLAMA_CPP} is accepted")
    if find_spec("llama_cpp") is None:
        raise UnsupportedOperationError(
            "llama.cpp is measured through its Python package: pip install llama-cpp-python"
        )


def _file_of(model: str) -> str:
    return inspect_model(model, 1).files[0]


def _title(model: str) -> str:
    return Path(model).resolve().name.removesuffix(".gguf")


def _about() -> dict[str, str]:
    """What a reader must know of where figures come from."""
    return {
        "CPU": cpu_name(),
        "kernels": _C.isa(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "on": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


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
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _numbers(least: int) -> Callable[[str], list[int]]:
    """Reads "128,512": whole numbers from ``least`` on."""

    def read(text: str) -> list[int]:
        if not re.fullmatch(r"\d+(,\d+)*", text) or any(int(number) < least for number in text.split(",")):
            raise typer.BadParameter(f"{text!r}; numbers from {least} on with commas between, such as 128,512")
        return [int(number) for number in text.split(",")]

    return read


def bench_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    prompt: Annotated[str, typer.Option(metavar="N,N", help="Lengths of prompts, in tokens.")] = "128,512",
    depth: Annotated[
        str, typer.Option(metavar="N,N", help="Answering is measured after a conversation of so many tokens.")
    ] = "0",
    batch: Annotated[str, typer.Option(metavar="N,N", help="How many conversations at once.")] = "1",
    threads: Annotated[
        str | None, typer.Option(metavar="N,N", help="Threads; one for each core that may be used if not given.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer: samples of each speed.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Times to measure everything; medians are shown.")] = 3,
    against: Annotated[
        str | None, typer.Option(metavar="llama.cpp", help="Measure llama.cpp too, in turns, on the same file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    png: Annotated[str | None, typer.Option(help="Also write a picture to this file (.png, .svg).")] = None,
) -> None:
    """Measure how fast MODEL reads prompts and answers on this machine, and what bounds it.

    The model is loaded, and asked for random tokens. Speeds are tokens per second; the limit is what the memory or the
    multipliers of this machine, measured in the same rounds, allow at most.
    """
    if png is not None:
        require_plot(png)
    if as_json and markdown:
        raise typer.BadParameter("--json and --markdown are two forms of the same; give one of them")
    report = bench(
        located(model),
        prompts=_numbers(1)(prompt),
        depths=_numbers(0)(depth),
        batches=_numbers(1)(batch),
        threads=None if threads is None else _numbers(1)(threads),
        new_tokens=new_tokens,
        rounds=rounds,
        against=against,
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.markdown() if markdown else report)
    if png is not None:
        report.plot(png)
