"""How commands name a model, and what they share about it."""

from __future__ import annotations

from pathlib import Path

from transformers_kt.assets import bundled_model

BUNDLED = bundled_model().name
"""The name that stands for the bundled model, unless something of that name lies here."""

MODEL_HELP = (
    "The model: a GGUF file (the usual single-file format of quantized models), a folder that holds one, any part of "
    f"a split one, org/repo:file.gguf on the Hugging Face hub, or {BUNDLED} for the 5 MB model that is bundled."
)
NOT_ALL_WELL = 3
"""Exit code of a command that did its work and has bad news. 1 is a refusal, 2 a command line not understood."""


def located(model: str) -> str:
    """``model``, or the folder of the bundled model where it is meant."""
    return str(bundled_model()) if model == BUNDLED and not Path(model).exists() else model
