// Blocks that no quantizer writes: what they decode to is defined, and they spoil no row but their own.
#include <cmath>

#include "check.h"
#include "formats/row_decoder.h"
#include "kernels/dispatch.h"
#include "layers/linear.h"
#include "random_blocks.h"

namespace {

using namespace tkt;

constexpr uint16_t kNan = 0x7e00, kInfinity = 0x7c00, kLargest = 0x7bff;

std::vector<float> dequantized(const WeightTypeInfo& info, const std::vector<uint8_t>& blocks) {
  const int64_t cols = static_cast<int64_t>(blocks.size()) / info.block_bytes * info.block_elements;
  std::vector<float> values(static_cast<size_t>(cols));
  dequantize_row(info.type, blocks.data(), cols, values.data());
  return values;
}

TEST(a_scale_that_is_no_number_gives_weights_that_are_none) {
  std::mt19937 random(5);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    if (!test::scales_may_be_no_numbers(info.type)) continue;
    std::vector<uint8_t> block = test::random_blocks(info, 1, random);
    test::set_scales(info.type, kNan, block.data());
    test::set_float(info.type, std::nanf(""), block.data());
    for (const float value : dequantized(info, block)) CHECK(std::isnan(value)) << "for " << info.name << ": " << value;
  }
}

TEST(an_infinite_scale_gives_no_finite_weight) {
  std::mt19937 random(6);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    if (!test::scales_may_be_no_numbers(info.type)) continue;
    std::vector<uint8_t> block = test::random_blocks(info, 1, random);
    test::set_scales(info.type, kInfinity, block.data());
    test::set_float(info.type, INFINITY, block.data());
    for (const float value : dequantized(info, block)) CHECK(!std::isfinite(value)) << "for " << info.name;
  }
}

TEST(the_largest_scale_gives_finite_weights_whatever_the_other_bytes) {
  std::mt19937 random(7);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    if (info.block_elements == 1) continue;
    if (info.type == WeightType::kMXFP4) continue;  // 2^127, its largest scale, times 12 is infinite
    for (const int byte : {0x00, 0x7f, 0x80, 0xff, -1}) {
      std::vector<uint8_t> block = test::random_blocks(info, 1, random);
      if (byte >= 0) std::fill(block.begin(), block.end(), static_cast<uint8_t>(byte));
      test::set_scales(info.type, kLargest, block.data());
      for (const float value : dequantized(info, block)) CHECK(std::isfinite(value)) << "for " << info.name;
    }
  }
}

TEST(every_table_computes_with_any_bytes) {
  std::mt19937 random(8);
  const int64_t rows = 40, blocks = 3, tokens = 3, hostile_row = 21;
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    const int64_t row_bytes = blocks * info.block_bytes;
    std::vector<uint8_t> source = test::random_blocks(info, rows * blocks, random);
    const std::vector<float> x = test::random_floats(tokens * blocks * info.block_elements, random);
    for (const KernelTable* table : all_tables()) {
      if (!is_supported(*table)) continue;
      select_kernels(table->name);
      const auto product = [&](const std::vector<uint8_t>& bytes) {
        PackedMatrix matrix(info.type, 1, rows, blocks * info.block_elements);
        matrix.pack(0, 1, bytes.data());
        std::vector<float> out(static_cast<size_t>(tokens * rows));
        linear(matrix, 0, x.data(), tokens, out.data());
        return out;
      };
      const std::vector<float> clean = product(source);
      for (const int kind : {0, 1, 2}) {
        std::vector<uint8_t> damaged = source;
        uint8_t* row = damaged.data() + hostile_row * row_bytes;
        for (int64_t i = 0; i < row_bytes; ++i) row[i] = kind == 0 ? 0xff : static_cast<uint8_t>(random());
        if (kind == 2) test::set_scales(info.type, kNan, row);
        if (kind == 2) test::set_float(info.type, std::nanf(""), row);
        const std::vector<float> got = product(damaged);
        for (size_t i = 0; i < got.size(); ++i) {
          const bool is_hostile = static_cast<int64_t>(i) % rows == hostile_row;
          // 0xffff is a NaN as float16, as bfloat16 and twice as float32.
          const bool is_number = kind == 1 || !test::scales_may_be_no_numbers(info.type);
          if (is_hostile && !is_number) CHECK(std::isnan(got[i])) << "for " << table->name << ", " << info.name;
          if (!is_hostile) {
            CHECK(std::memcmp(&got[i], &clean[i], sizeof(float)) == 0)
                << "for " << table->name << ", " << info.name << ", row " << static_cast<int64_t>(i) % rows;
          }
        }
      }
    }
    select_kernels("");
  }
}

}  // namespace
