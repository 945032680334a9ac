// Which kernels run: the best table this CPU supports, or the one named by TRANSFORMERS_KT_ISA.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernel_table.h"

namespace tkt {

// Python sees it as transformers_kt.errors.UnsupportedCpuError.
struct UnsupportedCpu : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// All tables of this build, best first.
const std::vector<const KernelTable*>& all_tables();

bool is_supported(const KernelTable& table);

// The table in use. Throws UnsupportedCpu, naming the missing CPU flag, where the CPU lacks AVX2, FMA or F16C, or
// where TRANSFORMERS_KT_ISA names a table that is unknown or not supported.
const KernelTable& kernels();

// For tests: switches by name; throws as above. "" goes back to the automatic choice.
void select_kernels(const std::string& name);

}  // namespace tkt
