// Softmax attention of absorbed queries over cached latents: the middle of multi-head latent attention.
#pragma once

#include <cstdint>

namespace tkt {

struct LatentDims {
  int64_t heads;
  int64_t latent_dim;  // of a cached latent, which is key and value
  int64_t rope_dim;    // of a cached rotary key
  float softmax_scale;
};

// Cached keys of a batch. Row of key i of sequence s: latents + s * latent_batch_stride + i * latent_stride.
struct LatentCache {
  const float* latents;
  int64_t latent_batch_stride;
  int64_t latent_stride;
  const float* ropes;
  int64_t rope_batch_stride;
  int64_t rope_stride;
  int64_t length;  // keys per sequence
};

// Which keys each query sees: either ranges [start, end), or a mask; the order of summation starts at the first visible
// key, so padding on the left changes nothing.
struct Visibility {
  const int32_t* ranges;  // [batch][tokens][2], or null
  const uint8_t* mask;    // [batch][tokens][length], non-zero: visible; used where ranges is null
};

// Tokens [first, first + count) of a batch whose sequences have per_sequence tokens each.
struct TokenRange {
  int64_t first;
  int64_t count;
  int64_t per_sequence;
};

// contexts[count][heads][latent_dim] = softmax(scale * queries . keys) . latents, for queries[count][heads][latent_dim +
// rope_dim]. The context of a query that sees no key is 0. On all threads; the same bits however tokens are divided over
// calls.
void attend_latents(const LatentDims& dims, const float* queries, const TokenRange& tokens, const LatentCache& cache,
                    const Visibility& visibility, float* contexts);

}  // namespace tkt
