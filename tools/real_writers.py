#!/usr/bin/env python3
"""Read what llama.cpp itself writes: its converter and its quantizer on random models, compared with transformers.

    tools/real_writers.py --llama-python INTERPRETER    # writes docs/models.md; needs npm, 90 MB and half an hour
    tools/real_writers.py --llama-python INTERPRETER --golden    # the archive of tests/golden/real_writers.py, then

Each model of tests/support/random_models.py is saved by transformers with the tokenizer of tiny-r1, converted by
llama.cpp's converter to F32 in three layouts, and quantized by its quantizer. Nothing is compiled: the converter comes
with the sources of llama-cpp-python, the quantizer with the prebuilt library of node-llama-cpp. INTERPRETER is a Python
that has llama-cpp-python, which computes llama.cpp's own logits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests")]
import random_models  # noqa: E402
from golden import real_writers as golden  # noqa: E402
from golden.reference import dequantized_model, kl_divergence  # noqa: E402

from transformers_kt.assets import bundled_model  # noqa: E402

FOLDER = ROOT / "build" / "real_writers"
TABLE = ROOT / "docs" / "models.md"
SOURCES, LIBRARIES = "llama-cpp-python==0.3.36", "@node-llama-cpp/linux-x64@3.22.1"


class Model(NamedTuple):
    """``builder`` in random_models.py, with ``overrides`` for what the converter wants of such a config, and ``tokens``
    that it looks for in the tokenizer. ``scores`` stand in published configs; transformers does not save them.
    ``options`` are the converter's."""

    builder: str
    scores: str = "sigmoid"
    overrides: dict[str, Any] = {}  # noqa: RUF012
    tokens: Sequence[str] = ()
    options: Sequence[str] = ()
    has_whole_kv_b: bool = True


MODELS = {
    "DeepSeek-V2-Lite": Model("v2_lite_like", "softmax"),
    "DeepSeek-V2": Model("v2_like", "softmax"),
    "DeepSeek-V3, R1": Model("v3_like"),
    "DeepSeek-V3.2": Model("v32_like", options=["--no-mtp"], has_whole_kv_b=False),
    "Moonlight": Model("moonlight_like"),
    "Kimi-K2": Model("kimi_like"),
    "GLM-4.7-Flash": Model(
        "glm_lite_like",
        "sigmoid",
        {"first_k_dense_replace": 1, "vocab_size": 544},
        ["[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"],
    ),
}
TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_S", "MXFP4_MOE")
SHARDED_TYPES = ("Q8_0", "Q4_K_M", "IQ4_XS")
ONE, SHARDS, WHOLE = "one file", "three shards", "one file, whole kv_b"
# Each model in three types, each type at least once, both forms of kv_b: what tests can afford.
GOLDEN_TYPES, GOLDEN_PER_MODEL = (*TYPES, "Q6_K", "IQ4_NL", "IQ2_XS", "Q5_0", "Q4_1"), 3
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "IQ3_XXS", "IQ3_XS")
"""What the quantizer makes only where it is told which inputs matter."""
# Additions in another order are all that differs: tests/models/test_parity.py explains the figure.
FLOAT_TOLERANCE = 6e-4
NEW_TOKENS = 16
# The converter names a tokenizer by the ids of one text, and knows that of no test. Until April 2025 it kept kv_b as it
# is, for attention that expands its keys.
CONVERT = """
import runpy, sys
import conversion.base
from conversion.deepseek import DeepseekV2Model, DeepseekV32Model
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
DeepseekV32Model.set_vocab = conversion.base.TextModel._set_vocab_gpt2  # without the demand for an attribute
if sys.argv[1] == "whole":
    split, parameters = DeepseekV2Model.modify_tensors, DeepseekV2Model.set_gguf_parameters

    def modify_tensors(self, data, name, bid):
        whole = name.endswith("kv_b_proj.weight")
        yield from (super(DeepseekV2Model, self).modify_tensors if whole else split.__get__(self))(data, name, bid)

    def set_gguf_parameters(self):
        parameters(self)
        values = self.gguf_writer.kv_data[0]
        for name in ("key_length", "value_length"):
            values[f"deepseek2.attention.{name}"] = values.pop(f"deepseek2.attention.{name}_mla")
        values["deepseek2.attention.head_count_kv"].value = self.hparams["num_attention_heads"]

    DeepseekV2Model.modify_tensors, DeepseekV2Model.set_gguf_parameters = modify_tensors, set_gguf_parameters
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


class Importance(ctypes.Structure):
    """llama_model_imatrix_data of llama.h: of one tensor, a number for each of its inputs."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))

    @classmethod
    def all_alike(cls, path: Path) -> ctypes.Array[Importance]:
        """Ones for each tensor of the file, ended by an entry without a name."""
        entries = []
        for tensor in gguf.GGUFReader(path).tensors:
            size = int(tensor.shape[0]) * int(tensor.shape[2] if len(tensor.shape) > 2 else 1)
            entries.append(cls(tensor.name.encode(), (ctypes.c_float * size)(*[1.0] * size), size))
        return (cls * (len(entries) + 1))(*entries, cls())


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("nthread", "ftype", "output_type", "embedding_type")),
        *(
            (name, ctypes.c_bool)
            for name in ("requantize", "quantize_output", "only_copy", "pure", "keep_split", "dry_run")
        ),
        ("imatrix", ctypes.POINTER(Importance)),
        *((name, ctypes.c_void_p) for name in ("kv_overrides", "type_overrides", "prune_layers")),
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


def convert(sources: Path, folder: Path, path: Path, *options: str, kv_b: str = "split") -> None:
    command = [sys.executable, "-c", CONVERT, kv_b, str(folder), "--outtype", "f32", "--outfile", str(path), *options]
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
        params.keep_split = "-of-" in source.name
        if name in NEED_IMPORTANCE:
            params.imatrix = Importance.all_alike(source)
        paths = (str(source).encode(), str(destination).encode())
        if library.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
            raise RuntimeError(f"llama.cpp did not quantize {source} to {name}")

    return quantize


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """float32 (tokens, vocab)."""
    found: torch.Tensor = model(golden.prompt(model.config.vocab_size), use_cache=False).logits[0]
    return found


def read(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(None, gguf_path=path)


def logits_of_llama_cpp(interpreter: str, vocab: int, paths: Sequence[Path]) -> dict[Path, torch.Tensor]:
    ids = ",".join(map(str, golden.prompt(vocab)[0].tolist()))
    out = FOLDER / "llama-logits.npz"
    subprocess.run([interpreter, str(ROOT / "tools" / "llama_logits.py"), str(out), ids, *map(str, paths)], check=True)
    with np.load(out) as found:
        return {path: torch.from_numpy(found[path.name]) for path in paths}


def require_same_answer(path: Path, stock: Any, ours: Any) -> None:
    """Greedy text, as far as the best token leads by more than additions in another order can change."""
    prompt = golden.prompt(stock.config.vocab_size)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    wanted = stock.generate(prompt, output_logits=True, **options)
    found = ours.generate(prompt, **options).sequences[0, prompt.shape[1] :].tolist()
    for place, (token, row) in enumerate(
        zip(wanted.sequences[0, prompt.shape[1] :].tolist(), wanted.logits, strict=True)
    ):
        if row[0].topk(2).values.diff().abs() < 2 * FLOAT_TOLERANCE:
            return
        assert found[place] == token, f"{path}: token {place} of the answer is {found[place]}, transformers' {token}"


def float_files(sources: Path, name: str, stock: Any) -> dict[str, Path]:
    """Layout -> the F32 file, or the first of three, that the converter makes of ``stock``."""
    model = MODELS[name]
    folder, path = FOLDER / model.builder, FOLDER / f"{model.builder}.gguf"
    stock.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    tokenizer.add_tokens(list(model.tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    _add(folder / "tokenizer_config.json", {"add_bos_token": True})
    _add(folder / "config.json", {"scoring_func": model.scores})
    convert(sources, folder, path, *model.options)
    files = {ONE: path}
    each = math.ceil(len(gguf.GGUFReader(path).tensors) / 3)
    convert(sources, folder, path, *model.options, "--split-max-tensors", str(each))
    files[SHARDS] = FOLDER / f"{model.builder}-00001-of-00003.gguf"
    if model.has_whole_kv_b:
        files[WHOLE] = FOLDER / f"{model.builder}-whole.gguf"
        convert(sources, folder, files[WHOLE], *model.options, kv_b="whole")
    return files


def _add(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def quantized(source: Path, file_type: str) -> Path:
    """Where the file goes; of three files the first."""
    first = "-00001-of-00003"
    stem = source.stem.removesuffix(first)
    return source.with_name(f"{stem}-{file_type}{first if first in source.stem else ''}.gguf")


def measure(names: Sequence[str], interpreter: str) -> None:
    """Keep rows of the table. Raises `AssertionError` where F32 files are further off than additions are, or answer
    otherwise, and where a file in shards gives other bits."""
    sources, libraries = fetch()
    quantize = quantizer(libraries)
    for name in names:
        model = MODELS[name]
        stock = getattr(random_models, model.builder)(**model.overrides)
        files = float_files(sources, name, stock)
        for layout, source in files.items():
            for file_type in SHARDED_TYPES if layout == SHARDS else {*TYPES, *golden_types(name)}:
                target = quantized(source, file_type)
                # For shards the quantizer adds numbers itself.
                quantize(source, target.with_name(target.name.replace("-00001-of-00003.gguf", "")), file_type)
        alone = [source for layout, source in files.items() if layout != SHARDS]
        paths = [path for source in alone for path in (source, *(quantized(source, each) for each in TYPES))]
        theirs = logits_of_llama_cpp(interpreter, stock.config.vocab_size, paths)
        reference = logits(stock)
        rows, bits = [], {}
        for layout, source in files.items():
            ours = read(source)
            worst = (logits(ours) - reference).abs().max().item()
            assert worst < FLOAT_TOLERANCE, f"{source}: logits differ by {worst}"
            require_same_answer(source, stock, ours)
            cells = [name, layout, f"{worst:.0e}"]
            if layout == SHARDS:
                assert torch.equal(logits(ours), bits["F32"]), source
                for file_type in SHARDED_TYPES:
                    assert torch.equal(logits(read(quantized(source, file_type))), bits[file_type]), (source, file_type)
                rows.append(
                    cells + ["the same bits" if each in ("F32", *SHARDED_TYPES) else "" for each in ("F32", *TYPES)]
                )
                continue
            bits["F32"] = logits(ours)
            cells.append(_cell(reference, logits(ours), theirs[source]))
            for file_type in TYPES:
                path = quantized(source, file_type)
                bits[file_type] = logits(read(path))
                cells.append(_cell(logits(dequantized_model(path, stock.config)), bits[file_type], theirs[path]))
            rows.append(cells)
        for row in rows:
            print(*row, sep=" | ", flush=True)
        (FOLDER / f"{model.builder}.json").write_text(json.dumps(rows))


def _cell(exact: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    mine, other = (1e3 * kl_divergence(exact, each).median().item() for each in (ours, theirs))
    return f"{mine:.2g} / {other:.2g}"


def golden_types(name: str) -> list[str]:
    first = GOLDEN_PER_MODEL * list(MODELS).index(name)
    return [GOLDEN_TYPES[(first + number) % len(GOLDEN_TYPES)] for number in range(GOLDEN_PER_MODEL)]


def make_golden(names: Sequence[str], interpreter: str) -> None:
    """Write the archive of headers and logits. The files that `measure` quantized have to be there."""
    found = []
    for name in names:
        model = MODELS[name]
        config = getattr(random_models, model.builder)(**model.overrides).config
        written = []
        for number, file_type in enumerate(golden_types(name)):
            whole = model.has_whole_kv_b and number == GOLDEN_PER_MODEL - 1
            source = quantized(FOLDER / f"{model.builder}{'-whole' if whole else ''}.gguf", file_type)
            case = golden.Case.of(
                f"{name}, {WHOLE if whole else ONE}, {file_type}", model.builder, model.overrides, source
            )
            written.append((case, case.write(FOLDER / f"golden-{source.name}")))
        theirs = logits_of_llama_cpp(interpreter, config.vocab_size, [path for _, path in written])
        for case, path in written:
            exact = logits(dequantized_model(path, config))
            found.append(case.with_logits(path, exact, theirs[path]))
    golden.store(found)


HEADER = """# Models and what was read of them

Written by [tools/real_writers.py](../tools/real_writers.py), which has transformers save small random models, converts
them with llama.cpp's own converter and quantizes them with its quantizer. **Difference**: of F32 files, the largest of
a logit to transformers' own model, where logits spread by 3; greedy answers are the same. Other columns are names of
file types: the median KL divergence, in 0.001 nats, of our logits and, behind the stroke, of llama.cpp's, to
transformers' model on the weights that the `gguf` package dequantizes. What is left is how activations are rounded. A
file in three shards gives the bits of the same file in one. A median is of 72 places: with Q8_0, Q4_0 and MXFP4, where
both round alike, either is ahead by up to a half. Over 640 places of V3, V2-Lite and GLM, ours is 0.79 to 1.09 of
llama.cpp's in these types, 0.94 on average, and 0.44 to 0.74 in Q4_K_M.

llama.cpp itself computes V2's expert groups by V3's rule and Kimi's YaRN with another ramp, so that it is off also in
F32. transformers is the measure. "Whole kv_b" is what the converter wrote until April 2025.

"""


def write_table() -> None:
    kept = [FOLDER / f"{model.builder}.json" for model in MODELS.values()]
    rows = [row for path in kept if path.exists() for row in json.loads(path.read_text())]
    columns = ["Model", "Layout", "Difference", "F32", *TYPES]
    table = [columns, ["---"] * len(columns), *rows]
    TABLE.write_text(HEADER + "".join(f"| {' | '.join(row)} |\n" for row in table), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", choices=[*MODELS, []], help="all where none is named")
    parser.add_argument("--llama-python", required=True, help="a Python interpreter that has llama-cpp-python")
    parser.add_argument("--golden", action="store_true", help="write the golden archive in place of the table")
    logging.disable_progress_bar()
    given = parser.parse_args()
    if given.golden:
        make_golden(list(MODELS), given.llama_python)
        return
    measure(given.model or list(MODELS), given.llama_python)
    write_table()


if __name__ == "__main__":
    main()
