#include "formats/grid_rows.h"

#include <cstring>

#include "formats/f16.h"
#include "formats/iq1_m.h"
#include "formats/iq1_s.h"
#include "formats/iq2_s.h"
#include "formats/iq2_xs.h"
#include "formats/iq2_xxs.h"
#include "formats/iq3_s.h"
#include "formats/iq3_xxs.h"

namespace tkt {
namespace {

void look_up(const BlockIQ3_S& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d);
  for (int j = 0; j < 8; ++j) {
    std::memcpy(&to.signs[j][row], block.signs + j * 4, 4);
    to.scales[j][row] = static_cast<uint32_t>(block.scales[j / 2] >> (j % 2 * 4));
    const uint32_t upper = uint32_t{block.qh[j]} << 8;
    for (int k = 0; k < 4; ++k) {
      const auto four = [&](int i) { return uint64_t{kGridIQ3S[block.qs[j * 8 + i] | (upper >> i & 0x100)]}; };
      to.entries[j * 4 + k][row] = four(2 * k) | four(2 * k + 1) << 32;
    }
  }
}

void look_up(const BlockIQ3_XXS& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d) / 4;
  for (int j = 0; j < 8; ++j) {
    std::memcpy(&to.signs[j][row], block.scales + j * 4, 4);
    for (int k = 0; k < 4; ++k) {
      const auto four = [&](int i) { return uint64_t{kGridIQ3XXS[block.qs[j * 8 + i]]}; };
      to.entries[j * 4 + k][row] = four(2 * k) | four(2 * k + 1) << 32;
    }
  }
}

void look_up(const BlockIQ2_S& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    std::memcpy(&to.signs[j][row], block.signs + j * 4, 4);
    to.scales[j][row] = block.scales[j];
    const uint32_t upper = uint32_t{block.qh[j]} << 8;
    for (int k = 0; k < 4; ++k) {
      to.entries[j * 4 + k][row] = kGridIQ2S[block.qs[j * 4 + k] | (upper >> (2 * k) & 0x300)];
    }
  }
}

void look_up(const BlockIQ2_XS& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    to.scales[j][row] = block.scales[j];
    uint64_t four;
    std::memcpy(&four, block.qs + j * 4, 8);
    for (int k = 0; k < 4; ++k) to.entries[j * 4 + k][row] = kGridIQ2XS[four >> (16 * k) & 511];
    // The upper 7 bits of each 16 to a byte each.
    uint64_t signs = four >> 9 & 0x007f007f007f007f;
    signs = (signs | signs >> 8) & 0x00007f7f00007f7f;
    to.signs[j][row] = static_cast<uint32_t>(signs | signs >> 16);
  }
}

void look_up(const BlockIQ2_XXS& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    for (int k = 0; k < 4; ++k) to.entries[j * 4 + k][row] = kGridIQ2XXS[block.qs[j * 8 + k]];
    std::memcpy(&to.signs[j][row], block.qs + j * 8 + 4, 4);
  }
}

void look_up(const BlockIQ1_S& block, int row, GridRows& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    const uint32_t upper = uint32_t{block.qh[j]} << 8;
    to.signs[j][row] = block.qh[j];
    for (int k = 0; k < 4; ++k) {
      to.entries[j * 4 + k][row] = kGridIQ1S[block.qs[j * 4 + k] | (upper >> (3 * k) & 0x700)];
    }
  }
}

void look_up(const BlockIQ1_M& block, int row, GridRows& to) {
  to.d[row] = scale_of(block);
  for (int j = 0; j < 8; ++j) {
    const uint32_t upper = block.qh[2 * j] | uint32_t{block.qh[2 * j + 1]} << 8;
    to.signs[j][row] = upper;
    to.scales[j][row] = static_cast<uint32_t>(block.scales[j / 2] >> (j % 2 * 6));
    for (int k = 0; k < 4; ++k) {
      to.entries[j * 4 + k][row] = kGridIQ1S[block.qs[j * 4 + k] | (upper << 8 >> (4 * k) & 0x700)];
    }
  }
}

template <class Block>
void look_up_rows(const uint8_t* blocks, GridRows& to) {
  for (int row = 0; row < kPanelRows; ++row) {
    Block block;
    std::memcpy(&block, blocks + row * static_cast<int>(sizeof(Block)), sizeof(Block));
    look_up(block, row, to);
  }
}

}  // namespace

void look_up_grid_rows(WeightType type, const uint8_t* blocks, GridRows& to) {
  switch (type) {
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return look_up_rows<Block##name>(blocks, to);
    TKT_GRID_TYPES(TKT_CASE)
#undef TKT_CASE
    default:
      break;
  }
}

}  // namespace tkt
