// AVX2: the primitives of its kernels. Included first by each file of this instruction set.

#include <immintrin.h>

#include "formats/four_bit_values.h"
#include "formats/grid_rows.h"
#include "formats/unpack_rows.h"
#include "kernels/exp_constants.h"
#include "kernels/kernel_table.h"
#include "kernels/macros-inl.h"
#include "machine/cpu_features.h"

#define TKT_ISA_NAME "avx2"
#define TKT_ISA_FEATURES (kAvx2 | kFma | kF16c)

namespace tkt::avx2 {
namespace {

#include "kernels/avx2_primitives-inl.h"

struct V : Avx2Primitives {
  static constexpr bool kAddsIn16Bits = true;
  // One core of Zen 3, 12 and 48 tokens: Q4_K 4 and 6% faster, Q5_K 0 and 5, Q6_K 5 and 10. One token, weights from
  // memory, two cores: Q4_K 2% and Q5_K 1% faster.
  static constexpr bool kFoldsScales = true;
  // Likewise Q5_0 15 and 29% faster, Q4_0 1 and 10. Not Q8_0, whose bytes need no unpacking: 9 and 4% slower.
  static constexpr bool kUnpacks32Wide = true;
  TKT_INLINE I pair_products(I w, I a) {
    return {_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high)};
  }
  // gcc regroups long sums of integers into trees, whose many leaves then wait in memory; an empty asm keeps them
  // chains. Sums of pairs of Q4_K: 189 stack accesses in a tile instead of 981, 272 GOPS instead of 202 on one core of
  // Zen 5; Q4_0 297 instead of 220.
  TKT_INLINE I chained(I sum) {
    __asm__("" : "+x"(sum.low), "+x"(sum.high));
    return sum;
  }
  TKT_INLINE I add_pairs(I a, I b) {
    return chained({_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)});
  }
  // Likewise, but signed and times 2^kLog2.
  template <int low, int high, int kLog2>
  TKT_INLINE I signed_byte_pair(I a) {
    const I upper = bytes_of_lanes(a, 0x00800080u | low << 8 | high << 24);
    return {_mm256_srai_epi16(upper.low, 8 - kLog2), _mm256_srai_epi16(upper.high, 8 - kLog2)};
  }
  // Weights from -128 to 127: magnitudes (-128 has 128, as an unsigned byte) times activations that take over the sign.
  // 2 * 128 * 127 fits in 16 bits. Q8_0: 188 GOPS; 136 with even and odd bytes as products of 16 bits.
  TKT_INLINE __m256i dot4_signed_8(__m256i acc, __m256i w, __m256i a, __m256i factors) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, factors));
    __asm__("" : "+x"(acc));
    return acc;
  }
  TKT_INLINE I dot4_signed(I acc, I w, I a, I factors) {
    return {dot4_signed_8(acc.low, w.low, a.low, factors.low), dot4_signed_8(acc.high, w.high, a.high, factors.high)};
  }
};

}  // namespace
}  // namespace tkt::avx2
