"""Golden data: what llama.cpp computes from the very GGUF files that the tests read with transformers_kt.

    python tests/golden/make_golden.py models    # random models -> build/golden/*.gguf in F32; needs transformers_kt
    python tests/golden/make_golden.py golden    # quantizes them, runs llama.cpp; needs llama-cpp-python and numpy only

The second step writes, beside this file, the quantized random models and one ``<model>.npz`` for each of them and for
the bundled tiny-r1. An archive holds, all from llama.cpp with its defaults (float16 cache, flash attention off):

    <prompt>.tokens       int32 (tokens,)           token ids
    <prompt>.logits       float32 (stored, vocab)   logits at the last ``stored`` positions of the prompt
    <prompt>.greedy       int32 (new,)              greedy continuation, end of sentence included where one came
    <prompt>.margins      float32 (new,)            by how much each greedy token beat the second best
    gguf_sha256, writer   str                       the file that was run; the version of llama-cpp-python

Random models are compared by their logits. Greedy tokens of theirs mean something only where the margin is larger
than the noise of quantized activations: a test has to feed the stored tokens back and skip small margins.

V2 with expert groups is missing on purpose: llama.cpp ranks groups by the sum of their two best experts (V3's rule)
also where V2 takes the best one alone.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TINY_R1 = ROOT / "transformers_kt/assets/tiny-r1/tiny-r1-Q4_K_M.gguf"
F32_FOLDER = ROOT / "build/golden"

THREADS = 2
SEED = 20
VOCAB = 512
STORED_OF_LONG_PROMPT = 16
NEW_TOKENS = 16


class RandomModel(NamedTuple):
    name: str
    builder: str  # function of tests/random_models.py
    overrides: dict[str, Any]
    quantization: str  # of LLAMA_FTYPE_MOSTLY_*


# v3_like in full would be 3.8 MB; with one MoE layer a near tie in the router cannot set off others further up.
RANDOM_MODELS = (
    RandomModel("v3-like-Q4_K_M", "v3_like", {"num_hidden_layers": 3}, "Q4_K_M"),
    RandomModel("v3-narrow-Q8_0", "v3_narrow", {}, "Q8_0"),
    RandomModel("v2-lite-like-Q4_K_M", "v2_lite_like", {}, "Q4_K_M"),
)


class Prompt(NamedTuple):
    name: str
    tokens: list[int]
    stored: int  # logits are kept for so many positions at the end
    new_tokens: int


def random_prompts() -> list[Prompt]:
    """1, 7 and 64 tokens, and one that ends past the 128 positions that YaRN starts from in the random models."""
    rng = np.random.default_rng(SEED)
    prompts = []
    for length, stored in ((1, 1), (7, 7), (64, 64), (160, STORED_OF_LONG_PROMPT)):
        tokens = rng.integers(3, VOCAB, length).tolist()
        prompts.append(Prompt(f"random_{length}", tokens, stored, NEW_TOKENS))
    return prompts


def tiny_r1_prompts(tokenize: Any) -> list[Prompt]:
    """A sum at three stages of its answer, a greeting, a chat, and one longer than tiny-r1's 512 original positions."""
    sys.path.insert(0, str(ROOT / "tools" / "tiny_r1"))
    from task import chat_prompt, sum_turn

    turn = sum_turn(348, 276)
    question = chat_prompt([], turn.question)
    long_chat = [sum_turn(100 + 7 * i, 300 + 11 * i) for i in range(22)]
    texts = {
        "question": (question, 128),
        "half_way": (question + turn.reasoning[: turn.reasoning.index("Hundreds")], 64),
        "greeting": (chat_prompt([], "Hello!"), 64),
        "carry_into_thousands": (chat_prompt([], "Add 987 and 654."), 128),
        "third_turn": (chat_prompt([sum_turn(1, 2), sum_turn(30, 40)], "506+77=?"), 128),
    }
    prompts = [Prompt(name, tokenize(text), 64, new) for name, (text, new) in texts.items()]
    prompts += [Prompt(f"first_{n}", tokenize(question + turn.reply)[:n], n, 0) for n in (1, 7, 64)]
    prompts.append(Prompt("long", tokenize(chat_prompt(long_chat, turn.question)), STORED_OF_LONG_PROMPT, 16))
    return prompts


def build_models() -> None:
    sys.path.insert(0, str(HERE.parent / "support"))
    import random_models
    from transformers import AutoTokenizer

    from transformers_kt.families.deepseek.export import export_gguf

    tokenizer = AutoTokenizer.from_pretrained(TINY_R1.parent)
    F32_FOLDER.mkdir(parents=True, exist_ok=True)
    for spec in RANDOM_MODELS:
        model = getattr(random_models, spec.builder)(**spec.overrides)
        export_gguf(model, tokenizer, F32_FOLDER / f"{spec.name}.gguf", name=spec.name)


def quantize(spec: RandomModel) -> Path:
    import llama_cpp

    source, target = F32_FOLDER / f"{spec.name}.gguf", HERE / f"{spec.name}.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{spec.quantization}")
    params.nthread = THREADS
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not quantize {source}; its own message stands above")
    return target


def logits_of(model: Any, prompt: Prompt) -> npt.NDArray[np.float32]:
    model.reset()
    model.eval(prompt.tokens)
    return np.array(model.scores[len(prompt.tokens) - prompt.stored : len(prompt.tokens)], dtype=np.float32)


def greedy_of(model: Any, prompt: Prompt) -> tuple[list[int], list[float]]:
    """Continues from the state that `logits_of` left."""
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < prompt.new_tokens and (not tokens or tokens[-1] != model.token_eos()):
        row = model.scores[model.n_tokens - 1]
        second, first = np.partition(row, -2)[-2:]
        tokens.append(int(row.argmax()))
        margins.append(float(first - second))
        model.eval(tokens[-1:])
    return tokens, margins


def run(path: Path, name: str) -> None:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, logits_all=True, verbose=False
    )

    def tokenize(text: str) -> list[int]:
        return list(model.tokenize(text.encode(), add_bos=False, special=True))

    arrays: dict[str, npt.NDArray[Any]] = {
        "gguf_sha256": np.array(hashlib.sha256(path.read_bytes()).hexdigest()),
        "writer": np.array(f"llama-cpp-python {llama_cpp.__version__}"),
    }
    for prompt in tiny_r1_prompts(tokenize) if path == TINY_R1 else random_prompts():
        prompt = prompt._replace(stored=min(prompt.stored, len(prompt.tokens)))
        logits = logits_of(model, prompt)
        tokens, margins = greedy_of(model, prompt)
        arrays[f"{prompt.name}.tokens"] = np.array(prompt.tokens, dtype=np.int32)
        arrays[f"{prompt.name}.logits"] = logits
        arrays[f"{prompt.name}.greedy"] = np.array(tokens, dtype=np.int32)
        arrays[f"{prompt.name}.margins"] = np.array(margins, dtype=np.float32)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)


def make_golden() -> None:
    for spec in RANDOM_MODELS:
        run(quantize(spec), spec.name)
    run(TINY_R1, "tiny-r1-Q4_K_M")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("models", "golden"))
    {"models": build_models, "golden": make_golden}[parser.parse_args().step]()


if __name__ == "__main__":
    main()
