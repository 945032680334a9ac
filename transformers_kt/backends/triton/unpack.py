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

import transformers_kt._C as _C
from transformers_kt.backends.gpu.panels import LAYOUTS


class Kind(NamedTuple):
    """What a kernel is compiled for: a type, the shape of its blocks, and how many of them are read at once.

    A block is ``head`` units, then ``chunks`` of ``sets`` of ``set_units`` that hold ``vectors``. Scales that stand
    apart are ``scale_words`` words of 4 bytes for the 16 rows of a block; those of ``together`` blocks lead together.
    The float types are columns of 16 values, of which ``blocks`` are read at once.
    """

    name: str
    columns: int  # of a block
    units: int  # of a block
    scale_words: int
    together: int
    blocks: int
    head: int = 0
    chunks: int = 0
    sets: int = 0
    set_units: int = 0
    vectors: int = 0


_SETS: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (8, 0, 1, 4, 1, 2),
    "IQ4_NL": (8, 0, 1, 4, 1, 2),
    "MXFP4": (8, 0, 1, 4, 1, 2),
    "Q4_1": (8, 1, 1, 4, 1, 2),
    "Q5_0": (32, 0, 1, 1, 5, 8),
    "Q5_1": (32, 1, 1, 1, 5, 8),
    "Q8_0": (4, 0, 1, 8, 1, 1),
    "Q2_K": (2, 5, 4, 4, 1, 4),
    "Q3_K": (4, 3, 4, 2, 3, 8),
    "Q4_K": (1, 4, 4, 8, 1, 2),
    "Q5_K": (4, 4, 4, 2, 5, 8),
    "Q6_K": (2, 4, 4, 4, 3, 4),
    "IQ4_XS": (1, 2, 4, 8, 1, 2),
}
"""Blocks at once (512 words of a set, 16 bytes to each of 128 threads), and what of a `Kind` follows them."""
FLOAT_COLUMNS = 64


def _kind(name: str) -> Kind:
    layout = LAYOUTS[name]
    shape = _SETS.get(name, (FLOAT_COLUMNS,))
    return Kind(name, layout.block_elements, layout.units, layout.scale_bytes * 4, layout.together, *shape)


FLOATS = ("F32", "F16", "BF16")
KINDS: Mapping[str, Kind] = {name: _kind(name) for name in (*FLOATS, *_SETS)}
"""Types with kernels."""


def _words(type_name: str) -> list[tl.constexpr]:
    """The 16 signed bytes that nibbles of the type stand for, as four words."""
    packed = _C.codebooks()[type_name].tobytes()
    return [tl.constexpr(int.from_bytes(packed[i : i + 4], "little")) for i in range(0, 16, 4)]


IQ4_NL_0, IQ4_NL_4, IQ4_NL_8, IQ4_NL_12 = _words("IQ4_NL")
MXFP4_0, MXFP4_4, MXFP4_8, MXFP4_12 = _words("MXFP4")


@triton.jit
def half_bits(bits):
    """float32 of the f16 in the low 16 bits."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def block_start(block, blocks, KIND: tl.constexpr):
    """Where the units of ``block`` start in a panel of ``blocks``, in words of 4 bytes."""
    if KIND.scale_words == 0:
        return block * (KIND.units * 16)
    else:
        first = block // KIND.together * KIND.together
        scales = tl.minimum(blocks - first, KIND.together) * KIND.scale_words  # a last group may have fewer blocks
        start = first * (KIND.units * 16 + KIND.scale_words) + scales + (block - first) * (KIND.units * 16)
        # Said once, so that the compiler loads 16 bytes a lane: it cannot see through the minimum.
        return tl.multiple_of(start, [KIND.scale_words, KIND.scale_words, KIND.scale_words])


@triton.jit
def leading_scale(panel, block, lane, mask, KIND: tl.constexpr):
    """float32 of the scale that stands apart from the units. ``panel`` points to words."""
    first = block // KIND.together * KIND.together
    words = first * (KIND.units * 16 + KIND.scale_words) + (block - first) * KIND.scale_words
    if KIND.scale_words == 8:
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
def set_words(at, mask, KIND: tl.constexpr):
    """The words of a set whose first is ``at``: five, of which a type with fewer has copies of the first."""
    w0 = tl.load(at, mask=mask, other=0)
    w1, w2, w3, w4 = w0, w0, w0, w0
    if KIND.set_units >= 3:
        w1 = tl.load(at + 16, mask=mask, other=0)
        w2 = tl.load(at + 32, mask=mask, other=0)
    if KIND.set_units == 5:
        w3 = tl.load(at + 48, mask=mask, other=0)
        w4 = tl.load(at + 64, mask=mask, other=0)
    return w0, w1, w2, w3, w4


@triton.jit
def vector(w0, w1, w2, w3, w4, K: tl.constexpr, KIND: tl.constexpr):
    """Vector ``K`` of a set: a word of 4 weights as unsigned bytes (Q8_0: signed ones)."""
    if KIND.vectors == 1:
        return w0
    elif KIND.vectors == 2:
        return (w0 >> (4 * K)) & 0x0F0F0F0F
    elif KIND.name == "Q2_K":
        return (w0 >> (2 * K)) & 0x03030303
    elif KIND.name == "Q6_K":
        if K == 0:
            return w0 & 0x3F3F3F3F
        elif K == 1:
            return w1 & 0x3F3F3F3F
        elif K == 2:
            return w2 & 0x3F3F3F3F
        else:
            return ((w0 >> 6) & 0x03030303) | ((w1 >> 4) & 0x0C0C0C0C) | ((w2 >> 2) & 0x30303030)
    elif KIND.name == "Q3_K":
        if K < 2:
            return (w0 >> (3 * K)) & 0x07070707
        elif K < 4:
            return (w1 >> (3 * (K - 2))) & 0x07070707
        elif K < 6:
            return (w2 >> (3 * (K - 4))) & 0x07070707
        elif K == 6:
            return ((w0 >> 6) & 0x03030303) | ((w2 >> 4) & 0x04040404)
        else:
            return ((w1 >> 6) & 0x03030303) | ((w2 >> 5) & 0x04040404)
    else:
        tl.static_assert(KIND.set_units == 5)
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
    if KIND.name == "Q8_0":
        return (word.to(tl.int32, bitcast=True) << (24 - 8 * BYTE) >> 24).to(tl.float32)
    else:
        byte = (word >> (8 * BYTE)) & 0xFF
        if KIND.name == "IQ4_NL" or KIND.name == "IQ4_XS":
            return looked_up(byte, IQ4_NL_0, IQ4_NL_4, IQ4_NL_8, IQ4_NL_12).to(tl.float32)
        elif KIND.name == "MXFP4":
            return looked_up(byte, MXFP4_0, MXFP4_4, MXFP4_8, MXFP4_12).to(tl.float32)
        byte = byte.to(tl.int32).to(tl.float32)
        if KIND.name == "Q3_K":
            return byte - 4.0
        elif KIND.name == "Q4_0":
            return byte - 8.0
        elif KIND.name == "Q5_0":
            return byte - 16.0
        elif KIND.name == "Q6_K":
            return byte - 32.0
        else:
            return byte


@triton.jit
def first_column(chunk, set_, K: tl.constexpr, KIND: tl.constexpr):
    """The column in its block of weight 0 of vector ``K``."""
    if KIND.name == "Q8_0":
        return 4 * set_ + 0 * chunk
    elif KIND.name == "Q5_0" or KIND.name == "Q5_1":
        return 4 * (K // 2) + 16 * (K % 2) + 0 * (chunk + set_)
    elif KIND.chunks == 1:
        return 4 * set_ + 16 * K + 0 * chunk
    elif KIND.name == "Q6_K":
        return 32 * (chunk // 2 * 4 + chunk % 2 + 2 * (K % 2)) + 8 * set_ + 4 * (K // 2)
    else:
        return 64 * chunk + 32 * (K % 2) + (32 // KIND.sets) * set_ + 4 * (K // 2)


@triton.jit
def scale_and_minimum(panel, block, start, chunk, set_, K: tl.constexpr, lane, mask, KIND: tl.constexpr):
    """Scale and minimum of vector ``K`` of a set: float32 (chunks, sets, 16). Units of the block start at ``start``."""
    # j is the part of a block with a scale of its own: the first column over 16 or 32, said so that no register spills.
    if KIND.name == "Q4_K" or KIND.name == "Q5_K":
        j = 2 * chunk + K % 2
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
    elif KIND.name == "Q2_K":
        j = 4 * chunk + 2 * (K % 2) + set_ // 2
        head = tl.load(panel + start + lane, mask=mask, other=0)
        bytes_ = panel.to(tl.pointer_type(tl.uint8), bitcast=True)
        both = tl.load(bytes_ + (start + (1 + j // 4) * 16 + lane) * 4 + j % 4, mask=mask, other=0).to(tl.int32)
        return half_bits(head) * (both & 15).to(tl.float32), half_bits(head >> 16) * (both >> 4).to(tl.float32)
    elif KIND.name == "Q3_K":
        j = 4 * chunk + 2 * (K % 2) + set_
        byte = (8 * (j % 4)).to(tl.uint32)
        low = tl.load(panel + start + j // 4 % 2 * 16 + lane, mask=mask, other=0) >> byte
        high = tl.load(panel + start + 32 + lane, mask=mask, other=0) >> byte
        six = ((low >> (j // 8 * 4).to(tl.uint32)) & 15) | (((high >> (j // 4 * 2).to(tl.uint32)) & 3) << 4)
        scale = leading_scale(panel, block, lane, mask, KIND) * (six.to(tl.int32) - 32).to(tl.float32)
        return scale, 0.0 * scale
    elif KIND.name == "IQ4_XS":
        j = 2 * chunk + K % 2
        head = tl.load(panel + start + lane, mask=mask, other=0)
        low = tl.load(panel + start + 16 + lane, mask=mask, other=0)
        six = ((low >> (4 * j).to(tl.uint32)) & 15) | (((head >> (2 * j + 16).to(tl.uint32)) & 3) << 4)
        scale = half_bits(head) * (six.to(tl.int32) - 32).to(tl.float32)
        return scale, 0.0 * scale
    elif KIND.name == "Q4_1" or KIND.name == "Q5_1":
        head = tl.load(panel + start + lane, mask=mask, other=0)
        return half_bits(head), -half_bits(head >> 16)
    else:
        scale = leading_scale(panel, block, lane, mask, KIND)
        if KIND.name == "Q6_K":
            j = 2 * (chunk // 2 * 4 + chunk % 2 + 2 * (K % 2)) + set_ // 2
            bytes_ = panel.to(tl.pointer_type(tl.int8), bitcast=True)
            own = tl.load(bytes_ + (start + j // 4 * 16 + lane) * 4 + j % 4, mask=mask, other=0)
            scale = scale * own.to(tl.float32)
        return scale, 0.0 * scale
