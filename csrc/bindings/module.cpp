// The Python module transformers_kt._C: checks dtypes, shapes and ranges, releases the GIL, does no arithmetic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/gil.h"
#include "bindings/machine.h"
#include "formats/codebooks.h"
#include "formats/four_bit_values.h"
#include "formats/panel_layout.h"
#include "formats/row_decoder.h"
#include "kernels/dispatch.h"
#include "kernels/prefetch.h"
#include "layers/attention.h"
#include "layers/decoder_layer.h"
#include "layers/decoder_stack.h"
#include "layers/experts.h"
#include "layers/linear.h"
#include "layers/mla.h"
#include "layers/packed_matrix.h"
#include "layers/row_ops.h"
#include "layers/stored_tensor.h"
#include "layers/tune_prefetch.h"
#include "machine/thread_pool.h"

namespace py = pybind11;

namespace tkt {
namespace {

const WeightTypeInfo& type_numbered(int ggml_type) {
  const WeightTypeInfo* info = find_ggml_type(ggml_type);
  if (info == nullptr) throw std::invalid_argument("no kernel for ggml type " + std::to_string(ggml_type));
  return *info;
}

std::vector<float> to_vector(const std::optional<Floats>& values, const char* name) {
  if (!values) return {};
  size_of(*values, name);
  return std::vector<float>(values->data(), values->data() + values->size());
}

std::shared_ptr<PackedMatrix> make_matrix(int ggml_type, int64_t count, int64_t rows, int64_t cols) {
  return std::make_shared<PackedMatrix>(type_numbered(ggml_type).type, count, rows, cols);
}

// Whole matrices from `index` on.
void pack(PackedMatrix& matrix, int64_t index, const Bytes& source) {
  const int64_t matrix_bytes = matrix.rows() * matrix.row_bytes();
  const int64_t matrices = source.size() / matrix_bytes;
  if (matrices < 1 || index < 0 || index > matrix.count() - matrices || matrices * matrix_bytes != source.size()) {
    throw std::invalid_argument("the source must be whole matrices of " + std::to_string(matrix_bytes) +
                                " bytes; got shape " + shape_text(source) + " for matrix " + std::to_string(index) +
                                " of " + std::to_string(matrix.count()));
  }
  require_shape(source, "source bytes", {matrices * matrix_bytes});
  const uint8_t* data = source.data();
  const ReleaseGil release;
  matrix.pack(index, matrices, data);
}

std::shared_ptr<StoredTensor> make_stored(int ggml_type, const std::vector<std::pair<int, int64_t>>& parts,
                                          int64_t part_bytes) {
  if (ggml_type < 0) throw std::invalid_argument("no ggml type has the number " + std::to_string(ggml_type));
  std::vector<StoredTensor::Part> places;
  for (const auto& [descriptor, offset] : parts) {
    if (descriptor < 0 || offset < 0 || part_bytes > INT64_MAX - offset) {
      throw std::invalid_argument("descriptor " + std::to_string(descriptor) + ", offset " + std::to_string(offset) +
                                  ": no place of " + std::to_string(part_bytes) + " bytes in a file");
    }
    places.push_back({descriptor, offset});
  }
  return std::make_shared<StoredTensor>(find_ggml_type(ggml_type), std::move(places), part_bytes);
}

// The range of `bytes` bytes from `start` on, which must be whole blocks of the tensor.
ByteRange range_of(const StoredTensor& tensor, int64_t start, int64_t bytes) {
  if (start < 0 || bytes < 1 || bytes > tensor.nbytes() || start > tensor.nbytes() - bytes ||
      start % tensor.block_bytes() != 0 || bytes % tensor.block_bytes() != 0) {
    throw std::invalid_argument(std::to_string(bytes) + " bytes from " + std::to_string(start) +
                                " on are no whole blocks of " + std::to_string(tensor.block_bytes()) + " in " +
                                std::to_string(tensor.nbytes()));
  }
  return {start, start + bytes};
}

void read_stored(StoredTensor& tensor, int64_t start, Bytes& out) {
  require_shape(out, "out", {out.size()});
  const ByteRange range = range_of(tensor, start, out.size());
  uint8_t* to = out.mutable_data();
  const ReleaseGil release;
  tensor.read_and_look_at(range, to);
}

void look_at_stored(StoredTensor& tensor, int64_t start, const Bytes& blocks) {
  require_shape(blocks, "blocks", {blocks.size()});
  const ByteRange range = range_of(tensor, start, blocks.size());
  const uint8_t* data = blocks.data();
  const ReleaseGil release;
  tensor.look_at(range, data);
}

void pack_stored(PackedMatrix& matrix, StoredTensor& source, int64_t first, int64_t count) {
  const bool is_type = source.info() != nullptr && source.info()->type == matrix.info().type;
  const int64_t matrix_bytes = matrix.rows() * matrix.row_bytes();
  if (!is_type || source.nbytes() != matrix.count() * matrix_bytes || source.part_bytes() % matrix_bytes != 0) {
    throw std::invalid_argument("a tensor of " + std::to_string(source.nbytes()) + " bytes in parts of " +
                                std::to_string(source.part_bytes()) + (is_type ? "" : ", of another type,") +
                                " does not fill " + shape_text(&matrix) + " of " + matrix.info().name);
  }
  if (first < 0 || count < 1 || count > matrix.count() || first > matrix.count() - count) {
    throw std::invalid_argument(std::to_string(count) + " matrices from " + std::to_string(first) + " on, of " +
                                std::to_string(matrix.count()));
  }
  const ReleaseGil release;
  matrix.pack_stored(source, first, count);
}

// EOFError, or OSError with its errno; the attributes `part` and `position` say where.
void raise_read_failure(const ReadFailure& failure) {
  const py::object error = failure.error == 0 ? py::reinterpret_borrow<py::object>(PyExc_EOFError)(failure.what())
                                              : py::reinterpret_borrow<py::object>(PyExc_OSError)(
                                                    failure.error, std::strerror(failure.error));
  error.attr("part") = failure.part;
  error.attr("position") = failure.position;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

void pack_floats(PackedMatrix& matrix, const Floats& source) {
  require_shape(source, "source", {matrix.count(), matrix.rows(), matrix.cols()});
  const float* data = source.data();
  const ReleaseGil release;
  matrix.pack_floats(data);
}

void linear_op(const PackedMatrix& w, const Floats& x, Floats& out) {
  const int64_t tokens = rows_of(x, "x", w.cols());
  require_shape(out, "out", {tokens, w.rows()});
  if (w.count() != 1) throw std::invalid_argument("linear takes one matrix, got " + std::to_string(w.count()));
  const float* from = x.data();
  float* to = out.mutable_data();
  const ReleaseGil release;
  linear(w, 0, from, tokens, to);
}

void rms_norm_op(const Floats& x, const Floats& weight, float eps, Floats& out) {
  const int64_t width = size_of(weight, "weight");
  const int64_t rows = rows_of(x, "x", width);
  require_shape(out, "out", {rows, width});
  const float* from = x.data();
  const float* scale = weight.data();
  float* to = out.mutable_data();
  const ReleaseGil release;
  rms_norm_rows(from, scale, eps, rows, width, to);
}

void embed_op(int ggml_type, const Bytes& data, const Int64s& ids, Floats& out) {
  const WeightTypeInfo& info = type_numbered(ggml_type);
  const int64_t tokens = ids.size();
  require_shape(ids, "ids", {tokens});
  if (out.ndim() != 2 || out.shape(1) < 1 || out.shape(1) % info.block_elements != 0) {
    throw std::invalid_argument("out must have shape (tokens, columns in whole blocks of " +
                                std::to_string(info.block_elements) + "), got " + shape_text(out));
  }
  const int64_t cols = out.shape(1);
  require_shape(out, "out", {tokens, cols});
  const int64_t vocabulary = data.size() / info.block_bytes / (cols / info.block_elements);
  const int64_t* id = ids.data();
  for (int64_t t = 0; t < tokens; ++t) {
    if (id[t] >= 0 && id[t] < vocabulary) continue;
    throw py::index_error("token id " + std::to_string(id[t]) + " is not in [0, " + std::to_string(vocabulary) + ")");
  }
  const uint8_t* matrix = data.data();
  float* to = out.mutable_data();
  const ReleaseGil release;
  embed_rows(info, matrix, id, tokens, cols, to);
}

void dequantize_op(int ggml_type, const Bytes& data, Floats& out) {
  const WeightTypeInfo& info = type_numbered(ggml_type);
  if (out.size() % info.block_elements != 0) {
    throw std::invalid_argument("out must hold whole blocks of " + std::to_string(info.block_elements) +
                                " values, got " + std::to_string(out.size()));
  }
  require_shape(data, "data", {row_bytes(info, out.size())});
  dequantize_row(info.type, data.data(), out.size(), out.mutable_data());
}

// A call of routed experts, checked.
struct RoutedCall {
  const ExpertWeights* experts;
  std::vector<int32_t> indices;
  const float* weights;
  int64_t top_k;
  const float* x;
  int64_t tokens;
  float* out;

  void run() const { run_experts(*experts, {indices.data(), weights, top_k}, nullptr, x, tokens, out); }
};

RoutedCall routed_call(const ExpertWeights& experts, const Floats& x, const Int64s& indices, const Floats& weights,
                       Floats& out) {
  const int64_t tokens = rows_of(x, "x", experts.hidden());
  require_shape(out, "out", {tokens, experts.hidden()});
  if (indices.ndim() != 2 || indices.shape(1) < 1) {
    throw std::invalid_argument("indices must have shape (tokens, top_k), top_k at least 1, got " +
                                shape_text(indices));
  }
  const int64_t top_k = indices.shape(1);
  require_shape(indices, "indices", {tokens, top_k});
  require_shape(weights, "weights", {tokens, top_k});
  std::vector<int32_t> chosen(static_cast<size_t>(tokens * top_k));
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int64_t e = indices.data()[i];
    if (e != kNoExpert && (e < 0 || e >= experts.count())) {
      throw py::index_error("expert " + std::to_string(e) + " is not in [0, " + std::to_string(experts.count()) +
                            "), and not -1, which is none");
    }
    chosen[i] = static_cast<int32_t>(e);
  }
  return {&experts, std::move(chosen), weights.data(), top_k, x.data(), tokens, out.mutable_data()};
}

void routed_experts_op(const ExpertWeights& experts, const Floats& x, const Int64s& indices, const Floats& weights,
                       Floats& out) {
  const RoutedCall call = routed_call(experts, x, indices, weights, out);
  const ReleaseGil release;
  call.run();
}

// A job with the arrays it works on.
class BoundJob {
 public:
  BoundJob(Job job, std::vector<py::object> holds) : job_(std::move(job)), holds_(std::move(holds)) {}
  BoundJob(BoundJob&&) = default;
  BoundJob(const BoundJob&) = delete;
  ~BoundJob() {
    if (holds_.empty() || job_.is_done()) return;
    const ReleaseGil release;
    try {
      job_.wait();
    } catch (...) {
      // Nobody asked.
    }
  }

  bool is_done() const { return job_.is_done(); }
  void wait() const {
    const ReleaseGil release;
    job_.wait();
  }

 private:
  Job job_;
  std::vector<py::object> holds_;
};

BoundJob submit_routed_op(const std::shared_ptr<ExpertWeights>& experts, const Floats& x, const Int64s& indices,
                          const Floats& weights, Floats& out) {
  RoutedCall call = routed_call(*experts, x, indices, weights, out);
  return {submit([experts, call = std::move(call)] { call.run(); }), {x, weights, out}};
}

// A loop of which one task throws.
void failing_loop_op(int64_t tasks, int64_t failing) {
  const ReleaseGil release;
  parallel_for(tasks, [failing](int64_t task) {
    if (task == failing) throw std::bad_alloc();
  });
}

void mlp_op(const ExpertWeights& mlp, const Floats& x, Floats& out) {
  const int64_t tokens = rows_of(x, "x", mlp.hidden());
  require_shape(out, "out", {tokens, mlp.hidden()});
  if (mlp.count() != 1) throw std::invalid_argument("an MLP is one expert, got " + std::to_string(mlp.count()));
  const float* from = x.data();
  float* to = out.mutable_data();
  const ReleaseGil release;
  run_mlp(mlp, from, tokens, to);
}

std::shared_ptr<MoeBlock> make_moe(std::shared_ptr<PackedMatrix> router, const std::optional<Floats>& bias,
                                   std::shared_ptr<ExpertWeights> routed, std::shared_ptr<ExpertWeights> shared,
                                   bool sigmoid, int64_t groups, int64_t top_groups, int64_t top_k, bool normalize,
                                   float scale) {
  const RouterConfig config{sigmoid ? Scoring::kSigmoid : Scoring::kSoftmax,
                            sigmoid ? GroupScore::kTop2Sum : GroupScore::kMax,
                            groups,
                            top_groups,
                            top_k,
                            normalize,
                            scale};
  return std::make_shared<MoeBlock>(std::move(router), to_vector(bias, "bias"), config, std::move(routed),
                                    std::move(shared));
}

void moe_op(const MoeBlock& moe, const Floats& x, Floats& out, Floats& logits) {
  const int64_t tokens = rows_of(x, "x", moe.hidden());
  require_shape(out, "out", {tokens, moe.hidden()});
  require_shape(logits, "logits", {tokens, moe.experts()});
  const float* from = x.data();
  float* to = out.mutable_data();
  float* scores = logits.mutable_data();
  const ReleaseGil release;
  moe.forward(from, tokens, to, scores);
}

std::shared_ptr<MlaAttention> make_attention(int64_t hidden, int64_t heads, int64_t nope_dim, int64_t rope_dim,
                                             int64_t latent_dim, int64_t value_dim, float softmax_scale, float norm_eps,
                                             std::shared_ptr<PackedMatrix> q_a, const std::optional<Floats>& q_a_norm,
                                             std::shared_ptr<PackedMatrix> q, std::shared_ptr<PackedMatrix> kv_a,
                                             const Floats& kv_a_norm, std::shared_ptr<PackedMatrix> k_b,
                                             std::shared_ptr<PackedMatrix> v_b, std::shared_ptr<PackedMatrix> o) {
  AttentionWeights weights{std::move(q_a),
                           to_vector(q_a_norm, "q_a_norm"),
                           std::move(q),
                           std::move(kv_a),
                           to_vector(kv_a_norm, "kv_a_norm"),
                           std::move(k_b),
                           std::move(v_b),
                           std::move(o)};
  const AttentionConfig config{hidden, heads, nope_dim, rope_dim, latent_dim, value_dim, softmax_scale, norm_eps};
  return std::make_shared<MlaAttention>(config, std::move(weights));
}

// Dense rows for what goes into the cache for x, as one long sequence.
CacheRows dense_rows(const AttentionShape& shape, int64_t tokens, const Floats& rope_table, Floats& first,
                     Floats& second) {
  require_shape(rope_table, "rope_table", {tokens, shape.rope_dim});
  require_shape(first, "the first stream", {tokens, shape.cache.first});
  require_shape(second, "the second stream", {tokens, shape.cache.second});
  return {{first.mutable_data(), shape.cache.first}, {second.mutable_data(), shape.cache.second}};
}

void project_keys_op(const MlaAttention& attention, const Floats& x, const Floats& rope_table, Floats& latents,
                     Floats& ropes) {
  const int64_t tokens = rows_of(x, "x", attention.shape().hidden);
  const CacheRows rows = dense_rows(attention.shape(), tokens, rope_table, latents, ropes);
  const LayerInput in{x.data(), rope_table.data(), 1, tokens};
  const ReleaseGil release;
  attention.project_keys(in, &rows);
}

// Of the first sequence. A cache may be a view into a longer buffer, but its last axis is dense. It may be read-only
// where it is only read.
CacheStream stream_of(const StridedFloats& array, const char* name, bool is_written) {
  if (is_written && !array.writeable()) throw std::invalid_argument(std::string(name) + " cannot be written");
  const py::ssize_t float_bytes = sizeof(float);
  if (array.strides(2) != float_bytes || array.strides(0) % float_bytes != 0 || array.strides(1) % float_bytes != 0) {
    throw std::invalid_argument(std::string(name) + " must have a dense last axis; its strides are (" +
                                std::to_string(array.strides(0)) + ", " + std::to_string(array.strides(1)) + ", " +
                                std::to_string(array.strides(2)) + ") bytes");
  }
  return {const_cast<float*>(array.data()), array.strides(1) / float_bytes};
}

// Both streams of a layer's cache: (batch, room, width) each.
struct CacheArrays {
  int64_t batch;
  int64_t room;
  CacheWidths widths;
  CacheRows rows;               // of the first sequence
  CacheWidths sequence_stride;  // floats from one sequence to the next

  // Adds the cache of each sequence, of `length` keys.
  void add_to(std::vector<Cache>& caches, int64_t length) const {
    for (int64_t s = 0; s < batch; ++s) {
      caches.push_back({{{rows.first.data + s * sequence_stride.first, rows.first.row_stride},
                         {rows.second.data + s * sequence_stride.second, rows.second.row_stride}},
                        length});
    }
  }
  // Of all its keys.
  std::vector<Cache> caches() const {
    std::vector<Cache> caches;
    add_to(caches, room);
    return caches;
  }
};

CacheArrays cache_arrays(const StridedFloats& first, const StridedFloats& second, bool is_written) {
  if (first.ndim() != 3 || second.ndim() != 3 || first.shape(0) != second.shape(0) ||
      first.shape(1) != second.shape(1)) {
    throw std::invalid_argument("both streams of a cache must have shape (batch, keys, width), got " +
                                shape_text(first) + " and " + shape_text(second));
  }
  const int64_t float_bytes = sizeof(float);
  return {first.shape(0),
          first.shape(1),
          {first.shape(2), second.shape(2)},
          {stream_of(first, "the first stream", is_written), stream_of(second, "the second stream", is_written)},
          {first.strides(0) / float_bytes, second.strides(0) / float_bytes}};
}

// Checks what attention is given beside caches.
LayerInput layer_input(const AttentionShape& shape, const Floats& x, const Floats& rope_table, const Floats& out) {
  if (x.ndim() != 3) throw std::invalid_argument("x must have shape (batch, tokens, hidden), got " + shape_text(x));
  const int64_t batch = x.shape(0);
  const int64_t tokens = x.shape(1);
  require_shape(x, "x", {batch, tokens, shape.hidden});
  require_shape(out, "out", {batch, tokens, shape.hidden});
  require_shape(rope_table, "rope_table", {batch * tokens, shape.rope_dim});
  return {x.data(), rope_table.data(), batch, tokens};
}

// Whether a cache holds `length` keys of `batch` sequences; its arrays may have room for more.
void require_cache(const AttentionShape& shape, int64_t batch, const CacheArrays& cache, int64_t length) {
  if (cache.batch != batch || cache.widths.first != shape.cache.first || cache.widths.second != shape.cache.second ||
      length < 0 || length > cache.room) {
    const auto size = [](int64_t batches, int64_t rows, const CacheWidths& widths) {
      return std::to_string(batches) + " x " + std::to_string(rows) + " x " + std::to_string(widths.first) + " and " +
             std::to_string(widths.second);
    };
    throw std::invalid_argument("the cache must have " + size(batch, length, shape.cache) +
                                " values or room for more rows, got " + size(cache.batch, cache.room, cache.widths));
  }
}

Visibility visibility_of(const LayerInput& in, int64_t length, const std::optional<Int32s>& ranges,
                         const std::optional<Bytes>& mask) {
  if (ranges.has_value() == mask.has_value()) {
    throw std::invalid_argument(std::string("give either ranges or a mask, got ") + (mask ? "both" : "neither"));
  }
  if (ranges) require_shape(*ranges, "ranges", {in.batch, in.tokens, 2});
  if (mask) require_shape(*mask, "mask", {in.batch, in.tokens, length});
  return {ranges ? ranges->data() : nullptr, mask ? mask->data() : nullptr};
}

void require_room(const LayerInput& in, int64_t length) {
  if (length >= in.tokens) return;
  throw std::invalid_argument("a cache of " + std::to_string(length) + " keys has no room for those of " +
                              std::to_string(in.tokens) + " tokens");
}

void attend_op(const MlaAttention& attention, const Floats& x, const Floats& rope_table, const StridedFloats& latents,
               const StridedFloats& ropes, const std::optional<Int32s>& ranges, const std::optional<Bytes>& mask,
               Floats& out) {
  const CacheArrays cache = cache_arrays(latents, ropes, false);
  const LayerInput in = layer_input(attention.shape(), x, rope_table, out);
  require_cache(attention.shape(), in.batch, cache, cache.room);
  const Visibility visibility = visibility_of(in, cache.room, ranges, mask);
  const std::vector<Cache> caches = cache.caches();
  float* to = out.mutable_data();
  const ReleaseGil release;
  attention.attend(in, caches.data(), visibility, to);
}

LayerNorms norms_of(const DecoderLayer& layer, const Floats& input_norm, const Floats& post_norm) {
  require_shape(input_norm, "input_norm", {layer.shape().hidden});
  require_shape(post_norm, "post_norm", {layer.shape().hidden});
  return {input_norm.data(), post_norm.data()};
}

void layer_project_keys_op(const DecoderLayer& layer, const Floats& x, const Floats& input_norm,
                           const Floats& rope_table, Floats& first, Floats& second) {
  const int64_t tokens = rows_of(x, "x", layer.shape().hidden);
  require_shape(input_norm, "input_norm", {layer.shape().hidden});
  const CacheRows rows = dense_rows(layer.shape(), tokens, rope_table, first, second);
  const LayerInput in{x.data(), rope_table.data(), 1, tokens};
  const float* norm = input_norm.data();
  const ReleaseGil release;
  layer.project_keys(in, norm, &rows);
}

template <bool kAppends>
void layer_forward_op(const DecoderLayer& layer, const Floats& x, const Floats& input_norm, const Floats& post_norm,
                      const Floats& rope_table, const StridedFloats& first, const StridedFloats& second,
                      const std::optional<Int32s>& ranges, const std::optional<Bytes>& mask, Floats& out) {
  const CacheArrays cache = cache_arrays(first, second, kAppends);
  const LayerInput in = layer_input(layer.shape(), x, rope_table, out);
  require_cache(layer.shape(), in.batch, cache, cache.room);
  const Visibility visibility = visibility_of(in, cache.room, ranges, mask);
  const LayerNorms norms = norms_of(layer, input_norm, post_norm);
  if (kAppends) require_room(in, cache.room);
  const std::vector<Cache> caches = cache.caches();
  float* to = out.mutable_data();
  const ReleaseGil release;
  if (kAppends) {
    layer.append_and_forward(in, norms, caches.data(), visibility, to);
  } else {
    layer.forward(in, norms, caches.data(), visibility, to);
  }
}

// The caches of all layers for sequences of one length, in arrays that stay where they are.
class KeyBuffers {
 public:
  KeyBuffers(std::vector<StridedFloats> first, std::vector<StridedFloats> second)
      : first_(std::move(first)), second_(std::move(second)) {
    if (first_.size() != second_.size()) {
      throw std::invalid_argument("each layer needs both streams, got " + std::to_string(first_.size()) + " and " +
                                  std::to_string(second_.size()));
    }
    for (size_t i = 0; i < first_.size(); ++i) layers_.push_back(cache_arrays(first_[i], second_[i], true));
  }
  const std::vector<CacheArrays>& layers() const { return layers_; }
  int64_t batch() const { return layers_.empty() ? 0 : layers_.front().batch; }

 private:
  std::vector<StridedFloats> first_;  // keep what the pointers in layers_ point to
  std::vector<StridedFloats> second_;
  std::vector<CacheArrays> layers_;
};

// A DecoderStack with the arrays of its norms. Decoding calls it for every token, when the weights have emptied the
// caches: what it needs lies together, apart from the Python objects it came from.
class BoundStack {
 public:
  BoundStack(const std::vector<std::shared_ptr<DecoderLayer>>& layers, std::vector<Floats> norms)
      : norms_(std::move(norms)), stack_(entries(layers, norms_)) {}

  // Sequences come in the order of the buffers that hold their keys, of which those of buffers[i] are lengths[i].
  void append_and_forward(const Floats& x, const Floats& rope_table, const std::vector<const KeyBuffers*>& buffers,
                          const std::vector<int64_t>& lengths, const std::optional<Int32s>& ranges,
                          const std::optional<Bytes>& mask, Floats& out) const {
    const LayerInput in = layer_input(stack_.layer(0).shape(), x, rope_table, out);
    require_buffers(in, buffers, lengths);
    if (mask && std::adjacent_find(lengths.begin(), lengths.end(), std::not_equal_to<>()) != lengths.end()) {
      throw std::invalid_argument("a mask is for sequences of one length; give ranges");
    }
    const Visibility visibility = visibility_of(in, lengths.front(), ranges, mask);
    std::vector<Cache> caches;
    caches.reserve(stack_.size() * static_cast<size_t>(in.batch));
    for (size_t i = 0; i < stack_.size(); ++i) {
      for (size_t b = 0; b < buffers.size(); ++b) {
        const CacheArrays& arrays = buffers[b]->layers()[i];
        require_cache(stack_.layer(i).shape(), buffers[b]->batch(), arrays, lengths[b]);
        arrays.add_to(caches, lengths[b]);
      }
    }
    float* to = out.mutable_data();
    const ReleaseGil release;
    stack_.append_and_forward(in, caches.data(), visibility, to);
  }

 private:
  void require_buffers(const LayerInput& in, const std::vector<const KeyBuffers*>& buffers,
                       const std::vector<int64_t>& lengths) const {
    if (buffers.empty() || buffers.size() != lengths.size()) {
      throw std::invalid_argument("buffers need a length each, got " + std::to_string(buffers.size()) + " and " +
                                  std::to_string(lengths.size()));
    }
    int64_t batch = 0;
    for (size_t b = 0; b < buffers.size(); ++b) {
      if (buffers[b] == nullptr) throw std::invalid_argument("buffers " + std::to_string(b) + " is None");
      if (buffers[b]->layers().size() != stack_.size()) {
        throw std::invalid_argument(std::to_string(stack_.size()) + " layers need a cache each, got " +
                                    std::to_string(buffers[b]->layers().size()));
      }
      require_room(in, lengths[b]);
      batch += buffers[b]->batch();
    }
    if (batch == in.batch) return;
    throw std::invalid_argument("x has " + std::to_string(in.batch) + " sequences, the buffers " +
                                std::to_string(batch));
  }

  static std::vector<DecoderStack::Entry> entries(const std::vector<std::shared_ptr<DecoderLayer>>& layers,
                                                  const std::vector<Floats>& norms) {
    if (norms.size() != 2 * layers.size()) {
      throw std::invalid_argument(std::to_string(layers.size()) + " layers need two norms each, got " +
                                  std::to_string(norms.size()));
    }
    std::vector<DecoderStack::Entry> entries;
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i] == nullptr) throw std::invalid_argument("layer " + std::to_string(i) + " is None");
      entries.push_back({layers[i], norms_of(*layers[i], norms[2 * i], norms[2 * i + 1])});
    }
    return entries;
  }

  std::vector<Floats> norms_;
  DecoderStack stack_;
};

void rope_table_op(const Int64s& positions, const Floats& inv_freq, float scaling, Floats& table) {
  const int64_t dim = size_of(inv_freq, "inv_freq") * 2;
  require_shape(positions, "positions", {positions.size()});
  require_shape(table, "table", {positions.size(), dim});
  fill_rope_table(positions.data(), positions.size(), inv_freq.data(), dim, scaling, table.mutable_data());
}

py::list weight_types() {
  py::list types;
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    types.append(py::make_tuple(info.name, info.ggml_type, info.block_elements, info.block_bytes));
  }
  return types;
}

py::list panel_layouts() {
  py::list layouts;
  for (const WeightTypeInfo& info : kWeightTypeInfos) {
    layouts.append(py::make_tuple(info.name, info.block_elements, info.block_bytes, info.unit_count, info.unit_bytes,
                                  info.scale_bytes(), info.blocks_together()));
  }
  return layouts;
}

// The weights that quants of a type are positions of, as rows of 8 or 4, or one by one.
template <typename Entry, size_t kEntries>
py::array_t<int8_t> grid_of(const std::array<Entry, kEntries>& entries) {
  py::array_t<int8_t> grid({kEntries, sizeof(Entry)});
  std::memcpy(grid.mutable_data(), entries.data(), sizeof(entries));
  return grid;
}

py::dict codebooks() {
  py::dict found;
  found["IQ2_XXS"] = grid_of(kGridIQ2XXS);
  found["IQ2_XS"] = grid_of(kGridIQ2XS);
  found["IQ2_S"] = grid_of(kGridIQ2S);
  found["IQ3_XXS"] = grid_of(kGridIQ3XXS);
  found["IQ3_S"] = grid_of(kGridIQ3S);
  for (const char* name : {"IQ1_S", "IQ1_M"}) found[name] = grid_of(kGridIQ1S);
  for (const char* name : {"IQ4_NL", "IQ4_XS"}) found[name] = py::array_t<int8_t>(16, kValuesIQ4);
  for (const char* name : {"MXFP4", "NVFP4"}) found[name] = py::array_t<int8_t>(16, kValuesE2M1);
  return found;
}

// All panels of matrix `index`, those of all nodes, as they lie in memory.
void read_panels(const PackedMatrix& matrix, int64_t index, Bytes& out) {
  require_shape(out, "out", {matrix.panels(), matrix.panel_bytes()});
  if (index < 0 || index >= matrix.count()) {
    throw std::invalid_argument("matrix " + std::to_string(index) + " of " + std::to_string(matrix.count()));
  }
  uint8_t* to = out.mutable_data();
  const py::gil_scoped_release release;
  matrix.read_panels(index, to);
}

// Views of the memory itself, which they keep alive.
py::list node_panels(const std::shared_ptr<PackedMatrix>& matrix) {
  py::list views;
  const py::object owner = py::cast(matrix);
  for (int node = 0; node < matrix->nodes(); ++node) {
    const PanelRange panels = matrix->panels_of_node(node);
    if (panels.count() == 0) continue;
    const std::vector<py::ssize_t> shape{matrix->count(), panels.count(), matrix->panel_bytes()};
    views.append(py::make_tuple(panels.first, py::array_t<uint8_t>(shape, matrix->panel(0, panels.first), owner)));
  }
  return views;
}

py::tuple prefetch_names() {
  py::list names;
  for (const Prefetch strategy : kPrefetches) names.append(name_of(strategy));
  return py::tuple(names);
}

void set_prefetch_op(PackedMatrix& matrix, const std::string& name) {
  if (name.empty()) return matrix.set_prefetch(std::nullopt);
  for (const Prefetch strategy : kPrefetches) {
    if (name == name_of(strategy)) return matrix.set_prefetch(strategy);
  }
  throw std::invalid_argument("no prefetch strategy is called " + name + "; there are hardware, per line and bursts");
}

py::dict tune_prefetch_op(const std::vector<std::shared_ptr<PackedMatrix>>& matrices) {
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (matrices[i] == nullptr) throw std::invalid_argument("matrix " + std::to_string(i) + " is None");
  }
  std::vector<PrefetchSpeed> found;
  {
    const ReleaseGil release;
    found = tune_prefetch(matrices);
  }
  py::dict speeds;
  for (const PrefetchSpeed& each : found) speeds[name_of(each.strategy)] = each.speed;
  return speeds;
}

}  // namespace
}  // namespace tkt

PYBIND11_MODULE(_C, m) {
  using namespace tkt;
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const UnsupportedCpu& error) {
      const py::object cls = py::module_::import("transformers_kt.errors").attr("UnsupportedCpuError");
      PyErr_SetString(cls.ptr(), error.what());
    } catch (const ReadFailure& failure) {
      raise_read_failure(failure);
    }
  });
  m.doc() = "CPU kernels of transformers_kt; use the Python modules instead of this.";

  bind_machine(m);
  bind_gil();

  m.attr("PANEL_ROWS") = kPanelRows;
  m.def("weight_types", &weight_types, "(name, ggml number, block elements, block bytes) of every type with kernels");
  m.def(
      "panel_layouts", &panel_layouts,
      "(name, block elements, block bytes, units of a block, unit bytes, scale bytes, blocks together) of every type");
  m.def("codebooks", &codebooks, "type -> int8 weights that its quants are positions of: (entries, 8 or 4) or (16,)");
  m.attr("PREFETCHES") = prefetch_names();

  py::class_<StoredTensor, std::shared_ptr<StoredTensor>>(m, "StoredTensor")
      .def(py::init(&make_stored), py::arg("ggml_type"), py::arg("parts"), py::arg("part_bytes"))
      .def("read", &read_stored, py::arg("start"), py::arg("out").noconvert())
      .def("look_at", &look_at_stored, py::arg("start"), py::arg("blocks").noconvert())
      .def_property_readonly("not_finite", &StoredTensor::not_finite)
      .def_property_readonly("has_values", &StoredTensor::has_values)
      .def_property_readonly("zeros", [](const StoredTensor& tensor) {
        std::vector<std::pair<int64_t, int64_t>> ranges;
        for (const ByteRange& each : tensor.zeros()) ranges.emplace_back(each.first, each.end);
        return ranges;
      });
  py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(m, "PackedMatrix")
      .def(py::init(&make_matrix), py::arg("ggml_type"), py::arg("count"), py::arg("rows"), py::arg("cols"))
      .def("pack", &pack, py::arg("index"), py::arg("source").noconvert())
      .def("pack_stored", &pack_stored, py::arg("source"), py::arg("first"), py::arg("count"))
      .def("pack_floats", &pack_floats, py::arg("source").noconvert())
      .def("read_panels", &read_panels, py::arg("index"), py::arg("out").noconvert())
      .def_property_readonly("type_name", [](const PackedMatrix& w) { return std::string(w.info().name); })
      .def_property_readonly("count", &PackedMatrix::count)
      .def_property_readonly("rows", &PackedMatrix::rows)
      .def_property_readonly("cols", &PackedMatrix::cols)
      .def_property_readonly("nbytes", &PackedMatrix::nbytes)
      .def_property(
          "prefetch", [](const PackedMatrix& w) { return name_of(w.prefetch()); }, &set_prefetch_op,
          "one of PREFETCHES; setting '' goes back to what suits the CPU and the kernels")
      .def_property_readonly("node_panels", &node_panels,
                             "of each node that has some: first panel, uint8 (count, panels, panel bytes)")
      .def_property_readonly("panels_of_nodes", [](const PackedMatrix& w) {
        std::vector<std::pair<int64_t, int64_t>> ranges;
        for (int node = 0; node < w.nodes(); ++node) {
          ranges.emplace_back(w.panels_of_node(node).first, w.panels_of_node(node).end);
        }
        return ranges;
      });

  m.def("tune_prefetch", &tune_prefetch_op, py::arg("matrices"),
        "times the PREFETCHES and sets the fastest on the matrices: name -> speed, the one before being 1; {} where it "
        "did not try");
  m.def("linear", &linear_op, py::arg("w"), py::arg("x").noconvert(), py::arg("out").noconvert());
  m.def("rms_norm", &rms_norm_op, py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("eps"),
        py::arg("out").noconvert());
  m.def("embed", &embed_op, py::arg("ggml_type"), py::arg("data").noconvert(), py::arg("ids").noconvert(),
        py::arg("out").noconvert());
  m.def("dequantize", &dequantize_op, py::arg("ggml_type"), py::arg("data").noconvert(), py::arg("out").noconvert());
  m.def("rope_table", &rope_table_op, py::arg("positions").noconvert(), py::arg("inv_freq").noconvert(),
        py::arg("scaling"), py::arg("table").noconvert());

  m.def("failing_loop", &failing_loop_op, py::arg("tasks"), py::arg("failing"),
        "for tests: a parallel loop whose task `failing` is refused memory");

  py::class_<BoundJob>(m, "Job").def("is_done", &BoundJob::is_done).def("wait", &BoundJob::wait);
  py::class_<ExpertWeights, std::shared_ptr<ExpertWeights>>(m, "Experts")
      .def(py::init<std::shared_ptr<PackedMatrix>, std::shared_ptr<PackedMatrix>, std::shared_ptr<PackedMatrix>>(),
           py::arg("gate"), py::arg("up"), py::arg("down"))
      .def_property_readonly("matrices", &ExpertWeights::matrices, "gate, up, down")
      .def("forward_routed", &routed_experts_op, py::arg("x").noconvert(), py::arg("indices").noconvert(),
           py::arg("weights").noconvert(), py::arg("out").noconvert())
      .def("submit_routed", &submit_routed_op, py::arg("x").noconvert(), py::arg("indices").noconvert(),
           py::arg("weights").noconvert(), py::arg("out").noconvert())
      .def("forward_mlp", &mlp_op, py::arg("x").noconvert(), py::arg("out").noconvert());

  py::class_<MoeBlock, std::shared_ptr<MoeBlock>>(m, "MoeBlock")
      .def(py::init(&make_moe), py::arg("router"), py::arg("bias").noconvert(), py::arg("routed"), py::arg("shared"),
           py::kw_only(), py::arg("sigmoid").noconvert(), py::arg("groups"), py::arg("top_groups"), py::arg("top_k"),
           py::arg("normalize").noconvert(), py::arg("scale"))
      .def_property_readonly("matrices", &MoeBlock::matrices, "router, routed experts, shared experts")
      .def_property_readonly("routed", &MoeBlock::routed)
      .def("forward", &moe_op, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("logits").noconvert());

  py::class_<Attention, std::shared_ptr<Attention>>(m, "Attention");
  py::class_<MlaAttention, Attention, std::shared_ptr<MlaAttention>>(m, "MlaAttention")
      .def(py::init(&make_attention), py::kw_only(), py::arg("hidden"), py::arg("heads"), py::arg("nope_dim"),
           py::arg("rope_dim"), py::arg("latent_dim"), py::arg("value_dim"), py::arg("softmax_scale"),
           py::arg("norm_eps"), py::arg("q_a"), py::arg("q_a_norm").noconvert(), py::arg("q"), py::arg("kv_a"),
           py::arg("kv_a_norm").noconvert(), py::arg("k_b"), py::arg("v_b"), py::arg("o"))
      .def_property_readonly("matrices", &MlaAttention::matrices)
      .def("project_keys", &project_keys_op, py::arg("x").noconvert(), py::arg("rope_table").noconvert(),
           py::arg("latents").noconvert(), py::arg("ropes").noconvert())
      .def("attend", &attend_op, py::arg("x").noconvert(), py::arg("rope_table").noconvert(),
           py::arg("latents").noconvert(), py::arg("ropes").noconvert(), py::arg("ranges").noconvert(),
           py::arg("mask").noconvert(), py::arg("out").noconvert());

  py::class_<DecoderLayer, std::shared_ptr<DecoderLayer>>(m, "DecoderLayer")
      .def(py::init<std::shared_ptr<Attention>, std::shared_ptr<MoeBlock>, std::shared_ptr<ExpertWeights>, float,
                    float>(),
           py::kw_only(), py::arg("attention"), py::arg("moe"), py::arg("mlp"), py::arg("input_norm_eps"),
           py::arg("post_norm_eps"))
      .def("project_keys", &layer_project_keys_op, py::arg("x").noconvert(), py::arg("input_norm").noconvert(),
           py::arg("rope_table").noconvert(), py::arg("first").noconvert(), py::arg("second").noconvert())
      .def("forward", &layer_forward_op<false>, py::arg("x").noconvert(), py::arg("input_norm").noconvert(),
           py::arg("post_norm").noconvert(), py::arg("rope_table").noconvert(), py::arg("first").noconvert(),
           py::arg("second").noconvert(), py::arg("ranges").noconvert(), py::arg("mask").noconvert(),
           py::arg("out").noconvert())
      .def("append_and_forward", &layer_forward_op<true>, py::arg("x").noconvert(), py::arg("input_norm").noconvert(),
           py::arg("post_norm").noconvert(), py::arg("rope_table").noconvert(), py::arg("first").noconvert(),
           py::arg("second").noconvert(), py::arg("ranges").noconvert(), py::arg("mask").noconvert(),
           py::arg("out").noconvert());
  py::class_<KeyBuffers>(m, "KeyBuffers")
      .def(py::init<std::vector<StridedFloats>, std::vector<StridedFloats>>(), py::arg("first").noconvert(),
           py::arg("second").noconvert());
  py::class_<BoundStack>(m, "DecoderStack")
      .def(py::init<const std::vector<std::shared_ptr<DecoderLayer>>&, std::vector<Floats>>(), py::arg("layers"),
           py::arg("norms").noconvert())
      .def("append_and_forward", &BoundStack::append_and_forward, py::arg("x").noconvert(),
           py::arg("rope_table").noconvert(), py::arg("buffers"), py::arg("lengths"), py::arg("ranges").noconvert(),
           py::arg("mask").noconvert(), py::arg("out").noconvert());
}
