"""Files that come with the package: the bundled model, and texts to run models on."""

from __future__ import annotations

from pathlib import Path


def bundled_model() -> Path:
    """The folder of tiny-r1: ``from_pretrained(bundled_model(), kt_rules="auto")``.

    It has DeepSeek-V3's architecture and answers in DeepSeek-R1's format, but knows nothing except sums of two numbers
    of up to three digits. The folder holds config, tokenizer and a Q4_K_M GGUF.
    """
    return Path(__file__).parent / "tiny-r1"


def bundled_texts() -> dict[str, str]:
    """Name -> a page of text to compare models on, written for this package: prose, an explanation, a program, letters
    in five languages."""
    names = ("prose", "explanation", "program", "languages")
    return {name: (Path(__file__).parent / "texts" / f"{name}.txt").read_text(encoding="utf-8") for name in names}
