"""``plan()``: what loading a model would do, from headers alone, on hardware that need not be there.

Made without torch and transformers, which together take ten times as long and as much memory as everything else here;
where `model_config` or `outlines` does not know the model, they are asked.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers_kt import assignments as assigning
from transformers_kt import placement
from transformers_kt.assignments import Assignment
from transformers_kt.device_map import PlacementWish, bytes_on_gpu, require_devices
from transformers_kt.errors import InputError, UnsupportedTypeError
from transformers_kt.gguf.config import config_values
from transformers_kt.gguf.names import check_tensors
from transformers_kt.model_config import plain_config, read_config
from transformers_kt.model_tree import ModelTree, tree_of
from transformers_kt.operations import OPERATIONS
from transformers_kt.outlines import is_known_class, outline
from transformers_kt.placement import CPU, FastMemory, Hardware
from transformers_kt.plan_report import DeviceUse, PlanReport, PlanRow, shortages
from transformers_kt.request import MOOT_OPTIONS, SOURCE_OPTIONS, Request, read_request, without
from transformers_kt.rules import AUTO, TORCH, KtRules, Plan, RuleList, load_rules

if TYPE_CHECKING:
    from transformers_kt.gguf.checkpoint import Checkpoint
    from transformers_kt.gguf.reader import TensorInfo

DEFAULT_CONTEXT = 32768

_GPU = "cuda:"
# What is there where a driver of NVIDIA, of AMD, or of either under WSL is loaded.
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_RAM, _GPUS = "RAM", "GPUs"  # in notes

# Bytes per second, where nobody says. Eight channels of DDR4 or two of fast DDR5 read about 100 GB/s, a graphics card
# with 24 GB some 900.
_ASSUMED_RAM_BANDWIDTH = 100e9
_ASSUMED_GPU_BANDWIDTH = 900e9
_MEASURED_BYTES = 1 << 28
_MEASURED_ROUNDS = 3

# What CUDA itself takes on a card once a process computes there: context, libraries, workspaces.
_CUDA_BYTES = 512 << 20
# Work buffers are for this many tokens at once, what generate(prefill_chunk_size=512) keeps longer prompts to.
_PREFILL_TOKENS = 512
_CPU_FLOAT_BYTES = 4  # activations, cache and stock modules: float32 on the CPU, 16 bits on a GPU
_GPU_FLOAT_BYTES = 2
_LATENTS = ".kv_a_proj_with_mqa.weight"  # makes the latents of one layer
_EXPERT_ROLES = ("gate", "up", "down")


def plan(
    model: str | os.PathLike[str] | None,
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    kt_rules: KtRules = AUTO,
    device_map: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    gpus: Sequence[int | str] | None = None,
    ram: int | str | None = None,
    context: int = DEFAULT_CONTEXT,
    bandwidth: float | Sequence[float] | str | None = None,
    kt_cpu_layers: int | None = None,
    kt_gpu_experts: int | None = None,
    **hub: Any,
) -> PlanReport:
    """What ``from_pretrained`` with the same arguments would do: which operation, where, in how much memory.

    Only headers are read. ``model``, ``gguf_path``, ``kt_rules``, ``device_map``, ``max_memory``, ``kt_cpu_layers``,
    ``kt_gpu_experts`` and the options of the hub (``revision``, ``token``, ...) are those of ``from_pretrained``; the
    model may be a GGUF file itself.

    ``gpus`` (one size each: ``["24GiB", "24GiB"]``; ``[]`` for none) and ``ram`` ("512GiB" or bytes) describe the
    machine to plan for; what is left out is as here and now. ``context`` is the number of tokens to have room for, up
    to what the model takes. ``bandwidth`` is what RAM reads, or RAM and each GPU, in GB/s, or "measure"; 100 and 900
    are assumed where nothing is said.

    With GPUs, this plans what later versions will run: this one computes on the CPU.

    Raises the errors that loading would raise, but not for want of memory and for tensor types without a kernel:
    those the report lists as ``problems``.
    """
    wish = PlacementWish.read(kt_rules, device_map, max_memory, kt_cpu_layers, kt_gpu_experts)
    hardware = wish.limited(_hardware(gpus, ram, wish.max_memory))
    if type(context) is not int or context < 1:
        raise InputError(f"context={context!r}; a number of tokens, at least 1, is accepted")
    rules = load_rules(kt_rules, OPERATIONS)
    request = read_request(model, {"kt_rules": AUTO, "gguf_path": gguf_path, **hub})
    assert request is not None  # kt_rules is there
    checkpoint = request.open()
    config, tree = _model(request, checkpoint, without(hub, (*SOURCE_OPTIONS, *MOOT_OPTIONS)), rules)
    slots, tensors = check_tensors(checkpoint, config), checkpoint.tensors
    speeds = _bandwidths(bandwidth)
    context = min(context, config.max_position_embeddings)
    costs = _Costs(config, context)

    is_auto, layers = rules.source == AUTO, config.num_hidden_layers
    chosen = wish.settled(is_auto, tree, layers, slots, tensors, hardware, costs.on_gpus)
    found = assigning.settled_plan(tree, rules, OPERATIONS, None, chosen)
    require_devices(
        found, hardware.capacities, chosen is not None, 'Name more with gpus= (--gpu), or pass device_map="cpu"'
    )
    assignments = assigning.assign_tensors(found, tree, slots, tensors)
    assigning.require_supported(tree, config, assignments, OPERATIONS)
    problems = _unsupported_types(assignments)
    rows = tuple(_row(config, assignment, costs) for assignment in assignments)
    devices = _device_uses(assignments, rows, hardware, speeds, costs)
    notes = (*_notes(found, devices, speeds), *found.notes)
    return PlanReport(request.title, rules.source, context, rows, devices, notes, (*shortages(devices), *problems))


def _model(
    request: Request, checkpoint: Checkpoint, options: Mapping[str, Any], rules: RuleList
) -> tuple[Any, ModelTree]:
    """Config and tree of the model that ``request`` names; ``options`` are what is left of those of the call."""
    if not options:  # else they are values of the config, which transformers knows
        facts = config_values(checkpoint) if request.folder is None else read_config(request.folder, request.hub)
        config = None if facts is None else plain_config(facts)
        tree = None if config is None else outline(config)
        if tree is not None and all(map(is_known_class, rules.class_names)):
            return config, tree
    from transformers_kt import integration

    real_config, unknown = integration.resolved_config(request, None, options, checkpoint)
    if unknown:
        raise TypeError(f"plan() got unexpected arguments: {', '.join(unknown)}")
    return real_config, tree_of(integration.skeleton(real_config))


class _Costs:
    """Sizes that follow from config and context."""

    def __init__(self, config: Any, context: int) -> None:
        self.active_share: float = config.num_experts_per_tok / config.n_routed_experts
        self.latent_values: int = context * (config.kv_lora_rank + config.qk_rope_head_dim)  # per layer
        tokens = min(context, _PREFILL_TOKENS)
        self.work_values: int = tokens * _values_per_token(config) + config.vocab_size
        self.on_gpus = FastMemory(self.latent_values * _GPU_FLOAT_BYTES, self.buffers("cuda:0"))

    def kv_cache(self, device: str) -> int:
        """Bytes per layer: a latent and a rotary key for each token of the context."""
        return self.latent_values * _float_bytes(device)

    def buffers(self, device: str) -> int:
        return self.work_values * _float_bytes(device) + (0 if device == CPU else _CUDA_BYTES)


def _float_bytes(device: str) -> int:
    return _CPU_FLOAT_BYTES if device == CPU else _GPU_FLOAT_BYTES


def _values_per_token(config: Any) -> int:
    """Activations of one token that are alive at once in a layer, all counted, whatever could share its place.

    The residual stream, its normed copy and the outputs of both halves of the layer; queries, queries in the space of
    latents, what attention gives there and per head; both intermediates of the widest MLP.
    """
    nope, rope, latent = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    attention = config.num_attention_heads * ((nope + rope) + (latent + rope) + latent + config.v_head_dim)
    active = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    widest = max(config.intermediate_size, active)
    return int(4 * config.hidden_size + attention + 2 * widest)


def _hardware(gpus: Sequence[int | str] | None, ram: int | str | None, max_memory: Mapping[str, int]) -> Hardware:
    if isinstance(gpus, str):
        gpus = [gpus]
    here = _free_gpu_memory() if gpus is None else ()
    if here:
        sizes = here
    elif gpus is None:  # max_memory alone can describe a machine
        numbers = [int(device.removeprefix(_GPU)) for device in max_memory if device.startswith(_GPU)]
        sizes = tuple(max_memory.get(f"{_GPU}{number}", 0) for number in range(max(numbers, default=-1) + 1))
    else:
        sizes = tuple(placement.parse_bytes(size, f"gpus[{number}]") for number, size in enumerate(gpus))
    if ram is None:
        return Hardware(sizes, max_memory.get(CPU, placement.free_memory().nbytes))
    return Hardware(sizes, placement.parse_bytes(ram, "ram"))


def _free_gpu_memory() -> tuple[int, ...]:
    """Bytes free on each GPU of this machine."""
    is_driverless = sys.platform == "linux" and not any(map(os.path.exists, _GPU_DRIVERS))
    if is_driverless and "torch" not in sys.modules:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))


class _Bandwidths(NamedTuple):
    """Bytes per second, and which of them nobody stated: "assumed" or "measured" -> of what."""

    ram: float
    gpu: float
    unstated: Mapping[str, Sequence[str]]


def _bandwidths(bandwidth: float | Sequence[float] | str | None) -> _Bandwidths:
    if bandwidth is None:
        return _Bandwidths(_ASSUMED_RAM_BANDWIDTH, _ASSUMED_GPU_BANDWIDTH, {"assumed": (_RAM, _GPUS)})
    if bandwidth == "measure":
        if _free_gpu_memory():
            measured = _measured_bandwidth(CPU), _measured_bandwidth("cuda:0")
            return _Bandwidths(*measured, {"measured on this machine": (_RAM, _GPUS)})
        unstated = {"measured on this machine": (_RAM,), "assumed": (_GPUS,)}
        return _Bandwidths(_measured_bandwidth(CPU), _ASSUMED_GPU_BANDWIDTH, unstated)
    try:
        given = [bandwidth] if isinstance(bandwidth, int | float) else bandwidth
        numbers = [float(number) for number in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 < number < math.inf for number in numbers):
        raise InputError(
            f"bandwidth={bandwidth!r}; GB/s of RAM (400), of RAM and each GPU (400, 936), or 'measure' is accepted"
        )
    if len(numbers) == 1:
        return _Bandwidths(1e9 * numbers[0], _ASSUMED_GPU_BANDWIDTH, {"assumed": (_GPUS,)})
    return _Bandwidths(1e9 * numbers[0], 1e9 * numbers[1], {})


def _measured_bandwidth(device: str) -> float:
    """Bytes per second that torch reads in a sum, the best of a few rounds."""
    import torch

    values = torch.ones(_MEASURED_BYTES // 4, dtype=torch.float32, device=device)
    times = []
    for _ in range(_MEASURED_ROUNDS):
        start = time.perf_counter()
        values.sum().item()
        times.append(time.perf_counter() - start)
    return _MEASURED_BYTES / min(times)


def _unsupported_types(assignments: Sequence[Assignment]) -> tuple[str, ...]:
    problems: dict[str, str] = {}  # one per type: 58 layers would say the same
    for assignment in assignments:
        try:
            assigning.check_types([assignment], OPERATIONS)
        except UnsupportedTypeError as error:
            types = {info.ggml_type for info in assignment.tensors.values()}
            problems.setdefault(f"{assignment.entry.op} {sorted(types)}", f"Cannot be loaded: {error}.")
    return tuple(problems.values())


def _row(config: Any, assignment: Assignment, costs: _Costs) -> PlanRow:
    entry = assignment.entry
    stored = {
        key: _bytes_of(entry.op, entry.device, f"{entry.module}.{key}", info)
        for key, info in assignment.tensors.items()
    }
    nbytes = sum(stored.values())
    if entry.op in OPERATIONS:
        nbytes = OPERATIONS[entry.op].memory_needed(assignment.tensors, config)
    scale = nbytes / (sum(stored.values()) or 1)
    parts: dict[str, int] = {}
    read = 0.0
    for key, info in assignment.tensors.items():
        part = _part(f"{entry.module}.{key}")
        parts[part] = parts.get(part, 0) + int(scale * stored[key])
        read += scale * stored[key] * _read_share(f"{entry.module}.{key}", info.shape, costs)
    types = tuple(sorted({info.ggml_type.name for info in assignment.tensors.values()}))
    return PlanRow(entry.module, entry.op, entry.device, types, nbytes, int(read), entry.rule, parts)


def _bytes_of(op: str, device: str, key: str, info: TensorInfo) -> int:
    if op == TORCH:  # norms and routers, F32 in every file, stay float32 on a GPU too
        return math.prod(info.shape) * (_CPU_FLOAT_BYTES if info.ggml_type.name == "F32" else _float_bytes(device))
    return info.nbytes if device == CPU else bytes_on_gpu(key, info)


def _read_share(key: str, shape: Sequence[int], costs: _Costs) -> float:
    """How much of a tensor one token reads: the active experts, one row of the embedding, all of others."""
    if _is_routed(key):
        return costs.active_share
    return 1 / shape[0] if _module_of(key).endswith("embed_tokens") else 1.0


def _part(key: str) -> str:
    """Which of PARTS a tensor belongs to."""
    if _is_routed(key):
        return "routed experts"
    if ".mlp." in key:
        return "dense and shared experts"
    is_outside = _module_of(key).rpartition(".")[2] in ("embed_tokens", "lm_head")
    return "embedding and head" if is_outside else "attention"


def _is_routed(key: str) -> bool:
    return key.rpartition(".")[2] in _EXPERT_ROLES


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def _device_uses(
    assignments: Sequence[Assignment],
    rows: Sequence[PlanRow],
    hardware: Hardware,
    speeds: _Bandwidths,
    costs: _Costs,
) -> tuple[DeviceUse, ...]:
    kv_caches = dict.fromkeys(hardware.capacities, 0)
    for assignment in assignments:
        entry = assignment.entry
        # Where attention is in pieces, its cache lies where the latents are made.
        latents = sum(f"{entry.module}.{key}".endswith(_LATENTS) for key in assignment.tensors)
        kv_caches[entry.device] += latents * costs.kv_cache(entry.device)
    uses = []
    for device, capacity in hardware.capacities.items():
        own = [row for row in rows if row.device == device]
        uses.append(
            DeviceUse(
                device,
                capacity,
                weights=sum(row.nbytes for row in own),
                kv_cache=kv_caches[device],
                buffers=costs.buffers(device) if own or device == CPU else 0,
                read_per_token=sum(row.read_per_token for row in own),
                bandwidth=speeds.ram if device == CPU else speeds.gpu,
            )
        )
    return tuple(uses)


def _notes(found: Plan, devices: Sequence[DeviceUse], speeds: _Bandwidths) -> list[str]:
    notes = []
    for how, of_what in speeds.unstated.items():
        if there := [name for name in of_what if name == _RAM or len(devices) > 1]:
            notes.append(f"The bandwidth of {' and '.join(there)} is {how}; bandwidth= (--bandwidth) states it.")
    notes.append(f"Buffers are for {_PREFILL_TOKENS} tokens at a time: generate(prefill_chunk_size={_PREFILL_TOKENS}).")
    if any(entry.device != CPU for entry in found.entries):
        notes.append('GPUs are planned, not yet used: this version loads with device_map="cpu" only.')
    return notes
