// Finds the prefetch strategy that makes products with these weights fastest on this machine, by timing each.
#pragma once

#include <memory>
#include <vector>

#include "kernels/prefetch.h"
#include "layers/packed_matrix.h"

namespace tkt {

struct PrefetchSpeed {
  Prefetch strategy;
  double speed;  // ratio to the strategy that was in use
};

// Times products of one token over `matrices`, all threads taking part, and sets the fastest strategy on all of them:
// another one than the first matrix had only where that is 3% slower or more. Reads some GB, which takes a fraction of
// a second. Returns the speeds; nothing, and sets nothing, where caches could hold the matrices or where kernels do not
// prefetch at all.
std::vector<PrefetchSpeed> tune_prefetch(const std::vector<std::shared_ptr<PackedMatrix>>& matrices);

}  // namespace tkt
