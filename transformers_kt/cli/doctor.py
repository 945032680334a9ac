"""``transformers-kt doctor``: what this machine can do, what a model would do on it, and what holds it back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transformers_kt.assets import bundled_model
from transformers_kt.cli.machine import (
    DecodeRates,
    HandOff,
    Machine,
    Rate,
    disk_rate,
    machine,
    product_rate,
    read_rates,
)
from transformers_kt.cli.models import MODEL_HELP, NOT_ALL_WELL, located
from transformers_kt.cli.pictures import new_figure
from transformers_kt.families.registry import families
from transformers_kt.planning.plan import plan
from transformers_kt.planning.report import PlanReport, require_plot
from transformers_kt.planning.tables import new_table, rendered
from transformers_kt.rules import AUTO
from transformers_kt.rules.devices import CPU
from transformers_kt.text import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_CONTEXT = 4096
_ENOUGH = 0.95  # of the bandwidth: the threads after that bring nothing that can be measured
_TOKENS = 32  # decoded to time the bundled model, or the model itself
_TOO_SLOW = 0.8  # of what was expected: forecasts are within 20%
_MUCH_SWAPPED = 1 << 30
_BRINGS = {
    "avx512_vnni": "prompts in half the time that AVX2 takes",
    "avx_vnni": "prompts in 0.65 to 0.9 of the time that AVX2 takes",
}
"""Instruction sets that CPUs may lack -> what they bring, measured on one core (benchmarks/JOURNAL.md, J23). Decoding
waits for memory, and is as fast on all."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """``reads`` by threads in bytes per second, ``decode`` what our kernels read so of weights, ``products`` of bytes a
    second with weights in the cache, ``overhead_s`` what generate() takes for a token beside the weights."""

    reads: Sequence[Rate]
    decode: float
    products: float
    overhead_s: float

    @property
    def most(self) -> float:
        return max(rate.bytes_per_s for rate in self.reads)

    @property
    def threads_enough(self) -> int:
        """The fewest threads that read at 95% of the bandwidth."""
        return next(rate.threads for rate in self.reads if rate.bytes_per_s >= _ENOUGH * self.most)

    def tokens_per_s(self, read_per_token: int) -> float:
        """What decoding reaches: the time to read the weights with our kernels, and that of all else."""
        return 1 / (read_per_token / self.decode + self.overhead_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one model: sizes in bytes, ``limit``, ``expected`` and ``measured`` in tokens per second, ``disk`` in bytes a
    second."""

    title: str
    needed: int
    read_per_token: int
    expected: float
    limit: float
    measured: float | None = None
    disk: float | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """``sentences`` say what to expect, ``advice`` what to change."""

    machine: Machine
    speeds: Speeds
    model: Forecast | None
    sentences: Sequence[str]
    advice: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values all through, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = new_table("what", "value")
        table.show_footer = table.show_header = False
        for name, value in (*_facts(self.machine), *_speeds(self.speeds)):
            table.add_row(name, value)
        tables = [table, *([] if self.model is None else [_forecast_table(self.model)])]
        return rendered(*tables, *self.sentences, *(f"To change: {text}" for text in self.advice))

    def plot(self, path: str) -> None:
        """Write a picture of the read bandwidth by threads. Raises what `require_plot` raises."""
        figure, (axes,) = new_figure(1)
        threads = [rate.threads for rate in self.speeds.reads]
        axes.plot(threads, [rate.bytes_per_s / 1e9 for rate in self.speeds.reads], "o-", label="read from RAM")
        axes.axhline(
            self.speeds.decode / 1e9,
            color="C1",
            linestyle="--",
            label=f"weights read while decoding, {self.machine.threads} threads",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(threads, [str(count) for count in threads])
        axes.minorticks_off()
        axes.set(xlabel="threads", ylabel="GB/s (higher is better)", ylim=0)
        axes.set_title(f"{self.machine.cpu}: read bandwidth")
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=100)


def diagnose(model: str | None = None, context: int = DEFAULT_CONTEXT, *, run: bool = False) -> Diagnosis:
    """Measures for some seconds. With ``run`` the model is loaded and measured too.

    Raises what `plan` and loading raise.
    """
    name = None if model is None else located(model)
    here, decoding = machine(), DecodeRates()
    samples = decoding.sample()
    reads = read_rates()
    samples += decoding.sample()
    products = product_rate()
    measured = _measured(name) if name is not None and run else None
    samples += decoding.sample()
    bundled = _measured(str(bundled_model()))
    samples += decoding.sample()
    decode = median(samples)
    speeds = Speeds(reads, decode, products, _overhead(bundled, decode))
    forecast = None if name is None else _forecast(name, context, speeds, measured)
    return Diagnosis(here, speeds, forecast, [*_sentences(here, speeds, forecast)], [*_advice(here, forecast)])


def _overhead(bundled: float, decode: float) -> float:
    """Seconds of a token in generate() beside reading weights at the rate ``decode``.

    Those of the bundled model, which decodes ``bundled`` tokens per second, and whose weights lie in the cache. What
    they would take from RAM is part of no forecast, so that models of its size are forecast right too.
    """
    (cpu,) = plan(str(bundled_model()), gpus=[]).devices
    return max(0.0, 1 / bundled - cpu.read_per_token / decode)


def _measured(model: str) -> float:
    """Tokens per second of decoding on the CPU from an empty context: the median."""
    from transformers import AutoModelForCausalLM

    from transformers_kt.cli.timing import random_tokens, timed_generate

    loaded = AutoModelForCausalLM.from_pretrained(model, kt_rules=AUTO, device_map=CPU)
    prompt = [random_tokens(1, loaded.config.vocab_size)]
    timed_generate(loaded, prompt, _TOKENS)  # the first call imports and allocates
    return 1 / median(timed_generate(loaded, prompt, _TOKENS).gaps)


def _forecast(model: str, context: int, speeds: Speeds, measured: float | None) -> Forecast:
    report: PlanReport = plan(model, gpus=[], context=context)
    (cpu,) = report.devices
    file = Path(model)
    files = [file] if file.is_file() else sorted(file.glob("*.gguf"))
    return Forecast(
        report.title,
        cpu.needed,
        cpu.read_per_token,
        speeds.tokens_per_s(cpu.read_per_token),
        max(speeds.most, speeds.decode) / cpu.read_per_token,  # kernels prefetch, plain reading does not
        measured,
        disk_rate(files[0]) if files else None,
    )


def _facts(here: Machine) -> Iterator[tuple[str, str]]:
    yield "CPU", here.cpu
    yield "kernels", f"{here.isa}; this CPU can run {', '.join(here.isas)}"
    smt = f", {here.cpus / here.cores:.0f} CPUs each" if here.cpus > here.cores else ""
    quota = f", quota of {here.quota:g} CPUs" if here.quota else ""
    yield "cores", f"{here.cores} that may be used{smt} (of {here.all_cpus} CPUs), {here.nodes} NUMA node(s){quota}"
    yield "threads", str(here.threads)
    yield "RAM", f"{format_bytes(here.ram)}, {format_bytes(here.free_ram)} free ({here.free_ram_source})"
    yield "swap", f"{format_bytes(here.swap)}, {format_bytes(here.swap_used)} in use" if here.swap else "none"
    yield "huge pages", here.huge_pages
    for gpu in here.gpus:
        yield (
            "GPU",
            f"{gpu['name']}, {gpu['free_mib']} of {gpu['total_mib']} MiB free, PCIe {gpu['pcie_generation']} x "
            f"{gpu['pcie_lanes']}, driver {gpu['driver']}",
        )
    if not here.gpus:
        yield "GPU", "none that nvidia-smi names"
    for hand_off in here.hand_offs:
        yield "hand-off", _hand_off(hand_off)
    if here.gpus and not here.hand_offs:
        yield "hand-off", "none: this torch sees no GPU"
    yield "Python", here.python
    for package in here.packages:
        yield package.name, f"{package.version or 'not installed'} ({package.wanted} is accepted)"


def _hand_off(found: HandOff) -> str:
    if found.is_fake:
        return f"{found.gpu} is a fake, computed by torch on the CPU; experts in RAM are computed between its layers"
    kernels = "kernels of Triton" if found.has_kernels else "torch operations, for triton is missing"
    return (
        f"{found.gpu} runs layers as {kernels}, as CUDA graphs when decoding; the host launches them, and computes "
        "experts in RAM meanwhile"
    )


def _speeds(speeds: Speeds) -> Iterator[tuple[str, str]]:
    for rate in speeds.reads:
        threads = "1 thread" if rate.threads == 1 else f"{rate.threads} threads"
        yield f"read, {threads}", f"{format_bytes(int(rate.bytes_per_s))}/s"
    yield "read, decoding", f"{format_bytes(int(speeds.decode))}/s of weights"
    yield "int8 products", f"{speeds.products / 1e9:,.0f} GOPS, weights in the cache"
    yield "generate() itself", f"{1e3 * speeds.overhead_s:.2f} ms a token"


def _forecast_table(model: Forecast) -> Table:
    table = new_table(model.title, "value")
    table.show_footer = False
    table.add_row("memory", f"{format_bytes(model.needed)}")
    table.add_row("a token reads", format_bytes(model.read_per_token))
    table.add_row("memory allows", f"{_shown(model.limit)} tokens/s")
    table.add_row("expected", f"{_shown(model.expected)} tokens/s")
    if model.measured is not None:
        share = model.measured / model.expected
        table.add_row("measured", f"{_shown(model.measured)} tokens/s, {share:.0%} of what is expected")
    if model.disk is not None:
        table.add_row("its disk", f"{format_bytes(int(model.disk))}/s")
    return table


def _sentences(here: Machine, speeds: Speeds, model: Forecast | None) -> Iterator[str]:
    enough, most = speeds.threads_enough, max(rate.threads for rate in speeds.reads)
    reached = "1 thread reaches" if enough == 1 else f"{enough} threads reach"
    more = "more will not help decoding" if enough < most else "there are no more to use"
    yield f"{reached} {_ENOUGH:.0%} of this machine's bandwidth, {format_bytes(int(speeds.most))}/s; {more}."
    lacking = [name for name in _BRINGS if name not in here.isas]
    if len(lacking) == len(_BRINGS):
        brings = "; ".join(f"{name} would bring {_BRINGS[name]}" for name in lacking)
        yield f"This CPU multiplies bytes without VNNI: {brings}. Decoding would be as fast."
    if here.gpus:
        yield "Speeds are those of the CPU alone; transformers-kt plan says what GPUs take from it."
    if model is not None:
        yield f"{model.title} would decode at about {_shown(model.expected)} tokens/s."
        return
    for family in families():
        for name, example in family.examples.items():
            speed = f"{name} would decode at about {_shown(speeds.tokens_per_s(example.read_per_token))} tokens/s"
            short = example.memory - here.ram
            yield f"{speed}." if short <= 0 else f"{speed}, with {format_bytes(short)} more RAM."


def _advice(here: Machine, model: Forecast | None) -> Iterator[str]:
    if here.isa != here.isas[0]:
        yield f"TRANSFORMERS_KT_ISA asks for {here.isa}; without it {here.isas[0]} is used."
    if here.cpus < here.all_cpus:
        yield f"only {here.cpus} of {here.all_cpus} CPUs may be used; an affinity mask (taskset, cpuset) says so."
    if here.quota and here.quota < here.cores:
        yield f"a control group leaves {here.quota:g} CPUs of {here.cores} cores; raise its quota (docker --cpus)."
    if here.huge_pages == "never":
        yield "huge pages are off; as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
    if here.swap_used > _MUCH_SWAPPED:
        yield f"{format_bytes(here.swap_used)} are swapped out; a model that is among it takes seconds for a token."
    if here.gpus and not here.hand_offs:
        yield "torch sees no GPU: install one that is built for CUDA (https://pytorch.org/get-started)."
    if any(not (found.is_fake or found.has_kernels) for found in here.hand_offs):
        yield "triton is missing, so GPUs compute slowly: pip install 'transformers-kt-experts[gpu]'"
    for package in here.packages:
        if not package.fits:
            yield f"{package.name} is {package.version or 'missing'}: pip install '{package.name}{package.wanted}'"
    if model is None:
        return
    if model.needed > here.free_ram:
        yield (
            f"{model.title} needs {format_bytes(model.needed)}, {format_bytes(model.needed - here.free_ram)} more than "
            "are free; free memory, or take a smaller quantization."
        )
    if model.measured is not None and model.measured < _TOO_SLOW * model.expected:
        load = os.getloadavg()[0]
        others = (
            f"other processes compete for the cores (load {load:.1f} on {here.cores})"
            if load > here.cores
            else "see whether print(model.kt_report) names the operation torch, and whether a page cache is all RAM has"
        )
        yield f"{model.title} decodes at {model.measured / model.expected:.0%} of what is expected; {others}."


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def doctor_command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Load MODEL and measure it: what is expected, and what is reached.")
    ] = False,
    context: Annotated[int, typer.Option(min=1, help="Tokens of conversation to count memory for.")] = DEFAULT_CONTEXT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    png: Annotated[
        str | None, typer.Option(help="Also write a picture of the bandwidth by threads to this file (.png, .svg).")
    ] = None,
) -> None:
    """Examine this machine: processor, memory, versions; measure how fast it reads and multiplies; say what to expect.

    Measures for about ten seconds, best while nothing else runs. With MODEL, it also says how fast that would answer
    and whether it fits. Ends with 3 if something should be changed, and says what.
    """
    if png is not None:
        require_plot(png)
    if run and model is None:
        raise typer.BadParameter("--run measures a model: name one")
    diagnosis = diagnose(model, context, run=run)
    print(json.dumps(diagnosis.to_dict(), indent=1) if as_json else diagnosis)
    if png is not None:
        diagnosis.plot(png)
    if diagnosis.advice:
        raise typer.Exit(NOT_ALL_WELL)
