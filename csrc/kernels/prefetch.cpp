#include "kernels/prefetch.h"

#include "machine/cpu_features.h"

namespace tkt {
namespace {

struct VendorDefault {
  CpuVendor vendor;
  Prefetch with_avx2;
  Prefetch with_avx512;
};
constexpr VendorDefault kVendorDefaults[] = {
    {CpuVendor::kIntel, Prefetch::kBursts, Prefetch::kBursts},
    {CpuVendor::kAmd, Prefetch::kPerLine, Prefetch::kHardware},
    {CpuVendor::kOther, Prefetch::kPerLine, Prefetch::kHardware},
};

Prefetch default_of_vendor(CpuVendor vendor, bool avx512) {
  for (const VendorDefault& row : kVendorDefaults) {
    if (row.vendor == vendor) return avx512 ? row.with_avx512 : row.with_avx2;
  }
  return Prefetch::kHardware;
}

}  // namespace

const char* name_of(Prefetch strategy) {
  return strategy == Prefetch::kHardware ? "hardware" : strategy == Prefetch::kPerLine ? "per line" : "bursts";
}

Prefetch default_prefetch(uint32_t required_features) {
  static const CpuVendor vendor = cpu_vendor();
  return default_of_vendor(vendor, (required_features & kAvx512f) != 0);
}

}  // namespace tkt
