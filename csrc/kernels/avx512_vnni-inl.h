// AVX-512 with VNNI: the primitives of its kernels. Included first by each file of this instruction set.

#include <immintrin.h>

#include "formats/four_bit_values.h"
#include "formats/grid_rows.h"
#include "formats/unpack_rows.h"
#include "kernels/exp_constants.h"
#include "kernels/kernel_table.h"
#include "kernels/macros-inl.h"
#include "machine/cpu_features.h"

#define TKT_ISA_NAME "avx512_vnni"
#define TKT_ISA_FEATURES (kAvx2 | kFma | kF16c | kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl | kAvx512vnni)

namespace tkt::avx512_vnni {
namespace {

#include "kernels/avx512_primitives-inl.h"

struct V : Avx512Primitives {
  static constexpr bool kAddsIn16Bits = false;
  static constexpr bool kFoldsScales = false;
  static constexpr bool kUnpacks32Wide = false;
  // acc + sum over 4 bytes of unsigned weight * signed activation, exact in 32 bits.
  TKT_INLINE I dot4(I acc, I weights, I activations) { return _mm512_dpbusd_epi32(acc, weights, activations); }
};

}  // namespace
}  // namespace tkt::avx512_vnni
