// What a decoder layer asks of its attention.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/cache.h"
#include "layers/packed_matrix.h"

namespace tkt {

struct LayerInput {
  const float* x;           // [batch][tokens][hidden]
  const float* rope_table;  // [batch][tokens][rope_dim]
  int64_t batch;
  int64_t tokens;

  int64_t rows() const { return batch * tokens; }
};

struct AttentionShape {
  int64_t hidden;
  int64_t rope_dim;  // of a row of the rope table
  CacheWidths cache;
};

class Attention {
 public:
  explicit Attention(const AttentionShape& shape) : shape_(shape) {}
  virtual ~Attention() = default;
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  const AttentionShape& shape() const { return shape_; }
  virtual std::vector<std::shared_ptr<PackedMatrix>> matrices() const = 0;

  // rows[batch] = what goes into the caches for the tokens of `in`.
  virtual void project_keys(const LayerInput& in, const CacheRows* rows) const = 0;

  // out[batch][tokens][hidden] = attention of `in` over caches[batch]. A query that sees no key gives the output
  // projection of zero.
  virtual void attend(const LayerInput& in, const Cache* caches, const Visibility& visibility, float* out) const = 0;

  // Both: the last in.tokens rows of each cache are written, and are then part of it.
  virtual void append_and_attend(const LayerInput& in, const Cache* caches, const Visibility& visibility,
                                 float* out) const = 0;

 private:
  AttentionShape shape_;
};

}  // namespace tkt
