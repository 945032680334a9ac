"""A chain of LangChain whose model is a GGUF file.

pip install langchain-huggingface
python examples/langchain_chain.py
"""

from __future__ import annotations

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import transformers_kt  # noqa: F401  # teaches from_pretrained kt_rules=
from transformers_kt.assets import bundled_model

model = AutoModelForCausalLM.from_pretrained(bundled_model(), kt_rules="auto")
tokenizer = AutoTokenizer.from_pretrained(bundled_model())
generate = pipeline(
    "text-generation", model=model, tokenizer=tokenizer, max_new_tokens=300, do_sample=False, return_full_text=False
)
chat = ChatHuggingFace(llm=HuggingFacePipeline(pipeline=generate), tokenizer=tokenizer)
chain = ChatPromptTemplate.from_template("What is {left} + {right}?") | chat | StrOutputParser()
for text in chain.batch([{"left": 486, "right": 57}, {"left": 12, "right": 30}]):
    print(text.rpartition("</think>")[2].strip())
