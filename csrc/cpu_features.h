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

// Whether products of few tokens, which are bound by reading weights, ask for them ahead, into L2. On Intel that is what
// keeps enough lines under way: one token, two cores of Emerald Rapids that read 33 GB/s, Q4_K 23.8 and 30.8 GB/s, Q6_K 18.6
// and 29.9, Q4_0 19.9 and 31.7 (8 and 16 KB ahead alike, 1 KB or to L1 half the gain). On AMD it costs speed: one core of
// Zen 4 28.4 and 18.7 to 23, likewise Zen 3.
bool software_prefetch_pays();

// For tests: as on a CPU where it does, or does not; -1 ends it.
void set_software_prefetch_pays(int pays);

// For tests: cpu_features() goes without these bits, as on a CPU that lacks them. 0 ends it.
void hide_cpu_features(uint32_t features);

// Bits of the names in "avx2 fma f16c"; names that are not known give none.
uint32_t features_named(const std::string& names);

// "avx2 fma f16c" for a mask; empty for 0.
std::string feature_names(uint32_t features);

}  // namespace tkt
