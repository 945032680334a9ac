// Every table that this CPU supports gives the bits of the scalar one.
#include <algorithm>

#include "check.h"
#include "kernels/dispatch.h"
#include "layers/linear.h"
#include "random_blocks.h"

namespace {

using namespace tkt;

std::vector<const KernelTable*> vector_tables() {
  std::vector<const KernelTable*> tables;
  for (const KernelTable* table : all_tables()) {
    if (table != &scalar::kTable && is_supported(*table)) tables.push_back(table);
  }
  return tables;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> product(const KernelTable& table, const PackedMatrix& matrix, const std::vector<float>& x) {
  select_kernels(table.name);
  const int64_t tokens = static_cast<int64_t>(x.size()) / matrix.cols();
  std::vector<float> out(static_cast<size_t>(tokens * matrix.rows()));
  linear(matrix, 0, x.data(), tokens, out.data());
  select_kernels("");
  return out;
}

TEST(products_have_the_bits_of_the_scalar_table) {
  std::mt19937 random(3);
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    for (const int64_t rows : {1, 16, 37, 64}) {
      for (const int64_t blocks : {1, 2, 3}) {
        const std::vector<uint8_t> source = test::random_blocks(info, rows * blocks, random);
        PackedMatrix matrix(info.type, 1, rows, blocks * info.block_elements);
        matrix.pack(0, 1, source.data());
        for (const int64_t tokens : {1, 2, 3, 5, 8, 13}) {
          const std::vector<float> x = test::random_floats(tokens * matrix.cols(), random);
          const std::vector<float> expected = product(scalar::kTable, matrix, x);
          for (const KernelTable* table : vector_tables()) {
            CHECK(same_bits(product(*table, matrix, x), expected))
                << "for " << table->name << ", " << info.name << ", " << rows << " rows, " << blocks << " blocks, "
                << tokens << " tokens";
          }
        }
      }
    }
  }
}

// body(table) -> the values that it wrote.
template <typename Body>
void check_same_bits(const char* what, int64_t n, Body body) {
  const std::vector<float> expected = body(scalar::kTable);
  for (const KernelTable* table : vector_tables()) {
    CHECK(same_bits(body(*table), expected)) << "for " << what << " of " << table->name << ", " << n << " values";
  }
}

TEST(vector_operations_have_the_bits_of_the_scalar_table) {
  std::mt19937 random(4);
  // Allocations of exactly n values: a read or write beyond is seen by ASan.
  for (const int64_t n : {1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 256}) {
    const std::vector<float> x = test::random_floats(n, random);
    const std::vector<float> y = test::random_floats(n, random);
    check_same_bits("rms_norm", n, [&](const KernelTable& table) {
      std::vector<float> out(x.size());
      table.rms_norm(x.data(), y.data(), 1e-6f, n, out.data());
      return out;
    });
    check_same_bits("swiglu", n, [&](const KernelTable& table) {
      std::vector<float> out(x.size());
      table.swiglu(x.data(), y.data(), n, out.data());
      return out;
    });
    check_same_bits("exp_minus", n, [&](const KernelTable& table) {
      std::vector<float> out(x.size());
      table.exp_minus(x.data(), 0.5f, n, out.data());
      return out;
    });
    check_same_bits("add_scaled", n, [&](const KernelTable& table) {
      std::vector<float> out = y;
      table.add_scaled(x.data(), 0.3f, n, out.data());
      return out;
    });
  }
}

}  // namespace
