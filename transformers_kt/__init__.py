"""DeepSeek-class MoE models from GGUF files in stock Hugging Face transformers.

Importing this package teaches ``from_pretrained`` of transformers two arguments, ``gguf_path=`` and ``kt_rules=``;
nothing else happens.
"""

from __future__ import annotations

from transformers_kt._environment import check_environment

check_environment()

from typing import TYPE_CHECKING, Any  # noqa: E402

from transformers_kt import integration  # noqa: E402  (what it imports is what was checked)
from transformers_kt._C import set_thread_count, thread_count  # noqa: E402
from transformers_kt.errors import KtError  # noqa: E402
from transformers_kt.integration import KtConfig  # noqa: E402
from transformers_kt.loading import KtReport  # noqa: E402

__version__ = "0.1.0"

__all__ = ["KtConfig", "KtError", "KtReport", "PlanReport", "plan", "set_thread_count", "thread_count"]

if TYPE_CHECKING:
    from transformers_kt.plan_report import PlanReport
    from transformers_kt.planning import plan
else:

    def __getattr__(name: str) -> Any:
        # Planning imports the models of transformers, which nobody needs who loads none.
        if name == "plan":
            from transformers_kt.planning import plan

            return plan
        if name == "PlanReport":
            from transformers_kt.plan_report import PlanReport

            return PlanReport
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


integration.install()
