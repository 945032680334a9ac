"""Damage in tensor data that a sound header does not show: scales that are not finite, and zeros where weights were.

One such block makes a model answer with noise, or with token 0 for ever. Who reads a tensor looks at every scale; here
is what follows from what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES

from transformers_kt.errors import GgufFormatError
from transformers_kt.gguf.reader import TensorInfo

# A hole that a broken download or copy leaves is of whole pages.
_HOLE_BYTES = 4096
# Inside a tensor it is told from what a quantizer may write by its size: an intermediate size that was padded with rows
# of zeros has 150 kB of them.
_INNER_HOLE_BYTES = 1 << 20
# Rows of the vocabulary that no token uses may be zero; no model has as many as a sixteenth of them.
_UNUSED_ROWS = 16
_VOCABULARY = ("token_embd.weight", "output.weight")
_MAY_BE_ZERO = (".exp_probs_b.bias",)
_GET_IT_AGAIN = "The file is damaged, or was made so: get it again, or one that somebody else quantized"
_LOOKED_BACK_BYTES = 1 << 20


class Findings(Protocol):
    """What was found in a tensor so far."""

    @property
    def not_finite(self) -> int:
        """The first block with a scale (of a float type a value) that is infinite or no number; -1 for none."""

    @property
    def has_values(self) -> bool:
        """Whether any scale or value is other than zero."""

    @property
    def zeros(self) -> Sequence[tuple[int, int]]:
        """Ranges [start, end) of the tensor's bytes that are nothing but zeros, ascending."""


def require_finite(info: TensorInfo, found: Findings) -> None:
    """Raise `GgufFormatError` for a block that is not finite."""
    if found.not_finite >= 0:
        what = "value" if _block_bytes(info) <= 4 else "scale"
        raise GgufFormatError(
            f"{info.path}: block {found.not_finite} of tensor {info.name} ({info.ggml_type.name}) has a {what} that is "
            f"infinite or not a number. {_GET_IT_AGAIN}"
        )


def require_values(info: TensorInfo, found: Findings, data: Callable[[int, int], npt.NDArray[np.uint8]]) -> None:
    """Raise `GgufFormatError` for zeros in place of weights in a tensor that was read to its end.

    ``data(start, end)`` gives bytes of it. A matrix of a stack may be zeros: an expert that was pruned.
    """
    if info.name.endswith(_MAY_BE_ZERO):
        return
    if not found.has_values:
        raise GgufFormatError(
            f"{info.path}: tensor {info.name} is nothing but zeros. Space was reserved for it that no data filled. "
            f"{_GET_IT_AGAIN}"
        )
    unused = info.nbytes // _UNUSED_ROWS if info.name in _VOCABULARY else 0
    hole = max(_HOLE_BYTES, unused)
    if info.is_last and info.nbytes >= hole and not data(info.nbytes - hole, info.nbytes).any():
        first = _end_of_values(info.nbytes - hole, data)
        raise GgufFormatError(
            f"{info.path}: the file ends in zeros, from byte {info.offset + first} on, block "
            f"{first // _block_bytes(info)} of tensor {info.name}. Space was reserved that no data filled. "
            f"{_GET_IT_AGAIN}"
        )
    each = info.nbytes // (info.shape[0] if len(info.shape) == 3 else 1)
    for start, end in found.zeros:
        if end - start >= max(_INNER_HOLE_BYTES, unused) and (start % each or end % each):
            raise GgufFormatError(
                f"{info.path}: {end - start} bytes of tensor {info.name} are zeros, from block "
                f"{start // _block_bytes(info)} on. Space was reserved that no data filled. {_GET_IT_AGAIN}"
            )


def _block_bytes(info: TensorInfo) -> int:
    return int(GGML_QUANT_SIZES[info.ggml_type][1])


def _end_of_values(position: int, data: Callable[[int, int], npt.NDArray[np.uint8]]) -> int:
    """Where the zeros before ``position`` begin."""
    while position > 0:
        before = data(max(0, position - _LOOKED_BACK_BYTES), position)
        values = np.flatnonzero(before)
        if len(values):
            return position - len(before) + int(values[-1]) + 1
        position -= len(before)
    return position
