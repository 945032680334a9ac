"""Small functions on text that messages and tables share."""

from __future__ import annotations

import pytest

from transformers_kt.text import brief, layer_number, listed, longest_prefix, nearest


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.mlp", 3),
        ("layers.12", 12),
        ("model.layers.60.mlp.experts.7.up_proj", 60),
        ("model.norm", None),
        ("model.layers", None),
        ("model.sublayers.4.x", None),
        ("model.layers.4th", None),
        ("", None),
    ],
)
def test_a_layer_is_the_number_after_layers(path: str, layer: int | None) -> None:
    assert layer_number(path) == layer


def test_a_list_says_how_much_it_leaves_out() -> None:
    assert listed("abc", 3) == "a, b, c"
    assert listed("abcd", 3) == "a, b, c and 1 more"
    assert listed("abcd", 2, separator="; ", before_more="; ") == "a; b; and 2 more"
    assert listed([]) == ""


def test_the_nearest_word_is_found_in_whatever_case_and_nonsense_has_none() -> None:
    assert nearest("Liner", ["linear", "moe"]) == " (did you mean 'linear'?)"
    assert nearest("moee", {"linear", "MoE"}) == " (did you mean 'MoE'?)"
    assert nearest("xyz", ["linear"]) == ""
    assert nearest(7, ["linear"]) == ""
    assert nearest("linear" * 50, ["linear" * 50]) == ""


def test_a_value_of_any_size_is_shown_briefly() -> None:
    assert brief("cuda:0") == "'cuda:0'"
    assert len(brief("x" * 10**6)) < 110
    assert brief(10**5000) == "a huge int"
    assert len(brief([[["x" * 50] * 1000] * 1000])) < 10_000  # 50 MB in full


def test_the_empty_prefix_is_one_of_every_path_and_a_part_of_a_name_is_none() -> None:
    assert longest_prefix("a.b.c", ["", "a", "a.b"]) == "a.b"
    assert longest_prefix("ab.c", ["", "a"]) == ""
    assert longest_prefix("a.b", ["a.b.c", "b"]) is None
