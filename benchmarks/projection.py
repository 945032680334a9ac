"""What DeepSeek-R1 Q4_K_M should do on a machine with one GPU, from what a plan says is read and where.

    python benchmarks/projection.py                    # all machines of projection.json, as Markdown
    python benchmarks/projection.py --gpu build/gpu    # with shares that bench_gpu.py has measured

Bytes are the plan's. What part of a bandwidth or of a peak is reached is measured where somebody has: on CPUs from
results/, on GPUs from files of bench_gpu.py if there are any. The rest is assumed, in projection.json. Every share is
printed with where it comes from.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from on_gpu.report import markdown_table, read

import transformers_kt
from transformers_kt.families.registry import dims_of
from transformers_kt.gguf.checkpoint import open_checkpoint
from transformers_kt.planning.report import PlanReport
from transformers_kt.text import layer_number

HERE = Path(__file__).parent
PLACEMENTS = {"none": {"kt_gpu_experts": 0}, "layers that fit": {}}
PROMPTS = (512, 4096, 16384)
DEEP = 8192
"""Tokens of context where decoding is projected, beside none."""


class Value(NamedTuple):
    value: float
    source: str


@dataclass(frozen=True)
class Model:
    """What a plan does not say of a model: weights that a token is multiplied with, and the shape of its attention."""

    path: Path
    routed: int  # of the chosen experts of one layer
    all_routed: int  # of all experts of one layer
    other: int
    layers: int
    heads: int
    key_and_value: int  # values of an expanded key and value

    @classmethod
    def read(cls, path: Path, config: Any) -> Model:
        tensors = open_checkpoint(path).tensors
        sizes = {name: math.prod(info.shape) for name, info in tensors.items()}
        routed = [size for name, size in sizes.items() if "_exps." in name]
        moe_layers = sum("ffn_up_exps." in name for name in sizes)
        other = sum(sizes.values()) - sum(routed) - sizes["token_embd.weight"]
        dims = dims_of(config)
        all_routed = sum(routed) // moe_layers
        return cls(
            path,
            all_routed * dims.top_k // dims.experts,
            all_routed,
            other,
            dims.layers,
            config.num_attention_heads,
            config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim,
        )


@dataclass(frozen=True)
class Machine:
    """A machine of projection.json, with everything that is assumed or measured for it."""

    title: str
    plan: Mapping[str, Any]
    values: Mapping[str, Value]

    def __getattr__(self, name: str) -> float:
        return self.values[name].value

    def assumptions(self) -> list[dict[str, str]]:
        return [{"": name, "value": f"{each.value:.3g}", "from": each.source} for name, each in self.values.items()]


@dataclass(frozen=True)
class Load:
    """What of a model lies where, by a plan; bytes of a token, from an empty context."""

    cpu: int
    gpu: int
    shared: int
    """Of ``gpu``: shared experts of layers with experts in RAM, which are computed meanwhile."""
    kv_per_token: float
    layers_in_ram: int
    layers_on_gpu: int
    routed_in_ram: int
    """Bytes of all routed experts there."""

    @classmethod
    def of(cls, report: PlanReport) -> Load:
        uses = {use.device: use for use in report.devices}
        cpu, gpu = uses["cpu"], uses["cuda:0"]
        routed = {layer_number(row.module): row.device for row in report.rows if "routed experts" in row.parts}
        in_ram = [layer for layer, device in routed.items() if device == "cpu"]
        shared = [row for row in report.rows if row.module.endswith(".shared_experts")]
        return cls(
            cpu.read_per_token,
            gpu.read_per_token,
            sum(row.read_per_token for row in shared if layer_number(row.module) in in_ram),
            gpu.kv_cache / report.context,
            len(in_ram),
            len(routed) - len(in_ram),
            sum(row.parts.get("routed experts", 0) for row in report.rows if row.device == "cpu"),
        )


def machines(gpu_results: Path | None) -> list[Machine]:
    """Those of projection.json."""
    data = json.loads((HERE / "projection.json").read_text(encoding="utf-8"))
    shared = {name: Value(*pair) for name, pair in data["efficiencies"].items()}
    found = []
    for each in data["machines"]:
        name, why = each["cpu_results"]
        values = {
            "gpu_tflops": Value(*each["gpu_tflops"]),
            "link_gb_s": Value(*each["link_gb_s"]),
            "cores": Value(each["cores"], "the machine"),
            **cpu_values(name, why),
            **shared,
            **(measured_gpu_values(gpu_results, each["gpu_tflops"][0]) if gpu_results else {}),
        }
        ram, gpu = each["plan"]["bandwidth"]
        bandwidths = {
            kind: Value(speed, each["bandwidths_from"]) for kind, speed in (("ram_gb_s", ram), ("gpu_gb_s", gpu))
        }
        found.append(Machine(each["title"], each["plan"], {**bandwidths, **values}))
    return found


def cpu_values(name: str, why: str) -> dict[str, Value]:
    """Share of the read bandwidth in decoding, and GOPS of a core in prompts, of a whole model in results/."""
    results = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    ours = results["engines"]["transformers_kt"]
    with TemporaryDirectory() as folder:
        model = header(Path(folder), "v2-lite")
        report = transformers_kt.plan(model.path, gpus=[], ram="64GiB")
    (use,) = report.devices
    moe_layers = sum("routed experts" in row.parts for row in report.rows)
    operations = 2 * (model.other + moe_layers * model.routed)
    share = statistics.median(ours["decode_tok_s"]) * use.read_per_token / results["read_gb_s"]["median"] / 1e9
    gops = statistics.median(ours["prefill_512_tok_s"]) * operations / results["threads"] / 1e9
    source = f"results/{name}.json: {why}, a whole model of V2-Lite's size on {results['threads']} cores"
    return {"cpu_bandwidth": Value(share, source), "cpu_gops_a_core": Value(gops, source)}


def measured_gpu_values(folder: Path, peak_tflops: float) -> dict[str, Value]:
    """What bench_gpu.py has found in ``folder``; what it has not stays assumed."""
    found = {}
    contents = {name: (read(folder, name) or {}).get("tables", {}) for name in ("products", "handoff")}
    source = f"bench_gpu.py, {(read(folder, 'products') or {}).get('machine', {}).get('gpu', 'unknown GPU')}"
    few = [row for row in contents["products"].get("Products of few tokens", []) if row["tokens"] == 1]
    if few:
        total = sum(row["us"] for row in few)
        share = sum(row["of copy"] * row["us"] for row in few) / total
        found["gpu_bandwidth"] = Value(share, f"{source}: share of a copy, products of one token by their time")
    handoff = [row["us"] for row in contents["handoff"].get("Hand-off, a layer", []) if "staging" in row]
    if handoff:
        found["handoff_us"] = Value(min(handoff), f"{source}: the best way of launching")
    many = [row["bfloat16, TFLOPS"] for row in contents["products"].get("Products of many tokens", [])]
    if many:
        found["gpu_flops"] = Value(max(many) / peak_tflops, f"{source}: the best product in bfloat16, over its peak")
    return found


def header(folder: Path, dimensions: str, *, whole_kv_b: bool = False) -> Model:
    """A file of the size of a published one that holds its header and no weights."""
    import synthetic

    path = folder / f"{dimensions}.gguf"
    synthetic.write(dimensions, "q4_k_m", path, whole_kv_b=whole_kv_b, sparse=True)
    return Model.read(path, synthetic.MODELS[dimensions]())


class Decode(NamedTuple):
    """Milliseconds of a token."""

    gpu: float
    cpu: float
    handoff: float
    python: float

    @property
    def tokens_per_second(self) -> float:
        return 1000 / sum(self)


def decode(machine: Machine, load: Load, model: Model, cached: int) -> Decode:
    gpu_speed = machine.gpu_gb_s * machine.gpu_bandwidth * 1e6  # bytes a millisecond
    cpu = load.cpu / (machine.ram_gb_s * machine.cpu_bandwidth * 1e6)
    shared = min(load.shared / gpu_speed, cpu)  # hidden behind the CPU's experts
    gaps = model.layers * machine.kernels_a_layer * machine.kernel_gap_us / 1e3
    gpu = (load.gpu + cached * load.kv_per_token) / gpu_speed - shared + gaps
    return Decode(gpu, cpu, load.layers_in_ram * machine.handoff_us / 1e3, machine.python_ms)


class Prefill(NamedTuple):
    """Seconds of a prompt in one piece: the GPU's own part; routed experts by the CPU; by the GPU, through the link."""

    gpu: float
    by_cpu: float
    by_link: float

    @property
    def split(self) -> float:
        """Experts shared out so that CPU and link end together."""
        return self.gpu + (self.by_cpu * self.by_link / (self.by_cpu + self.by_link) if self.by_cpu else 0.0)

    @property
    def unsplit(self) -> float:
        return self.gpu + self.by_cpu


def prefill(machine: Machine, load: Load, model: Model, tokens: int) -> Prefill:
    flops = machine.gpu_tflops * machine.gpu_flops * 1e12
    weights = model.other + load.layers_on_gpu * model.routed
    attention = model.layers * model.heads * model.key_and_value * tokens * tokens  # 2 operations, half the keys
    dequantized = model.other + load.layers_on_gpu * model.all_routed
    moved = load.gpu + 2 * 2 * dequantized  # bfloat16, written and read
    gpu = (2 * weights * tokens + attention) / flops + moved / (machine.gpu_gb_s * machine.gpu_bandwidth * 1e9)
    gops = machine.cores * machine.cpu_gops_a_core * machine.cpu_scaling * 1e9
    operations = 2 * load.layers_in_ram * model.routed * tokens
    # The GPU multiplies what has come while more comes.
    by_link = max(load.routed_in_ram / (machine.link_gb_s * 1e9), operations / flops)
    return Prefill(gpu, operations / gops, by_link)


def text(gpu_results: Path | None = None) -> str:
    """Markdown: what to expect, where a token's time goes, and for each machine what that rests on."""
    expected, times, parts = [], [], []
    with TemporaryDirectory() as folder:
        model = header(Path(folder), "v3", whole_kv_b=True)
        for machine in machines(gpu_results):
            for placement, options in PLACEMENTS.items():
                load = Load.of(transformers_kt.plan(model.path, **machine.plan, **options))
                title = {"machine": machine.title, "experts on the GPU": placement}
                empty = decode(machine, load, model, 0)
                expected.append({**title, **_speeds(machine, load, model, empty)})
                times.append({**title, **{f"{part}, ms": value for part, value in empty._asdict().items()}})
            parts.append(f"## {machine.title}\n\n{markdown_table(machine.assumptions())}")
    return "\n".join([markdown_table(expected), "## A token\n\n" + markdown_table(times), *parts])


def _speeds(machine: Machine, load: Load, model: Model, empty: Decode) -> dict[str, Any]:
    """Tokens per second; of prompts with experts computed by the CPU, and in brackets shared with the GPU."""
    row: dict[str, Any] = {"decode": empty.tokens_per_second}
    row[f"decode at {DEEP:,}"] = decode(machine, load, model, DEEP).tokens_per_second
    for tokens in PROMPTS:
        seconds = prefill(machine, load, model, tokens)
        row[f"prompt of {tokens:,}"] = f"{tokens / seconds.unsplit:.0f} ({tokens / seconds.split:.0f})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=Path, help="folder that bench_gpu.py has written")
    options = parser.parse_args()
    sys.path.append(str(HERE.parent / "tests" / "support"))
    print(text(options.gpu))


if __name__ == "__main__":
    main()
