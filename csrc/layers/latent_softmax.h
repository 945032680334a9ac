// Softmax attention of absorbed queries over cached latents: the middle of multi-head latent attention.
#pragma once

#include <cstdint>

#include "layers/cache.h"

namespace tkt {

struct LatentDims {
  int64_t heads;
  int64_t latent_dim;  // of a cached latent, which is key and value
  int64_t rope_dim;    // of a cached rotary key
  float softmax_scale;
};

// Tokens [first, first + count) of a batch whose sequences have per_sequence tokens each.
struct TokenRange {
  int64_t first;
  int64_t count;
  int64_t per_sequence;
};

// contexts[count][heads][latent_dim] = softmax(scale * queries . keys) . latents, for queries[count][heads][latent_dim
// + rope_dim], and for each sequence of the batch a cache of latents and rotary keys. The context of a query that sees
// no key is 0. On all threads; the same bits however tokens are divided over calls, and sequences over batches.
void attend_latents(const LatentDims& dims, const float* queries, const TokenRange& tokens, const Cache* caches,
                    const Visibility& visibility, float* contexts);

}  // namespace tkt
