"""``plan()``: what loading a model would do, from headers alone, on hardware that need not be there.

Made without torch and transformers, which together take ten times as long and as much memory as everything else here;
where `plain_config` or the family's outline does not know the model, they are asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers_kt.errors import InputError
from transformers_kt.families.from_gguf import config_values, notes_from_gguf
from transformers_kt.families.plain_config import plain_config, read_config
from transformers_kt.families.registry import dims_of, family_of
from transformers_kt.families.tensors import check_tensors
from transformers_kt.families.tree import ModelTree, tree_of
from transformers_kt.planning.costs import DEFAULT_CONTEXT, PREFILL_TOKENS, Costs, device_uses, plan_row
from transformers_kt.planning.decision import Decision, Machine, ModelRequest, decide
from transformers_kt.planning.device_map import PlacementRequest
from transformers_kt.planning.hardware import RAM, Bandwidths, Hardware, described_hardware, read_bandwidths
from transformers_kt.planning.operations import replaced_classes
from transformers_kt.planning.report import DeviceUse, PlanReport, shortages
from transformers_kt.planning.request import (
    MOOT_OPTIONS,
    SOURCE_OPTIONS,
    Request,
    read_request,
    rules_or_default,
    without,
)
from transformers_kt.rules import AUTO, KtRules, RuleList, load_rules

if TYPE_CHECKING:
    from transformers_kt.gguf.checkpoint import Checkpoint


def plan(
    model: str | os.PathLike[str] | None,
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    kt_rules: KtRules | None = None,
    device_map: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    gpus: Sequence[int | str] | None = None,
    ram: int | str | None = None,
    context: int = DEFAULT_CONTEXT,
    bandwidth: float | Sequence[float] | str | None = None,
    kt_cpu_layers: int | None = None,
    kt_gpu_experts: int | None = None,
    kt_expert_slots: int | str | None = None,
    kt_expert_profile: str | os.PathLike[str] | None = None,
    kt_prefill_stream_tokens: int | None = None,
    kt_cuda_graph: bool | None = None,
    **hub: Any,
) -> PlanReport:
    """What ``from_pretrained`` with the same arguments would do: which operation, where, in how much memory.

    Only headers are read. ``model``, ``gguf_path``, ``device_map``, ``max_memory``, what begins with ``kt_`` and the
    options of the hub (``revision``, ``token``, ...) are those of ``from_pretrained``; the model may be a GGUF file
    itself.

    ``gpus`` (one size each: ``["24GiB", "24GiB"]``; ``[]`` for none) and ``ram`` ("512GiB" or bytes) describe the
    machine to plan for; what is left out is as here and now. ``context`` is the number of tokens to have room for, up
    to what the model takes. ``bandwidth`` is what RAM reads, or RAM and each GPU, in GB/s, or "measure"; 100 and 900
    are assumed where nothing is said.

    Raises the errors that loading would raise, but not for want of memory and for tensor types without a kernel:
    those the report lists as ``problems``.
    """
    kt_rules = rules_or_default(kt_rules)
    placement = PlacementRequest.read(
        kt_rules,
        device_map,
        max_memory,
        kt_cpu_layers=kt_cpu_layers,
        kt_gpu_experts=kt_gpu_experts,
        kt_expert_slots=kt_expert_slots,
        kt_expert_profile=kt_expert_profile,
        kt_prefill_stream_tokens=kt_prefill_stream_tokens,
        kt_cuda_graph=kt_cuda_graph,
    )
    hardware = placement.limited(described_hardware(gpus, ram, placement.max_memory))
    if type(context) is not int or context < 1:
        raise InputError(f"context={context!r}; a number of tokens, at least 1, is accepted")
    rules = load_rules(kt_rules, replaced_classes())
    request = read_request(model, {"kt_rules": AUTO, "gguf_path": gguf_path, **hub})
    assert request is not None  # kt_rules is there
    checkpoint = request.open()
    checkpoint.require_weights()
    config, tree = _model(request, checkpoint, without(hub, (*SOURCE_OPTIONS, *MOOT_OPTIONS)), rules)
    slots = check_tensors(checkpoint, config)
    speeds = read_bandwidths(bandwidth)
    context = min(context, dims_of(config).context)
    costs = Costs(config, context)
    of_file = notes_from_gguf(checkpoint) if request.folder is None else ()
    asked = ModelRequest(request.title, checkpoint, config, slots, rules, placement, notes=of_file)
    machine = Machine(hardware, "there is", 'Name more with gpus= (--gpu), or pass device_map="cpu"')
    decision = decide(asked, tree, machine, costs.on_gpus)
    return _report(asked, decision, hardware, speeds, costs, context)


def _report(
    request: ModelRequest, decision: Decision, hardware: Hardware, speeds: Bandwidths, costs: Costs, context: int
) -> PlanReport:
    rows = tuple(plan_row(request.config, assignment, costs) for assignment in decision.assignments)
    devices = device_uses(decision.assignments, rows, hardware, speeds, costs, decision.gpu_experts)
    notes = (*_notes(devices, speeds), *decision.notes)
    problems = (*shortages(devices), *(f"Cannot be loaded: {problem}." for problem in decision.problems))
    return PlanReport(request.title, request.rules.source, context, rows, devices, notes, problems)


def _model(
    request: Request, checkpoint: Checkpoint, options: Mapping[str, Any], rules: RuleList
) -> tuple[Any, ModelTree]:
    """Config and tree of the model that ``request`` names; ``options`` are what is left of those of the call."""
    if not options:  # else they are values of the config, which transformers knows
        facts = config_values(checkpoint) if request.folder is None else read_config(request.folder, request.hub)
        config = None if facts is None else plain_config(facts)
        outline = None if config is None else family_of(config).outline
        if outline is not None and all(map(outline.knows_class, rules.class_names)):
            tree = outline.tree(config)
            if tree is not None:
                return config, tree
    from transformers_kt.planning import stock_model

    real_config, unknown = stock_model.resolved_config(request, None, options, checkpoint)
    if unknown:
        raise TypeError(f"plan() got unexpected arguments: {', '.join(unknown)}")
    return real_config, tree_of(stock_model.skeleton(real_config))


def _notes(devices: Sequence[DeviceUse], speeds: Bandwidths) -> list[str]:
    notes = []
    for how, of_what in speeds.unstated.items():
        if there := [name for name in of_what if name == RAM or len(devices) > 1]:
            notes.append(f"The bandwidth of {' and '.join(there)} is {how}; bandwidth= (--bandwidth) states it.")
    notes.append(f"Buffers are for {PREFILL_TOKENS} tokens at a time: generate(prefill_chunk_size={PREFILL_TOKENS}).")
    return notes
