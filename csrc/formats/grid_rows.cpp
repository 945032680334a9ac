#include "formats/grid_rows.h"

#include <cstring>

#include "formats/codebooks.h"
#include "formats/f16.h"

namespace tkt {
namespace {

void look_up_scales(const BlockIQ3_S& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d);
  for (int j = 0; j < 8; ++j) {
    std::memcpy(&to.signs[j][row], block.signs + j * 4, 4);
    to.scales[j][row] = static_cast<uint32_t>(block.scales[j / 2] >> (j % 2 * 4));
  }
}

void look_up_scales(const BlockIQ3_XXS& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d) / 4;
  for (int j = 0; j < 8; ++j) std::memcpy(&to.signs[j][row], block.scales + j * 4, 4);
}

void look_up_scales(const BlockIQ2_S& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    std::memcpy(&to.signs[j][row], block.signs + j * 4, 4);
    to.scales[j][row] = block.scales[j];
  }
}

void look_up_scales(const BlockIQ2_XS& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) {
    to.scales[j][row] = block.scales[j];
    uint64_t four;
    std::memcpy(&four, block.qs + j * 4, 8);
    // The upper 7 bits of each 16 to a byte each.
    uint64_t signs = four >> 9 & 0x007f007f007f007f;
    signs = (signs | signs >> 8) & 0x00007f7f00007f7f;
    to.signs[j][row] = static_cast<uint32_t>(signs | signs >> 16);
  }
}

void look_up_scales(const BlockIQ2_XXS& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) std::memcpy(&to.signs[j][row], block.qs + j * 8 + 4, 4);
}

void look_up_scales(const BlockIQ1_S& block, int row, GridScales& to) {
  to.d[row] = float_from_f16(block.d) / 8;
  for (int j = 0; j < 8; ++j) to.signs[j][row] = block.qh[j];
}

void look_up_scales(const BlockIQ1_M& block, int row, GridScales& to) {
  to.d[row] = scale_of(block);
  for (int j = 0; j < 8; ++j) {
    uint16_t two;
    std::memcpy(&two, block.qh + 2 * j, 2);
    to.signs[j][row] = two;
    to.scales[j][row] = static_cast<uint32_t>(block.scales[j / 2] >> (j % 2 * 6));
  }
}

template <class Block>
void look_up_scales_of(const uint8_t* blocks, GridScales& to) {
  const Block* each = reinterpret_cast<const Block*>(blocks);
  for (int row = 0; row < kPanelRows; ++row) look_up_scales(each[row], row, to);
}

template <class Block>
void look_up_rows_of(const uint8_t* blocks, const void* grid, GridRows& to) {
  const Block* each = reinterpret_cast<const Block*>(blocks);
  for (int row = 0; row < kPanelRows; ++row) {
    const Block& block = each[row];
    look_up_scales(block, row, to);
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 4; ++k) to.entries[j * 4 + k][row] = grid_entry(block, grid, j, k);
    }
  }
}

}  // namespace

void look_up_grid_rows(WeightType type, const uint8_t* blocks, GridRows& to) {
  switch (type) {
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return look_up_rows_of<Block##name>(blocks, grid_of(type), to);
    TKT_GRID_TYPES(TKT_CASE)
#undef TKT_CASE
    default:
      break;
  }
}

void look_up_grid_scales(WeightType type, const uint8_t* blocks, GridScales& to) {
  switch (type) {
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return look_up_scales_of<Block##name>(blocks, to);
    TKT_GRID_TYPES(TKT_CASE)
#undef TKT_CASE
    default:
      break;
  }
}

const void* grid_of(WeightType type) {
  switch (type) {
    case WeightType::kIQ3_S:
      return kGridIQ3S.data();
    case WeightType::kIQ3_XXS:
      return kGridIQ3XXS.data();
    case WeightType::kIQ2_S:
      return kGridIQ2S.data();
    case WeightType::kIQ2_XS:
      return kGridIQ2XS.data();
    case WeightType::kIQ2_XXS:
      return kGridIQ2XXS.data();
    case WeightType::kIQ1_S:
    case WeightType::kIQ1_M:
      return kGridIQ1S.data();
    default:
      return nullptr;
  }
}

}  // namespace tkt
