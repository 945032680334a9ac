"""Damage in tensor data that a sound header does not show: scales that are not finite, and zeros where weights were.

One such block makes a model answer with noise, or with token 0 for ever. Every piece is looked at while it is read, at
its scales alone: 10 to 50 microseconds for a MB, where packing takes ten times as long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as GgmlType

from transformers_kt.errors import GgufFormatError
from transformers_kt.gguf.reader import TensorInfo

# Where the float16 scales of a block begin, and how many stand there: of the published block layouts of ggml.
_HALVES: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F16: (0, 1),
    GgmlType.Q4_0: (0, 1),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0, 1),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0, 1),
    GgmlType.Q2_K: (80, 2),
    GgmlType.Q3_K: (108, 1),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208, 1),
    GgmlType.IQ1_S: (0, 1),
    GgmlType.IQ2_XXS: (0, 1),
    GgmlType.IQ2_XS: (0, 1),
    GgmlType.IQ2_S: (0, 1),
    GgmlType.IQ3_XXS: (0, 1),
    GgmlType.IQ3_S: (0, 1),
    GgmlType.IQ4_NL: (0, 1),
    GgmlType.IQ4_XS: (0, 1),
    GgmlType.TQ1_0: (52, 1),
    GgmlType.TQ2_0: (64, 1),
}
# The bits of a finite number's exponent are never all ones, in any of these.
_HALF_EXPONENT = 0x7C00
_BF16_EXPONENT = 0x7F80
_F32_EXPONENT = 0x7F800000
_E8M0_NAN = 0xFF  # the scale of an MXFP4 block
_E4M3_NAN = 0x7F  # each of the four scales of an NVFP4 block, without sign

# A hole that a broken download or copy leaves is of whole pages.
_HOLE_BYTES = 4096
# Rows of the vocabulary that no token uses may be zero; no model has as many as a sixteenth of them.
_UNUSED_ROWS = 16
_VOCABULARY = ("token_embd.weight", "output.weight")
_MAY_BE_ZERO = (".exp_probs_b.bias",)
_GET_IT_AGAIN = "The file is damaged, or was made so: get it again, or one that somebody else quantized"


class DamageCheck:
    """Of one tensor, whose pieces are given in order. Raises `GgufFormatError` for the first that is damaged."""

    def __init__(self, info: TensorInfo) -> None:
        self._info = info
        self._is_zero = True
        self._block_bytes = GGML_QUANT_SIZES[info.ggml_type][1]

    def look_at(self, stored: npt.NDArray[np.uint8], start: int) -> None:
        """``stored`` are whole blocks, from byte ``start`` of the tensor on."""
        info = self._info
        suspects, has_values = _looked_at(info.ggml_type, stored, self._block_bytes)
        if suspects is not None and suspects.any():
            number = start // self._block_bytes + int(np.argmax(suspects.reshape(len(suspects), -1).any(axis=1)))
            what = "value" if self._block_bytes <= 4 else "scale"
            raise GgufFormatError(
                f"{info.path}: block {number} of tensor {info.name} ({info.ggml_type.name}) has a {what} that is "
                f"infinite or not a number. {_GET_IT_AGAIN}"
            )
        self._is_zero = self._is_zero and not has_values
        if start + stored.nbytes == info.nbytes:
            self._require_values(stored)

    def _require_values(self, last: npt.NDArray[np.uint8]) -> None:
        info = self._info
        if info.name.endswith(_MAY_BE_ZERO):
            return
        if self._is_zero:
            raise GgufFormatError(
                f"{info.path}: tensor {info.name} is nothing but zeros. Space was reserved for it that no data filled. "
                f"{_GET_IT_AGAIN}"
            )
        hole = max(_HOLE_BYTES, info.nbytes // _UNUSED_ROWS if info.name in _VOCABULARY else 0)
        if info.is_last and last.nbytes >= hole and not last[-hole:].any():
            first = info.nbytes - (last.nbytes - int(np.flatnonzero(last)[-1]) - 1 if last.any() else last.nbytes)
            raise GgufFormatError(
                f"{info.path}: the file ends in zeros, from byte {info.offset + first} on, block "
                f"{first // self._block_bytes} of tensor {info.name}. Space was reserved that no data filled. "
                f"{_GET_IT_AGAIN}"
            )


def _looked_at(
    ggml_type: GgmlType, stored: npt.NDArray[np.uint8], block_bytes: int
) -> tuple[npt.NDArray[np.bool_] | None, bool]:
    """Which blocks hold what is not finite, None where none does, and whether any holds a value beside zero."""
    blocks = len(stored) // block_bytes
    if ggml_type == GgmlType.F32:
        return _exponents(stored.view("<u4"), _F32_EXPONENT)
    if ggml_type == GgmlType.BF16:
        return _exponents(stored.view("<u2"), _BF16_EXPONENT)
    if ggml_type in _HALVES:
        start, count = _HALVES[ggml_type]
        if count == 2:
            # Both at once: an exponent of all ones carries into the sign, which was masked away.
            pairs = np.ndarray((blocks,), "<u4", stored.data, start, (block_bytes,))
            exponents = pairs & np.uint32(_HALF_EXPONENT * 0x10001)
            if not ((exponents + np.uint32(0x04000400)) & np.uint32(0x80008000)).any():
                return None, bool(exponents.any()) or bool((pairs & np.uint32(0x7FFF7FFF)).any())
        halves = np.ndarray((blocks, count), "<u2", stored.data, start, (block_bytes, 2))
        return _exponents(halves, _HALF_EXPONENT)
    table = stored.reshape(blocks, block_bytes)
    if ggml_type == GgmlType.MXFP4:
        return table[:, 0] == _E8M0_NAN, bool(table[:, 1:].any())
    if ggml_type == GgmlType.NVFP4:
        return (table[:, :4] & 0x7F) == _E4M3_NAN, bool(table[:, :4].any())
    if ggml_type == GgmlType.IQ1_M:
        # A float16 in the highest four bits of four words.
        parts = np.ndarray((blocks, 4), "<u2", stored.data, 48, (block_bytes, 2)) >> 12
        return _exponents(parts @ np.array([1, 1 << 4, 1 << 8, 1 << 12], np.uint16), _HALF_EXPONENT)
    return None, bool(stored.any())


def _exponents(words: npt.NDArray[np.unsignedinteger], ones: int) -> tuple[npt.NDArray[np.bool_] | None, bool]:
    exponents = words & words.dtype.type(ones)
    largest = exponents.max()
    if largest == ones:
        return exponents == ones, True
    # Denormals count as values: all but the sign.
    return None, bool(largest) or bool((words << 1).any())
