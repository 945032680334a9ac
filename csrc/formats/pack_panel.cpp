#include "formats/pack_panel.h"

#include <cstring>
#include <vector>

#include "formats/panel_layout.h"

namespace tkt {
namespace {

uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

typedef uint64_t FourRows __attribute__((vector_size(16)));  // what every x86-64 and every ARM has registers for

void store_word(uint8_t* p, uint64_t word) { std::memcpy(p, &word, sizeof(word)); }

// A line is read for each 144 bytes of 16 rows: too irregular for the prefetchers, which do read ahead when all rows of
// the panel, mostly less than L2 holds, pass once. One core of Zen 3, GB/s without and with: Q4_K 4.4 and 4.9, Q6_K 1.7
// and 3.3.
void touch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    // Read, though nobody uses it.
    __asm__ volatile("" : : "r"(p[i]));
  }
}

// Units of 4 bytes: two of two rows are transposed in words of 8. The constants of a type unroll all of it; GB/s on one
// core of Zen 3, with the type as a variable and a copy per unit, and so: Q4_K 2.0 and 4.9, Q6_K 1.4 and 3.4.
template <WeightType type>
void pack_blocks(const uint8_t* source, int64_t blocks, uint8_t* panel) {
  constexpr WeightTypeInfo info = info_of(type);
  static_assert(info.unit_bytes == 4);
  constexpr int kUnits = info.unit_count;
  const int64_t stride = blocks * info.block_bytes;
  touch(source, stride * kPanelRows);
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* to = panel + units_position(info, blocks, b);
    for (int lane = 0; lane < kPanelRows; lane += 2) {
      const uint8_t* first = source + lane * stride + b * info.block_bytes;
      const uint8_t* second = first + stride;
      if constexpr (info.scale_offset >= 0) {
        constexpr size_t kBytes = static_cast<size_t>(info.scale_bytes());
        uint8_t* scales = panel + scales_position(info, b) + static_cast<size_t>(lane) * kBytes;
        std::memcpy(scales, first + info.scale_offset, kBytes);
        std::memcpy(scales + kBytes, second + info.scale_offset, kBytes);
      }
      uint64_t units[kUnits + 1];  // of both rows
      for (int u = 0; u + 1 < kUnits; u += 2) {
        units[u] = load_word(first + info.unit_offset + u * 4);
        units[u + 1] = load_word(second + info.unit_offset + u * 4);
        exchange(units[u], units[u + 1], uint64_t{0xffffffff}, 32);
      }
      if constexpr (kUnits % 2 == 1) {
        uint32_t last[2];
        std::memcpy(last, first + info.unit_offset + (kUnits - 1) * 4, 4);
        std::memcpy(last + 1, second + info.unit_offset + (kUnits - 1) * 4, 4);
        std::memcpy(units + kUnits - 1, last, 8);
      }
      regroup_bits<type, false>(units);
      for (int u = 0; u < kUnits; ++u) store_word(to + unit_place(type, u) * kPanelRows * 4 + lane * 4, units[u]);
    }
  }
  // In a pass of its own, of 4 rows at once, because reading what was just stored in pieces of 8 bytes would wait for
  // it.
  if constexpr (set_units(type) > 1) {
    constexpr int kVectors = kPanelRows * 4 / sizeof(FourRows);
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* block = panel + units_position(info, blocks, b);
      FourRows units[kUnits * kVectors];
      std::memcpy(units, block, sizeof units);
      spread_sets<type, false, kVectors>(units);
      std::memcpy(block, units, sizeof units);
    }
  }
}

void pack_whole_blocks(const WeightTypeInfo& info, const uint8_t* source, int64_t blocks, uint8_t* panel) {
  const size_t bytes = static_cast<size_t>(info.block_bytes);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int lane = 0; lane < kPanelRows; ++lane, panel += bytes) {
      std::memcpy(panel, source + (lane * blocks + b) * info.block_bytes, bytes);
    }
  }
}

// Types of one column to a block: as many columns of as many rows as fill a word are transposed. F32, as above: 1.3 and
// 5.1; with touch() 3.6.
template <typename Value>
void pack_columns(const uint8_t* source, int64_t cols, uint8_t* panel) {
  constexpr int kBytes = sizeof(Value);
  constexpr int kAtOnce = 8 / kBytes;
  const int64_t stride = cols * kBytes;
  const int64_t whole = cols / kAtOnce * kAtOnce;
  for (int64_t c = 0; c < whole; c += kAtOnce) {
    for (int lane = 0; lane < kPanelRows; lane += kAtOnce) {
      uint64_t words[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) words[i] = load_word(source + (lane + i) * stride + c * kBytes);
      for (int i = 0; i < kAtOnce / 2; ++i) exchange(words[i], words[i + kAtOnce / 2], uint64_t{0xffffffff}, 32);
      if constexpr (kAtOnce == 4) {
        for (int i = 0; i < 4; i += 2) exchange(words[i], words[i + 1], uint64_t{0x0000ffff0000ffff}, 16);
      }
      for (int i = 0; i < kAtOnce; ++i) store_word(panel + ((c + i) * kPanelRows + lane) * kBytes, words[i]);
    }
  }
  for (int64_t c = whole; c < cols; ++c) {
    for (int lane = 0; lane < kPanelRows; ++lane) {
      std::memcpy(panel + (c * kPanelRows + lane) * kBytes, source + lane * stride + c * kBytes, kBytes);
    }
  }
}

}  // namespace

void pack_panel(const WeightTypeInfo& info, const uint8_t* source, int rows, int64_t blocks, uint8_t* panel) {
  std::vector<uint8_t> padded;
  if (rows < kPanelRows) {
    const size_t row_size = static_cast<size_t>(blocks * info.block_bytes);
    padded.resize(kPanelRows * row_size);
    std::memcpy(padded.data(), source, static_cast<size_t>(rows) * row_size);
    source = padded.data();
  }
  switch (info.type) {
    case WeightType::kF32:
      return pack_columns<uint32_t>(source, blocks, panel);
    case WeightType::kF16:
    case WeightType::kBF16:
      return pack_columns<uint16_t>(source, blocks, panel);
#define TKT_CASE(name)      \
  case WeightType::k##name: \
    return pack_blocks<WeightType::k##name>(source, blocks, panel);
      TKT_UNIT_TYPES(TKT_CASE)
#undef TKT_CASE
#define TKT_CASE(name) case WeightType::k##name:
      TKT_ROW_TYPES(TKT_CASE)
      return pack_whole_blocks(info, source, blocks, panel);
  }
}

}  // namespace tkt
