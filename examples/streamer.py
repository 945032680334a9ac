"""Text in the main thread while the model generates in another: how a server or a user interface would do it.

    python examples/streamer.py                                # the bundled tiny-r1
    python examples/streamer.py --gguf_path model.gguf         # or yours

The kernels release the interpreter lock, so the main thread stays free for other work.
"""

from __future__ import annotations

import argparse
from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

import transformers_kt  # noqa: F401  # teaches from_pretrained gguf_path= and kt_rules=
from transformers_kt.assets import bundled_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--gguf_path", default=bundled_model())
parser.add_argument("question", nargs="?", default="What is 12 + 29?")
arguments = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(None, gguf_path=arguments.gguf_path)
tokenizer = AutoTokenizer.from_pretrained(None, gguf_path=arguments.gguf_path)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": arguments.question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)

streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 300, "streamer": streamer})
thread.start()
for text in streamer:
    print(text, end="", flush=True)
thread.join()
print()
