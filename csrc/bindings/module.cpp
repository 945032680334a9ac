// The Python module transformers_kt._C: checks dtypes, shapes and ranges, releases the GIL, does no arithmetic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/machine.h"
#include "formats/panel_layout.h"
#include "formats/row_decoder.h"
#include "kernels/dispatch.h"
#include "kernels/look_ahead.h"
#include "layers/decoder_layer.h"
#include "layers/experts.h"
#include "layers/linear.h"
#include "layers/mla.h"
#include "layers/packed_matrix.h"
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

std::vector<float> to_vector(const std::optional<Floats>& values) {
  if (!values) return {};
  return std::vector<float>(values->data(), values->data() + values->size());
}

std::shared_ptr<PackedMatrix> make_matrix(int ggml_type, int64_t count, int64_t rows, int64_t cols) {
  return std::make_shared<PackedMatrix>(type_numbered(ggml_type).type, count, rows, cols);
}

// Whole matrices from `index` on, or rows of that matrix from `row` on.
void pack(PackedMatrix& matrix, int64_t index, const Bytes& source, int64_t row) {
  const int64_t rows = source.size() / matrix.row_bytes();
  const bool whole = row == 0 && rows > 0 && rows % matrix.rows() == 0;
  const int64_t matrices = whole ? rows / matrix.rows() : 1;
  const bool rows_fit = rows > 0 && row >= 0 && (whole || rows <= matrix.rows() - row);
  const int64_t end = whole ? matrix.rows() : rows_fit ? row + rows : 0;
  const bool in_panels = row % kPanelRows == 0 && (end % kPanelRows == 0 || end == matrix.rows());
  const bool index_fits = index >= 0 && index <= matrix.count() - matrices;
  if (!rows_fit || !in_panels || !index_fits || rows * matrix.row_bytes() != source.size()) {
    throw std::invalid_argument(
        "the source must be whole matrices of " + std::to_string(matrix.rows()) + " rows of " +
        std::to_string(matrix.row_bytes()) + " bytes, or rows of one matrix from a multiple of " +
        std::to_string(kPanelRows) + " to another or the end; got shape " + shape_text(source) + " for row " +
        std::to_string(row) + " of matrix " + std::to_string(index) + " of " + std::to_string(matrix.count()));
  }
  require_shape(source, "source bytes", {rows * matrix.row_bytes()});
  const uint8_t* data = source.data();
  const py::gil_scoped_release release;
  matrix.pack(index, matrices, {row / kPanelRows, (end + kPanelRows - 1) / kPanelRows}, data);
}

void pack_floats(PackedMatrix& matrix, const Floats& source) {
  require_shape(source, "source", {matrix.count(), matrix.rows(), matrix.cols()});
  const float* data = source.data();
  const py::gil_scoped_release release;
  matrix.pack_floats(data);
}

void linear_op(const PackedMatrix& w, const Floats& x, Floats& out) {
  const int64_t tokens = rows_of(x, "x", w.cols());
  require_shape(out, "out", {tokens, w.rows()});
  if (w.count() != 1) throw std::invalid_argument("linear takes one matrix, got " + std::to_string(w.count()));
  const float* from = x.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  linear(w, 0, from, tokens, to);
}

void rms_norm_op(const Floats& x, const Floats& weight, float eps, Floats& out) {
  const int64_t width = weight.size();
  const int64_t tokens = rows_of(x, "x", width);
  require_shape(out, "out", {tokens, width});
  const float* from = x.data();
  const float* scale = weight.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  const KernelTable& table = kernels();
  parallel_for(tokens, [&](int64_t t) { table.rms_norm(from + t * width, scale, eps, width, to + t * width); });
}

void embed_op(int ggml_type, const Bytes& data, const Int64s& ids, Floats& out) {
  const WeightTypeInfo& info = type_numbered(ggml_type);
  const int64_t tokens = ids.size();
  if (out.ndim() != 2 || out.shape(1) % info.block_elements != 0) {
    throw std::invalid_argument("out must have shape (tokens, columns in whole blocks), got " + shape_text(out));
  }
  const int64_t cols = out.shape(1);
  require_shape(out, "out", {tokens, cols});
  const int64_t bytes = row_bytes(info, cols);
  const int64_t vocabulary = data.size() / bytes;
  const int64_t* id = ids.data();
  for (int64_t t = 0; t < tokens; ++t) {
    if (id[t] >= 0 && id[t] < vocabulary) continue;
    throw py::index_error("token id " + std::to_string(id[t]) + " is not in [0, " + std::to_string(vocabulary) + ")");
  }
  const uint8_t* rows = data.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  parallel_for(tokens, [&](int64_t t) { dequantize_row(info.type, rows + id[t] * bytes, cols, to + t * cols); });
}

void dequantize_op(int ggml_type, const Bytes& data, Floats& out) {
  const WeightTypeInfo& info = type_numbered(ggml_type);
  if (out.size() % info.block_elements != 0) throw std::invalid_argument("out must hold whole blocks");
  require_shape(data, "data", {row_bytes(info, out.size())});
  dequantize_row(info.type, data.data(), out.size(), out.mutable_data());
}

void routed_experts_op(const ExpertWeights& experts, const Floats& x, const Int64s& indices, const Floats& weights,
                       Floats& out) {
  const int64_t tokens = rows_of(x, "x", experts.hidden());
  require_shape(out, "out", {tokens, experts.hidden()});
  if (indices.ndim() != 2) throw std::invalid_argument("indices must have shape (tokens, top_k)");
  const int64_t top_k = indices.shape(1);
  require_shape(indices, "indices", {tokens, top_k});
  require_shape(weights, "weights", {tokens, top_k});
  std::vector<int32_t> chosen(static_cast<size_t>(tokens * top_k));
  for (size_t i = 0; i < chosen.size(); ++i) {
    const int64_t e = indices.data()[i];
    if (e < 0 || e >= experts.count()) {
      throw py::index_error("expert " + std::to_string(e) + " is not in [0, " + std::to_string(experts.count()) + ")");
    }
    chosen[i] = static_cast<int32_t>(e);
  }
  const float* from = x.data();
  const float* scale = weights.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  run_experts(&experts, chosen.data(), scale, top_k, nullptr, from, tokens, to);
}

void mlp_op(const ExpertWeights& mlp, const Floats& x, Floats& out) {
  const int64_t tokens = rows_of(x, "x", mlp.hidden());
  require_shape(out, "out", {tokens, mlp.hidden()});
  if (mlp.count() != 1) throw std::invalid_argument("an MLP is one expert, got " + std::to_string(mlp.count()));
  const float* from = x.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  run_experts(nullptr, nullptr, nullptr, 0, &mlp, from, tokens, to);
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
  return std::make_shared<MoeBlock>(std::move(router), to_vector(bias), config, std::move(routed), std::move(shared));
}

void moe_op(const MoeBlock& moe, const Floats& x, Floats& out, Floats& logits) {
  const int64_t tokens = rows_of(x, "x", moe.hidden());
  require_shape(out, "out", {tokens, moe.hidden()});
  require_shape(logits, "logits", {tokens, moe.experts()});
  const float* from = x.data();
  float* to = out.mutable_data();
  float* scores = logits.mutable_data();
  const py::gil_scoped_release release;
  moe.forward(from, tokens, to, scores);
}

std::shared_ptr<MlaAttention> make_attention(int64_t hidden, int64_t heads, int64_t nope_dim, int64_t rope_dim,
                                             int64_t latent_dim, int64_t value_dim, float softmax_scale, float norm_eps,
                                             std::shared_ptr<PackedMatrix> q_a, const std::optional<Floats>& q_a_norm,
                                             std::shared_ptr<PackedMatrix> q, std::shared_ptr<PackedMatrix> kv_a,
                                             const Floats& kv_a_norm, std::shared_ptr<PackedMatrix> k_b,
                                             std::shared_ptr<PackedMatrix> v_b, std::shared_ptr<PackedMatrix> o) {
  AttentionWeights weights{std::move(q_a),       to_vector(q_a_norm), std::move(q),   std::move(kv_a),
                           to_vector(kv_a_norm), std::move(k_b),      std::move(v_b), std::move(o)};
  const AttentionConfig config{hidden, heads, nope_dim, rope_dim, latent_dim, value_dim, softmax_scale, norm_eps};
  return std::make_shared<MlaAttention>(config, std::move(weights));
}

// Dense rows for the keys of x, as one long sequence.
KeyRows key_rows(const AttentionConfig& c, int64_t tokens, const Floats& rope_table, Floats& latents, Floats& ropes) {
  require_shape(rope_table, "rope_table", {tokens, c.rope_dim});
  require_shape(latents, "latents", {tokens, c.latent_dim});
  require_shape(ropes, "ropes", {tokens, c.rope_dim});
  return {latents.mutable_data(), 0, c.latent_dim, ropes.mutable_data(), 0, c.rope_dim};
}

void project_keys_op(const MlaAttention& attention, const Floats& x, const Floats& rope_table, Floats& latents,
                     Floats& ropes) {
  const int64_t tokens = rows_of(x, "x", attention.config().hidden);
  const KeyRows keys = key_rows(attention.config(), tokens, rope_table, latents, ropes);
  const float* from = x.data();
  const float* table = rope_table.data();
  const py::gil_scoped_release release;
  attention.project_keys(from, table, 1, tokens, keys);
}

// Floats between rows along `axis`; a cache may be a view into a longer buffer, but its last axis is dense.
int64_t stride_of(const StridedFloats& array, const char* name, py::ssize_t axis) {
  if (array.strides(2) != static_cast<py::ssize_t>(sizeof(float)) || array.strides(axis) % sizeof(float) != 0) {
    throw std::invalid_argument(std::string(name) + " must have a dense last axis");
  }
  return array.strides(axis) / static_cast<py::ssize_t>(sizeof(float));
}

// Latents (batch, room, latent_dim) and rotary keys (batch, room, rope_dim) of one layer.
struct KeyArrays {
  int64_t batch;
  LatentCache cache;  // `length` is the room
  int64_t latent_dim;
  int64_t rope_dim;
};

KeyArrays key_arrays(const StridedFloats& latents, const StridedFloats& ropes) {
  if (latents.ndim() != 3) throw std::invalid_argument("latents must have shape (batch, keys, latent_dim)");
  require_shape(ropes, "ropes", {latents.shape(0), latents.shape(1), ropes.ndim() == 3 ? ropes.shape(2) : 0});
  return {latents.shape(0),
          {latents.data(), stride_of(latents, "latents", 0), stride_of(latents, "latents", 1), ropes.data(),
           stride_of(ropes, "ropes", 0), stride_of(ropes, "ropes", 1), latents.shape(1)},
          latents.shape(2),
          ropes.shape(2)};
}

// What attention is given besides its input, checked.
struct AttentionInputs {
  int64_t batch;
  int64_t tokens;
  LatentCache cache;
  Visibility visibility;
};

// `length` is the number of keys: the arrays may have room for more.
AttentionInputs attention_inputs(const AttentionConfig& c, const Floats& x, const Floats& rope_table,
                                 const KeyArrays& keys, int64_t length, const std::optional<Int32s>& ranges,
                                 const std::optional<Bytes>& mask, const Floats& out) {
  if (x.ndim() != 3) throw std::invalid_argument("x must have shape (batch, tokens, hidden), got " + shape_text(x));
  const int64_t batch = x.shape(0);
  const int64_t tokens = x.shape(1);
  require_shape(x, "x", {batch, tokens, c.hidden});
  require_shape(out, "out", {batch, tokens, c.hidden});
  require_shape(rope_table, "rope_table", {batch * tokens, c.rope_dim});
  if (keys.batch != batch || keys.latent_dim != c.latent_dim || keys.rope_dim != c.rope_dim || length < 0 ||
      length > keys.cache.length) {
    const auto size = [](int64_t batches, int64_t rows, int64_t latent, int64_t rope) {
      return std::to_string(batches) + " x " + std::to_string(rows) + " x " + std::to_string(latent) + " and " +
             std::to_string(rope);
    };
    throw std::invalid_argument("latents and ropes must have " + size(batch, length, c.latent_dim, c.rope_dim) +
                                " values or room for more rows, got " +
                                size(keys.batch, keys.cache.length, keys.latent_dim, keys.rope_dim));
  }
  if (ranges.has_value() == mask.has_value()) throw std::invalid_argument("give either ranges or a mask");
  if (ranges) require_shape(*ranges, "ranges", {batch, tokens, 2});
  if (mask) require_shape(*mask, "mask", {batch, tokens, length});
  AttentionInputs in{batch, tokens, keys.cache, {ranges ? ranges->data() : nullptr, mask ? mask->data() : nullptr}};
  in.cache.length = length;
  return in;
}

void attend_op(const MlaAttention& attention, const Floats& x, const Floats& rope_table, const StridedFloats& latents,
               const StridedFloats& ropes, const std::optional<Int32s>& ranges, const std::optional<Bytes>& mask,
               Floats& out) {
  const KeyArrays keys = key_arrays(latents, ropes);
  const AttentionInputs in =
      attention_inputs(attention.config(), x, rope_table, keys, keys.cache.length, ranges, mask, out);
  const float* from = x.data();
  const float* table = rope_table.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  attention.attend(from, table, in.batch, in.tokens, in.cache, in.visibility, to);
}

void layer_project_keys_op(const DecoderLayer& layer, const Floats& x, const Floats& input_norm,
                           const Floats& rope_table, Floats& latents, Floats& ropes) {
  const int64_t tokens = rows_of(x, "x", layer.config().hidden);
  require_shape(input_norm, "input_norm", {layer.config().hidden});
  const KeyRows keys = key_rows(layer.config(), tokens, rope_table, latents, ropes);
  const float* from = x.data();
  const float* norm = input_norm.data();
  const float* table = rope_table.data();
  const py::gil_scoped_release release;
  layer.project_keys(from, norm, table, 1, tokens, keys);
}

void require_norms(const DecoderLayer& layer, const Floats& input_norm, const Floats& post_norm) {
  require_shape(input_norm, "input_norm", {layer.config().hidden});
  require_shape(post_norm, "post_norm", {layer.config().hidden});
}

void layer_forward_op(const DecoderLayer& layer, const Floats& x, const Floats& input_norm, const Floats& post_norm,
                      const Floats& rope_table, const StridedFloats& latents, const StridedFloats& ropes,
                      const std::optional<Int32s>& ranges, const std::optional<Bytes>& mask, Floats& out) {
  const KeyArrays keys = key_arrays(latents, ropes);
  const AttentionInputs in =
      attention_inputs(layer.config(), x, rope_table, keys, keys.cache.length, ranges, mask, out);
  require_norms(layer, input_norm, post_norm);
  const float* from = x.data();
  const float* before = input_norm.data();
  const float* after = post_norm.data();
  const float* table = rope_table.data();
  float* to = out.mutable_data();
  const py::gil_scoped_release release;
  layer.forward(from, before, after, table, in.batch, in.tokens, in.cache, in.visibility, to);
}

// The keys of all layers of a cache, in arrays that stay where they are.
class KeyBuffers {
 public:
  KeyBuffers(std::vector<StridedFloats> latents, std::vector<StridedFloats> ropes)
      : latents_(std::move(latents)), ropes_(std::move(ropes)) {
    if (latents_.size() != ropes_.size()) throw std::invalid_argument("each layer needs latents and ropes");
    for (size_t i = 0; i < latents_.size(); ++i) {
      layers_.push_back(key_arrays(latents_[i], ropes_[i]));
      if (!latents_[i].writeable() || !ropes_[i].writeable()) throw std::invalid_argument("keys cannot be written");
    }
  }
  const std::vector<KeyArrays>& layers() const { return layers_; }

 private:
  std::vector<StridedFloats> latents_;  // keep what the pointers in layers_ point to
  std::vector<StridedFloats> ropes_;
  std::vector<KeyArrays> layers_;
};

// The last rows of a cache, for the keys of as many tokens.
KeyRows last_rows(const AttentionInputs& in) {
  const LatentCache& cache = in.cache;
  const int64_t first = cache.length - in.tokens;
  if (first < 0) {
    throw std::invalid_argument("a cache of " + std::to_string(cache.length) + " keys has no room for those of " +
                                std::to_string(in.tokens) + " tokens");
  }
  return {
      const_cast<float*>(cache.latents) + first * cache.latent_stride, cache.latent_batch_stride, cache.latent_stride,
      const_cast<float*>(cache.ropes) + first * cache.rope_stride,     cache.rope_batch_stride,   cache.rope_stride};
}

// Decoder layers that follow each other, with the weights of their norms. Decoding calls it for every token, when the
// weights have emptied the caches: what it needs lies together, apart from the Python objects it came from.
class DecoderStack {
 public:
  DecoderStack(std::vector<std::shared_ptr<DecoderLayer>> layers, std::vector<Floats> norms)
      : layers_(std::move(layers)), norms_(std::move(norms)) {
    if (layers_.empty() || norms_.size() != 2 * layers_.size()) {
      throw std::invalid_argument("each layer needs two norms");
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
      require_norms(*layers_[i], norms_[2 * i], norms_[2 * i + 1]);
      weights_.push_back(norms_[2 * i].data());
      weights_.push_back(norms_[2 * i + 1].data());
    }
  }

  void append_and_forward(const Floats& x, const Floats& rope_table, const KeyBuffers& buffers, int64_t keys,
                          const std::optional<Int32s>& ranges, const std::optional<Bytes>& mask, Floats& out) const {
    if (buffers.layers().size() != layers_.size()) throw std::invalid_argument("each layer needs a cache");
    std::vector<AttentionInputs> in;
    std::vector<KeyRows> new_keys;
    for (size_t i = 0; i < layers_.size(); ++i) {
      in.push_back(attention_inputs(layers_[i]->config(), x, rope_table, buffers.layers()[i], keys, ranges, mask, out));
      new_keys.push_back(last_rows(in[i]));
    }
    const float* from = x.data();
    const float* table = rope_table.data();
    float* to = out.mutable_data();
    const py::gil_scoped_release release;
    for (size_t i = 0; i < layers_.size(); ++i) {
      layers_[i]->append_and_forward(i == 0 ? from : to, weights_[2 * i], weights_[2 * i + 1], table, in[i].batch,
                                     in[i].tokens, new_keys[i], in[i].cache, in[i].visibility, to);
    }
  }

 private:
  std::vector<std::shared_ptr<DecoderLayer>> layers_;
  std::vector<Floats> norms_;  // keep what the pointers in weights_ point to
  std::vector<const float*> weights_;
};

void rope_table_op(const Int64s& positions, const Floats& inv_freq, float scaling, Floats& table) {
  const int64_t dim = inv_freq.size() * 2;
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

py::tuple look_ahead_names() {
  py::list names;
  for (const LookAhead how : kLookAheads) names.append(name_of(how));
  return py::tuple(names);
}

void set_look_ahead_op(const std::string& name) {
  if (name.empty()) return set_look_ahead(std::nullopt);
  for (const LookAhead how : kLookAheads) {
    if (name == name_of(how)) return set_look_ahead(how);
  }
  throw std::invalid_argument("no way of looking ahead is called " + name);
}

py::dict choose_look_ahead_op(const std::vector<std::shared_ptr<PackedMatrix>>& matrices) {
  std::vector<LookAheadSpeed> found;
  {
    const py::gil_scoped_release release;
    found = choose_look_ahead(matrices);
  }
  py::dict speeds;
  for (const LookAheadSpeed& each : found) speeds[name_of(each.how)] = each.speed;
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
    }
  });
  m.doc() = "CPU kernels of transformers_kt; use the Python modules instead of this.";

  bind_machine(m);

  m.attr("PANEL_ROWS") = kPanelRows;
  m.def("weight_types", &weight_types, "(name, ggml number, block elements, block bytes) of every type with kernels");
  m.attr("LOOK_AHEADS") = look_ahead_names();
  m.def(
      "look_ahead", [] { return name_of(look_ahead(kernels().look_ahead)); },
      "how products of few tokens see to it that weights are under way before they are needed");
  m.def("set_look_ahead", &set_look_ahead_op, py::arg("name"),
        "for tests and measurements; '' goes back to what suits the CPU's maker and the kernels");
  py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(m, "PackedMatrix")
      .def(py::init(&make_matrix), py::arg("ggml_type"), py::arg("count"), py::arg("rows"), py::arg("cols"))
      .def("pack", &pack, py::arg("index"), py::arg("source").noconvert(), py::arg("row") = 0)
      .def("pack_floats", &pack_floats, py::arg("source").noconvert())
      .def_property_readonly("type_name", [](const PackedMatrix& w) { return std::string(w.info().name); })
      .def_property_readonly("count", &PackedMatrix::count)
      .def_property_readonly("rows", &PackedMatrix::rows)
      .def_property_readonly("cols", &PackedMatrix::cols)
      .def_property_readonly("nbytes", &PackedMatrix::nbytes)
      .def_property_readonly("panels_of_nodes", [](const PackedMatrix& w) {
        std::vector<std::pair<int64_t, int64_t>> ranges;
        for (int node = 0; node < w.nodes(); ++node) {
          ranges.emplace_back(w.panels_of_node(node).first, w.panels_of_node(node).end);
        }
        return ranges;
      });

  m.def(
      "choose_look_ahead", &choose_look_ahead_op, py::arg("matrices"),
      "tries the LOOK_AHEADS and keeps the fastest: name -> times as fast as the one before; {} where it did not try");
  m.def("linear", &linear_op, py::arg("w"), py::arg("x").noconvert(), py::arg("out").noconvert());
  m.def("rms_norm", &rms_norm_op, py::arg("x").noconvert(), py::arg("weight").noconvert(), py::arg("eps"),
        py::arg("out").noconvert());
  m.def("embed", &embed_op, py::arg("ggml_type"), py::arg("data").noconvert(), py::arg("ids").noconvert(),
        py::arg("out").noconvert());
  m.def("dequantize", &dequantize_op, py::arg("ggml_type"), py::arg("data").noconvert(), py::arg("out").noconvert());
  m.def("rope_table", &rope_table_op, py::arg("positions").noconvert(), py::arg("inv_freq").noconvert(),
        py::arg("scaling"), py::arg("table").noconvert());

  py::class_<ExpertWeights, std::shared_ptr<ExpertWeights>>(m, "Experts")
      .def(py::init<std::shared_ptr<PackedMatrix>, std::shared_ptr<PackedMatrix>, std::shared_ptr<PackedMatrix>>(),
           py::arg("gate"), py::arg("up"), py::arg("down"))
      .def_property_readonly("matrices", &ExpertWeights::matrices, "gate, up, down")
      .def("forward_routed", &routed_experts_op, py::arg("x").noconvert(), py::arg("indices").noconvert(),
           py::arg("weights").noconvert(), py::arg("out").noconvert())
      .def("forward_mlp", &mlp_op, py::arg("x").noconvert(), py::arg("out").noconvert());

  py::class_<MoeBlock, std::shared_ptr<MoeBlock>>(m, "MoeBlock")
      .def(py::init(&make_moe), py::arg("router"), py::arg("bias").noconvert(), py::arg("routed"), py::arg("shared"),
           py::kw_only(), py::arg("sigmoid"), py::arg("groups"), py::arg("top_groups"), py::arg("top_k"),
           py::arg("normalize"), py::arg("scale"))
      .def_property_readonly("routed", &MoeBlock::routed)
      .def("forward", &moe_op, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("logits").noconvert());

  py::class_<MlaAttention, std::shared_ptr<MlaAttention>>(m, "MlaAttention")
      .def(py::init(&make_attention), py::kw_only(), py::arg("hidden"), py::arg("heads"), py::arg("nope_dim"),
           py::arg("rope_dim"), py::arg("latent_dim"), py::arg("value_dim"), py::arg("softmax_scale"),
           py::arg("norm_eps"), py::arg("q_a"), py::arg("q_a_norm").noconvert(), py::arg("q"), py::arg("kv_a"),
           py::arg("kv_a_norm").noconvert(), py::arg("k_b"), py::arg("v_b"), py::arg("o"))
      .def("project_keys", &project_keys_op, py::arg("x").noconvert(), py::arg("rope_table").noconvert(),
           py::arg("latents").noconvert(), py::arg("ropes").noconvert())
      .def("attend", &attend_op, py::arg("x").noconvert(), py::arg("rope_table").noconvert(),
           py::arg("latents").noconvert(), py::arg("ropes").noconvert(), py::arg("ranges").noconvert(),
           py::arg("mask").noconvert(), py::arg("out").noconvert());

  py::class_<DecoderLayer, std::shared_ptr<DecoderLayer>>(m, "DecoderLayer")
      .def(py::init<std::shared_ptr<MlaAttention>, std::shared_ptr<MoeBlock>, std::shared_ptr<ExpertWeights>, float,
                    float>(),
           py::kw_only(), py::arg("attention"), py::arg("moe"), py::arg("mlp"), py::arg("input_norm_eps"),
           py::arg("post_norm_eps"))
      .def("project_keys", &layer_project_keys_op, py::arg("x").noconvert(), py::arg("input_norm").noconvert(),
           py::arg("rope_table").noconvert(), py::arg("latents").noconvert(), py::arg("ropes").noconvert())
      .def("forward", &layer_forward_op, py::arg("x").noconvert(), py::arg("input_norm").noconvert(),
           py::arg("post_norm").noconvert(), py::arg("rope_table").noconvert(), py::arg("latents").noconvert(),
           py::arg("ropes").noconvert(), py::arg("ranges").noconvert(), py::arg("mask").noconvert(),
           py::arg("out").noconvert());
  py::class_<KeyBuffers>(m, "KeyBuffers")
      .def(py::init<std::vector<StridedFloats>, std::vector<StridedFloats>>(), py::arg("latents"), py::arg("ropes"));
  py::class_<DecoderStack>(m, "DecoderStack")
      .def(py::init<std::vector<std::shared_ptr<DecoderLayer>>, std::vector<Floats>>(), py::arg("layers"),
           py::arg("norms"))
      .def("append_and_forward", &DecoderStack::append_and_forward, py::arg("x").noconvert(),
           py::arg("rope_table").noconvert(), py::arg("buffers"), py::arg("keys"), py::arg("ranges").noconvert(),
           py::arg("mask").noconvert(), py::arg("out").noconvert());
}
