// How products of small batches, which wait for memory, have lines of weights under way before they need them. Machines
// want different strategies (benchmarks/RESULTS.md has the figures), and none changes a bit.
#pragma once

#include <cstdint>

namespace tkt {

enum class Prefetch {
  kHardware,  // whatever the CPU's own prefetchers make of one ascending stream
  kPerLine,   // with each line, the one kPerLineBytes further, into L1
  kBursts,    // every few lines, as many that lie kBurstBytes further, into L2
};
constexpr Prefetch kPrefetches[] = {Prefetch::kHardware, Prefetch::kPerLine, Prefetch::kBursts};

// "hardware", "per line", "bursts".
const char* name_of(Prefetch strategy);

// What suits the vendor of this CPU, where nobody has measured, for a kernel table of these CpuFeatures.
Prefetch default_prefetch(uint32_t required_features);

}  // namespace tkt
