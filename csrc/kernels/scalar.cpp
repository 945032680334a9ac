// The oracle: every entry of the kernel table as plain loops, sharing nothing with the vector code but the block
// formats and the constants of exp. Rows are taken back out of their panel and decoded as ggml defines them.

#include <cmath>
#include <cstring>

#include "formats/f16.h"
#include "formats/panel_layout.h"
#include "formats/row_decoder.h"
#include "formats/unpack_rows.h"
#include "kernels/exp_constants.h"
#include "kernels/kernel_table.h"

namespace tkt::scalar {
namespace {

int sum_of_products(const int8_t* weights, const int8_t* activations, int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += weights[i] * activations[i];
  return sum;
}

int sum_of(const int8_t* values, int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += values[i];
  return sum;
}

// `product` of sub-blocks of 16 or 32 columns in the activation block of 32 that starts at `column`, times their
// scales.
float scaled_products(const DecodedBlock& w, int column, const ActivationQ8& a) {
  float sum = 0.0f;
  const int columns = w.sub_columns < 32 ? w.sub_columns : 32;
  for (int i = 0; i < 32; i += columns) {
    const float product = static_cast<float>(sum_of_products(w.q + column + i, a.q + i, columns));
    const float scale = w.scale[(column + i) / w.sub_columns];
    sum = i == 0 ? product * scale : std::fma(product, scale, sum);
  }
  return sum;
}

float add_k_quant(const DecodedBlock& w, const ActivationQ8* a, bool minima_too, float acc) {
  float scaled = 0.0f;
  float minima = 0.0f;
  for (int block = 0; block < 8; ++block) {
    scaled = std::fma(scaled_products(w, block * 32, a[block]), a[block].d, scaled);
    if (!minima_too) continue;
    if (w.sub_columns == 32) {
      minima = std::fma(w.min[block], a[block].d_sum, minima);
    } else {
      float of_both = 0.0f;
      for (int i = 0; i < 2; ++i) of_both += w.min[2 * block + i] * static_cast<float>(a[block].neg_sum16[i]);
      minima = std::fma(-of_both, a[block].d, minima);
    }
  }
  acc = std::fma(w.d, scaled, acc);
  return minima_too ? std::fma(-w.dmin, minima, acc) : acc;
}

float add_32(const DecodedBlock& w, const ActivationQ8& a, bool minimum_too, float acc) {
  acc = std::fma(w.d * a.d, static_cast<float>(sum_of_products(w.q, a.q, 32)), acc);
  return minimum_too ? std::fma(-w.dmin, a.d_sum, acc) : acc;
}

// As kernel_table.h has it for types whose blocks stand whole in a panel.
float add_whole_block(const DecodedBlock& w, const ActivationQ8* a, int blocks, float acc) {
  float scaled = 0.0f;
  for (int block = 0; block < blocks; ++block) {
    scaled = std::fma(scaled_products(w, block * 32, a[block]), a[block].d, scaled);
  }
  return std::fma(w.d, scaled, acc);
}

float dot_row(WeightType type, const uint8_t* panel, int64_t blocks, int lane, const uint8_t* activations) {
  const WeightTypeInfo& info = info_of(type);
  float acc = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t block[kMostBlockBytes];
    read_block(info, panel, blocks, b, lane, block);
    if (info.activation == ActivationFormat::kF32) {
      acc = std::fma(decode_float(type, block), reinterpret_cast<const float*>(activations)[b], acc);
      continue;
    }
    const ActivationQ8* a = reinterpret_cast<const ActivationQ8*>(activations) + b * info.block_elements / 32;
    DecodedBlock w;
    decode_block(type, block, w);
    acc = info.whole_blocks()          ? add_whole_block(w, a, info.block_elements / 32, acc)
          : info.block_elements == 256 ? add_k_quant(w, a, has_minima(type), acc)
                                       : add_32(w, *a, has_minima(type), acc);
  }
  return acc;
}

template <WeightType type>
void dot(const DotArgs& args) {
  for (int token = 0; token < args.tokens; ++token) {
    for (int p = 0; p < args.panel_count; ++p) {
      for (int lane = 0; lane < kPanelRows; ++lane) {
        args.out[token * 32 + p * 16 + lane] =
            dot_row(type, args.panels[p], args.blocks, lane, args.activations[token]);
      }
    }
  }
}

template <WeightType type>
void gemv(const GemvArgs& args) {
  for (int64_t p = 0; p < args.panel_count; ++p) {
    const uint8_t* panel = args.panels + p * args.panel_bytes;
    for (int lane = 0; lane < kPanelRows; ++lane) {
      args.out[p * 16 + lane] = dot_row(type, panel, args.blocks, lane, args.activations);
    }
  }
}

float exp_polynomial(float x) {
  if (std::isnan(x)) return x;
  x = std::fmin(std::fmax(x, kExpMin), kExpMax);
  const float n = std::nearbyint(x * kLog2e);
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float p = kExpPoly[0];
  for (int i = 1; i < 6; ++i) p = std::fma(p, r, kExpPoly[i]);
  const float y = std::fma(p, r * r, r) + 1.0f;
  return y * float_from_bits(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
}

float quantize(const float* x, int n, int8_t* q) {
  float amax = 0.0f;
  bool is_finite = true;
  for (int i = 0; i < n; ++i) {
    amax = std::fmax(amax, std::fabs(x[i]));
    is_finite = is_finite && std::isfinite(x[i]);
  }
  if (!is_finite || amax < kSmallestAmax) {
    std::memset(q, 0, static_cast<size_t>(n));
    return is_finite ? 0.0f : NAN;
  }
  const float inverse = 127.0f / amax;
  for (int i = 0; i < n; ++i) q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
  return amax / 127.0f;
}

void quantize_q8(const float* x, int64_t cols, uint8_t* row) {
  ActivationQ8* blocks = reinterpret_cast<ActivationQ8*>(row);
  for (int64_t b = 0; b < cols / 32; ++b) {
    ActivationQ8& block = blocks[b];
    block.d = quantize(x + b * 32, 32, block.q);
    block.neg_sum16[0] = -sum_of(block.q, 16);
    block.neg_sum16[1] = -sum_of(block.q + 16, 16);
    block.neg_sum = block.neg_sum16[0] + block.neg_sum16[1];
    block.d_sum = block.d * static_cast<float>(-block.neg_sum);
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  float lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] = std::fma(x[i], x[i], lane[i % 16]);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  }
  const float scale = 1.0f / std::sqrt(lane[0] / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * scale);
}

void swiglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exp_polynomial(0.0f - gate[i])) * up[i];
}

void exp_minus(const float* x, float offset, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp_polynomial(x[i] - offset);
}

void add_scaled(const float* x, float scale, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::fma(scale, x[i], out[i]);
}

void score_split(const AttentionSplitArgs& args) {
  for (int group = 0; group < args.groups; ++group) {
    const float* queries = args.query + group * (args.latent_dim + args.rope_dim) * 16;
    for (int key = 0; key < args.keys[group]; ++key) {
      for (int lane = 0; lane < 16; ++lane) {
        float score = 0.0f;
        const float* query = queries + lane;
        for (int i = 0; i < args.latent_dim; ++i) score = std::fma(query[i * 16], args.latents[key][i], score);
        query += args.latent_dim * 16;
        for (int i = 0; i < args.rope_dim; ++i) score = std::fma(query[i * 16], args.ropes[key][i], score);
        args.scores[(group * kAttentionSplitKeys + key) * 16 + lane] = score;
      }
    }
  }
}

void sum_split(const AttentionSplitArgs& args, int first, int end) {
  for (int group = 0; group < args.groups; ++group) {
    const int keys = args.keys[group];
    float* state = args.states + group * attention_state_floats(args.latent_dim);
    for (int lane = 0; lane < 16; ++lane) {
      const float* scores = args.scores + group * kAttentionSplitKeys * 16 + lane;
      float* weights = args.weights + group * kAttentionSplitKeys * 16 + lane;
      float max = -INFINITY;
      for (int key = 0; key < keys; ++key) max = std::fmax(max, scores[key * 16]);
      float sum = 0.0f;
      for (int key = 0; key < keys; ++key) {
        weights[key * 16] = exp_polynomial(scores[key * 16] - max);
        sum = sum + weights[key * 16];
      }
      if (first == 0) {
        state[lane] = max;
        state[16 + lane] = sum;
      }
      for (int i = first; i < end; ++i) {
        float acc = 0.0f;
        for (int key = 0; key < keys; ++key) acc = std::fma(weights[key * 16], args.latents[key][i], acc);
        state[32 + lane * args.latent_dim + i] = acc;
      }
    }
  }
}

void merge_split(const float* split, int latent_dim, int first, int count, float* state) {
  for (int lane = 0; lane < 16; ++lane) {
    const float new_max = std::fmax(state[lane], split[lane]);
    const float keep = exp_polynomial(state[lane] - new_max);
    const float add = exp_polynomial(split[lane] - new_max);
    state[lane] = new_max;
    state[16 + lane] = std::fma(split[16 + lane], add, state[16 + lane] * keep);
    if (lane < first || lane >= first + count) continue;
    for (int i = 0; i < latent_dim; ++i) {
      float& value = state[32 + (lane - first) * latent_dim + i];
      value = std::fma(split[32 + lane * latent_dim + i], add, value * keep);
    }
  }
}

}  // namespace

#define TKT_DOT(name) dot<WeightType::k##name>,
#define TKT_GEMV(name) gemv<WeightType::k##name>,
extern const KernelTable kTable = {
    "scalar",
    0,
    {TKT_WEIGHT_TYPES(TKT_DOT)},
    {TKT_WEIGHT_TYPES(TKT_GEMV)},
    quantize_q8,
    rms_norm,
    swiglu,
    exp_minus,
    add_scaled,
    score_split,
    sum_split,
    merge_split,
};

}  // namespace tkt::scalar
