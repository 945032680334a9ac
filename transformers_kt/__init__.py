"""DeepSeek-class MoE models from GGUF files in stock Hugging Face transformers.

Importing this package teaches ``from_pretrained`` of transformers two arguments, ``gguf_path=`` and ``kt_rules=``;
nothing else happens.
"""

from __future__ import annotations

from transformers_kt import integration
from transformers_kt._C import set_thread_count, thread_count
from transformers_kt.errors import KtError
from transformers_kt.integration import KtConfig
from transformers_kt.loading import KtReport

__version__ = "0.1.0"

__all__ = ["KtConfig", "KtError", "KtReport", "set_thread_count", "thread_count"]

integration.install()
