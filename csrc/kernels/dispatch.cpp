#include "kernels/dispatch.h"

#include <atomic>
#include <cstdlib>

#include "machine/cpu_features.h"

namespace tkt {
namespace {

std::atomic<const KernelTable*> selected{nullptr};

std::string supported_names() {
  std::string names;
  for (const KernelTable* table : all_tables()) {
    if (!is_supported(*table)) continue;
    if (!names.empty()) names += ", ";
    names += table->name;
  }
  return names;
}

const KernelTable& table_named(const std::string& name) {
  for (const KernelTable* table : all_tables()) {
    if (name != table->name) continue;
    if (is_supported(*table)) return *table;
    throw UnsupportedCpu("TRANSFORMERS_KT_ISA=" + name + ": this CPU lacks " +
                         feature_names(table->required_features & ~cpu_features()) +
                         "; it supports: " + supported_names());
  }
  throw UnsupportedCpu("TRANSFORMERS_KT_ISA=" + name + " is not known; this CPU supports: " + supported_names());
}

const KernelTable& best_table() {
  for (const KernelTable* table : all_tables()) {
    if (table == &scalar::kTable) continue;  // an oracle, hundreds of times too slow to be anyone's silent default
    if (is_supported(*table)) return *table;
  }
  const uint32_t floor = kAvx2 | kFma | kF16c;
  throw UnsupportedCpu("this CPU lacks " + feature_names(floor & ~cpu_features()) +
                       "; transformers_kt needs avx2, fma and f16c (Intel since 2013, AMD since 2015). "
                       "TRANSFORMERS_KT_ISA=scalar runs without them, very slowly");
}

}  // namespace

const std::vector<const KernelTable*>& all_tables() {
  static const std::vector<const KernelTable*> tables = {
#if defined(TKT_HAS_AVX512_VNNI)
      &avx512_vnni::kTable,
#endif
#if defined(TKT_HAS_AVX512)
      &avx512::kTable,
#endif
#if defined(TKT_HAS_AVX_VNNI)
      &avx_vnni::kTable,
#endif
#if defined(TKT_HAS_AVX2)
      &avx2::kTable,
#endif
      &scalar::kTable,
  };
  return tables;
}

bool is_supported(const KernelTable& table) { return (table.required_features & ~cpu_features()) == 0; }

const KernelTable& kernels() {
  const KernelTable* table = selected.load(std::memory_order_acquire);
  if (table != nullptr) return *table;
  const char* name = std::getenv("TRANSFORMERS_KT_ISA");
  const KernelTable& chosen = name != nullptr && *name != '\0' ? table_named(name) : best_table();
  selected.store(&chosen, std::memory_order_release);
  return chosen;
}

void select_kernels(const std::string& name) {
  selected.store(name.empty() ? nullptr : &table_named(name), std::memory_order_release);
}

}  // namespace tkt
