// What is packed comes out again byte for byte: every type, any rows beyond whole panels, any number of blocks.
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "formats/damage.h"
#include "formats/panel_layout.h"
#include "layers/packed_matrix.h"
#include "random_blocks.h"

namespace {

using namespace tkt;

std::vector<uint8_t> block_of(const PackedMatrix& matrix, int64_t index, int64_t row, int64_t block) {
  std::vector<uint8_t> out(static_cast<size_t>(matrix.info().block_bytes));
  read_block(matrix.info(), matrix.panel(index, row / kPanelRows), matrix.blocks(), block,
             static_cast<int>(row % kPanelRows), out.data());
  return out;
}

TEST(packed_blocks_are_those_of_the_file) {
  std::mt19937 random(1);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    for (int64_t rows = 1; rows <= 2 * kPanelRows + 1; ++rows) {
      const int64_t blocks = 1 + rows % 5;
      const int64_t matrices = 1 + rows % 2;
      const std::vector<uint8_t> source = test::random_blocks(info, matrices * rows * blocks, random);
      PackedMatrix matrix(info.type, matrices, rows, blocks * info.block_elements);
      matrix.pack(0, matrices, source.data());
      const uint8_t* expected = source.data();
      for (int64_t index = 0; index < matrices; ++index) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t block = 0; block < blocks; ++block, expected += info.block_bytes) {
            const std::vector<uint8_t> got = block_of(matrix, index, row, block);
            CHECK(std::memcmp(got.data(), expected, got.size()) == 0)
                << "for " << info.name << ", " << rows << " rows, " << blocks << " blocks: row " << row << ", block "
                << block;
          }
        }
      }
      const std::vector<uint8_t> zeros(static_cast<size_t>(info.block_bytes));
      for (int64_t row = rows; row < matrix.panels() * kPanelRows; ++row) {
        CHECK(block_of(matrix, 0, row, blocks - 1) == zeros) << "for " << info.name << ", missing row " << row;
      }
    }
  }
}

struct TemporaryFile {
  std::FILE* file = std::tmpfile();
  ~TemporaryFile() { std::fclose(file); }
  int descriptor() const { return fileno(file); }

  void write(const std::vector<uint8_t>& bytes) const {
    CHECK(std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && std::fflush(file) == 0);
  }
};

TEST(a_matrix_packed_from_its_file_is_one_packed_from_memory) {
  std::mt19937 random(2);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    const int64_t matrices = 2;
    const int64_t rows = 3 * kPanelRows + 5;
    const int64_t blocks = 3;
    const std::vector<uint8_t> source = test::random_blocks(info, matrices * rows * blocks, random);
    const TemporaryFile file;
    file.write(std::vector<uint8_t>(7));  // tensors of a file may begin anywhere
    file.write(source);
    PackedMatrix expected(info.type, matrices, rows, blocks * info.block_elements);
    PackedMatrix matrix(info.type, matrices, rows, blocks * info.block_elements);
    expected.pack(0, matrices, source.data());
    const int64_t each = static_cast<int64_t>(source.size()) / matrices;
    StoredTensor stored(&info, {{file.descriptor(), 7}, {file.descriptor(), 7 + each}}, each);
    matrix.pack_stored(stored, 0, 1);
    matrix.pack_stored(stored, 1, 1);
    for (int64_t index = 0; index < matrices; ++index) {
      for (int64_t panel = 0; panel < matrix.panels(); ++panel) {
        CHECK(std::memcmp(matrix.panel(index, panel), expected.panel(index, panel),
                          static_cast<size_t>(matrix.panel_bytes())) == 0)
            << "for " << info.name << ", matrix " << index << ", panel " << panel;
      }
    }
    // Random bytes are now and then an E8M0 or E4M3 scale that is no number.
    const int64_t first = look_at_blocks(info.type, source.data(), matrices * rows * blocks).not_finite;
    CHECK(first == -1 || !test::scales_may_be_no_numbers(info.type)) << "for " << info.name;
    CHECK(stored.not_finite() == first && stored.has_values() && stored.zeros().empty()) << "for " << info.name;
  }
}

TEST(a_file_that_ends_too_early_is_a_failure_that_says_where) {
  const WeightTypeInfo& info = info_of(WeightType::kQ8_0);
  const int64_t rows = 64 * kPanelRows;
  const TemporaryFile file;
  const int64_t there = 40 * kPanelRows * info.block_bytes + 5;
  file.write(std::vector<uint8_t>(static_cast<size_t>(there)));
  PackedMatrix matrix(info.type, 1, rows, info.block_elements);
  StoredTensor stored(&info, {{file.descriptor(), 0}}, rows * info.block_bytes);
  try {
    matrix.pack_stored(stored, 0, 1);
    CHECK(false);
  } catch (const ReadFailure& failure) {
    CHECK(failure.part == 0 && failure.position == there && failure.error == 0) << failure.what();
  }
}

TEST(sizes_that_no_matrix_has_are_refused) {
  const auto is_refused = [](int64_t count, int64_t rows, int64_t cols) {
    try {
      PackedMatrix(WeightType::kQ4_K, count, rows, cols);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  CHECK(is_refused(0, 16, 256));
  CHECK(is_refused(1, 0, 256));
  CHECK(is_refused(1, 16, 0));
  CHECK(is_refused(1, 16, 255));
  CHECK(is_refused(1, -16, 256));
  CHECK(is_refused(int64_t{1} << 40, int64_t{1} << 40, 256));
}

}  // namespace
