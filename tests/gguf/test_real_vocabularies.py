"""Published tokenizers, written to metadata as llama.cpp's converter does and rebuilt: the same ids, the same text.

tools/fetch_tokenizers.py fetches them; without it these tests are skipped. That of Kimi-K2 is in no package: its rules
are put to another vocabulary, against tiktoken, which Kimi's own code calls. So are GLM's, which are those of Llama 3.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from transformers_kt.families.from_gguf import tokenizer_from_gguf

FOLDER = Path(__file__).parents[2] / "build" / "tokenizers"
LINES = 2000
# Published tokenizer, tokenizer.ggml.pre of the files that are made with its rules.
CASES = [
    ("deepseek-v3", "deepseek-v3"),
    ("deepseek-v3", "joyai-llm"),
    ("deepseek-v4", "joyai-llm"),
    ("llama3", "glm4"),
    ("gpt-4o", "kanana2"),
    ("qwen2.5", "deepseek-r1-qwen"),
]
KIMI_CUTS = "|".join(
    [  # as tokenization_kimi.py of Kimi-K2 has them
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
PIECES = [
    *("the", "The", "THE", "NotEmpty", "camelCaseWord", "HTTPServer", "naïve", "Œuvre", "Straße", "ΑΒΓδε", "Привет"),
    *("don't", "WON'T", "I'LL", "we've", "'s", "'", "''", "x's", "’s", "O'Reilly"),
    *(
        "日本語",
        "ひらがな",
        "カタカナ",
        "中文",
        "漢字かな",
        "가나다",
        "ㄱㄴ",
        "ㄅㄆ",
        "㐀",
        "𠀀",
        "龥龦",
        "々",
        "〆",
        "ー",
    ),
    *("שלום", "مرحبا", "नमस्ते", "สวัสดี", "e\u0301", "i\u0307", "\u0301", "ﬁ", "ǅ", "ʰ", "ª", "\u1f7d", "\U0001e900"),
    *("0", "7", "12", "123", "1234", "12345678", "3.14", "1,234", "٣٤", "½", "Ⅳ", "²", "\U0001e950", "𝟘"),
    *("!", "...", "(", ")", "[]", "{x}", "->", "==", "//", "/*", "\\n", "#!", "@a", "$x", "%", "`", "~", "_", "__a__"),
    *("，", "。", "！", "、", "：", "“a”", "—", "…", "〜", "￥", "€", "🙂", "👨‍👩‍👧", "🏳️‍🌈", "\ufe0f"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff", "\x00"),
    *("\U0010ffff", "\ue000", "\u0378", "\ufffd", "<think>", "<|im_end|>", "<\uff5cUser\uff5c>", "[PAD7]"),
]


@functools.cache
def hard_lines() -> list[str]:
    """Words, digits, marks and spaces of many scripts, in every neighbourhood."""
    generator = random.Random(0)
    return ["".join(generator.choices(PIECES, k=generator.randint(1, 12))) for _ in range(LINES)]


def original(name: str) -> Tokenizer:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} was not fetched: run tools/fetch_tokenizers.py")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = None  # only Qwen's has one, and llama.cpp's rules of its name do not
    return tokenizer


def metadata(tokenizer: Tokenizer, pre: str, padding: int = 16) -> dict[str, Any]:
    """The keys that the converter writes: it calls control what looks it, and makes up a token for each row without."""
    texts = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(max(texts) + 1 + padding):
        tokens.append(token := texts.get(number, f"[PAD{number}]"))
        looks_special = (token[:2], token[-2:]) in (("<|", "|>"), ("<\uff5c", "\uff5c>"))
        if number in added:
            types.append(3 if added[number].special or looks_special else 4)
        else:
            types.append(1 if number in texts else 5)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


@pytest.fixture(scope="module", params=CASES, ids="-as-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, PreTrainedTokenizerFast]:
    name, pre = request.param
    tokenizer = original(name)
    return name, tokenizer, tokenizer_from_gguf(metadata(tokenizer, pre))


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_hard_lines_have_the_same_ids_and_the_same_text(
    pair: tuple[str, Tokenizer, PreTrainedTokenizerFast],
) -> None:
    _, theirs, ours = pair
    for line in hard_lines():
        ids = theirs.encode(line, add_special_tokens=False).ids
        assert ours.encode(line, add_special_tokens=False) == ids, line
        assert ours.decode(ids) == decoded(theirs, ids), line


def test_every_id_and_joined_pairs_of_them_are_the_same_text(
    pair: tuple[str, Tokenizer, PreTrainedTokenizerFast],
) -> None:
    _, theirs, ours = pair
    count = theirs.get_vocab_size(with_added_tokens=True)
    assert len(ours) == count
    for number in range(count + 16):  # the last of them are rows that no token has
        assert ours.decode([number]) == decoded(theirs, [number]), number
        kept = ours.decode([number], skip_special_tokens=True)
        assert kept == theirs.decode([number], skip_special_tokens=True), number
    generator = random.Random(1)
    for _ in range(LINES):
        ids = generator.choices(range(count), k=2)
        text = decoded(theirs, ids)
        assert ours.decode(ids) == text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False).ids


def test_kimis_rules_give_the_ids_of_the_code_that_kimi_brings() -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="Kimi's own code calls tiktoken")
    vocabulary = original("gpt-4o")
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = vocabulary.get_added_tokens_decoder()
    ranks = {
        bytes(bytes_of[character] for character in token): number
        for token, number in vocabulary.get_vocab(with_added_tokens=True).items()
        if number not in added
    }
    theirs = tiktoken.Encoding("kimi", pat_str=KIMI_CUTS, mergeable_ranks=ranks, special_tokens={})
    ours = tokenizer_from_gguf(metadata(vocabulary, "kimi-k2"))
    for line in hard_lines():
        assert ours.encode(line, add_special_tokens=False) == theirs.encode_ordinary(line), line


def bytes_to_unicode() -> dict[int, str]:
    """The characters that stand for bytes in the vocabularies of byte-level BPE."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(others)}
