"""Blocks that stand in a panel as they stand in a file, as numbers: types with grids, ternary types, NVFP4.

Plain torch operations, as all of `panels`, over ``blocks`` uint8 (..., block bytes). Results are float32 (...,
columns), computed as the extension does: scale and power of two first, then the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import transformers_kt._C as _C

_codebooks: dict[tuple[str, torch.device], torch.Tensor] = {}


def make_codebook(type_name: str, device: torch.device) -> None:
    """Put what `looked_up` needs on ``device``, where the type has it. It stays: captured work reads it, and may copy
    nothing from ordinary memory itself."""
    stored = _C.codebooks().get(type_name)
    if stored is not None and (type_name, device) not in _codebooks:
        _codebooks[type_name, device] = torch.from_numpy(stored).to(device, torch.float32)


def is_codebook(address: int) -> bool:
    """Whether one is stored there."""
    return any(table.data_ptr() == address for table in _codebooks.values())


def looked_up(places: torch.Tensor, type_name: str) -> torch.Tensor:
    """The weights of the type at ``places``, integers or floats: float32, grids with one more dimension."""
    make_codebook(type_name, places.device)
    return _codebooks[type_name, places.device][places.long()]


def split(values: torch.Tensor, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
    """``values`` with dimension ``dim`` as several; `Tensor.unflatten` has no types."""
    dim %= values.ndim
    return values.reshape(*values.shape[:dim], *shape, *values.shape[dim + 1 :])


def halves(stored: torch.Tensor) -> torch.Tensor:
    """uint8 (..., 2 n) -> float32 (..., n) of f16."""
    return stored.contiguous().view(torch.float16).float()


def _words(stored: torch.Tensor, nbytes: int) -> torch.Tensor:
    """uint8 (..., nbytes n) -> int64 (..., n) of little-endian words."""
    parts = stored.reshape(*stored.shape[:-1], -1, nbytes).long()
    return sum((parts[..., i] << 8 * i for i in range(nbytes)), torch.zeros_like(parts[..., 0]))


def _fields(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """The lowest ``count`` fields of ``bits`` bits of each word: (..., n) -> (..., n count)."""
    shifts = torch.arange(0, count * bits, bits, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _signs(bits: torch.Tensor) -> torch.Tensor:
    """(..., n) bytes, a bit a weight, 1 is minus -> float32 (..., 8 n) of 1 and -1."""
    return 1.0 - 2.0 * _fields(bits, 8, 1).float()


def _even_signs(seven: torch.Tensor) -> torch.Tensor:
    """(..., n) of 7 bits, whose eighth makes the number of minuses even -> as `_signs`."""
    odd = _fields(seven, 7, 1).reshape(*seven.shape, 7).sum(-1) & 1
    return _signs(seven | odd << 7)


def _scaled(d: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``d`` (..., 1) times each of ``scales`` (..., n), then times its share of ``weights`` (..., columns)."""
    each = weights.shape[-1] // scales.shape[-1]
    return (d * scales).repeat_interleave(each, dim=-1) * weights


def _odd(scales: torch.Tensor) -> torch.Tensor:
    return (2 * scales + 1).float()


def _iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    words = _words(blocks[..., 2:], 4)
    places, bits = _fields(words[..., 0::2], 4, 8), words[..., 1::2]
    weights = looked_up(places, "IQ2_XXS").flatten(-2) * _even_signs(_fields(bits, 4, 7))
    return _scaled(halves(blocks[..., :2]) / 8, _odd(bits >> 28), weights)


def _iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    both = _words(blocks[..., 2:66], 2)
    weights = looked_up(both & 511, "IQ2_XS").flatten(-2) * _even_signs(both >> 9)
    return _scaled(halves(blocks[..., :2]) / 8, _odd(_fields(_words(blocks[..., 66:], 1), 2, 4)), weights)


def _iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    low, signs, high, scales = (_words(blocks[..., a:b], 1) for a, b in ((2, 34), (34, 66), (66, 74), (74, 82)))
    weights = looked_up(low | _fields(high, 4, 2) << 8, "IQ2_S").flatten(-2) * _signs(signs)
    return _scaled(halves(blocks[..., :2]) / 8, _odd(_fields(scales, 2, 4)), weights)


def _iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    bits = _words(blocks[..., 66:], 4)
    weights = looked_up(blocks[..., 2:66], "IQ3_XXS").flatten(-2) * _even_signs(_fields(bits, 4, 7))
    return _scaled(halves(blocks[..., :2]) / 4, _odd(bits >> 28), weights)


def _iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    low, high, signs, scales = (_words(blocks[..., a:b], 1) for a, b in ((2, 66), (66, 74), (74, 106), (106, 110)))
    weights = looked_up(low | _fields(high, 8, 1) << 8, "IQ3_S").flatten(-2) * _signs(signs)
    return _scaled(halves(blocks[..., :2]), _odd(_fields(scales, 2, 4)), weights)


def _eighths(places: torch.Tensor, is_less: torch.Tensor) -> torch.Tensor:
    """Weights of the grid of IQ1_S at ``places``, an eighth more or less, in eighths."""
    return (8 * looked_up(places, "IQ1_S") + (1 - 2 * is_less).float().unsqueeze(-1)).flatten(-2)


def _iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    high = _words(blocks[..., 34:], 2)
    places = _words(blocks[..., 2:34], 1) | _fields(high, 4, 3) << 8
    weights = _eighths(places, (high >> 15).repeat_interleave(4, dim=-1))
    return _scaled(halves(blocks[..., :2]) / 8, _odd((high >> 12) & 7), weights)


def _iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    nibbles, scales = _fields(_words(blocks[..., 32:48], 1), 2, 4), _words(blocks[..., 48:], 2)
    weights = _eighths(_words(blocks[..., :32], 1) | (nibbles & 7) << 8, nibbles >> 3)
    quarters = split(blocks[..., 49::2] >> 4, -1, (2, 2))
    d = halves(quarters[..., 0] | quarters[..., 1] << 4)
    return _scaled(d / 8, _odd(_fields(scales, 4, 3)), weights)


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    parts = []
    for part, digits in ((blocks[..., :32], 5), (blocks[..., 32:48], 5), (blocks[..., 48:52], 4)):
        for place in range(digits):  # of the fraction in base 3 that a byte is
            parts.append(((part.int() * 3**place & 255) * 3 >> 8) - 1)
    return halves(blocks[..., 52:]) * torch.cat(parts, dim=-1).float()


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    parts = split(blocks[..., :64], -1, (2, 1, 32))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(4, 1)
    return halves(blocks[..., 64:]) * (((parts >> shifts) & 3).flatten(-3).float() - 1.0)


def _nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    d = blocks[..., :4].int()
    mantissa, exponent = d & 7, (d >> 3) & 15
    integer = torch.where(exponent == 0, mantissa, (8 + mantissa) << (exponent - 1).clamp(min=0))
    scales = torch.where(d == 0x7F, 0, integer).float() / 1024
    eight = split(blocks[..., 4:], -1, (4, 8))
    nibbles = torch.cat((eight & 15, eight >> 4), dim=-1).flatten(-2)
    return scales.repeat_interleave(16, dim=-1) * looked_up(nibbles, "NVFP4")


DECODERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "NVFP4": _nvfp4,
}
