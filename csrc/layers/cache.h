// What attention keeps of earlier tokens, and which of it a query sees.
#pragma once

#include <cstdint>

namespace tkt {

// Row i begins at data + i * row_stride.
struct CacheStream {
  float* data;
  int64_t row_stride;

  float* row(int64_t i) const { return data + i * row_stride; }
};

// Of one sequence: two streams with a row for each token, latents and rotary keys in latent attention, keys and values
// in grouped-query attention.
struct CacheRows {
  CacheStream first;
  CacheStream second;

  // The rows from row i on.
  CacheRows from(int64_t i) const { return {{first.row(i), first.row_stride}, {second.row(i), second.row_stride}}; }
};

// `length` rows of one sequence. A batch has an array of them: its sequences may lie in one buffer or in several, and
// be of different lengths.
struct Cache {
  CacheRows rows;
  int64_t length;

  CacheRows last(int64_t tokens) const { return rows.from(length - tokens); }
};

// Floats in a row of each stream.
struct CacheWidths {
  int64_t first;
  int64_t second;
};

// Which rows each query sees: either ranges [start, end), or a mask; the order of summation starts at the first visible
// row, so padding on the left changes nothing.
struct Visibility {
  const int32_t* ranges;  // [batch][tokens][2], or null
  const uint8_t* mask;    // [batch][tokens][length], non-zero: visible; used where ranges is null, for equal lengths
};

}  // namespace tkt
