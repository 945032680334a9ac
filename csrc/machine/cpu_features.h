// What this CPU and operating system let us execute.
#pragma once

#include <cstdint>
#include <string>

namespace tkt {

enum CpuFeature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512dq = 1u << 5,
  kAvx512vl = 1u << 6,
  kAvx512vnni = 1u << 7,
  kAvxvnni = 1u << 8,
};

// Features both the CPU (cpuid) and the operating system (XCR0: registers saved on a context switch) support.
uint32_t cpu_features();

enum class CpuVendor { kIntel, kAmd, kOther };

// Who made this CPU, as it says itself.
CpuVendor cpu_vendor();

// For tests: cpu_features() goes without these bits, as on a CPU that lacks them. 0 ends it.
void hide_cpu_features(uint32_t features);

// Bits of the names in "avx2 fma f16c"; names that are not known give none.
uint32_t features_named(const std::string& names);

// "avx2 fma f16c" for a mask; empty for 0.
std::string feature_names(uint32_t features);

}  // namespace tkt
