"""lm-evaluation-harness on a model from a GGUF file, with the task in examples/sums.

    pip install lm_eval
    python examples/evaluate.py [BATCH SIZE ...]

Numbers are the same, bit by bit, for every batch size, "auto" too. From the command line, without this file:
transformers-kt run lm_eval --model hf --model_args pretrained=FOLDER,gguf_file=FILE --include_path examples/sums ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_kt  # noqa: F401  # teaches from_pretrained kt_rules=
from transformers_kt.assets import bundled_model

folder = Path(__file__).parent / "sums"
os.chdir(folder)  # the task names its questions by a path from here
model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
tasks = TaskManager(include_path=str(folder), include_defaults=False)
for size in sys.argv[1:] or ["4"]:
    # "auto" tries batches of this length to see how large a batch may be.
    harness = HFLM(model, tokenizer=tokenizer, batch_size=size, max_batch_size=8, max_length=256)
    found = lm_eval.simple_evaluate(harness, tasks=["sums", "first_step"], task_manager=tasks, bootstrap_iters=0)
    said = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    print(json.dumps([said, found["results"]], default=float))
