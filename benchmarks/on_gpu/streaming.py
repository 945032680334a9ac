"""Prompts through one layer of V3's dimensions whose experts lie in RAM, 128 of its 256: computed by the CPU alone, and
divided between it and the link to the GPU. Three dense layers are there too, alike in both."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import synthetic
from transformers import AutoModelForCausalLM

from transformers_kt.assets import bundled_model
from transformers_kt.cli.timing import random_tokens, timed_generate

from .setting import Setting

_TOKENS = (512, 2048, 8192)
_FEWEST = {"CPU alone": 0, "divided": 1}
"""`kt_prefill_stream_tokens=`"""


def measure(setting: Setting) -> None:
    if setting.is_fake:
        _measure_file(setting, next(Path(bundled_model()).glob("*.gguf")), (24,))
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        synthetic.write("v3", "q4_k_m", path, layers=4, experts=128)
        _measure_file(setting, path, _TOKENS)


def _measure_file(setting: Setting, path: Path, lengths: tuple[int, ...]) -> None:
    for experts, fewest in _FEWEST.items():
        model: Any = AutoModelForCausalLM.from_pretrained(
            None, gguf_path=path, kt_gpu_experts=0, kt_prefill_stream_tokens=fewest
        )
        for tokens in lengths:
            prompts = [random_tokens(tokens, model.config.vocab_size)]
            timed_generate(model, prompts, 1)  # kernels are compiled, memory is registered, rates are measured
            seconds = timed_generate(model, prompts, 1).first
            row = {"experts": experts, "tokens": tokens, "s": seconds, "tokens/s": tokens / seconds}
            setting.report.add("Prompts through one layer of V3", row)
