// What an ISA must provide. Kernels see raw pointers; all checks stand above (bindings.cpp).
//
// Exactness: every function gives the same bits on every ISA. The order of floating-point work is stated at each entry;
// kernels/scalar.cpp is that statement as plain loops.
#pragma once

#include <cstdint>

#include "formats/block_formats.h"
#include "kernels/prefetch.h"

namespace tkt {

// Keys that one attention split covers. Fixed, because it decides the order of additions.
constexpr int kAttentionSplitKeys = 128;

// Groups of 16 query heads that go over a split together at most.
constexpr int kAttentionGroups = 4;

// Dot products of 16 or 32 weight rows with `tokens` activation rows.
struct DotArgs {
  const uint8_t* panels[2];           // packed panels; [1] is used where panel_count == 2
  int panel_count;                    // 1 or 2
  int64_t blocks;                     // per row
  const uint8_t* const* activations;  // [tokens] rows in the type's ActivationFormat
  int tokens;
  float* out;         // [tokens][32]: panel 0 in 0..15, panel 1 in 16..31
  Prefetch prefetch;  // for small batches
};

// Dot products of all rows of neighbouring panels with one activation row.
struct GemvArgs {
  const uint8_t* panels;
  int64_t panel_count;
  int64_t panel_bytes;
  int64_t blocks;              // per row
  const uint8_t* activations;  // in the type's ActivationFormat
  float* out;                  // [panel_count * 16]
  Prefetch prefetch;
};

// One split of MLA attention for groups of up to 16 query heads of one token, lane = head. Groups may be of different
// tokens that see the same keys from the first on, some fewer than others.
struct AttentionSplitArgs {
  int groups;                         // 1..kAttentionGroups
  const float* query;                 // [groups][latent_dim + rope_dim][16], already times the softmax scale
  const int* keys;                    // [groups] 1..kAttentionSplitKeys: how many of the rows a group sees
  const float* const* latents;        // rows of latent_dim floats
  const float* const* ropes;          // rows of rope_dim floats
  const float* const* latents_ahead;  // [keys_ahead] rows that this thread will want next, or none
  const float* const* ropes_ahead;
  int keys_ahead;
  int latent_dim;
  int rope_dim;
  float* scores;   // [groups][kAttentionSplitKeys][16]
  float* weights;  // scratch like scores; may be the same
  float* states;   // out [groups][attention_state_floats(latent_dim)]
};

// Softmax state of 16 heads: max[16], the largest score; sum[16], of exp(score - max); context[16][latent_dim], the sum
// of exp(score - max) * latent.
constexpr int64_t attention_state_floats(int64_t latent_dim) { return 16 * (2 + latent_dim); }

struct KernelTable {
  const char* name;            // "scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni"
  uint32_t required_features;  // CpuFeature bits

  // Integer products are exact; a_j is the activation block of 32 that sub-block j meets, d_j its scale.
  // K-quants and IQ4_XS, per block: S = 0; for each j: S = fma(float(P_j), d_j, S), where P_j is sc[j] * dot(q_j, a_j),
  // for Q2_K, Q3_K and Q6_K the sum of its two sub-blocks of 16 in a_j; acc = fma(d, S, acc). Q4_K and Q5_K also:
  // M = 0; M = fma(m[j], d_sum_j, M); acc = fma(-dmin, M, acc). Q2_K likewise, with two minima in a_j:
  // M = fma(m0 * sum0 + m1 * sum1, d_j, M).
  // Types whose blocks stand whole in a panel, per block of n activation blocks of 32: S as above over n blocks, where
  // P_j is fma(p1, s1, p0 * s0) of the products p and scales s of 16 columns each, as floats, which makes no difference
  // where those are integers; acc = fma(d, S, acc).
  // Other 32-wide types, per block: acc = fma(d * d_j, float(dot(q, a_j)), acc). Q4_1 and Q5_1 then also: acc = fma(m,
  // d_sum_j, acc). Float types: acc = fma(w, x, acc), column by column.
  void (*dot[kWeightTypes])(const DotArgs& args);

  // The same numbers. One call for a long stretch of memory: what a core does between two panels, be it 50 ns, it does
  // not ask memory for weights.
  void (*gemv[kWeightTypes])(const GemvArgs& args);

  // d = amax / 127, q = round-to-nearest-even(x * (127 / amax)); all zero where amax < 1e-30 (127 / amax overflows).
  // A block with a value that is not finite has q = 0 and d = NaN, so that every product with it is NaN.
  void (*quantize_q8)(const float* x, int64_t cols, uint8_t* row);

  // out = weight * (x * (1 / sqrt(sum(x^2) / n + eps))). Squares are summed in 16 lanes (element i in lane i % 16) by
  // fma, lanes by a tree: l += l + 8, l += l + 4, l += l + 2, l += l + 1. x and out may be the same.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);

  // out = (gate / (1 + exp(-gate))) * up
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* out);

  // out = exp(x - offset), by the polynomial of kernels/exp_constants.h; NaN where x is NaN
  void (*exp_minus)(const float* x, float offset, int64_t n, float* out);

  // out = fma(scale, x, out)
  void (*add_scaled)(const float* x, float scale, int64_t n, float* out);

  // score = fma over latent_dim, then rope_dim, in order.
  void (*score_split)(const AttentionSplitArgs& args);

  // weight = exp(score - max); columns [first, end) of the context, keys summed in order. `first` is a multiple of 16,
  // `end` too or latent_dim. Max and sum are written by the call that has the first column.
  void (*sum_split)(const AttentionSplitArgs& args, int first, int end);

  // Merges heads [first, first + count) of a split into a state whose context has no others:
  // m' = max(m, sm); a = exp(m - m'), b = exp(sm - m'); s = fma(ss, b, s * a), likewise the context.
  void (*merge_split)(const float* split, int latent_dim, int first, int count, float* state);
};

namespace scalar {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx_vnni {  // only where TKT_HAS_AVX_VNNI is defined: older compilers do not know it
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const KernelTable kTable;
}
#endif

}  // namespace tkt
