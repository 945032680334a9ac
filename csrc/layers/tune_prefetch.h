// Finds out how products of few tokens had best look ahead on this machine, with these weights, by trying.
#pragma once

#include <memory>
#include <vector>

#include "kernels/look_ahead.h"
#include "layers/packed_matrix.h"

namespace tkt {

struct LookAheadSpeed {
  LookAhead how;
  double speed;  // times as fast as the way that was in use
};

// Times products of one token over `matrices`, all threads taking part, and has products look ahead in the fastest way from
// now on: in another one than before only where that is 3% slower or more. Reads some GB, which takes a fraction of a second.
// Returns what it found; nothing, and changes nothing, where the matrices could stay in caches, where they are no measure, or
// where products do not look ahead at all.
std::vector<LookAheadSpeed> choose_look_ahead(const std::vector<std::shared_ptr<PackedMatrix>>& matrices);

}  // namespace tkt
