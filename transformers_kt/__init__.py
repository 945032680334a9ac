"""DeepSeek-class MoE models from GGUF files in stock Hugging Face transformers.

Importing this package teaches ``from_pretrained`` of transformers two arguments, ``gguf_path=`` and ``kt_rules=``;
nothing else happens.
"""

from __future__ import annotations

from transformers_kt._environment import check_environment

check_environment()

from typing import TYPE_CHECKING, Any  # noqa: E402

from transformers_kt import hooks  # noqa: E402  (what it waits for is what was checked)
from transformers_kt._C import set_thread_count, thread_count  # noqa: E402
from transformers_kt.errors import KtError  # noqa: E402

__version__ = "0.1.0"

__all__ = ["KtConfig", "KtError", "KtReport", "PlanReport", "plan", "set_thread_count", "thread_count"]

if TYPE_CHECKING:
    from transformers_kt.integration import KtConfig
    from transformers_kt.loading import KtReport
    from transformers_kt.plan_report import PlanReport
    from transformers_kt.planning import plan
else:
    # The first two import torch, which who plans has no need of, and the others who loads.
    _LATER = {"KtConfig": "integration", "KtReport": "loading", "PlanReport": "plan_report", "plan": "planning"}

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


hooks.install()
