"""How an answer of DeepSeek divides into thoughts and the rest, in transformers' form of a response template."""

from __future__ import annotations

from transformers_kt.families.base import ResponseTemplate

_ASSISTANT = "<｜Assistant｜>"

RESPONSES = (
    ResponseTemplate(
        (_ASSISTANT, "</think>"),
        {
            "defaults": {"role": "assistant"},
            # A prompt ends in <think> where the model is to think, and in V3.1 in </think> where it is not.
            "start_anchor": [f"{_ASSISTANT}</think>", _ASSISTANT],
            # Blank lines belong to the marks, so that a stream shows none that the whole answer has not.
            "fields": {
                "reasoning_content": {
                    "open_pattern": r"<think>\s*",
                    "close_pattern": r"\s*</think>\s*",
                    "content": "text",
                },
                "content": {"close_pattern": r"\s*<｜end▁of▁sentence｜>", "content": "text"},
            },
        },
    ),
)
