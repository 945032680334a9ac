// What is packed comes out again byte for byte: every type, any rows beyond whole panels, any number of blocks.
#include "check.h"
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
      matrix.pack(0, matrices, {0, matrix.panels()}, source.data());
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

TEST(a_matrix_packed_in_pieces_is_one_packed_at_once) {
  std::mt19937 random(2);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    const int64_t rows = 3 * kPanelRows + 5;
    const int64_t blocks = 3;
    const std::vector<uint8_t> source = test::random_blocks(info, rows * blocks, random);
    PackedMatrix whole(info.type, 1, rows, blocks * info.block_elements);
    PackedMatrix pieces(info.type, 1, rows, blocks * info.block_elements);
    whole.pack(0, 1, {0, whole.panels()}, source.data());
    for (int64_t panel = 0; panel < pieces.panels(); ++panel) {
      // Copied, so that a read beyond the piece is one beyond the allocation.
      const int64_t first = panel * kPanelRows * pieces.row_bytes();
      const int64_t end = std::min(rows, (panel + 1) * kPanelRows) * pieces.row_bytes();
      const std::vector<uint8_t> piece(source.begin() + first, source.begin() + end);
      pieces.pack(0, 1, {panel, panel + 1}, piece.data());
    }
    for (int64_t panel = 0; panel < whole.panels(); ++panel) {
      CHECK(std::memcmp(whole.panel(0, panel), pieces.panel(0, panel), static_cast<size_t>(whole.panel_bytes())) == 0)
          << "for " << info.name << ", panel " << panel;
    }
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
