"""Room for keys on devices, which a model keeps from one cache to the next.

A captured step appends at addresses. Were each call of ``generate`` to make a cache of its own, each would have to
capture anew, which takes as long as some tokens. So caches live in buffers that the model lends them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from transformers_kt.backends.gpu.device import Device
from transformers_kt.errors import OutOfMemoryError
from transformers_kt.modules.fused.latent_cache import Loan

_STEP = 256
"""Tokens of room are a multiple of it."""
MOST_RESERVED = 32768
"""Tokens, of all sequences together, that are reserved for a call that says it may become longer; a plan counts as
many."""

KeySizes = Sequence[tuple[Device, int, int]]
"""Of each layer: where its keys lie, how wide its latents are, and its rotary keys."""


class KeptKeys:
    """Buffers for ``batch`` sequences of up to ``capacity`` tokens."""

    def __init__(self, sizes: KeySizes, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        with torch.inference_mode(False):  # else only the mode that made them could write into them
            self.buffers = [
                [device.empty((batch, 1, capacity, width), device.activations) for width in widths]
                for device, *widths in sizes
            ]


class KeyStore:
    """What a model lends. It keeps one set of buffers that no cache uses."""

    def __init__(self, sizes: KeySizes) -> None:
        self._sizes = sizes
        self._idle: KeptKeys | None = None

    def lend(self, batch: int, tokens: int, expected: int) -> Loan:
        """Room for ``tokens`` at least, and for as many as are ``expected`` where there is memory.

        Raises OutOfMemoryError.
        """
        expected = min(expected, MOST_RESERVED // batch)
        # Half again as much as is needed now where nothing is known: see `latent_cache`.
        wanted = _rounded(expected if expected >= tokens else tokens + tokens // 2)
        kept, self._idle = self._idle, None
        if kept is None or kept.batch != batch or kept.capacity < wanted:
            kept = None  # first, so that its memory is free
            try:
                kept = KeptKeys(self._sizes, batch, wanted)
            except OutOfMemoryError:
                kept = KeptKeys(self._sizes, batch, _rounded(tokens))
        store = weakref.ref(self)  # a cache may live longer than its model

        def take_back(kept: KeptKeys) -> None:
            if (living := store()) is not None:
                living._idle = kept

        return Loan(kept.buffers, kept, take_back)


def _rounded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
