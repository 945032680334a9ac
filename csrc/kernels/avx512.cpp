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
  static constexpr bool kAddsIn16Bits = true;
  TKT_INLINE I pair_products(I w, I a) { return _mm512_maddubs_epi16(w, a); }
  TKT_INLINE I add_pairs(I a, I b) { return _mm512_add_epi16(a, b); }
  TKT_INLINE I widen_pairs(I a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
  // Weights up to 255, whose pair products would saturate in 16 bits: even and odd bytes as 16-bit products.
  TKT_INLINE I dot4_wide(I acc, I w, I a) {
    const I even_w = _mm512_and_si512(w, _mm512_set1_epi16(0xff));
    const I even_a = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even_w, even_a));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8)));
  }
};

#include "panel_dot-inl.h"
#include "vector_ops-inl.h"

}  // namespace

#include "table-inl.h"

}  // namespace tkt::avx512
