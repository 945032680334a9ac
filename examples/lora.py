"""A LoRA adapter of PEFT on the attention of a model from a GGUF file, for inference.

    pip install peft
    python examples/lora.py [FOLDER WITH AN ADAPTER]

Without a folder it makes an adapter of random values, as training with stock transformers would save one.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_kt  # noqa: F401  # teaches from_pretrained kt_rules=
from transformers_kt.assets import bundled_model

# These rules keep every linear layer under its own name, where adapters look for it.
model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="observable")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
if len(sys.argv) == 1:
    torch.manual_seed(0)
    targets = ["q_a_proj", "q_b_proj", "o_proj"]
    random = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="observable"), random
    ).save_pretrained(folder)

prompt = tokenizer("What is 12 + 34?", return_tensors="pt")
adapted = PeftModel.from_pretrained(model, folder)
with torch.no_grad():
    with adapted.disable_adapter():
        before = adapted(**prompt).logits
    after = adapted(**prompt).logits
print(f"the adapter moves logits by up to {(after - before).abs().max():.3f}")
