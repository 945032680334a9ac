"""Panels as numbers, in plain torch operations: what every GPU kernel that reads panels is held to.

A panel holds 16 rows, k-major, in the bytes that the CPU's kernels read (csrc/formats/panel_layout.h), so that a matrix
lies on a GPU as it lies in RAM. These functions run on any device that torch knows. They are slow: a block becomes some
ten tensors of bytes. Kernels in Triton give the same float32 values, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import transformers_kt._C as _C
from transformers_kt.backends.gpu import whole_blocks
from transformers_kt.backends.gpu.whole_blocks import halves, looked_up, split

PANEL_ROWS = 16


@dataclass(frozen=True, slots=True)
class PanelLayout:
    """Where the parts of a block of one type stand in a panel; sizes are of one row.

    A block is ``units`` units of ``unit_bytes``; a unit of the 16 rows stands together. A scale of ``scale_bytes`` a
    row, if there is any, stands apart from the units: those of ``together`` blocks lead the units of these.
    """

    name: str
    block_elements: int
    block_bytes: int
    units: int
    unit_bytes: int
    scale_bytes: int
    together: int

    def panel_bytes(self, cols: int) -> int:
        """Bytes of a panel of ``cols`` columns."""
        return cols // self.block_elements * self.block_bytes * PANEL_ROWS


def dequantize(panels: torch.Tensor, type_name: str, rows: int, cols: int) -> torch.Tensor:
    """``panels`` uint8 (panels, panel bytes) of one matrix -> float32 (rows, cols), exact but for one rounding.

    That one is of the subtraction of a minimum; bits are those of ``_C.dequantize`` on the rows of the file.
    """
    layout = LAYOUTS[type_name]
    if type_name in whole_blocks.DECODERS:
        blocks = panels.reshape(len(panels), cols // layout.block_elements, PANEL_ROWS, layout.block_bytes)
        return whole_blocks.DECODERS[type_name](blocks).transpose(1, 2).reshape(-1, cols)[:rows]
    units, scales = _parts(panels, layout, cols)
    values = _DECODERS[type_name](units, scales)  # (panels, blocks, block elements, 16)
    return values.permute(0, 3, 1, 2).reshape(-1, cols)[:rows]


def _parts(panels: torch.Tensor, layout: PanelLayout, cols: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Units uint8 (panels, blocks, units, 16, unit bytes); leading scales float32 (panels, blocks, 1, 16), or None."""
    count, blocks = panels.shape[0], cols // layout.block_elements
    unit_shape = (layout.units, PANEL_ROWS, layout.unit_bytes)
    if not layout.scale_bytes:
        return panels.reshape(count, blocks, *unit_shape), None
    in_groups = blocks // layout.together * layout.together
    border = in_groups * layout.block_bytes * PANEL_ROWS
    parts = []
    for part, together in ((panels[:, :border], layout.together), (panels[:, border:], blocks - in_groups)):
        if not part.shape[1]:
            continue
        group = part.reshape(count, -1, together * layout.block_bytes * PANEL_ROWS)
        lead = together * layout.scale_bytes * PANEL_ROWS
        scales = group[..., :lead].reshape(count, -1, PANEL_ROWS * layout.scale_bytes)
        parts.append((group[..., lead:].reshape(count, -1, *unit_shape), scales))
    units, scales = (torch.cat(same, dim=1) for same in zip(*parts, strict=True))
    return units, (halves(scales) if layout.scale_bytes == 2 else _powers(scales)).unsqueeze(2)


def _powers(stored: torch.Tensor) -> torch.Tensor:
    """uint8 exponents of MXFP4 -> float32 of half their power of two: its values are stored doubled."""
    return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - 128)


def _columns(vectors: torch.Tensor) -> torch.Tensor:
    """(panels, blocks, vectors, 16, 4), 4 columns of 16 rows to a vector -> float32 (panels, blocks, columns, 16)."""
    return vectors.transpose(-1, -2).flatten(2, 3).float()


def _five_bits(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The 8 vectors of a set of 5 units, side by side in a new second-last dimension but one."""
    vectors = (
        a & 31,
        b & 31,
        (a >> 5) | ((b >> 3) & 24),
        c & 31,
        d & 31,
        (c >> 5) | ((d >> 3) & 24),
        e & 31,
        (e >> 5) | ((b >> 2) & 8) | ((d >> 1) & 16),
    )
    return torch.stack(vectors, dim=-3)


def _six_bits(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The 4 vectors of a set of 3 units, likewise."""
    last = (a >> 6) | ((b >> 4) & 12) | ((c >> 2) & 48)
    return torch.stack((a & 63, b & 63, c & 63, last), dim=-3)


def _three_bits(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The 8 vectors of a set of 3 units, likewise."""
    whole = [vector for unit in (a, b, c) for vector in (unit & 7, (unit >> 3) & 7)]
    return torch.stack((*whole, (a >> 6) | ((c >> 4) & 4), (b >> 6) | ((c >> 5) & 4)), dim=-3)


def _f32(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return units.contiguous().view(torch.float32).squeeze(-1)


def _f16(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return units.contiguous().view(torch.float16).squeeze(-1).float()


def _bf16(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return units.contiguous().view(torch.bfloat16).squeeze(-1).float()


def _q8_0(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales * _columns(units.contiguous().view(torch.int8))


def _q4_0(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales * (_columns(torch.cat((units & 15, units >> 4), dim=2)) - 8)


def _iq4_nl(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales * looked_up(_columns(torch.cat((units & 15, units >> 4), dim=2)), "IQ4_NL")


def _mxfp4(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales * looked_up(_columns(torch.cat((units & 15, units >> 4), dim=2)), "MXFP4")


def _columns_of_five_bits(units: torch.Tensor) -> torch.Tensor:
    """A set of 5 units: vector 2 i has columns 4 i to 4 i + 3, the next one those 16 further."""
    vectors = _five_bits(*units.unbind(2))
    return _columns(torch.cat((vectors[:, :, 0::2], vectors[:, :, 1::2]), dim=2))


def _q5_0(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    return scales * (_columns_of_five_bits(units) - 16)


def _with_one_minimum(units: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of Q4_1 and Q5_1, whose unit 0 is scale and minimum."""
    head = halves(units[:, :, 0]).unsqueeze(2)  # (panels, blocks, 1, 16, 2)
    return head[..., 0] * columns + head[..., 1]


def _q4_1(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return _with_one_minimum(units, _columns(torch.cat((units[:, :, 1:] & 15, units[:, :, 1:] >> 4), dim=2)))


def _q5_1(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return _with_one_minimum(units, _columns_of_five_bits(units[:, :, 1:]))


def _k_scales(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """d * sc and dmin * m of units 0 to 3 of Q4_K or Q5_K: float32 (panels, blocks, 8, 16) each."""
    head = halves(units[:, :, 0])  # (panels, blocks, 16, 2)
    d, dmin = head[..., 0].unsqueeze(2), head[..., 1].unsqueeze(2)
    low, mid, high = units[:, :, 1], units[:, :, 2], units[:, :, 3]  # (panels, blocks, 16, 4)
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)
    minima = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=-1)
    return d * scales.transpose(-1, -2).float(), dmin * minima.transpose(-1, -2).float()


def _sub_blocks(vectors: torch.Tensor) -> torch.Tensor:
    """``vectors`` (panels, blocks, 4 chunks, 8 groups, low and high, 16, 4) -> (panels, blocks, 8, 32 columns, 16)."""
    return split(_columns(vectors.transpose(3, 4).flatten(2, 4)), 2, (8, 32))


def _nibbles_of_chunks(units: torch.Tensor) -> torch.Tensor:
    """32 units: 4 chunks, whose low nibbles are a sub-block and whose high ones the next; as of `_sub_blocks`."""
    nibbles = split(units, 2, (4, 8))
    return _sub_blocks(torch.stack((nibbles & 15, nibbles >> 4), dim=4))


def _with_minima(units: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of Q4_K and Q5_K."""
    scales, minima = _k_scales(units)
    return (scales.unsqueeze(3) * columns - minima.unsqueeze(3)).flatten(2, 3)


def _q4_k(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return _with_minima(units, _nibbles_of_chunks(units[:, :, 4:]))


def _q5_k(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    sets = split(units[:, :, 4:], 2, (4, 2, 5))
    vectors = _five_bits(*sets.unbind(4))  # (panels, blocks, 4 chunks, 2 sets, 8, 16, 4)
    return _with_minima(units, _sub_blocks(split(vectors, 4, (4, 2)).flatten(3, 4)))


def _q2_k(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    head = halves(units[:, :, 0]).unsqueeze(2)  # (panels, blocks, 1, 16, 2)
    both = units[:, :, 1:5].transpose(-1, -2).flatten(2, 3)  # (panels, blocks, 16 sub-blocks, 16)
    of_16, minima = head[..., 0] * (both & 15).float(), head[..., 1] * (both >> 4).float()
    sets = split(units[:, :, 5:], 2, (4, 4))
    vectors = torch.stack([(sets >> shift) & 3 for shift in (0, 2, 4, 6)], dim=4)  # (.., 4 chunks, 4 sets, 4, 16, 4)
    columns = _sub_blocks(split(vectors, 4, (2, 2)).flatten(3, 4)).flatten(2, 3)
    return (of_16.unsqueeze(3) * split(columns, 2, (16, 16)) - minima.unsqueeze(3)).flatten(2, 3)


def _q3_k(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    first, second, upper = units[:, :, 0], units[:, :, 1], units[:, :, 2]  # (panels, blocks, 16, 4)
    low = torch.cat((first & 15, second & 15, first >> 4, second >> 4), dim=-1)
    high = torch.cat([(upper >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    of_16 = (low | (high << 4)).transpose(-1, -2).float() - 32
    vectors = _three_bits(*split(units[:, :, 3:], 2, (4, 2, 3)).unbind(4))  # (.., 4 chunks, 2 sets, 8, 16, 4)
    columns = _sub_blocks(split(vectors, 4, (4, 2)).flatten(3, 4)).flatten(2, 3) - 4
    return ((scales * of_16).unsqueeze(3) * split(columns, 2, (16, 16))).flatten(2, 3)


def _iq4_xs(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    d = halves(units[:, :, 0])[..., 0].unsqueeze(2)
    lower = torch.stack((units[:, :, 1] & 15, units[:, :, 1] >> 4), dim=-1).flatten(-2)  # (panels, blocks, 16, 8)
    upper = torch.stack([(units[:, :, 0, :, 2:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    of_32 = (lower | (upper << 4)).transpose(-1, -2).float() - 32
    weights = looked_up(_nibbles_of_chunks(units[:, :, 2:]), "IQ4_XS")
    return ((d * of_32).unsqueeze(3) * weights).flatten(2, 3)


def _q6_k(units: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    assert scales is not None
    of_16 = units[:, :, :4].contiguous().view(torch.int8).transpose(-1, -2).flatten(2, 3).float()  # (.., 16, 16)
    vectors = _six_bits(*split(units[:, :, 4:], 2, (4, 4, 3)).unbind(4))  # (.., 4 chunks, 4 sets, 4, 16, 4)
    # Chunk c holds blocks of 32 columns c / 2 * 4 + c % 2 in its even vectors, and the one two further in its odd ones.
    ordered = split(split(vectors, 4, (2, 2)), 2, (2, 2)).permute(0, 1, 2, 6, 3, 4, 5, 7, 8)
    columns = split(_columns(ordered.flatten(2, 6)) - 32, 2, (16, 16))
    return ((scales * of_16).unsqueeze(3) * columns).flatten(2, 3)


_DECODERS: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_1": _q4_1,
    "Q5_1": _q5_1,
    "MXFP4": _mxfp4,
}

LAYOUTS: Mapping[str, PanelLayout] = {
    layout[0]: PanelLayout(*layout)
    for layout in _C.panel_layouts()
    if layout[0] in _DECODERS or layout[0] in whole_blocks.DECODERS
}
"""ggml type name -> layout, for every type that GPUs read: all with kernels on the CPU."""
