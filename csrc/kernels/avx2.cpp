#include "kernels/avx2-inl.h"

namespace tkt::avx2 {
namespace {
#include "kernels/vector_ops-inl.h"
}

#include "kernels/table-inl.h"

}  // namespace tkt::avx2
