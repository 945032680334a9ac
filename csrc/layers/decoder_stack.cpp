#include "layers/decoder_stack.h"

#include <stdexcept>
#include <utility>

namespace tkt {

DecoderStack::DecoderStack(std::vector<Entry> layers) : layers_(std::move(layers)) {
  if (layers_.empty()) throw std::invalid_argument("a stack needs at least one layer");
  for (const Entry& entry : layers_) {
    if (entry.layer == nullptr) throw std::invalid_argument("a stack is made of layers, got nothing for one");
  }
}

void DecoderStack::append_and_forward(const LayerInput& in, const Cache* caches, const Visibility& visibility,
                                      float* out) const {
  LayerInput next = in;
  for (const Entry& entry : layers_) {
    entry.layer->append_and_forward(next, entry.norms, caches, visibility, out);
    next.x = out;
    caches += in.batch;
  }
}

}  // namespace tkt
