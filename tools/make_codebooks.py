"""Writes csrc/formats/codebooks.cpp: the grids of the IQ types, from the tables that the gguf package publishes.

    python tools/make_codebooks.py

An entry of a grid is a word of as many digits as it has weights, a digit being the position of a weight's value in the
grid's list of values: 2 bits each of 8 weights, or 3 bits each of 4.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from gguf import quants

TARGET = Path(__file__).parent.parent / "csrc" / "formats" / "codebooks.cpp"
GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")

HEAD = """// Made by tools/make_codebooks.py from the tables of the gguf package; not to be edited.
// clang-format off
#include "formats/codebooks.h"

namespace tkt {
namespace {

// Digits of kBits each, the first weight in the lowest, to a weight of 8 bits each.
template <typename Entry, int kBits, size_t kEntries>
constexpr std::array<Entry, kEntries> expanded(const uint16_t (&digits)[kEntries], const int8_t* values) {
  std::array<Entry, kEntries> grid{};
  for (size_t i = 0; i < kEntries; ++i) {
    Entry entry = 0;
    for (size_t w = 0; w < sizeof(Entry); ++w) {
      const int digit = digits[i] >> (w * kBits) & ((1 << kBits) - 1);
      entry |= static_cast<Entry>(static_cast<uint8_t>(values[digit])) << (8 * w);
    }
    grid[i] = entry;
  }
  return grid;
}
"""


def main() -> None:
    parts, tail = [HEAD], []
    for name in GRIDS:
        quant = getattr(quants, name)
        quant.init_grid()
        entries, weights = quant.grid_shape
        grid = np.asarray(quant.grid).reshape(entries, weights)
        bits = 2 if weights == 8 else 3
        digits = np.searchsorted(np.array(quant.grid_map, np.float32), grid).astype(np.uint32)
        words = (digits << (bits * np.arange(weights, dtype=np.uint32))).sum(axis=1)
        lines = textwrap.wrap(", ".join(f"0x{word:04x}" for word in words), 116)
        variable = name.replace("_", "")
        values = ", ".join(str(value) for value in quant.grid_map)
        parts.append(f"constexpr int8_t kValues{variable}[] = {{{values}}};")
        body = "\n".join(f"    {line}" for line in lines)
        parts.append(f"constexpr uint16_t kDigits{variable}[] = {{\n{body}\n}};\n")
        entry = "uint64_t" if weights == 8 else "uint32_t"
        tail.append(
            f"extern const std::array<{entry}, {entries}> kGrid{variable} =\n"
            f"    expanded<{entry}, {bits}>(kDigits{variable}, kValues{variable});"
        )
    parts.append("}  // namespace\n")
    TARGET.write_text("\n".join((*parts, *tail)) + "\n\n}  // namespace tkt\n")


if __name__ == "__main__":
    main()
