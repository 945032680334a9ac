#include "machine/cpu_features.h"

#include <atomic>
#include <sstream>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tkt {
namespace {

struct NamedFeature {
  uint32_t bit;
  const char* name;
};
constexpr NamedFeature kNames[] = {
    {kAvx2, "avx2"},         {kFma, "fma"},           {kF16c, "f16c"},         {kAvx512f, "avx512f"},
    {kAvx512bw, "avx512bw"}, {kAvx512dq, "avx512dq"}, {kAvx512vl, "avx512vl"}, {kAvx512vnni, "avx512_vnni"},
    {kAvxvnni, "avx_vnni"},
};

std::atomic<uint32_t> hidden{0};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

uint32_t detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return 0;
  const bool os_uses_xsave = (c >> 27) & 1;
  if (!os_uses_xsave) return 0;
  const uint64_t xcr0 = read_xcr0();
  const bool ymm_saved = (xcr0 & 0x06) == 0x06;
  const bool zmm_saved = (xcr0 & 0xe6) == 0xe6;

  uint32_t features = 0;
  if (!ymm_saved) return 0;
  if ((c >> 12) & 1) features |= kFma;
  if ((c >> 29) & 1) features |= kF16c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return features;
  if ((b >> 5) & 1) features |= kAvx2;
  const unsigned subleaves = a;
  if (zmm_saved) {
    if ((b >> 16) & 1) features |= kAvx512f;
    if ((b >> 17) & 1) features |= kAvx512dq;
    if ((b >> 30) & 1) features |= kAvx512bw;
    if ((b >> 31) & 1) features |= kAvx512vl;
    if ((c >> 11) & 1) features |= kAvx512vnni;
  }
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && ((a >> 4) & 1)) features |= kAvxvnni;
  return features;
}
#else
uint32_t detect() { return 0; }
#endif

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features & ~hidden.load();
}

CpuVendor cpu_vendor() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0, &a, &b, &c, &d) == 0) return CpuVendor::kOther;
  if (b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx) return CpuVendor::kIntel;
  if (b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx) return CpuVendor::kAmd;
#endif
  return CpuVendor::kOther;
}

void hide_cpu_features(uint32_t features) { hidden.store(features); }

uint32_t features_named(const std::string& names) {
  std::istringstream words(names);
  std::string word;
  uint32_t features = 0;
  while (words >> word) {
    for (const NamedFeature& feature : kNames) {
      if (word == feature.name) features |= feature.bit;
    }
  }
  return features;
}

std::string feature_names(uint32_t features) {
  std::string names;
  for (const NamedFeature& feature : kNames) {
    if ((features & feature.bit) == 0) continue;
    if (!names.empty()) names += ' ';
    names += feature.name;
  }
  return names;
}

}  // namespace tkt
