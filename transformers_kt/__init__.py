"""DeepSeek-class MoE models from GGUF files in stock Hugging Face transformers.

Importing this package teaches ``from_pretrained`` of transformers two arguments, ``gguf_path=`` and ``kt_rules=``;
nothing else happens.
"""

from __future__ import annotations

from transformers_kt._environment import check_environment

check_environment()

from transformers_kt import integration  # noqa: E402  (what it imports is what was checked)
from transformers_kt._C import set_thread_count, thread_count  # noqa: E402
from transformers_kt.errors import KtError  # noqa: E402
from transformers_kt.integration import KtConfig  # noqa: E402
from transformers_kt.loading import KtReport  # noqa: E402

__version__ = "0.1.0"

__all__ = ["KtConfig", "KtError", "KtReport", "set_thread_count", "thread_count"]

integration.install()
