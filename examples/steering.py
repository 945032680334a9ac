"""Hooks read and change what passes between layers: here a vector is added in the middle of the model.

    python examples/steering.py

The direction is the difference that two prompts make; real work averages many. A layer with a hook computes its modules
one by one, with the same bits.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_kt  # noqa: F401  # teaches from_pretrained kt_rules=
from transformers_kt.assets import bundled_model

model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
layer = model.model.layers[2]


def hidden_state(text: str) -> torch.Tensor:
    """What the layer gives for the last token."""
    seen = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    return seen[0]


prompt = tokenizer("What is 12 + 34?", return_tensors="pt")
direction = hidden_state("What is 99 + 99?") - hidden_state("What is 1 + 1?")
for strength in (0.0, 1.0, 4.0):
    steering = layer.register_forward_hook(lambda module, args, output, by=strength: output + by * direction)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    steering.remove()
    print(f"{strength}: {tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])!r}")
