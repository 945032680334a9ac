"""Several questions at once through transformers' pipeline, from a GGUF file.

    python examples/pipeline.py                                # the bundled tiny-r1
    python examples/pipeline.py --gguf_path model.gguf         # or yours

In a batch, prompts are padded on the left to equal length. Each answer is the same, to the bit, as if its question had
been asked alone.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import transformers_kt  # noqa: F401  # teaches from_pretrained gguf_path= and kt_rules=
from transformers_kt.assets import bundled_model

QUESTIONS = ("What is 12 + 29?", "Add 7 and 995.", "How much is 486 + 57?")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--gguf_path", default=bundled_model())
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(None, gguf_path=arguments.gguf_path)
tokenizer = AutoTokenizer.from_pretrained(None, gguf_path=arguments.gguf_path)
answer = pipeline("text-generation", model=model, tokenizer=tokenizer)

conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
results = answer(conversations, batch_size=len(QUESTIONS), max_new_tokens=300, return_full_text=False)
for question, result in zip(QUESTIONS, results, strict=True):
    text = result[0]["generated_text"]
    print(f"{question}\n  {text.rpartition('</think>')[2].strip()}")
