// How products of few tokens, which wait for memory, have lines of weights under way before they need them. Machines want
// different things (figures in benchmarks/RESULTS.md, "One stream", "In place" and "Intel"), and none changes a bit.
#pragma once

#include <optional>

namespace tkt {

enum class LookAhead {
  kHardware,  // whatever the CPU's own prefetchers make of one ascending stream
  kInPlace,   // at each line, the one kInPlaceBytes further is asked for, into L1
  kBursts,    // every few lines, as many that lie kBurstBytes further, into L2
};
constexpr LookAhead kLookAheads[] = {LookAhead::kHardware, LookAhead::kInPlace, LookAhead::kBursts};

// "hardware", "in place", "bursts".
const char* name_of(LookAhead how);

// What products do now: what was set; else bursts on CPUs of Intel, and on others `otherwise`.
LookAhead look_ahead(LookAhead otherwise);

// Nothing ends it.
void set_look_ahead(std::optional<LookAhead> how);

}  // namespace tkt
