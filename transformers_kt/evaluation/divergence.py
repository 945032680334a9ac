"""Distances between the logits of two models, and what many of them come to. Arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

_ROWS_AT_ONCE = 16  # in float64, a row of 129,280 logits takes 1 MB, and some five of them are needed at once
_LEVELS = 2**16 - 1


class Rows(NamedTuple):
    """Logits of a reference, in 16 bits each: ``low + step * codes`` of each row, evenly spaced between its extremes.

    ``codes`` uint16 (rows, vocab), ``low`` and ``step`` float32 (rows, 1). What rounding would touch is kept beside
    them: ``best`` int64 (rows,) the likeliest id, ``loss`` float64 (rows,) -log of the next token's probability.
    """

    codes: torch.Tensor
    low: torch.Tensor
    step: torch.Tensor
    best: torch.Tensor
    loss: torch.Tensor


class Distances(NamedTuple):
    """Of each predicted token: float64 (tokens,) in nats, but for ``agrees``, which is bool.

    ``kl`` is KL(reference || model); ``loss`` and ``reference_loss`` are -log of the probability that each gave to the
    token that came; ``agrees`` says whether both had the same likeliest token.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    reference_loss: torch.Tensor
    agrees: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Distances]) -> Distances:
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def kept_rows(logits: torch.Tensor, next_ids: torch.Tensor) -> Rows:
    """``logits`` float32 (rows, vocab), finite, as they are stored; ``next_ids`` int64 (rows,) are what came."""
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
    step = ((high - low) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((logits - low) / step).round().clamp(0, _LEVELS).to(torch.uint16)
    return Rows(codes, low, step, logits.argmax(-1), _losses(logits, next_ids))


def distances(reference: Rows, logits: torch.Tensor, next_ids: torch.Tensor) -> Distances:
    """Of a model's ``logits`` float32 (rows, vocab) to those of the reference at the same places."""
    kl = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        codes = reference.codes[part].to(torch.float64)
        p = (codes * reference.step[part].double() + reference.low[part].double()).log_softmax(-1)
        q = logits[part].double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    agrees = logits.argmax(-1) == reference.best
    return Distances(torch.cat(kl), _losses(logits, next_ids), reference.loss, agrees)


def _losses(logits: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
    parts = zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(next_ids, _ROWS_AT_ONCE), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(rows.double(), ids, reduction="none") for rows, ids in parts])


class Estimate(NamedTuple):
    """A figure, and one standard error of it, for which tokens count as independent of each other."""

    value: float
    error: float

    @classmethod
    def mean_of(cls, values: torch.Tensor) -> Estimate:
        return cls(values.mean().item(), values.std().item() / math.sqrt(len(values)))

    def exponential(self) -> Estimate:
        return Estimate(math.exp(self.value), math.exp(self.value) * self.error)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the distances of ``tokens`` predicted tokens come to. KL divergences are in nats, ``same_top`` is a share.

    ``perplexity_ratio`` is the model's over the reference's. Both read the same tokens, so that its error is smaller
    than those of the two say.
    """

    tokens: int
    kl_mean: Estimate
    kl_median: float
    kl_99: float
    same_top: Estimate
    perplexity: Estimate
    reference_perplexity: Estimate
    perplexity_ratio: Estimate

    @classmethod
    def of(cls, measured: Distances) -> Statistics:
        median, most = torch.quantile(measured.kl, torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        return cls(
            len(measured.kl),
            Estimate.mean_of(measured.kl),
            median,
            most,
            Estimate.mean_of(measured.agrees.double()),
            Estimate.mean_of(measured.loss).exponential(),
            Estimate.mean_of(measured.reference_loss).exponential(),
            Estimate.mean_of(measured.loss - measured.reference_loss).exponential(),
        )
