#!/usr/bin/env python3
"""What quantizing costs: tiny-r1 in every type that llama.cpp's quantizer writes, measured for docs/quality.md.

    tools/quality_of_types.py              # half an hour; what is measured is kept, and not measured again
    tools/quality_of_types.py --document   # docs/quality.md and its picture alone, from what was kept

Needs what tools/real_writers.py needs. Figures are those of `transformers_kt.quality` against transformers' own float32
model, and the share of sums that are right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tools", "tools/tiny_r1", "tests", "tests/support")]
import real_writers  # noqa: E402
import task  # noqa: E402
from golden.reference import TINY_R1_NAME, config_of, dequantized_model, gguf_path  # noqa: E402

import transformers_kt  # noqa: E402
from transformers_kt.assets import bundled_model  # noqa: E402
from transformers_kt.families.deepseek.export import export_gguf  # noqa: E402

FOLDER = ROOT / "build" / "quality"
FLOAT, F32, LOGITS, RESULTS = (
    FOLDER / "tiny-r1",
    FOLDER / "tiny-r1-F32.gguf",
    FOLDER / "f32.npz",
    FOLDER / "results.json",
)
DOCUMENT, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality.png"
BLOCK = 32  # weights that share a scale in most types
SUMS, BATCH, TALKS, MAX_REPLY_TOKENS = 200, 50, 60, 128
# The quantizer refuses NVFP4, and no package of Python dequantizes Q1_0.
FILE_TYPES = [
    name.removeprefix("MOSTLY_")
    for name in gguf.LlamaFileType.__members__
    if name.startswith("MOSTLY_") and name not in ("MOSTLY_NVFP4", "MOSTLY_Q1_0")
]


@torch.no_grad()
def make_float_model() -> None:
    """Save tiny-r1 in float32.

    What the bundled file was quantized from is not kept, and its own weights stand on the grid of Q4_K, which would
    make that type look lossless. So each weight gets a random offset of up to half a step of a grid of 16 levels.
    """
    generator = torch.Generator().manual_seed(0)
    model = dequantized_model(gguf_path(TINY_R1_NAME), config_of(TINY_R1_NAME))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            blocks = parameter.view(-1, BLOCK)
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
            blocks += step * (torch.rand(blocks.shape, generator=generator) - 0.5)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    model.save_pretrained(FLOAT)
    tokenizer.save_pretrained(FLOAT)
    export_gguf(model, tokenizer, F32, name="tiny-r1")


def talks() -> dict[str, str]:
    """Held-out sums with their right answers, as conversations of one turn."""
    rng = random.Random("talks")
    found: dict[str, str] = {}
    while len(found) < TALKS:
        a, b = rng.randrange(task.MAX_NUMBER + 1), rng.randrange(task.MAX_NUMBER + 1)
        if task.is_held_out(a, b):
            turn = task.sum_turn(a, b, rng.choice(task.SUM_PHRASES))
            found[f"{a} + {b}"] = task.chat_prompt([], turn.question) + turn.reply
    return found


def accuracy(model: Any) -> float:
    """The share of held-out sums that greedy answers get right."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(), padding_side="left")
    questions = task.held_out_sums(SUMS)
    right = 0
    for start in range(0, SUMS, BATCH):
        part = questions[start : start + BATCH]
        prompts = tokenizer([prompt for prompt, _ in part], padding=True, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**prompts, max_new_tokens=MAX_REPLY_TOKENS, do_sample=False)
        replies = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])
        right += sum(task.answer_of(reply) == total for reply, (_, total) in zip(replies, part, strict=True))
    return right / SUMS


def measured(path: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(None, gguf_path=path)
    report = transformers_kt.quality(model, LOGITS)
    tensors = gguf.GGUFReader(path).tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    return {"bits": bits, "bytes": path.stat().st_size, "sums": accuracy(model), **report.to_dict()["overall"]}


def measure() -> None:
    """Quantize and measure one type after the other."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not F32.exists():
        make_float_model()
    if not LOGITS.exists():
        transformers_kt.save_logits(FLOAT, LOGITS, talks())
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    _, libraries = real_writers.fetch()
    quantize = real_writers.quantizer(libraries)
    for name in ["F32", *FILE_TYPES]:
        if name in results:
            continue
        path = F32 if name == "F32" else FOLDER / f"tiny-r1-{name}.gguf"
        if name != "F32":
            quantize(F32, path, name)
        results[name] = measured(path)
        RESULTS.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(results[name]), flush=True)
        if path != F32:
            path.unlink()


HEADER = f"""# What quantizing costs

Written by [tools/quality_of_types.py](../tools/quality_of_types.py): the bundled model in every type that llama.cpp's
quantizer writes, each against transformers' own model in float32 on the same {TALKS} held-out sums with their answers.
"Sums" is the share of {SUMS} other held-out sums that greedy answers get right. KL divergences are in nats; behind ± is
one standard error. What the columns mean: [commands](commands.md#quality).

![Mean and 99% KL divergence, and sums that are right, of each type](quality.png)

"""
NOTES = """
- **What it says of other models**: the order of the types, and that the mean is ruled by few tokens (compare the median
  and the 99th percentile). Not the height: a model of 8 million parameters that was trained for one task loses more
  with 2 bits than one of 671 billion. Measure yours: `transformers-kt quality YOURS --against ITS-ORIGINAL`.
- The float weights are those of the bundled file, each moved by up to half a step of a grid of 16 levels: what that
  file was made from is not kept, and its own weights would make Q4_K look lossless.
- {importance} are made only where the quantizer
  is told which inputs matter. It was told that all matter alike, and then takes other routines than without, so that
  these types do not compare with Q2_K and Q3_K, to which nothing was told. Published files were told from real texts.
- **Against llama.cpp**: on the same file we are nearer to float32 arithmetic with K and IQ types, and as near with
  Q8_0, Q4_0 and MXFP4, where both round activations alike ([models](models.md)). Two kinds of models llama.cpp computes
  otherwise than transformers does, also in F32: V2's group-limited routing (median KL 0.001 to 0.02 in random models)
  and Kimi-K2's YaRN (0.1 to 0.3). There transformers is the truth, and what we compute.
"""
COLUMNS = (
    "Type",
    "Bits per weight",
    "MB",
    "KL mean",
    "median",
    "99%",
    "Same top token, %",
    "Perplexity ratio",
    "Sums, %",
)


def write_document() -> None:
    results = json.loads(RESULTS.read_text())
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in sorted(results, key=lambda name: -results[name]["bits"]):
        found = results[name]
        share = {key: 100 * value for key, value in found["same_top"].items()}
        rows.append(
            [
                name,
                f"{found['bits']:.2f}",
                f"{found['bytes'] / 1e6:.1f}",
                f"{found['kl_mean']['value']:.2g} ± {found['kl_mean']['error']:.1g}",
                f"{found['kl_median']:.2g}",
                f"{found['kl_99']:.2g}",
                f"{share['value']:.1f} ± {share['error']:.1g}",
                f"{found['perplexity_ratio']['value']:.4g} ± {found['perplexity_ratio']['error']:.1g}",
                f"{100 * found['sums']:.1f}",
            ]
        )
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    DOCUMENT.write_text(
        HEADER + table + NOTES.format(importance=", ".join(real_writers.NEED_IMPORTANCE)), encoding="utf-8"
    )
    draw(results)


def draw(results: dict[str, Any]) -> None:
    """A line for each type, the smallest at the bottom: divergence left, sums right. 800 pixels wide."""
    from matplotlib.figure import Figure

    names = sorted((name for name in results if name != "F32"), key=lambda name: results[name]["bits"])
    figure = Figure(figsize=(8, 1.4 + 0.22 * len(names)), layout="constrained")
    divergence, sums = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(names))
    for key, marker, label in (("kl_mean", "o", "mean"), ("kl_99", "|", "99% of all tokens are below")):
        values = [results[name][key] for name in names]
        values = [value["value"] if isinstance(value, dict) else value for value in values]
        divergence.plot(values, places, marker, color="C0", label=label)
    divergence.set_yticks(places, [f"{name}  {results[name]['bits']:.1f}" for name in names], fontsize=8)
    divergence.set(xscale="log", xlabel="KL divergence, nats (lower is better)", ylabel="type, bits per weight")
    divergence.legend(frameon=False, fontsize=8, loc="upper right")
    shares = [100 * results[name]["sums"] for name in names]
    sums.barh(places, shares, color="C1")
    sums.axvline(100 * results["F32"]["sums"], color="black", linewidth=1)
    sums.set(xlabel="sums that are right, % (line: F32)", xlim=(0, 100))
    for axis in (divergence, sums):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(PICTURE, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", action="store_true", help="only write the document")
    logging.disable_progress_bar()
    if not parser.parse_args().document:
        measure()
    write_document()


if __name__ == "__main__":
    main()
