"""``transformers-kt plan``: see the plan before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_kt.cli.models import MODEL_HELP, located
from transformers_kt.errors import InputError
from transformers_kt.planning.costs import DEFAULT_CONTEXT
from transformers_kt.planning.plan import plan
from transformers_kt.planning.report import require_plot

_ARGUMENTS = (
    *("gguf_path", "kt_rules", "device_map", "ram", "context", "bandwidth", "kt_cpu_layers", "kt_gpu_experts"),
    *("kt_expert_slots", "kt_expert_profile", "kt_prefill_stream_tokens"),
)
OPTIONS = {"gpus": "--gpu", **{argument: f"--{argument.replace('_', '-')}" for argument in _ARGUMENTS}}
"""Arguments of `plan`, as messages name them -> options of the command."""


def plan_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} With --gguf-path: the folder or hub id with its config."),
    ],
    gguf_path: Annotated[
        str | None, typer.Option(help="The weights: file, folder, any shard, or hub org/repo:file.gguf.")
    ] = None,
    kt_rules: Annotated[
        str | None,
        typer.Option(
            help="auto, a YAML file, or the name of bundled rules. Default: TRANSFORMERS_KT_RULES, else auto."
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, balanced, balanced_low_0, sequential, cpu, cuda:0, or a JSON object of such devices."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Memory of each GPU to plan for, e.g. 24GiB,24GiB, or none. Default: what is here."),
    ] = None,
    ram: Annotated[str | None, typer.Option(help="RAM to plan for, e.g. 512GiB. Default: what is free here.")] = None,
    context: Annotated[int, typer.Option(help="Tokens to have room for.")] = DEFAULT_CONTEXT,
    bandwidth: Annotated[
        str | None, typer.Option(help="GB/s that RAM, or RAM and each GPU read, e.g. 400,936; or measure.")
    ] = None,
    kt_cpu_layers: Annotated[
        int | None,
        typer.Option(help="Keep the routed experts of the first N layers in RAM, as llama.cpp's --n-cpu-moe."),
    ] = None,
    kt_gpu_experts: Annotated[
        int | None, typer.Option(help="Give the routed experts of the last N layers that have some to the GPUs.")
    ] = None,
    kt_expert_slots: Annotated[
        str | None,
        typer.Option(
            help="Put so many experts of each layer into the memory of its GPU too: a number, a size on each GPU "
            "such as 4GiB, or auto for what is left there."
        ),
    ] = None,
    kt_expert_profile: Annotated[
        Path | None, typer.Option(help="Which experts these are at first: a file of transformers-kt profile.")
    ] = None,
    kt_prefill_stream_tokens: Annotated[
        int | None,
        typer.Option(help="From how many tokens on experts in RAM go to the GPU for a prompt; 0 for never."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[str | None, typer.Option(help="Also write a picture to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Show what loading MODEL would do: which operation computes what, where, in how much memory, and how fast.

    Reads headers only. Neither the weights nor the hardware that is named need be there in full. Routed experts are the
    parts of a layer of which each token takes a few.
    """
    if plot is not None:
        require_plot(plot)
    report = plan(
        located(model),
        gguf_path=gguf_path,
        kt_rules=kt_rules,
        device_map=_device_map(device_map),
        gpus=_sizes(gpu),
        ram=ram,
        context=context,
        bandwidth=bandwidth,
        kt_cpu_layers=kt_cpu_layers,
        kt_gpu_experts=kt_gpu_experts,
        kt_expert_slots=_slots(kt_expert_slots),
        kt_expert_profile=kt_expert_profile,
        kt_prefill_stream_tokens=kt_prefill_stream_tokens,
    )
    print(json.dumps(report.to_dict(), indent=1) if as_json else report)
    if plot is not None:
        report.plot(plot)


def _device_map(text: str | None) -> Any:
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"--device-map {text!r} is no JSON: {error}") from None


def _slots(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() else text


def _sizes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [] if text == "none" else [size.strip() for size in text.split(",")]
