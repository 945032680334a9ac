// Blocks of the types whose weights stand in a grid (codebooks.h), 16 rows side by side: scalar code looks entries up;
// signs and scales are left as the file has them, for vectors to take apart.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"
#include "formats/iq1_m.h"
#include "formats/iq1_s.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"

namespace tkt {

// Every type with a grid; all have blocks of 256 columns that stand whole in a panel.
#define TKT_GRID_TYPES(X) X(IQ3_S) X(IQ3_XXS) X(IQ2_S) X(IQ2_XS) X(IQ2_XXS) X(IQ1_S) X(IQ1_M)

// Lane = row. A place per type has:
// - signs, of 32 columns: a bit for each, 1 is minus (IQ3_S, IQ2_S); 7 bits of each byte for 8 (IQ2_XS); 4 times 7
//   bits, sc in the upper 4 (IQ3_XXS, IQ2_XXS); qh (IQ1_S, IQ1_M).
// - scales, of 32 columns: two nibbles, for 16 each (IQ2_S, IQ2_XS); one (IQ3_S); twice 3 bits (IQ1_M).
// - d: what a block's d and powers of two of its type are together.
struct GridScales {
  alignas(64) uint32_t signs[8][kPanelRows];
  alignas(64) uint32_t scales[8][kPanelRows];
  alignas(64) float d[kPanelRows];
};
struct GridRows : GridScales {
  alignas(64) uint64_t entries[32][kPanelRows];  // 8 columns of the grid, a byte each
};

// `blocks`: 16 blocks of `type`, one of each row.
void look_up_grid_rows(WeightType type, const uint8_t* blocks, GridRows& to);
void look_up_grid_scales(WeightType type, const uint8_t* blocks, GridScales& to);

// The grid of `type`: places of 4 bytes in IQ3, of 8 in all others.
const void* grid_of(WeightType type);

// Weights 8 k to 8 k + 7 of the 32 columns j, a byte each, without their signs. Inlined always: an ISA's file must not
// leave a copy that others might call.
#define TKT_ALWAYS_INLINE inline __attribute__((always_inline))
TKT_ALWAYS_INLINE uint64_t entry_of_8(const void* grid, uint32_t place) {
  return static_cast<const uint64_t*>(grid)[place];
}
TKT_ALWAYS_INLINE uint64_t entries_of_4(const void* grid, uint32_t first, uint32_t second) {
  const uint32_t* fours = static_cast<const uint32_t*>(grid);
  return fours[first] | uint64_t{fours[second]} << 32;
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ3_S& block, const void* grid, int j, int k) {
  const uint32_t upper = uint32_t{block.qh[j]} << 8;
  const uint8_t* two = block.qs + j * 8 + 2 * k;
  return entries_of_4(grid, two[0] | (upper >> (2 * k) & 0x100), two[1] | (upper >> (2 * k + 1) & 0x100));
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ3_XXS& block, const void* grid, int j, int k) {
  const uint8_t* two = block.qs + j * 8 + 2 * k;
  return entries_of_4(grid, two[0], two[1]);
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ2_S& block, const void* grid, int j, int k) {
  return entry_of_8(grid, block.qs[j * 4 + k] | (uint32_t{block.qh[j]} << 8 >> (2 * k) & 0x300));
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ2_XS& block, const void* grid, int j, int k) {
  return entry_of_8(grid, block.qs[j * 4 + k] & 511u);
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ2_XXS& block, const void* grid, int j, int k) {
  return entry_of_8(grid, block.qs[j * 8 + k]);
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ1_S& block, const void* grid, int j, int k) {
  return entry_of_8(grid, block.qs[j * 4 + k] | (uint32_t{block.qh[j]} << 8 >> (3 * k) & 0x700));
}
TKT_ALWAYS_INLINE uint64_t grid_entry(const BlockIQ1_M& block, const void* grid, int j, int k) {
  return entry_of_8(grid, block.qs[j * 4 + k] | (uint32_t{block.qh[2 * j + k / 2]} << 8 >> (4 * (k % 2)) & 0x700));
}

#undef TKT_ALWAYS_INLINE

}  // namespace tkt
