"""What the tokenizers of these models do that a file says by a name alone. Their own tokenizer.json say the same."""

from __future__ import annotations

from collections.abc import Mapping

from transformers_kt.gguf.tokenizer_rules import SINGLE_DIGITS, TokenizerRules

# Letters with case, spelt out range by range in deepseek-llm's tokenizer. Escaped, because normalizing the
# source text turns ends of ranges such as U+1F7D into others (U+03CE) and the ranges around.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"  # in deepseek-llm and deepseek-coder
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"  # in deepseek-v3
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_NOT_HAN = r"&&[^\p{Han}]"


def _words(but: str = "") -> str:
    """Words that begin in capitals and go on in small letters; letters without case and marks are both. ``but``
    restricts these classes of letters."""
    capitals, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}" + but + "]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}" + but + "]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{capitals}*{small}+{_CONTRACTION}?|{before}{capitals}+{small}*{_CONTRACTION}?"


# Of speakers, of tools and of filling in the middle: no special ones in the tokenizer.json of V3 and R1. V4's, which
# shares their name, adds those of searches, repositories and tables.
_TEXT_TOKENS = frozenset(
    f"<\uff5c{name}\uff5c>".replace(" ", "\u2581")
    for name in (
        *("User", "Assistant", "fim hole", "fim begin", "fim end"),
        *("tool calls begin", "tool calls end", "tool call begin", "tool call end", "tool sep"),
        *("tool outputs begin", "tool outputs end", "tool output begin", "tool output end"),
        *("begin of repo name", "end of repo name", "begin of file name", "end of file name"),
        *("begin of file", "end of file", "place holder for copy", "place holder for pointer replace"),
        *("begin sys", "end sys", "latest_reminder", "action", "query", "authority", "domain", "task", "political"),
        *("entity", "title", "safety", "answer", "search", "search begin", "search end", "extracted_url", "read_url"),
        *("image2", "table", "/td", "td", "/tr", "tr"),
    )
)
_OF_V4 = "\uff5cDSML\uff5c"
_V3 = TokenizerRules(
    (
        r"\p{N}{1,3}",
        _HAN_AND_KANA,
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
    text_tokens=_TEXT_TOKENS,
    text_tokens_beside={_OF_V4: frozenset({"<|EOT|>"})},
)
# As in tokenization_kimi.py, which the models bring, with the tokens that their config does not call special.
_KIMI = TokenizerRules(
    (rf"[\p{{Han}}]+|{_words(_NOT_HAN)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    text_tokens=frozenset(
        {
            *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
            *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<think>", "</think>"),
        }
    ),
)
_YOUTU = TokenizerRules(
    (
        "[\uac00-\ud7a3\u3131-\u318e]+"
        "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        rf"{_words()}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
    ignore_merges=True,
)

TOKENIZERS: Mapping[str, TokenizerRules] = {
    "deepseek-v3": _V3,
    # llama.cpp's converter names a tokenizer by the ids of one text, and gives R1's this name.
    "joyai-llm": _V3,
    "deepseek-llm": TokenizerRules(
        (
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _EAST_ASIAN,
            SINGLE_DIGITS,
        )
    ),
    "deepseek-coder": TokenizerRules(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, SINGLE_DIGITS)),
    "glm4": TokenizerRules(
        (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",),
        ignore_merges=True,
    ),
    # R1 distilled into Qwen, whose vocabulary it has.
    "deepseek-r1-qwen": TokenizerRules(
        (rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",),
        text_tokens=_TEXT_TOKENS.union(
            *({f"<|fim_{name}|>"} for name in ("prefix", "middle", "suffix", "pad")), {"<|repo_name|>", "<|file_sep|>"}
        ),
    ),
    "kimi-k2": _KIMI,
    "youtu": _YOUTU,
    # Kanana-2, whose model is V3's.
    "kanana2": TokenizerRules((rf"{_words()}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",)),
}
"""tokenizer.ggml.pre -> what the tokenizers of the models that are called so do."""
