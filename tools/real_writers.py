#!/usr/bin/env python3
"""Read what llama.cpp itself writes: its converter and its quantizer on random models, compared with transformers.

    tools/real_writers.py                  # fetches 90 MB once, needs npm and some minutes
    tools/real_writers.py GLM-4.7-Flash    # one model anew; the table of docs/models.md takes the others' last results

Each model of tests/support/random_models.py is saved by transformers with the tokenizer of tiny-r1, converted by
llama.cpp's converter to F32, in one file and in shards, and quantized by its quantizer. Nothing is compiled: the
converter comes with the sources of llama-cpp-python, the quantizer with the prebuilt library of node-llama-cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests")]
import random_models  # noqa: E402
from golden.reference import dequantized_model, kl_divergence  # noqa: E402

from transformers_kt.assets import bundled_model  # noqa: E402

FOLDER = ROOT / "build" / "real_writers"
TABLE = ROOT / "docs" / "models.md"
SOURCES, LIBRARIES = "llama-cpp-python==0.3.36", "@node-llama-cpp/linux-x64@3.22.1"
MODELS = {
    "GLM-4.7-Flash": random_models.glm_lite_like,
    "Kimi-K2": random_models.kimi_like,
    "DeepSeek-V3, R1": random_models.v3_like,
    "DeepSeek-V2-Lite": random_models.v2_lite_like,
}
# What the converter looks for in a model of a kind: values of its config, tokens of its tokenizer.
WANTED = {
    random_models.glm_lite_like: (
        {"first_k_dense_replace": 1, "vocab_size": 544},
        ["[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"],
    )
}
TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE")
# Additions in another order are all that differs: tests/models/test_parity.py explains the figure.
FLOAT_TOLERANCE = 6e-4
# The converter names a tokenizer by the ids of one text, and knows that of no test.
CONVERT = """
import runpy, sys
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[1:]]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_type", "embedding_type")),
        *(
            (name, ctypes.c_bool)
            for name in ("requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry_run")
        ),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv_overrides", "type_overrides", "prune_layers")),
        ("max_buffer", ctypes.c_size_t),
    )


def fetch() -> tuple[Path, Path]:
    """The folders of llama.cpp's sources and of its libraries."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    sources = FOLDER / SOURCES.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"
    if not sources.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, "--dest", str(FOLDER), SOURCES], check=True)
        with tarfile.open(next(FOLDER.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(FOLDER, filter="data")
    libraries = FOLDER / "node" / "package" / "bins" / "linux-x64"
    if not libraries.exists():
        packed = subprocess.run(["npm", "pack", "--silent", LIBRARIES], cwd=FOLDER, check=True, capture_output=True)
        with tarfile.open(FOLDER / packed.stdout.decode().split()[-1]) as archive:
            archive.extractall(FOLDER / "node", filter="data")
    return sources, libraries


def convert(sources: Path, folder: Path, path: Path, *options: str) -> None:
    command = [sys.executable, "-c", CONVERT, str(folder), "--outtype", "f32", "--outfile", str(path), *options]
    environment = {"PYTHONPATH": f"{sources}:{sources / 'gguf-py'}", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=sources, env=environment, check=True, stdout=subprocess.DEVNULL)


def quantizer(libraries: Path) -> Any:
    """quantize(source, destination, name of the file type), by llama.cpp's library."""
    for name in ("libggml-base.so", "libggml.v*.so"):
        ctypes.CDLL(str(next(libraries.glob(name))), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(libraries.glob("libllama.v*.so"))))
    library.llama_model_quantize_default_params.restype = QuantizeParams
    log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    library.llama_log_set(silent := log_callback(lambda level, text, data: None), None)

    def quantize(source: Path, destination: Path, name: str, keep: object = silent) -> None:
        params = library.llama_model_quantize_default_params()
        params.ftype, params.nthread = gguf.LlamaFileType[f"MOSTLY_{name}"], 2
        paths = (str(source).encode(), str(destination).encode())
        if library.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
            raise RuntimeError(f"llama.cpp did not quantize {source} to {name}")

    return quantize


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """float32 (40, vocab)."""
    ids = torch.randint(3, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(ids).logits[0]
    return found


def read(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(None, gguf_path=path)


def measure(names: list[str]) -> None:
    """Keep a row of the table for each model. Raises `AssertionError` where F32 files are further off than additions
    are."""
    sources, libraries = fetch()
    quantize = quantizer(libraries)
    for name in names:
        make = MODELS[name]
        folder = FOLDER / make.__name__
        values, tokens = WANTED.get(make, ({}, []))
        stock = make(**values)
        stock.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(bundled_model())
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.save_pretrained(folder)
        path = FOLDER / f"{make.__name__}.gguf"
        convert(sources, folder, path)
        convert(sources, folder, path, "--split-max-tensors", "40")
        cells = [name]
        for source in (path, next(FOLDER.glob(f"{make.__name__}-00001-of-*.gguf"))):
            worst = (logits(read(source)) - logits(stock)).abs().max().item()
            assert worst < FLOAT_TOLERANCE, f"{source}: logits differ by {worst}"
            cells.append(f"{worst:.0e}")
        for file_type in TYPES:
            quantized = FOLDER / f"{make.__name__}-{file_type}.gguf"
            quantize(path, quantized, file_type)
            exact = logits(dequantized_model(quantized, stock.config))
            cells.append(f"{kl_divergence(exact, logits(read(quantized))).median().item():.1e}")
        print(*cells, flush=True)
        (FOLDER / f"{make.__name__}.json").write_text(json.dumps(cells))


HEADER = """# Models and what was read of them

Written by [tools/real_writers.py](../tools/real_writers.py), which has transformers save small random models, converts
them with llama.cpp's own converter and quantizes them with its quantizer. F32 in one file and in shards: the largest
difference of a logit to transformers' own model, where the logits spread by 3. Other columns are names of file types:
the median KL divergence, in nats, to transformers' model on the weights that the `gguf` package dequantizes. What is
left is how activations are rounded.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", choices=[*MODELS, []], help="all where none is named")
    logging.disable_progress_bar()
    measure(parser.parse_args().model or list(MODELS))
    kept = [FOLDER / f"{make.__name__}.json" for make in MODELS.values()]
    rows = [json.loads(path.read_text()) for path in kept if path.exists()]
    table = [["Model", "F32", "F32, shards", *TYPES], ["---"] * (3 + len(TYPES)), *rows]
    TABLE.write_text(HEADER + "".join(f"| {' | '.join(row)} |\n" for row in table), encoding="utf-8")


if __name__ == "__main__":
    main()
