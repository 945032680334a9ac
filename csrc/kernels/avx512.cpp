#include <immintrin.h>

#include "../cpu_features.h"
#include "../kernel_table.h"
#include "exp_constants.h"
#include "macros-inl.h"

#define TKT_ISA_NAME "avx512"
#define TKT_ISA_FEATURES (kAvx2 | kFma | kF16c | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl)

namespace tkt::avx512 {
namespace {

#include "avx512_primitives-inl.h"

struct V : Avx512Primitives {
  // vpmaddubsw adds byte products pairwise in 16 bits. Up to 6-bit weights: 2 * 63 * 127 = 16,002, no saturation. Full
  // bytes (0..255) would saturate: their even and odd bytes go through 16-bit products instead.
  template <bool kFullByte>
  TKT_INLINE I dot4(I acc, I weights, I activations) {
    if constexpr (kFullByte) {
      const I even_w = _mm512_and_si512(weights, _mm512_set1_epi16(0xff));
      const I odd_w = _mm512_srli_epi16(weights, 8);
      const I even_a = _mm512_srai_epi16(_mm512_slli_epi16(activations, 8), 8);
      const I odd_a = _mm512_srai_epi16(activations, 8);
      acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even_w, even_a));
      return _mm512_add_epi32(acc, _mm512_madd_epi16(odd_w, odd_a));
    }
    const I pairs = _mm512_maddubs_epi16(weights, activations);
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

#include "panel_dot-inl.h"
#include "vector_ops-inl.h"

}  // namespace

#include "table-inl.h"

}  // namespace tkt::avx512
