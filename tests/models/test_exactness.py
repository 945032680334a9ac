"""The same bits, however the work is divided: over threads, batches, chunks, decoding steps and instruction sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_files import left_padded, random_tokens
from transformers import DynamicCache

import transformers_kt._C as _C
from transformers_kt.errors import InputError

MODELS = ("v3-F32", "v3-like-Q4_K_M", "v2-F16", "v2-mixed", "v2-lite-BF16", "v2-lite-like-Q4_K_M")
VECTOR_ISAS = [isa for isa in _C.supported_isas() if isa != "scalar"]

# Past all of these: 128 keys (one attention split), 128 positions (where YaRN starts), 256 and 512 tokens (pieces in
# which attention and experts work through a prompt).
PROMPT = random_tokens(530)

# Between us and transformers stand the order of additions and the absorbed form of attention: 6e-5 was measured over 27
# layers. A single key wrongly seen or hidden moves these logits, whose standard deviation is 3, by 0.1 or more.
FLOAT_TOLERANCE = 6e-4


@pytest.fixture(scope="module")
def expected(kt_model: Callable[[str], Any]) -> Callable[[str], torch.Tensor]:
    """Name of a model -> its logits for PROMPT (530, vocab), computed in one piece."""
    return functools.cache(lambda name: logits(kt_model(name), PROMPT))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = model(ids, use_cache="past_key_values" in kwargs, **kwargs).logits[0]
    return found


def in_chunks(model: Any, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = DynamicCache()
    return torch.cat([logits(model, chunk, past_key_values=cache) for chunk in ids.split(sizes, dim=1)])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.isfinite().all()
    if not torch.equal(got, expected):
        at = (got - expected).abs().argmax()
        row, token = divmod(int(at), got.shape[-1])
        raise AssertionError(
            f"{(got != expected).sum()} of {got.numel()} logits differ; worst at token {row}, entry {token}: "
            f"{got.flatten()[at]} where {expected.flatten()[at]} is expected"
        )


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_thread_count_changes_no_bit(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str, threads: int
) -> None:
    _C.set_thread_count(2)
    two = expected(name)
    _C.set_thread_count(threads)
    assert_same_bits(logits(kt_model(name), PROMPT), two)
    assert_same_bits(in_chunks(kt_model(name), PROMPT[:, :203], [200, 1, 1, 1]), two[:203])


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_vector_instructions_change_no_bit(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str, isa: str
) -> None:
    best = expected(name)
    _C.select_isa(isa)
    assert _C.isa() == isa
    assert_same_bits(logits(kt_model(name), PROMPT), best)
    assert_same_bits(in_chunks(kt_model(name), PROMPT[:, :202], [200, 1, 1]), best[:202])


@pytest.mark.parametrize("name", MODELS)
def test_scalar_code_gives_the_same_bits(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str
) -> None:
    """On a short prompt, and on a few tokens that look back over two attention splits: it is slow."""
    model, cache = kt_model(name), DynamicCache()
    logits(model, PROMPT[:, :140], past_key_values=cache)
    _C.select_isa("scalar")
    assert_same_bits(logits(model, PROMPT[:, 140:143], past_key_values=cache), expected(name)[140:143])
    assert_same_bits(logits(model, PROMPT[:, :9]), expected(name)[:9])


@pytest.mark.parametrize("size", [1, 7, 64, 127, 300])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_chunks_gives_the_same_bits(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str, size: int
) -> None:
    ids = PROMPT[:, : 140 if size == 1 else 530]
    sizes = [len(chunk) for chunk in ids[0].split(size)]
    assert_same_bits(in_chunks(kt_model(name), ids, sizes), expected(name)[: ids.shape[1]])


@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_the_same_bits_as_the_whole_sequence(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str
) -> None:
    assert_same_bits(in_chunks(kt_model(name), PROMPT[:, :270], [250] + [1] * 20), expected(name)[:270])


@pytest.mark.parametrize("name", MODELS)
def test_a_left_padded_batch_gives_the_same_bits_as_each_prompt_alone(
    kt_model: Callable[[str], Any], expected: Callable[[str], torch.Tensor], name: str
) -> None:
    """Both the prompts and, with the cache, two tokens after each of them."""
    model = kt_model(name)
    sequences = [PROMPT[:, start : start + tokens + 2] for start, tokens in ((0, 300), (7, 1), (11, 130), (40, 299))]
    alone = [logits(model, sequence) for sequence in sequences]
    assert_same_bits(alone[0], expected(name)[:302])

    ids, mask = left_padded([sequence[:, :-2] for sequence in sequences])
    ids = torch.cat((ids, torch.cat([sequence[:, -2:] for sequence in sequences])), dim=1)
    mask = torch.cat((mask, torch.ones_like(mask[:, :2])), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, steps = DynamicCache(), []
    for start, end in ((0, 300), (300, 301), (301, 302)):
        with torch.no_grad():
            step = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
        steps.append(step.logits)
    batch = torch.cat(steps, dim=1)
    for row, single in enumerate(alone):
        assert_same_bits(batch[row, -len(single) :], single)


# ---- Masks, against transformers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["small-v3-F32", "small-v2-F32"])
def pair(
    request: pytest.FixtureRequest, kt_model: Callable[[str], Any], stock_model: Callable[[str], Any]
) -> tuple[Any, Any]:
    return kt_model(request.param), stock_model(request.param)


TOKENS = 150
IDS = torch.cat((random_tokens(TOKENS, seed=1), random_tokens(TOKENS, seed=2)))


@torch.no_grad()
def assert_close_to_stock(pair: tuple[Any, Any], rows: torch.Tensor | slice = slice(None), **kwargs: Any) -> None:
    """``rows``: which of the (2 * TOKENS) tokens to compare; those before a prompt see nothing and mean nothing."""
    ours, stock = pair
    unmasked = ours(IDS, use_cache=False).logits.flatten(0, 1)[rows]
    got = ours(IDS, use_cache=False, **kwargs).logits.flatten(0, 1)[rows]
    # The plain mask must matter to what is compared, or the test could not fail.
    assert (got - unmasked).abs().max() > 0.1
    torch.testing.assert_close(
        got, stock(IDS, use_cache=False, **kwargs).logits.flatten(0, 1)[rows], rtol=0, atol=FLOAT_TOLERANCE
    )


def test_padding_on_both_sides_is_not_seen(pair: tuple[Any, Any]) -> None:
    """Nor does padding after a prompt see itself."""
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    mask[0, -30:] = 0
    mask[1, -1:] = 0
    assert_close_to_stock(pair, mask.cumsum(-1).flatten().bool(), attention_mask=mask)


def test_holes_in_the_mask_are_not_seen(pair: tuple[Any, Any]) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 30:50] = 0
    mask[0, 60] = 0
    mask[1, :5] = 0
    mask[1, 140:149] = 0
    assert_close_to_stock(pair, mask.flatten().bool(), attention_mask=mask)


def test_a_mask_of_its_own_for_every_query_is_followed(pair: tuple[Any, Any]) -> None:
    """Random keys, later ones among them: what no causal kernel could guess."""
    seen = torch.rand((2, 1, TOKENS, TOKENS), generator=torch.Generator().manual_seed(3)) < 0.3
    seen |= torch.eye(TOKENS, dtype=torch.bool)
    assert_close_to_stock(pair, attention_mask=seen)
    assert_close_to_stock(pair, attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min))
    assert_close_to_stock(pair, attention_mask=torch.where(seen, 0.0, -torch.inf))


def test_packed_sequences_do_not_see_each_other(pair: tuple[Any, Any]) -> None:
    """transformers finds the sequences by their position_ids."""
    positions = torch.cat((torch.arange(60), torch.arange(TOKENS - 60))).expand(2, TOKENS)
    assert_close_to_stock(pair, position_ids=positions)


def test_masks_that_this_attention_cannot_follow_are_refused(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    weighing = torch.zeros(2, 1, TOKENS, TOKENS)
    weighing[0, 0, 5, 3] = -1.5
    with pytest.raises(InputError, match="not weigh them"):
        logits(model, IDS, attention_mask=weighing)
    by_head = torch.ones(2, model.config.num_attention_heads, TOKENS, TOKENS, dtype=torch.bool).tril()
    by_head[:, 1, 20:, 3] = False
    with pytest.raises(InputError, match="head"):
        logits(model, IDS, attention_mask=by_head)
