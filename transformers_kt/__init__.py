"""Mixture-of-experts models from GGUF files in stock Hugging Face transformers.

Importing this package teaches ``from_pretrained`` of transformers two arguments, ``gguf_path=`` and ``kt_rules=``;
nothing else happens, unless TRANSFORMERS_KT_THREADS sets a thread count.
"""

from __future__ import annotations

from transformers_kt._environment import check_environment, default_threads

check_environment()

from typing import TYPE_CHECKING, Any  # noqa: E402

from transformers_kt._C import set_thread_count, thread_count  # noqa: E402
from transformers_kt.errors import KtError  # noqa: E402
from transformers_kt.integration import hooks  # noqa: E402  (what it waits for is what was checked)

__version__ = "0.1.0"

__all__ = [
    "KtConfig",
    "KtError",
    "KtReport",
    "PlanReport",
    "QualityReport",
    "plan",
    "quality",
    "save_logits",
    "set_thread_count",
    "thread_count",
]

if TYPE_CHECKING:
    from transformers_kt.evaluation.quality import quality, save_logits
    from transformers_kt.evaluation.report import QualityReport
    from transformers_kt.integration.loading import KtReport
    from transformers_kt.integration.quantizer import KtConfig
    from transformers_kt.planning.plan import plan
    from transformers_kt.planning.report import PlanReport
else:
    # Imported on first use: KtConfig and KtReport need torch, as evaluation does; planning does not.
    _LATER = {
        "KtConfig": "integration.quantizer",
        "KtReport": "integration.loading",
        "PlanReport": "planning.report",
        "QualityReport": "evaluation.report",
        "plan": "planning.plan",
        "quality": "evaluation.quality",
        "save_logits": "evaluation.quality",
    }

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


if (_threads := default_threads()) is not None:
    set_thread_count(_threads)
hooks.install()
