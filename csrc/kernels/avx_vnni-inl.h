// AVX-VNNI: the primitives of its kernels. Included first by each file of this instruction set.

#include <immintrin.h>

#include "formats/four_bit_values.h"
#include "formats/grid_rows.h"
#include "formats/unpack_rows.h"
#include "kernels/exp_constants.h"
#include "kernels/kernel_table.h"
#include "kernels/macros-inl.h"
#include "machine/cpu_features.h"

#define TKT_ISA_NAME "avx_vnni"
#define TKT_ISA_FEATURES (kAvx2 | kFma | kF16c | kAvxvnni)

namespace tkt::avx_vnni {
namespace {

#include "kernels/avx2_primitives-inl.h"

struct V : Avx2Primitives {
  static constexpr bool kAddsIn16Bits = false;
  static constexpr bool kFoldsScales = false;
  static constexpr bool kUnpacks32Wide = false;
  // acc + sum over 4 bytes of unsigned weight * signed activation, exact in 32 bits.
  TKT_INLINE I dot4(I acc, I w, I a) {
    return {_mm256_dpbusd_avx_epi32(acc.low, w.low, a.low), _mm256_dpbusd_avx_epi32(acc.high, w.high, a.high)};
  }
};

}  // namespace
}  // namespace tkt::avx_vnni
