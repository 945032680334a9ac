#include "kernels/avx512-inl.h"

namespace tkt::avx512 {
namespace {
#include "kernels/vector_ops-inl.h"
}

#include "kernels/table-inl.h"

}  // namespace tkt::avx512
