"""An answer that is JSON of a given schema: xgrammar allows only the tokens that can follow.

pip install xgrammar
python examples/json_answer.py
"""

from __future__ import annotations

import json

import xgrammar
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_kt  # noqa: F401  # teaches from_pretrained kt_rules=
from transformers_kt.assets import bundled_model

SUM = {"type": "integer", "minimum": 0, "maximum": 1998}
SCHEMA = {"type": "object", "properties": {"sum": SUM}, "required": ["sum"]}

model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
question = [{"role": "user", "content": "What is 486 + 57?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)

# It thinks freely, and then answers in JSON.
thoughts = model.generate(**prompt, max_new_tokens=300, stop_strings="</think>", tokenizer=tokenizer)
vocabulary = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
only_json = xgrammar.contrib.hf.LogitsProcessor(grammar)
answer = model.generate(thoughts, max_new_tokens=40, logits_processor=[only_json])
print(tokenizer.decode(answer[0, thoughts.shape[1] :], skip_special_tokens=True))
