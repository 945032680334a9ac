// AVX-512: the primitives of its kernels. Included first by each file of this instruction set.

#include <immintrin.h>

#include "formats/four_bit_values.h"
#include "formats/grid_rows.h"
#include "formats/unpack_rows.h"
#include "kernels/exp_constants.h"
#include "kernels/kernel_table.h"
#include "kernels/macros-inl.h"
#include "machine/cpu_features.h"

#define TKT_ISA_NAME "avx512"
#define TKT_ISA_FEATURES (kAvx2 | kFma | kF16c | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl)

namespace tkt::avx512 {
namespace {

#include "kernels/avx512_primitives-inl.h"

struct V : Avx512Primitives {
  static constexpr bool kAddsIn16Bits = true;
  static constexpr bool kFoldsScales = false;
  static constexpr bool kUnpacks32Wide = false;
  TKT_INLINE I pair_products(I w, I a) { return _mm512_maddubs_epi16(w, a); }
  // As in avx2.cpp: on one core of Zen 5, Q4_0 is computed at 580 GOPS instead of 372, Q4_K at 466 instead of 341.
  TKT_INLINE I add_pairs(I a, I b) {
    I sum = _mm512_add_epi16(a, b);
    __asm__("" : "+v"(sum));
    return sum;
  }
  // As in avx2.cpp; there is no vpsignb, and a weight of 0 needs no sign.
  TKT_INLINE I dot4_signed(I acc, I w, I a, I factors) {
    const I signed_a = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(w), _mm512_setzero_si512(), a);
    return _mm512_add_epi32(acc, widen_pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_a), factors));
  }
};

}  // namespace
}  // namespace tkt::avx512
