"""Latent attention alone: against plain float64 arithmetic, and every instruction set against the scalar table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fake_machines import write_machine
from gguf import GGMLQuantizationType

import transformers_kt._C as _C

HIDDEN, NOPE, VALUE = 24, 8, 8
SCALE = 0.3
VECTOR_ISAS = [isa for isa in _C.supported_isas() if isa != "scalar"]

# float32 against float64: sums of up to 300 terms of size 1, weighed by a softmax, then two small products.
FLOAT_TOLERANCE = 2e-5


class Case(NamedTuple):
    """Sizes that fill the tiles of no kernel, or just so; 128 keys are a split, 16 heads a group, 4 groups a bundle."""

    heads: int
    latent: int
    rope: int
    batch: int
    tokens: int
    keys: int
    visible: str


CASES = [
    Case(16, 32, 4, 1, 1, 300, "causal"),
    Case(5, 48, 6, 1, 3, 257, "causal"),  # the last of three tokens alone sees the third split
    Case(40, 36, 4, 2, 3, 140, "mask"),
    Case(16, 40, 20, 2, 5, 150, "ranges"),
    Case(72, 32, 4, 1, 2, 130, "causal"),
    Case(16, 32, 4, 1, 66, 131, "causal"),  # over 64 groups: a task takes four tokens over all keys
    Case(24, 36, 4, 2, 17, 150, "ranges"),
    Case(16, 32, 4, 1, 65, 140, "mask"),
    Case(20, 80, 4, 1, 1, 100, "causal"),
    Case(16, 72, 6, 3, 1, 55, "ranges"),
    Case(16, 48, 4, 1, 1, 1, "causal"),
]
MANY_CORES = 32


@pytest.fixture(autouse=True)
def _isa_and_threads_as_before() -> Iterator[None]:
    isa, threads = _C.isa(), _C.thread_count()
    yield
    _C.select_isa(isa)
    _C.use_topology()
    _C.set_thread_count(threads)


class Attention:
    """A random attention of a case, its input and its cache."""

    def __init__(self, case: Case) -> None:
        self.case, rng = case, np.random.default_rng(3)
        heads, latent, rope = case.heads, case.latent, case.rope

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, dtype=np.float32)

        self.q, self.k_b = normal(1, heads * (NOPE + rope), HIDDEN) / 5, normal(heads, latent, NOPE) / 5
        self.v_b, self.o = normal(heads, VALUE, latent) / 5, normal(1, HIDDEN, heads * VALUE) / 5
        self.x, self.table = normal(case.batch, case.tokens, HIDDEN), normal(case.batch * case.tokens, rope)
        self.latents, self.ropes = normal(case.batch, case.keys, latent), normal(case.batch, case.keys, rope)
        self.shown = self._shown(rng)

    def _shown(self, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """(batch, tokens, keys)."""
        batch, tokens, keys = self.case.batch, self.case.tokens, self.case.keys
        position = np.arange(keys)
        if self.case.visible == "mask":
            shown = rng.random((batch, tokens, keys)) < 0.6
            shown[0, 0] = False
        else:
            ends = np.broadcast_to(np.arange(keys - tokens, keys) + 1, (batch, tokens))
            starts = np.zeros_like(ends)
            if self.case.visible == "ranges":
                starts[:, 1::3] = 5
                ends = rng.integers(0, keys + 1, ends.shape)
            shown = (position >= starts[..., None]) & (position < ends[..., None])
        return np.ascontiguousarray(shown, np.uint8)

    def computed(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        case, out = self.case, np.full_like(self.x, np.nan)
        attention = _C.MlaAttention(
            hidden=HIDDEN,
            heads=case.heads,
            nope_dim=NOPE,
            rope_dim=case.rope,
            latent_dim=case.latent,
            value_dim=VALUE,
            softmax_scale=SCALE,
            norm_eps=1e-6,
            q_a=None,
            q_a_norm=None,
            q=packed(self.q),
            kv_a=packed(np.zeros((1, case.latent + case.rope, HIDDEN), np.float32)),
            kv_a_norm=np.ones(case.latent, np.float32),
            k_b=packed(self.k_b),
            v_b=packed(self.v_b),
            o=packed(self.o),
        )
        ranges = None
        if case.visible != "mask":
            counts, starts = self.shown.sum(-1), self.shown.argmax(-1)
            ranges = np.stack((starts, starts + counts), -1).astype(np.int32)
        mask = self.shown if ranges is None else None
        attention.attend(self.x, self.table, self.latents, self.ropes, ranges, mask, out)
        return np.asarray(out)

    def expected(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """As the paper has it: keys and values of each head made from the latents, in float64."""
        case = self.case
        x, latents, ropes = (part.astype(np.float64) for part in (self.x, self.latents, self.ropes))
        q = (x @ self.q[0].T).reshape(case.batch, case.tokens, case.heads, NOPE + case.rope)
        cos, sin = np.split(self.table.reshape(case.batch, case.tokens, 1, case.rope), 2, axis=-1)
        even, odd = q[..., NOPE::2], q[..., NOPE + 1 :: 2]
        rotated = np.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(*q.shape[:3], case.rope)
        keys = np.einsum("bkl,hln->bkhn", latents, self.k_b)
        values = np.einsum("bkl,hvl->bkhv", latents, self.v_b)
        scores = np.einsum("bthn,bkhn->bhtk", q[..., :NOPE], keys) + np.einsum("bthr,bkr->bhtk", rotated, ropes)
        weights = np.exp(scores * SCALE) * self.shown[:, None]
        sums = weights.sum(-1, keepdims=True)
        weights = weights / np.where(sums > 0, sums, 1)
        heads = np.einsum("bhtk,bkhv->bthv", weights, values)
        out: np.ndarray[Any, np.dtype[np.float64]] = heads.reshape(case.batch, case.tokens, -1) @ self.o[0].T
        return out


def packed(weights: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
    matrix = _C.PackedMatrix(int(GGMLQuantizationType.F32), *weights.shape)
    for index, rows in enumerate(np.ascontiguousarray(weights, np.float32)):
        matrix.pack(index, rows.view(np.uint8).reshape(-1))
    return matrix


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scalar_attention_is_that_of_the_paper(case: Case) -> None:
    attention = Attention(case)
    _C.select_isa("scalar")
    np.testing.assert_allclose(attention.computed(), attention.expected(), rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("isa", VECTOR_ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_equals_the_scalar_reference_bit_for_bit(case: Case, isa: str) -> None:
    attention = Attention(case)
    _C.select_isa("scalar")
    expected = attention.computed()
    _C.select_isa(isa)
    for threads in (1, 2):
        _C.set_thread_count(threads)
        np.testing.assert_array_equal(attention.computed(), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_more_threads_the_smaller_the_parts_and_the_same_bits(case: Case, tmp_path: Path) -> None:
    attention = Attention(case)
    _C.set_thread_count(1)
    expected = attention.computed()
    _C.use_topology(write_machine(tmp_path, {0: [[cpu] for cpu in range(MANY_CORES)]}), list(range(MANY_CORES)))
    for threads in (2, 5, MANY_CORES):
        _C.set_thread_count(threads)
        np.testing.assert_array_equal(attention.computed(), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_token_alone_gives_the_same_bits_as_among_others(case: Case) -> None:
    attention = Attention(case)
    together, x, shown, table = attention.computed(), attention.x, attention.shown, attention.table
    for t in range(case.tokens):
        attention.x, attention.shown = x[:, t : t + 1].copy(), shown[:, t : t + 1].copy()
        attention.table = table.reshape(case.batch, case.tokens, -1)[:, t].copy()
        np.testing.assert_array_equal(attention.computed(), together[:, t : t + 1])
