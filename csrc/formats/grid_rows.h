// Blocks of the types whose weights stand in a grid (codebooks.h), 16 rows side by side: scalar code looks entries up;
// signs and scales are left as the file has them, for vectors to take apart.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"

namespace tkt {

// Every type with a grid; all have blocks of 256 columns that stand whole in a panel.
#define TKT_GRID_TYPES(X) X(IQ3_S) X(IQ3_XXS) X(IQ2_S) X(IQ2_XS) X(IQ2_XXS) X(IQ1_S) X(IQ1_M)

// Lane = row. A place per type has:
// - entries: 8 columns of the grid, a byte each.
// - signs, of 32 columns: a bit for each, 1 is minus (IQ3_S, IQ2_S); 7 bits of each byte for 8 (IQ2_XS); 4 times 7
//   bits, sc in the upper 4 (IQ3_XXS, IQ2_XXS); qh (IQ1_S, IQ1_M).
// - scales, of 32 columns: two nibbles, for 16 each (IQ2_S, IQ2_XS); one (IQ3_S); twice 3 bits (IQ1_M).
// - d: what a block's d and powers of two of its type are together.
struct GridRows {
  alignas(64) uint64_t entries[32][kPanelRows];
  alignas(64) uint32_t signs[8][kPanelRows];
  alignas(64) uint32_t scales[8][kPanelRows];
  alignas(64) float d[kPanelRows];
};

// `blocks`: 16 blocks of `type`, one of each row.
void look_up_grid_rows(WeightType type, const uint8_t* blocks, GridRows& to);

}  // namespace tkt
