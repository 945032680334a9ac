"""Chat with a model from a GGUF file; by default with the bundled tiny-r1, which adds numbers.

    python examples/chat.py
    python examples/chat.py --gguf_path DeepSeek-R1-Q4_K_M/
    python examples/chat.py --model_path deepseek-ai/DeepSeek-R1 --gguf_path DeepSeek-R1-Q4_K_M/ --cpu_infer 32

This is `transformers-kt chat`, whose options are also those of KTransformers' local_chat. How it is made:
transformers_kt/cli/conversation.py.
"""

from __future__ import annotations

import sys

from transformers_kt.cli import main

sys.argv.insert(1, "chat")
main()
