// Decoder layers that follow each other: the whole of a decoding step between embedding and last norm.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "layers/decoder_layer.h"

namespace tkt {

class DecoderStack {
 public:
  struct Entry {
    std::shared_ptr<const DecoderLayer> layer;
    LayerNorms norms;  // must outlive the stack
  };

  // Throws std::invalid_argument where there is no layer, or one that is null.
  explicit DecoderStack(std::vector<Entry> layers);

  size_t size() const { return layers_.size(); }
  const DecoderLayer& layer(size_t i) const { return *layers_[i].layer; }

  // DecoderLayer::append_and_forward one after the other; caches: [layers][batch].
  void append_and_forward(const LayerInput& in, const Cache* caches, const Visibility& visibility, float* out) const;

 private:
  std::vector<Entry> layers_;
};

}  // namespace tkt
