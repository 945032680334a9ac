"""The tokenizer rebuilt from GGUF metadata is the one that the metadata was written from.

The original is a `tokenizers` tokenizer with the layout of DeepSeek-V3's tokenizer.json, trained on a little text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_handmade import TINY_V3, refusal, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from transformers_kt.errors import GgufFormatError, UnsupportedModelError
from transformers_kt.families.from_gguf import tokenizer_from_gguf
from transformers_kt.gguf.checkpoint import open_checkpoint

BOS, EOS, PAD = "<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>", "<\uff5c▁pad▁\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
HOLDER = "<\uff5cplace▁holder▁no▁0\uff5c>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}" + USER + "{{ m.content }}{% else %}" + ASSISTANT
    + "{{ m.content }}" + EOS + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip

# The parts of DeepSeek-V3's tokenizer.json that decide how text is cut, as published.
DEEPSEEK_V3_CUTS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DEEPSEEK_V3 = {
    "version": "1.0",
    "normalizer": {"type": "Sequence", "normalizers": []},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            *(
                {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
                for cut in DEEPSEEK_V3_CUTS
            ),
            BYTE_LEVEL,
        ],
    },
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "vocab": {}, "merges": []},
}

CORPUS = [
    "What is 123 + 456? The sum of 123 and 456 is 579, and 5 + 7 = 12.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\r\n",
    "日本語の文章と中文的句子\uff0c以及한국어 문장。ひらがなカタカナ",
    "Ça va déjà être l'été à l'Œuvre; Größe und Straße, naïve café.",
    "    indented    text\twith\ttabs and   runs of spaces   ",
    "the the the and and and of of of to to to in in in",
]
HOSTILE = [
    "", " ", "  ", "\n", "\r\n\r\n", "\t \n", " leading", "trailing ", "a  b   c    d", "\u00a0\u2003\u3000x",
    "1", "12", "123", "1234", "12345678901234567890", "1,234.5678e-90", "٣٤٥٦٧٨", "½²③Ⅳ", "a1b22c333d4444",
    "日本語とEnglishと中文123混ざり", "ひらがなカタカナ漢字", "가나다라마바사", "㐀𠀀龦",
    "a , b . c ! d ? e 's do n't ( f )",
    "don't won't I'll we've 's 'S", "!important #define ~tilde `tick` {json: [1, 2]}", "\\n \\u0041 C:\\path",
    "🙂👨‍👩‍👧‍👦🏳️‍🌈", "e\u0301 é ﬁ ﬀ \u210c", "שלום مرحبا नमस्ते สวัสดี", "\u200b\u200d\ufeff\u202e", "\x00\x01\x1f\x7f",
    "\U0010ffff\ue000\ufffd", BOS, EOS + EOS, f"a{EOS}b", f" {BOS} x {PAD}", f"{USER}hi{ASSISTANT}<think>\n1</think>",
    "<think>", "< think>", "<\uff5cend▁of", "<|end_of_sentence|>", "[PAD700]", f"日本{USER}語",
]  # fmt: skip


def train() -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(DEEPSEEK_V3))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    assert tokenizer.get_vocab_size() > 400
    # As published: who speaks belongs to the text.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (USER, ASSISTANT, "<think>", "</think>")])
    tokenizer.add_special_tokens([AddedToken(HOLDER, special=True, normalized=False)])
    return tokenizer


ORIGINAL = train()


def facts_of(tokenizer: Tokenizer, padding: int = 8) -> dict[str, Any]:
    """The ``tokenizer.*`` keys that llama.cpp's converter writes for ``tokenizer``, in an embedding a bit larger."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(len(vocabulary) + padding):
        tokens.append(vocabulary.get(number, f"[PAD{number}]"))
        kind = 1 if number in vocabulary else 5
        if number in added:
            # The converter calls control what looks it.
            kind = 3 if added[number].special or tokens[-1].endswith("\uff5c>") else 4
        types.append(kind)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-v3",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in json.loads(tokenizer.to_str())["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        "general.architecture": "deepseek2",
        "deepseek2.context_length": 256,
    }


FACTS = facts_of(ORIGINAL)
REBUILT = tokenizer_from_gguf(FACTS)


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    more = {key: value for key, value in FACTS.items() if key.startswith("tokenizer.")}
    path = write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", TINY_V3, {"token_embd.weight": (8, 8)}, more=more)
    return tokenizer_from_gguf(open_checkpoint(path))


def assert_same(rebuilt: PreTrainedTokenizerFast, text: str) -> None:
    ids = ORIGINAL.encode(text, add_special_tokens=False).ids
    assert rebuilt.encode(text, add_special_tokens=False) == ids
    assert rebuilt.encode(text) == [0, *ids]
    assert rebuilt.decode(ids) == ORIGINAL.decode(ids, skip_special_tokens=False) == text
    assert rebuilt.decode(ids, skip_special_tokens=True) == ORIGINAL.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", HOSTILE + CORPUS)
def test_text_is_encoded_and_decoded_like_the_original(from_file: PreTrainedTokenizerFast, text: str) -> None:
    assert_same(from_file, text)


PIECES = st.sampled_from(HOSTILE) | st.text(max_size=12) | st.text("0123456789 \n.,'abcé日ひ한", max_size=12)


@settings(deadline=None, max_examples=200)
@given(st.lists(PIECES, max_size=5).map("".join))
def test_any_text_is_encoded_and_decoded_like_the_original(text: str) -> None:
    assert_same(REBUILT, text)


def test_any_ids_decode_like_the_original() -> None:
    ids = np.random.default_rng(0).integers(0, ORIGINAL.get_vocab_size(), size=(200, 9))
    for row in ids.tolist():
        assert REBUILT.decode(row) == ORIGINAL.decode(row, skip_special_tokens=False)


def test_the_whole_vocabulary_has_its_numbers(from_file: PreTrainedTokenizerFast) -> None:
    assert from_file.get_vocab() == ORIGINAL.get_vocab()
    assert len(from_file) == ORIGINAL.get_vocab_size()


def test_rows_that_no_token_has_are_no_text(from_file: PreTrainedTokenizerFast) -> None:
    rows = len(FACTS["tokenizer.ggml.tokens"])
    assert FACTS["tokenizer.ggml.tokens"][-1] == f"[PAD{rows - 1}]"
    assert from_file.decode([5, rows - 1, 6]) == ORIGINAL.decode([5, rows - 1, 6]) == ORIGINAL.decode([5, 6])


def test_a_row_that_the_file_names_stays_a_token() -> None:
    rows = len(FACTS["tokenizer.ggml.tokens"])
    tokenizer = tokenizer_from_gguf({**FACTS, "tokenizer.ggml.padding_token_id": rows - 1})
    assert tokenizer.pad_token_id == rows - 1
    assert tokenizer(["a", "a b c"], padding=True)["input_ids"][0][0] == rows - 1


def test_control_tokens_are_special_but_for_those_that_the_original_has_as_text(
    from_file: PreTrainedTokenizerFast,
) -> None:
    ids = from_file.encode(f"{USER}hi<think>a</think>{HOLDER}{EOS}")
    assert from_file.decode(ids, skip_special_tokens=True) == f"{USER}hi<think>a</think>"
    assert set(from_file.all_special_tokens) >= {BOS, EOS, PAD}
    assert from_file.added_tokens_encoder["<think>"] == FACTS["tokenizer.ggml.tokens"].index("<think>")


def test_named_tokens_length_and_side_come_from_the_file(from_file: PreTrainedTokenizerFast) -> None:
    assert (from_file.bos_token, from_file.eos_token, from_file.pad_token) == (BOS, EOS, PAD)
    assert (from_file.bos_token_id, from_file.eos_token_id, from_file.pad_token_id) == (0, 1, 2)
    assert from_file.model_max_length == 256
    batch = from_file(["a", "a b c"], padding=True)
    assert batch["input_ids"][0][0] == 2
    assert batch["attention_mask"][0][0] == 0


def test_the_chat_template_is_applied(from_file: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "1+1?"}]
    text = from_file.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{BOS}{USER}1+1?{ASSISTANT}"
    ids = from_file.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ORIGINAL.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_file_says_which_tokens_frame_a_text(bos: bool, eos: bool) -> None:
    tokenizer = tokenizer_from_gguf({**FACTS, "tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos})
    inner = ORIGINAL.encode("hello").ids
    assert tokenizer.encode("hello") == [0] * bos + inner + [1] * eos
    assert tokenizer.encode("hello", add_special_tokens=False) == inner


def test_without_flags_nothing_frames_a_text() -> None:
    facts = {key: value for key, value in FACTS.items() if "add_" not in key}
    assert tokenizer_from_gguf(facts).encode("hello") == ORIGINAL.encode("hello").ids


def test_arguments_win_over_the_file() -> None:
    tokenizer = tokenizer_from_gguf(FACTS, padding_side="right", chat_template="other", model_max_length=9)
    assert (tokenizer.padding_side, tokenizer.chat_template, tokenizer.model_max_length) == ("right", "other", 9)


def test_it_survives_saving_and_loading(from_file: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from_file.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in HOSTILE:
        assert loaded.encode(text) == from_file.encode(text)
    assert loaded.chat_template == TEMPLATE


def pieces(pre: str, text: str) -> list[str]:
    """How ``text`` is cut before merging, as text again."""
    tokenizer = tokenizer_from_gguf({**FACTS, "tokenizer.ggml.pre": pre}).backend_tokenizer
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert tokenizer.decoder.decode([piece for piece, _ in cut]) == text
    return [tokenizer.decoder.decode([piece]) for piece, _ in cut]


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("deepseek-v3", "12345 ab", ["123", "45", " ab"]),
        ("deepseek-v3", "ok漢字かなok", ["ok", "漢字かな", "ok"]),
        ("deepseek-v3", ".foo (x)\n\n y", [".foo", " (", "x", ")\n\n", " y"]),
        ("deepseek-v3", "a   b", ["a", "  ", " b"]),
        ("deepseek-v3", "e\u0301x", ["e\u0301x"]),
        ("deepseek-llm", "12345", ["1", "2", "3", "4", "5"]),
        ("deepseek-llm", "a\n\nb", ["a", "\n", "\n", "b"]),
        ("deepseek-llm", "one two", ["one", " two"]),
        ("deepseek-llm", "漢字ok", ["漢字", "ok"]),
        ("deepseek-llm", "abשלcd", ["ab", "של", "cd"]),
        ("deepseek-llm", "x, (y)", ["x", ",", " (", "y", ")"]),
        ("deepseek-llm", "end  ", ["end", "  "]),
        ("deepseek-coder", "12 ab", ["1", "2", " ab"]),
        ("deepseek-coder", "abשלcd", ["abשלcd"]),
        ("deepseek-coder", "x = y;\n", ["x", " =", " y", ";", "\n"]),
        ("glm4", "don't 1234!\n\nx", ["don", "'t", " ", "123", "4", "!\n\n", "x"]),
        ("glm4", "WON'T stop", ["WON", "'T", " stop"]),
        ("glm4", "NotEmpty", ["NotEmpty"]),
        ("kimi-k2", "NotEmpty don't", ["Not", "Empty", " don't"]),
        ("kimi-k2", "漢字ひらok", ["漢字", "ひらok"]),
        ("kimi-k2", "e\u0301x 1234", ["e\u0301x", " ", "123", "4"]),
        ("kimi-k2", "\u0301x", ["\u0301x"]),
        ("youtu", "漢字ひらok", ["漢字ひら", "ok"]),
        ("youtu", "가나 a，b", ["가나", " a", "，", "b"]),
        ("youtu", "12 NotEmpty//\n", ["1", "2", " Not", "Empty", "//\n"]),
        ("kanana2", "1234 NotEmpty//\n", ["123", "4", " Not", "Empty", "//\n"]),
        ("gpt-2", "don't 1234!", ["don", "'t", " 1234", "!"]),
        ("gpt-2", "a   b", ["a", "  ", " b"]),
        ("default", "x<=1234", ["x", "<=", "123", "4"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_models_do(pre: str, text: str, cut: list[str]) -> None:
    assert pieces(pre, text) == cut


@settings(deadline=None, max_examples=50)
@given(text=PIECES)
def test_a_tokenizer_that_the_converter_calls_joyai_llm_is_that_of_deepseek_v3(text: str) -> None:
    # As it names the tokenizer of R1: what the original makes of a text does not depend on the name.
    renamed = tokenizer_from_gguf({**FACTS, "tokenizer.ggml.pre": "joyai-llm"})
    assert_same(renamed, text)
    assert pieces("joyai-llm", text) == pieces("deepseek-v3", text)


def test_a_piece_that_is_a_token_is_one_where_the_model_does_not_merge_it() -> None:
    """GLM's and Youtu's tokenizers were made from tiktoken's: some of their tokens are reached by no merge."""
    token, merges = "qxz", FACTS["tokenizer.ggml.merges"]
    tokens = [*FACTS["tokenizer.ggml.tokens"][:-1], token]
    types = [*FACTS["tokenizer.ggml.token_type"][:-1], 1]
    facts = {**FACTS, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert not any(merge.replace(" ", "") == token for merge in merges)
    for pre, count in {"glm4": 1, "youtu": 1, "deepseek-v3": 3, "kimi-k2": 3}.items():
        tokenizer = tokenizer_from_gguf({**facts, "tokenizer.ggml.pre": pre})
        assert len(tokenizer.encode(token, add_special_tokens=False)) == count, pre


def test_what_calls_of_kimis_tools_are_marked_with_is_text() -> None:
    marks = ["<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>"]
    tokens = [*FACTS["tokenizer.ggml.tokens"], *marks, "<|im_middle|>"]
    facts = {
        **FACTS,
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*FACTS["tokenizer.ggml.token_type"], 3, 3, 3, 3],
    }
    text = "".join(marks)
    tokenizer = tokenizer_from_gguf(facts)
    ids = tokenizer.encode(f"<|im_middle|>{text}", add_special_tokens=False)
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "pre",
    ["deepseek-v3", "deepseek-llm", "deepseek-coder", "glm4", "kimi-k2", "youtu", "kanana2", "gpt-2", "default"],
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=PIECES)
def test_no_pre_tokenizer_loses_text(pre: str, text: str) -> None:
    assert "".join(pieces(pre, text)) or not text
    tokenizer = tokenizer_from_gguf({**FACTS, "tokenizer.ggml.pre": pre})
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.model", None),
        ("tokenizer.ggml.pre", "tekken"),
        ("tokenizer.ggml.pre", "llama-bpe"),
        ("tokenizer.ggml.pre", None),
        ("tokenizer.ggml.pre", np.array([1, 2])),
    ],
)
def test_a_tokenizer_we_do_not_know_sends_to_the_model_folder(key: str, value: Any) -> None:
    facts = {**FACTS, key: value} if value is not None else {name: FACTS[name] for name in FACTS if name != key}
    with pytest.raises(UnsupportedModelError) as caught:
        tokenizer_from_gguf(facts)
    for fragment in (key, repr(value), "model folder"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer.ggml.tokens", None, "tokens is missing"),
        ("tokenizer.ggml.tokens", "abc", "array of strings"),
        ("tokenizer.ggml.tokens", np.array([1]), "array of strings"),
        ("tokenizer.ggml.tokens", ["a", "b", "a"], "'a' more than once"),
        ("tokenizer.ggml.tokens", ["a", "b", "c"], "array of 3 whole numbers"),
        ("tokenizer.ggml.merges", None, "merges is missing"),
        ("tokenizer.ggml.merges", ["ab"], r"merges\[0\] is 'ab'"),
        ("tokenizer.ggml.merges", ["a b", " b"], r"merges\[1\]"),
        ("tokenizer.ggml.merges", ["Ω Ω"], "does not fit the tokens"),
        ("tokenizer.ggml.token_type", [1, 2], "one for each token"),
        ("tokenizer.ggml.token_type", 3, "one for each token"),
        ("tokenizer.ggml.token_type", np.full(len(FACTS["tokenizer.ggml.tokens"]), 0.5), "one for each token"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id is 1000000"),
        ("tokenizer.ggml.eos_token_id", "1", "eos_token_id is '1'"),
        ("tokenizer.ggml.padding_token_id", -2, "padding_token_id is -2"),
        ("tokenizer.ggml.add_bos_token", 1, "add_bos_token is 1"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_named(key: str, value: Any, said: str) -> None:
    facts = {**FACTS, key: value} if value is not None else {name: FACTS[name] for name in FACTS if name != key}
    with pytest.raises(GgufFormatError, match=said):
        tokenizer_from_gguf(facts)


def test_tokens_without_types_are_plain() -> None:
    facts = {key: value for key, value in FACTS.items() if key != "tokenizer.ggml.token_type"}
    tokenizer = tokenizer_from_gguf(facts)
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) > 1
    assert tokenizer.encode(EOS, add_special_tokens=False) == [1]


SCALARS = st.integers() | st.text(max_size=3) | st.booleans() | st.none() | st.floats()
VALUES = SCALARS | st.lists(st.integers(0, 6)).map(np.array) | st.lists(st.text(max_size=4), max_size=4)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(sorted(FACTS)), VALUES, min_size=1, max_size=2))
def test_only_our_errors_come_out_of_any_metadata(changed: dict[str, Any]) -> None:
    said = refusal(lambda: tokenizer_from_gguf({**FACTS, **changed}))
    assert said is None or "tokenizer." in said


def test_far_more_merges_than_tokens_are_refused(tmp_path: Path) -> None:
    # Reading millions of them costs seconds and gigabytes, and the header says how many there are.
    path = write_model(
        tmp_path / "m.gguf",
        more={
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "deepseek-v3",
            "tokenizer.ggml.tokens": [f"t{number}" for number in range(50)],
            "tokenizer.ggml.merges": ["t1 t2"] * 401,
        },
    )
    with pytest.raises(GgufFormatError, match="lists 401 merges for 50 tokens"):
        tokenizer_from_gguf(open_checkpoint(path))
