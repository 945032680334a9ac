#include "kernels/look_ahead.h"

#include <atomic>

#include "machine/cpu_features.h"

namespace tkt {
namespace {

constexpr int kNotSet = -1;
std::atomic<int> chosen{kNotSet};

}  // namespace

const char* name_of(LookAhead how) {
  return how == LookAhead::kHardware ? "hardware" : how == LookAhead::kInPlace ? "in place" : "bursts";
}

LookAhead look_ahead(LookAhead otherwise) {
  static const bool intel = is_intel();
  const int set = chosen.load(std::memory_order_relaxed);
  if (set != kNotSet) return static_cast<LookAhead>(set);
  return intel ? LookAhead::kBursts : otherwise;
}

void set_look_ahead(std::optional<LookAhead> how) { chosen.store(how ? static_cast<int>(*how) : kNotSet); }

}  // namespace tkt
