"""How kernels in Triton read a panel: positions, bits of weights, scales. One place for GEMV, GEMM and dequantize.

A tile of work is (chunks, sets, 16 rows). A set is the few units of 4 bytes in which bits that stand apart in the file
stand together; it holds vectors of 4 columns (csrc/formats/panel_layout.h). `KINDS` has the counts per type, the
functions below what they mean; both follow the layout that the extension packs, which tests hold them to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import triton
import triton.language as tl

from transformers_kt.backends.gpu.panels import IQ4_NL_VALUES, MXFP4_VALUES


class Kind(NamedTuple):
    """The shape of a block: ``chunks`` of ``sets`` of ``units`` that hold ``vectors``; ``head`` units come before.

    Scales that stand apart are ``scale_words`` words of 4 bytes for the 16 rows of a block; those of ``together``
    blocks stand together and lead.
    """

    chunks: int
    sets: int
    units: int
    vectors: int
    head: int
    scale_words: int
    together: int

    @property
    def block_units(self) -> int:
        return self.head + self.chunks * self.sets * self.units


KINDS: Mapping[str, Kind] = {
    "Q4_0": Kind(1, 4, 1, 2, 0, 8, 2),
    "IQ4_NL": Kind(1, 4, 1, 2, 0, 8, 2),
    "MXFP4": Kind(1, 4, 1, 2, 0, 4, 4),
    "Q5_0": Kind(1, 1, 5, 8, 0, 8, 2),
    "Q8_0": Kind(1, 8, 1, 1, 0, 8, 2),
    "Q4_K": Kind(4, 8, 1, 2, 4, 0, 1),
    "Q5_K": Kind(4, 2, 5, 8, 4, 0, 1),
    "Q6_K": Kind(4, 4, 3, 4, 4, 8, 2),
    "IQ4_XS": Kind(4, 8, 1, 2, 2, 0, 1),
}
"""Types whose panels are sets of units -> their shape. F32, F16 and BF16 are columns of 16 values."""


def _words(values: tuple[int, ...]) -> list[tl.constexpr]:
    """16 signed bytes as four words."""
    packed = bytes(value & 0xFF for value in values)
    return [tl.constexpr(int.from_bytes(packed[i : i + 4], "little")) for i in range(0, 16, 4)]


IQ4_NL_0, IQ4_NL_4, IQ4_NL_8, IQ4_NL_12 = _words(IQ4_NL_VALUES)
MXFP4_0, MXFP4_4, MXFP4_8, MXFP4_12 = _words(MXFP4_VALUES)


@triton.jit
def half_bits(bits):
    """float32 of the f16 in the low 16 bits."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def block_start(block, blocks, UNITS: tl.constexpr, SCALE_WORDS: tl.constexpr, TOGETHER: tl.constexpr):
    """Where the units of ``block`` start in a panel of ``blocks``, in words of 4 bytes."""
    if SCALE_WORDS == 0:
        return block * (UNITS * 16)
    else:
        first = block // TOGETHER * TOGETHER
        scales = tl.minimum(blocks - first, TOGETHER) * SCALE_WORDS  # a last group may have fewer blocks
        start = first * (UNITS * 16 + SCALE_WORDS) + scales + (block - first) * (UNITS * 16)
        # Said once, so that the compiler loads 16 bytes a lane: it cannot see through the minimum.
        return tl.multiple_of(start, [SCALE_WORDS, SCALE_WORDS, SCALE_WORDS])


@triton.jit
def leading_scale(panel, block, lane, mask, UNITS: tl.constexpr, SCALE_WORDS: tl.constexpr, TOGETHER: tl.constexpr):
    """float32 of the scale that stands apart from the units. ``panel`` points to words."""
    first = block // TOGETHER * TOGETHER
    words = first * (UNITS * 16 + SCALE_WORDS) + (block - first) * SCALE_WORDS
    if SCALE_WORDS == 8:
        halves = panel.to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(halves + words * 2 + lane, mask=mask, other=0.0).to(tl.float32)
    else:
        # Half a power of two, for the values of MXFP4 are stored doubled; exponents 0 and 1 make denormal numbers.
        bytes_ = panel.to(tl.pointer_type(tl.uint8), bitcast=True)
        exponent = tl.load(bytes_ + words * 4 + lane, mask=mask, other=0).to(tl.uint32)
        bits = tl.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def looked_up(nibble, V0: tl.constexpr, V4: tl.constexpr, V8: tl.constexpr, V12: tl.constexpr):
    """Entry ``nibble`` of a table of 16 signed bytes, given as four words."""
    low = tl.where(nibble < 4, V0, V4)
    high = tl.where(nibble < 12, V8, V12)
    word = tl.where(nibble < 8, low, high).to(tl.uint32)
    return ((word >> (8 * (nibble & 3))) << 24).to(tl.int32, bitcast=True) >> 24


@triton.jit
def set_words(at, mask, SET_UNITS: tl.constexpr):
    """The words of a set whose first is ``at``: five, of which a type with fewer has copies of the first."""
    w0 = tl.load(at, mask=mask, other=0)
    w1, w2, w3, w4 = w0, w0, w0, w0
    if SET_UNITS >= 3:
        w1 = tl.load(at + 16, mask=mask, other=0)
        w2 = tl.load(at + 32, mask=mask, other=0)
    if SET_UNITS == 5:
        w3 = tl.load(at + 48, mask=mask, other=0)
        w4 = tl.load(at + 64, mask=mask, other=0)
    return w0, w1, w2, w3, w4


@triton.jit
def vector(w0, w1, w2, w3, w4, K: tl.constexpr, KIND: tl.constexpr):
    """Vector ``K`` of a set: a word of 4 weights as unsigned bytes (Q8_0: signed ones)."""
    if KIND == "Q8_0":
        return w0
    elif KIND == "Q4_0" or KIND == "Q4_K" or KIND == "IQ4_NL" or KIND == "IQ4_XS" or KIND == "MXFP4":
        return (w0 >> (4 * K)) & 0x0F0F0F0F
    elif KIND == "Q6_K":
        if K == 0:
            return w0 & 0x3F3F3F3F
        elif K == 1:
            return w1 & 0x3F3F3F3F
        elif K == 2:
            return w2 & 0x3F3F3F3F
        else:
            return ((w0 >> 6) & 0x03030303) | ((w1 >> 4) & 0x0C0C0C0C) | ((w2 >> 2) & 0x30303030)
    else:
        tl.static_assert(KIND == "Q5_0" or KIND == "Q5_K")
        if K == 0:
            return w0 & 0x1F1F1F1F
        elif K == 1:
            return w1 & 0x1F1F1F1F
        elif K == 2:
            return ((w0 >> 5) & 0x07070707) | ((w1 >> 3) & 0x18181818)
        elif K == 3:
            return w2 & 0x1F1F1F1F
        elif K == 4:
            return w3 & 0x1F1F1F1F
        elif K == 5:
            return ((w2 >> 5) & 0x07070707) | ((w3 >> 3) & 0x18181818)
        elif K == 6:
            return w4 & 0x1F1F1F1F
        else:
            return ((w4 >> 5) & 0x07070707) | ((w1 >> 2) & 0x08080808) | ((w3 >> 1) & 0x10101010)


@triton.jit
def weight(word, BYTE: tl.constexpr, KIND: tl.constexpr):
    """Weight ``BYTE`` of a vector as float32, before scale and minimum."""
    if KIND == "Q8_0":
        return (word.to(tl.int32, bitcast=True) << (24 - 8 * BYTE) >> 24).to(tl.float32)
    else:
        byte = (word >> (8 * BYTE)) & 0xFF
        if KIND == "IQ4_NL" or KIND == "IQ4_XS":
            return looked_up(byte, IQ4_NL_0, IQ4_NL_4, IQ4_NL_8, IQ4_NL_12).to(tl.float32)
        elif KIND == "MXFP4":
            return looked_up(byte, MXFP4_0, MXFP4_4, MXFP4_8, MXFP4_12).to(tl.float32)
        byte = byte.to(tl.int32).to(tl.float32)
        if KIND == "Q4_0":
            return byte - 8.0
        elif KIND == "Q5_0":
            return byte - 16.0
        elif KIND == "Q6_K":
            return byte - 32.0
        else:
            return byte


@triton.jit
def sub_block(chunk, set_, K: tl.constexpr, KIND: tl.constexpr):
    """The part of a block with a scale of its own that vector ``K`` of a set belongs to."""
    if KIND == "Q6_K":
        return 2 * (chunk // 2 * 4 + chunk % 2 + 2 * (K % 2)) + set_ // 2
    elif KIND == "Q4_K" or KIND == "Q5_K" or KIND == "IQ4_XS":
        return 2 * chunk + K % 2 + 0 * set_
    else:
        return 0 * (chunk + set_)


@triton.jit
def first_column(chunk, set_, K: tl.constexpr, KIND: tl.constexpr):
    """The column in its block of weight 0 of vector ``K``."""
    if KIND == "Q8_0":
        return 4 * set_ + 0 * chunk
    elif KIND == "Q4_0" or KIND == "IQ4_NL" or KIND == "MXFP4":
        return 4 * set_ + 16 * K + 0 * chunk
    elif KIND == "Q5_0":
        return 4 * (K // 2) + 16 * (K % 2) + 0 * (chunk + set_)
    elif KIND == "Q4_K" or KIND == "IQ4_XS":
        return 64 * chunk + 32 * K + 4 * set_
    elif KIND == "Q5_K":
        return 64 * chunk + 32 * (K % 2) + 16 * set_ + 4 * (K // 2)
    else:
        return 32 * (chunk // 2 * 4 + chunk % 2 + 2 * (K % 2)) + 8 * set_ + 4 * (K // 2)


@triton.jit
def scale_and_minimum(
    panel,
    block,
    start,
    j,
    lane,
    mask,
    UNITS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    TOGETHER: tl.constexpr,
    KIND: tl.constexpr,
):
    """Scale and minimum of sub-block ``j``: float32 (chunks, sets, 16); ``start`` is that of the block's units."""
    if KIND == "Q4_K" or KIND == "Q5_K":
        head = tl.load(panel + start + lane, mask=mask, other=0)
        low = tl.load(panel + start + 16 + lane, mask=mask, other=0)
        mid = tl.load(panel + start + 32 + lane, mask=mask, other=0)
        high = tl.load(panel + start + 48 + lane, mask=mask, other=0)
        shift = (8 * (j % 4)).to(tl.uint32)
        upper = high >> shift
        six_low, six_mid = low >> shift, mid >> shift
        scale = tl.where(j < 4, six_low & 63, (upper & 15) | (((six_low >> 6) & 3) << 4))
        minimum = tl.where(j < 4, six_mid & 63, ((upper >> 4) & 15) | (((six_mid >> 6) & 3) << 4))
        d, dmin = half_bits(head), half_bits(head >> 16)
        return d * scale.to(tl.int32).to(tl.float32), dmin * minimum.to(tl.int32).to(tl.float32)
    elif KIND == "IQ4_XS":
        head = tl.load(panel + start + lane, mask=mask, other=0)
        low = tl.load(panel + start + 16 + lane, mask=mask, other=0)
        six = ((low >> (4 * j).to(tl.uint32)) & 15) | (((head >> (2 * j + 16).to(tl.uint32)) & 3) << 4)
        scale = half_bits(head) * (six.to(tl.int32) - 32).to(tl.float32)
        return scale, 0.0 * scale
    else:
        scale = leading_scale(panel, block, lane, mask, UNITS, SCALE_WORDS, TOGETHER)
        if KIND == "Q6_K":
            bytes_ = panel.to(tl.pointer_type(tl.int8), bitcast=True)
            own = tl.load(bytes_ + (start + j // 4 * 16 + lane) * 4 + j % 4, mask=mask, other=0)
            scale = scale * own.to(tl.float32)
        return scale, 0.0 * scale
