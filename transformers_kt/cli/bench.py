"""``transformers-kt bench``: how fast a model reads prompts and answers here, and what bounds it."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

import transformers_kt._C as _C
from transformers_kt.cli.alternating import alternating, llama_cpp_version
from transformers_kt.cli.bench_report import OURS, BenchReport, Figure, Limits, Setting
from transformers_kt.cli.inspect import inspect_model
from transformers_kt.cli.machine import DecodeRates, cpu_name, product_rate
from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.errors import InputError
from transformers_kt.planning.bandwidth import ReadableMemory
from transformers_kt.planning.hardware import usable_cpus
from transformers_kt.planning.plan import plan
from transformers_kt.planning.report import PlanReport, require_plot

_WARM_UP_TOKENS = 8
_PACKAGES = ("torch", "transformers", "transformers-kt-experts")


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
    llama_python: str = sys.executable,
) -> BenchReport:
    """Loads the model and measures it inside generate(), every setting in every round.

    ``against`` llama.cpp the rounds alternate; ``llama_python`` is the interpreter that has llama-cpp-python. Raises
    `InputError` or `UnsupportedOperationError` for what cannot be measured, and what loading raises.
    """
    title, counts = title_of(model), list(threads or [_C.thread_count()])
    positions = plan(model, gpus=[], context=1 << 40).context
    longest = max([*prompts, *depths]) + new_tokens + 1
    if longest > positions:
        raise InputError(f"{longest} tokens of prompt or depth and answer; this model has {positions} positions")
    settings = [Setting(count, batch, prompt, None) for count in counts for batch in batches for prompt in prompts]
    settings += [Setting(count, batch, None, depth) for count in counts for batch in batches for depth in depths]
    if against is not None:
        peer_version = llama_cpp_version(against, llama_python)
        return alternating(model, title, settings, new_tokens, rounds, llama_python, peer_version)
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
    memory, decoding, cpus = ReadableMemory(), DecodeRates(), usable_cpus()
    for number in range(rounds):
        for count in counts:
            _C.set_thread_count(count)
            # Kernels prefetch, plain reading does not: either may be faster.
            reads[count] += [memory.bandwidth(cpus[:count], rounds=1), *decoding.sample()]
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
    return BenchReport(title, about_here(), work.bytes_per_token, limits, figures)


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


def title_of(model: str) -> str:
    return Path(model).resolve().name.removesuffix(".gguf")


def about_here() -> dict[str, str]:
    """What a reader must know of where figures come from."""
    return {
        "CPU": cpu_name(),
        "kernels": _C.isa(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "on": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def numbers_from(least: int) -> Callable[[str], list[int]]:
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
        str | None,
        typer.Option(metavar="llama.cpp", help="Measure llama.cpp too, in both of its ways, on the same file."),
    ] = None,
    llama_python: Annotated[
        str,
        typer.Option(
            metavar="INTERPRETER",
            show_default=False,
            help="The Python that has llama-cpp-python; this one if not given.",
        ),
    ] = sys.executable,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    png: Annotated[str | None, typer.Option(help="Also write a picture to this file (.png, .svg).")] = None,
) -> None:
    """Measure how fast MODEL reads prompts and answers on this machine, and what bounds it.

    The model is loaded, and asked for random tokens (a word has one or two). Speeds are tokens per second; the limit is
    what the memory or the multipliers of this machine, measured in the same rounds, allow at most.
    """
    if png is not None:
        require_plot(png)
    if as_json and markdown:
        raise typer.BadParameter("--json and --markdown are two forms of the same; give one of them")
    report = bench(
        located(model),
        prompts=numbers_from(1)(prompt),
        depths=numbers_from(0)(depth),
        batches=numbers_from(1)(batch),
        threads=None if threads is None else numbers_from(1)(threads),
        new_tokens=new_tokens,
        rounds=rounds,
        against=against,
        llama_python=llama_python,
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report.markdown() if markdown else report)
    if png is not None:
        report.plot(png)
