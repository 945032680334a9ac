// From GGUF rows to a panel (layout: block_formats.h).
#pragma once

#include <cstdint>

#include "formats/block_formats.h"

namespace tkt {

// Packs `rows` (1..16) consecutive GGUF rows of `blocks` blocks; the lanes of missing rows become zero. Plain copies,
// but for the order of bits.
void pack_panel(const WeightTypeInfo& info, const uint8_t* source, int rows, int64_t blocks, uint8_t* panel);

}  // namespace tkt
